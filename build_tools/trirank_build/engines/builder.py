"""One builder for TensorRT and TensorRT-RTX, which share the API used here.

The network is strongly typed: precision comes from the ONNX, since TensorRT 11 has no builder flags for it.
TensorRT-RTX builds for a named architecture on a machine without a GPU; TensorRT builds for the GPU it runs on.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from trirank import contract
from trirank_backend.features import FeatureSpec

from trirank_build.artefacts import atomic_file, file_digest
from trirank_build.engines.lock import PlanKey, lock, locked
from trirank_build.engines.plan import PlanManifest, manifest_path
from trirank_build.engines.rewriting import for_tensorrt
from trirank_build.errors import BadModel
from trirank_build.export.onnx import check_onnx
from trirank_build.progress import progress

FLAVOURS = ("tensorrt", "tensorrt_rtx")
OPT_BATCH = 8
WORKSPACE_BYTES = 1 << 30
FLAGS = ("SPARSE_WEIGHTS",)
"""Of the builder: it uses 2:4 sparsity where the weights have it."""


def build_plans(
    onnx_path: Path, spec: FeatureSpec, targets: list[str], out: Path, flavour: str = "tensorrt_rtx"
) -> list[Path]:
    """One plan a GPU architecture, with a profile a bucket; a plan that is there already is taken as it is.

    Args:
        targets: architectures, "86" or "sm86".

    Returns:
        ``out/sm86.plan`` and so on, each with its manifest beside it.

    Raises:
        BadModel: the graph is damaged or cannot be built, or the flavour is not installed or cannot build for a target.
    """
    graph = for_tensorrt(check_onnx(onnx_path, spec)).SerializeToString()
    trt = _library(flavour)
    names = [_sm(target) for target in targets]
    if not names:
        raise BadModel("no GPU architecture was given; say --sm 86, once for each")
    supported = (
        [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
        if flavour == "tensorrt_rtx"
        else []
    )
    if flavour == "tensorrt" and any(name != (present := _present_sm()) for name in names):
        raise BadModel(
            f"tensorrt builds for the GPU it runs on, which is {present}, not {', '.join(names)}; "
            "build on a machine with that GPU"
        )
    for name in names:
        if flavour == "tensorrt_rtx" and name.upper() not in supported:
            raise BadModel(
                f"{flavour} {trt.__version__} cannot build for {name}; it can for {', '.join(supported).lower()}"
            )
    digest, cuda = file_digest(onnx_path), _cuda(flavour)
    keys = [
        PlanKey(digest, flavour, trt.__version__, name, cuda, _profiles(), list(FLAGS), WORKSPACE_BYTES)
        for name in names
    ]
    with progress() as bar:
        tracked = bar.track(keys, description=f"building with {flavour}")
        return [_build(trt, graph, spec, key, out / f"{key.sm}.plan", onnx_path) for key in tracked]


def _profiles() -> list[dict[str, int]]:
    """One a bucket."""
    return [
        {"bucket": bucket, "min_batch": 1, "opt_batch": OPT_BATCH, "max_batch": contract.MAX_BATCH}
        for bucket in contract.BUCKETS
    ]


def _build(trt: Any, graph: bytes, spec: FeatureSpec, key: PlanKey, plan: Path, onnx_path: Path) -> Path:
    """The plan of a key, built now unless the folder's lock has it."""
    if locked(plan, key) is not None:
        return plan
    problems: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                problems.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph):
        errors = [parser.get_error(at).desc() for at in range(parser.num_errors)]
        raise BadModel(f"{key.flavour} cannot parse {onnx_path}: {'; '.join(errors or problems)}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, key.workspace_bytes)
    for flag in key.flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if key.flavour == "tensorrt_rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, key.sm.upper()), 0)
    for wanted in key.profiles:
        profile = builder.create_optimization_profile()
        for tensor in contract.ranker_inputs(spec.shape):
            shape = tuple(wanted["bucket"] if axis < 0 else axis for axis in tensor.shape)
            batches = (wanted["min_batch"], wanted["opt_batch"], wanted["max_batch"])
            profile.set_shape(tensor.name, *((batch, *shape) for batch in batches))
        config.add_optimization_profile(profile)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise BadModel(
            f"{key.flavour} cannot build {onnx_path} for {key.sm}: {'; '.join(problems) or 'no reason given'}"
        )
    with atomic_file(plan) as scratch:
        scratch.write_bytes(serialized)
    manifest = PlanManifest(plan=file_digest(plan), **key.__dict__)
    with atomic_file(manifest_path(plan)) as scratch:
        scratch.write_text(json.dumps(manifest.to_json(), indent=1) + "\n")
    lock(plan, manifest)
    return plan


def _cuda(flavour: str) -> str:
    """From the name of the package that brought the library: tensorrt-rtx-cu13 → 13."""
    names = metadata.packages_distributions().get(flavour, [])
    return next((match[1] for name in names if (match := re.search(r"cu(\d+)", name))), "unknown")


def _library(flavour: str) -> Any:
    if flavour not in FLAVOURS:
        raise BadModel(f"flavour {flavour!r} is none of {', '.join(FLAVOURS)}")
    try:
        return importlib.import_module(flavour)
    except ImportError as error:
        where = "pip install 'trirank[tensorrt]'" if flavour == "tensorrt_rtx" else "use NVIDIA's Triton container"
        raise BadModel(f"{flavour} is not installed ({error}); {where}") from error


def _present_sm() -> str:
    """Architecture of this machine's first GPU, by nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return _sm(found[0])
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise BadModel(f"tensorrt needs a GPU to build, and nvidia-smi finds none ({error})") from error


def _sm(target: str) -> str:
    match = re.fullmatch(r"(?:sm)?(\d)\.?(\d+)", target.lower())
    if not match or len(match[1] + match[2]) not in (2, 3):
        raise BadModel(f"--sm {target} is no GPU architecture; write 86 or sm86")
    return f"sm{match[1]}{match[2]}"
