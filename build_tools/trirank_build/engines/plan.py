"""A plan's manifest: what it was built from and what it is good for."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trirank_build.artefacts import file_digest
from trirank_build.errors import BadModel

_AMPERE = 80


@dataclass(frozen=True)
class PlanManifest:
    """Attributes:
    flavour: ``tensorrt`` or ``tensorrt_rtx``; a plan runs in nothing but its own.
    version: of that library; a plan runs in nothing but its own.
    sm: the GPU architecture, ``sm86``.
    cuda: major version that the library was made for; "unknown" where its package does not say.
    flags: names of the builder's flags.
    hardware_compatibility: ``none``, ``ampere_plus`` or ``same_compute_capability``: GPUs that the plan runs on beside
        its own.
    workspace_bytes: most memory that a layer may use.
    onnx, plan: SHA-256 of the graph it came from and of the plan itself.
    profiles: one a bucket: bucket, min_batch, opt_batch, max_batch.
    """

    flavour: str
    version: str
    sm: str
    onnx: str
    plan: str
    profiles: list[dict[str, int]]
    cuda: str
    flags: list[str]
    workspace_bytes: int
    hardware_compatibility: str = "none"

    @property
    def compute_capability(self) -> str:
        """As Triton writes it: ``8.6``."""
        return compute_capability(self.sm)

    def runs_on(self, sm: str) -> bool:
        """Whether it was built for a GPU of this architecture."""
        if self.hardware_compatibility == "ampere_plus":
            return sm_number(sm) >= _AMPERE
        return sm == self.sm

    def same_version(self, version: str) -> bool:
        """Whether a library of this version runs it: its own, or with VERSION_COMPATIBLE one of the same major."""
        if "VERSION_COMPATIBLE" in self.flags:
            return version.split(".")[0] == self.version.split(".")[0]
        # Packages say 10.8.0, containers 10.8.0.43: what both say has to agree.
        own, other = self.version.split("."), version.split(".")
        length = min(len(own), len(other))
        return own[:length] == other[:length]

    @property
    def stripped(self) -> bool:
        """Whether the weights were left out, to be put in again from the graph on the machine that serves."""
        return "STRIP_PLAN" in self.flags

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def sm_name(target: str) -> str:
    """``sm86`` of what people write: 86, 8.6 or sm86.

    Raises:
        BadModel: this is no architecture.
    """
    match = re.fullmatch(r"(?:sm)?(\d+)\.?(\d)", target.strip().lower())
    if not match or len(match[1]) > 2:
        raise BadModel(f"--sm {target} is no GPU architecture; write 86 or sm86")
    return f"sm{match[1]}{match[2]}"


def compute_capability(sm: str) -> str:
    """``8.6`` of ``sm86``."""
    digits = sm.removeprefix("sm")
    return f"{digits[:-1]}.{digits[-1]}"


def sm_number(sm: str) -> int:
    """86 of ``sm86``."""
    return int(sm.removeprefix("sm"))


def manifest_path(plan: Path) -> Path:
    """Beside its plan."""
    return plan.with_suffix(".plan.json")


def load_plan_manifest(plan: Path) -> PlanManifest:
    """The manifest of a plan that is still what was built.

    Raises:
        BadModel: the plan or its manifest is missing, or the plan has changed.
    """
    path = manifest_path(plan)
    try:
        manifest = PlanManifest(**json.loads(path.read_text()))
        digest = file_digest(plan)
    except (OSError, ValueError, TypeError) as error:
        raise BadModel(
            f"{plan} has no readable manifest {path.name} ({error}); build it with `trirank engine build`"
        ) from error
    if digest != manifest.plan:
        raise BadModel(f"{plan} has digest {digest[:12]}, its manifest says {manifest.plan[:12]}; build it again")
    return manifest
