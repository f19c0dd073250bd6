"""A plan's manifest: what it was built from and what it is good for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trirank_build.artefacts import file_digest
from trirank_build.errors import BadModel


@dataclass(frozen=True)
class PlanManifest:
    """Attributes:
    flavour: ``tensorrt`` or ``tensorrt_rtx``; a plan runs in nothing but its own.
    version: of that library; a plan runs in nothing but its own.
    sm: the GPU architecture, ``sm86``.
    cuda: major version that the library was made for; "unknown" where its package does not say.
    flags: names of the builder's flags.
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

    @property
    def compute_capability(self) -> str:
        """As Triton writes it: ``8.6``."""
        digits = self.sm.removeprefix("sm")
        return f"{digits[:-1]}.{digits[-1]}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


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
