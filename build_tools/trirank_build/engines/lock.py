"""`engines.lock.toml`: which plans a folder holds, and all that each depends on.

A plan is known by its key: the graph, the library and its version, the architecture, CUDA, the profiles, the flags. A
build whose key is in the lock, beside a plan that is still what was built, is not done again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from trirank_build.artefacts import atomic_file
from trirank_build.engines.plan import PlanManifest, load_plan_manifest
from trirank_build.errors import BadModel

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOCK = "engines.lock.toml"


@dataclass(frozen=True)
class PlanKey:
    """All that a plan depends on; see PlanManifest for the fields."""

    onnx: str
    flavour: str
    version: str
    sm: str
    cuda: str
    profiles: list[dict[str, int]]
    flags: list[str]
    workspace_bytes: int
    hardware_compatibility: str = "none"

    @property
    def digest(self) -> str:
        """SHA-256 over all fields."""
        return hashlib.sha256(json.dumps(self.__dict__, sort_keys=True).encode()).hexdigest()

    def differences(self, other: PlanKey) -> list[str]:
        """In words, the fields in which two keys differ."""
        return [
            f"{name} is {getattr(self, name)!r}, not {getattr(other, name)!r}"
            for name in PlanKey.__dataclass_fields__
            if getattr(self, name) != getattr(other, name)
        ]


def key_of(manifest: PlanManifest) -> PlanKey:
    """What a plan was built for."""
    fields = PlanKey.__dataclass_fields__
    return PlanKey(**{name: getattr(manifest, name) for name in fields})


def read_lock(folder: Path) -> dict[str, dict[str, Any]]:
    """File of each plan → its entry; empty without a lock.

    Raises:
        BadModel: the lock is damaged.
    """
    path = folder / LOCK
    if not path.is_file():
        return {}
    try:
        return {entry["file"]: entry for entry in tomllib.loads(path.read_text())["plan"]}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise BadModel(f"{path} is damaged ({error}); delete it and build again") from error


def locked(plan: Path, key: PlanKey) -> PlanManifest | None:
    """The manifest of a plan that is there already, built for this very key and unchanged since."""
    entry = read_lock(plan.parent).get(plan.name)
    if entry is None or entry["key"] != key.digest:
        return None
    try:
        manifest = load_plan_manifest(plan)
    except BadModel:  # gone or changed: it is built again
        return None
    return manifest if manifest.plan == entry["plan"] and key_of(manifest) == key else None


def lock(plan: Path, manifest: PlanManifest) -> None:
    """Enter a plan."""
    entries = read_lock(plan.parent)
    key = key_of(manifest)
    entries[plan.name] = {"file": plan.name, "key": key.digest, "plan": manifest.plan, **key.__dict__}
    with atomic_file(plan.parent / LOCK) as scratch:
        scratch.write_text(
            "# Written by `trirank engine build`.\n"
            + tomli_w.dumps({"plan": [entries[name] for name in sorted(entries)]})
        )
