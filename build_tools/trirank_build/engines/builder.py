"""`trirank engine build`: which plans are wanted, which are there already, which are to be built.

TensorRT-RTX builds for a named architecture on a machine without a GPU; TensorRT builds for the GPU it runs on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from trirank import contract
from trirank_backend.features import FeatureSpec

from trirank_build.artefacts import atomic_file, file_digest
from trirank_build.engines.lock import PlanKey, lock, locked
from trirank_build.engines.machine import present_sms
from trirank_build.engines.network import (
    HARDWARE_COMPATIBILITY,
    TIMING_CACHE,
    build_network,
    can_build_for,
    cuda_version,
    library,
)
from trirank_build.engines.plan import PlanManifest, manifest_path, sm_name
from trirank_build.engines.rewriting import for_tensorrt
from trirank_build.errors import BadModel
from trirank_build.export.onnx import check_onnx
from trirank_build.export.weights import LARGEST, weights_of
from trirank_build.progress import progress

OPT_BATCH = 8
WORKSPACE_BYTES = 1 << 30
FLAGS = ("SPARSE_WEIGHTS",)
"""Of the builder: it uses 2:4 sparsity where the weights have it."""


@dataclass(frozen=True)
class BuildOptions:
    """What a plan may be besides the plainest one.

    Attributes:
        hardware_compatibility: one of HARDWARE_COMPATIBILITY: other GPUs it shall run on, at some cost in speed.
        version_compatible: whether later TensorRT versions of the same major shall run it.
        strip_weights: leave the weights out; whoever loads it puts them in again from the graph ("refit").
        workspace_bytes: most memory that a layer may use.
    """

    hardware_compatibility: str = "none"
    version_compatible: bool = False
    strip_weights: bool = False
    workspace_bytes: int = WORKSPACE_BYTES

    def check(self, flavour: str) -> None:
        """Raises BadModel if a flavour has no such option, or its value is out of range."""
        if self.hardware_compatibility not in HARDWARE_COMPATIBILITY:
            raise BadModel(
                f"hardware compatibility {self.hardware_compatibility!r} is none of {', '.join(HARDWARE_COMPATIBILITY)}"
            )
        if flavour == "tensorrt_rtx" and self.hardware_compatibility != "none":
            raise BadModel("tensorrt_rtx knows no levels of hardware compatibility; build a plan for each --sm instead")
        if self.workspace_bytes < 1 << 20:
            raise BadModel(
                f"a workspace of {self.workspace_bytes} bytes is below 1 MiB, with which nothing can be built"
            )

    @property
    def flags(self) -> list[str]:
        """Names of the builder's flags."""
        compatible = ["VERSION_COMPATIBLE"] if self.version_compatible else []
        return [*FLAGS, *compatible, *(["REFIT", "STRIP_PLAN"] if self.strip_weights else [])]


def build_plans(
    onnx_path: Path,
    spec: FeatureSpec,
    targets: list[str],
    out: Path,
    flavour: str = "tensorrt_rtx",
    options: BuildOptions | None = None,
) -> list[Path]:
    """One plan a GPU architecture, with a profile a bucket; a plan that is there already is taken as it is.

    Args:
        targets: architectures, "86" or "sm86".

    Returns:
        ``out/sm86.plan`` and so on, each with its manifest beside it.

    Raises:
        BadModel: the graph is damaged or cannot be built, or the flavour is not installed or cannot build for a target.
    """
    options = options or BuildOptions()
    options.check(flavour)
    checked = check_onnx(onnx_path, spec)
    if beside := weights_of(onnx_path, checked):
        raise BadModel(
            f"{onnx_path} has more than {LARGEST / 1e9:g} GB of weights, in {beside[0].name} beside it: plans are "
            'not built from; keep a smaller table of items (model.embedding = "low_rank" or "quotient_remainder"), or '
            "assemble with --runtime python"
        )
    graph = for_tensorrt(checked).SerializeToString()
    version, names = library(flavour).__version__, [sm_name(target) for target in targets]
    _check_targets(flavour, version, names)
    digest, cuda = file_digest(onnx_path), cuda_version(flavour)
    common = (_profiles(), options.flags, options.workspace_bytes, options.hardware_compatibility)
    keys = {out / f"{name}.plan": PlanKey(digest, flavour, version, name, cuda, *common) for name in names}
    with progress() as bar:
        for plan, key in keys.items():
            if locked(plan, key) is not None:
                continue
            task = bar.add_task(key.sm, total=None)
            inputs = contract.ranker_inputs(spec.shape)
            try:
                built = build_network(graph, inputs, key, out / TIMING_CACHE, bar, task)
            except BadModel as error:
                raise BadModel(f"{onnx_path}: {error}") from None
            _keep(plan, built, key)
            bar.update(task, description=f"{key.sm}: built", total=1, completed=1)
    return list(keys)


def _check_targets(flavour: str, version: str, names: list[str]) -> None:
    if not names:
        raise BadModel("no GPU architecture was given; say --sm 86, once for each")
    if flavour == "tensorrt":
        present = present_sms()
        if not present:
            raise BadModel("tensorrt needs a GPU to build, and nvidia-smi finds none")
        if others := [name for name in names if name != present[0]]:
            raise BadModel(
                f"tensorrt builds for the GPU it runs on, which is {present[0]}, not {', '.join(others)}; "
                "build on a machine with that GPU"
            )
    elif unknown := [name for name in names if name not in can_build_for(flavour)]:
        possible = ", ".join(can_build_for(flavour))
        raise BadModel(f"{flavour} {version} cannot build for {', '.join(unknown)}; it can for {possible}")


def _profiles() -> list[dict[str, int]]:
    """One a bucket."""
    return [
        {"bucket": bucket, "min_batch": 1, "opt_batch": OPT_BATCH, "max_batch": contract.MAX_BATCH}
        for bucket in contract.BUCKETS
    ]


def _keep(plan: Path, built: bytes, key: PlanKey) -> None:
    with atomic_file(plan) as scratch:
        scratch.write_bytes(built)
    manifest = PlanManifest(plan=file_digest(plan), **key.__dict__)
    with atomic_file(manifest_path(plan)) as scratch:
        scratch.write_text(json.dumps(manifest.to_json(), indent=1) + "\n")
    lock(plan, manifest)
