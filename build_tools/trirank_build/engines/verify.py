"""`trirank engine verify`: whether a plan is what it says, and of what it should be. Every field that differs is
named."""

from __future__ import annotations

import importlib
from pathlib import Path

from trirank_build.artefacts import file_digest
from trirank_build.engines.lock import PlanKey, key_of, read_lock
from trirank_build.engines.plan import load_plan_manifest
from trirank_build.errors import BadModel


def plans_of(place: Path) -> list[Path]:
    """The plans of a folder, or the one plan that was given.

    Raises:
        BadModel: there is none.
    """
    found = sorted(place.glob("*.plan")) if place.is_dir() else [place] if place.is_file() else []
    if not found:
        raise BadModel(f"{place} holds no plan; build one with `trirank engine build`")
    return found


def verify(plan: Path, onnx: Path | None = None) -> list[str]:
    """What is wrong with a plan; nothing is a good answer.

    Args:
        onnx: the graph that it should come from.
    """
    try:
        manifest = load_plan_manifest(plan)
    except BadModel as error:
        return [str(error)]
    problems = []
    if plan.stem.startswith("sm") and plan.stem != manifest.sm:
        problems.append(
            f"sm is {manifest.sm}, the file is named {plan.name}; a plan runs on its own architecture alone"
        )
    entry = read_lock(plan.parent).get(plan.name)
    if entry is None:
        problems.append(f"the lock does not know {plan.name}; build it here")
    else:
        wanted = PlanKey(**{name: entry[name] for name in PlanKey.__dataclass_fields__})
        problems += [f"{difference} as the lock says" for difference in key_of(manifest).differences(wanted)]
        if entry["plan"] != manifest.plan:
            problems.append(f"plan is {manifest.plan[:12]}, not {entry['plan'][:12]} as the lock says")
    if onnx is not None and (digest := file_digest(onnx)) != manifest.onnx:
        problems.append(f"onnx is {manifest.onnx[:12]}, not {digest[:12]} as {onnx} has")
    installed = _installed(manifest.flavour)
    if installed is not None and installed != manifest.version:
        problems.append(f"version is {manifest.version}, not {installed} as installed here; build it again")
    return problems


def _installed(flavour: str) -> str | None:
    """The library's version, where it is installed."""
    try:
        return str(importlib.import_module(flavour).__version__)
    except ImportError:
        return None
