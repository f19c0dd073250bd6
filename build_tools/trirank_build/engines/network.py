"""One graph, built by TensorRT or TensorRT-RTX: all of this project that touches their API.

Both give the same Python API under two names. The type checker holds this file to TensorRT's stubs; what TensorRT-RTX
adds is in one function. The network is strongly typed: precision comes from the ONNX, since TensorRT 11 has no builder
flags for it.
"""

from __future__ import annotations

import importlib
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress, TaskID
from trirank.contract import TensorSpec

from trirank_build.artefacts import atomic_file
from trirank_build.engines.lock import PlanKey
from trirank_build.errors import BadModel

FLAVOURS = ("tensorrt", "tensorrt_rtx")
HARDWARE_COMPATIBILITY = ("none", "ampere_plus", "same_compute_capability")
TIMING_CACHE = "timing.cache"


def library(flavour: str) -> Any:
    """The library of a flavour.

    Raises:
        BadModel: there is no such flavour, or it is not installed.
    """
    if flavour not in FLAVOURS:
        raise BadModel(f"flavour {flavour!r} is none of {', '.join(FLAVOURS)}")
    where = "pip install 'trirank[tensorrt]'" if flavour == "tensorrt_rtx" else "use NVIDIA's Triton container"
    try:
        found = importlib.import_module(flavour)
    except ImportError as error:
        raise BadModel(f"{flavour} is not installed ({error}); {where}") from error
    if not hasattr(found, "Builder"):
        raise BadModel(f"{flavour} is not installed, though there is a folder of its name; {where}")
    return found


def cuda_version(flavour: str) -> str:
    """From the name of the package that brought the library: tensorrt-rtx-cu13 → 13."""
    names = metadata.packages_distributions().get(flavour, [])
    return next((match[1] for name in names if (match := re.search(r"cu(\d+)", name))), "unknown")


def can_build_for(flavour: str) -> list[str]:
    """The architectures that TensorRT-RTX builds for on any machine, ``sm86``; none for TensorRT, which builds for the
    GPU it runs on."""
    if flavour != "tensorrt_rtx":
        return []
    return [name.lower() for name in library(flavour).ComputeCapability.__members__ if name.startswith("SM")]


def build_network(
    graph: bytes, tensors: tuple[TensorSpec, ...], key: PlanKey, cache: Path, bar: Progress, task: TaskID
) -> bytes:
    """The serialised plan of a graph.

    Args:
        tensors: the graph's inputs; axes of -1 take a profile's bucket.
        cache: file of the timing cache, read if it is there, written after; TensorRT-RTX times nothing.
        task: where the builder's progress is shown.

    Raises:
        BadModel: it cannot be parsed or built, with the builder's own words.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = library(key.flavour)
    problems: list[str] = []

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                problems.append(message.strip())

    class Bar(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            bar.update(task, description=f"{key.sm}: {phase_name.lower()}", completed=0, total=num_steps)

        def phase_finish(self, phase_name: str) -> None:
            bar.refresh()

        def step_complete(self, phase_name: str, step: int) -> bool:
            bar.update(task, completed=step)
            return True

    log, monitor = Log(), Bar()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    parsed: Any = parser.parse(graph)  # the stubs mistake bool for TensorRT's own data type of that name
    if not parsed:
        errors = [parser.get_error(at).desc() for at in range(parser.num_errors)]
        raise BadModel(f"{key.flavour} cannot parse it: {'; '.join(errors or problems)}")
    config = builder.create_builder_config()
    config.progress_monitor = monitor
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, key.workspace_bytes)
    for flag in key.flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if key.hardware_compatibility != "none":
        level = getattr(trt.HardwareCompatibilityLevel, key.hardware_compatibility.upper())
        config.hardware_compatibility_level = level
    for wanted in key.profiles:
        profile = builder.create_optimization_profile()
        for tensor in tensors:
            shape = tuple(wanted["bucket"] if axis < 0 else axis for axis in tensor.shape)
            least, usual, most = (
                trt.Dims([wanted[which], *shape]) for which in ("min_batch", "opt_batch", "max_batch")
            )
            profile.set_shape(tensor.name, least, usual, most)
        config.add_optimization_profile(profile)
    timings = None
    if key.flavour == "tensorrt_rtx":
        _target(trt, config, key.sm)
    else:
        timings = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
        config.set_timing_cache(timings, ignore_mismatch=False)
    serialized: Any = builder.build_serialized_network(network, config)  # None where it fails
    if serialized is None:
        reason = "; ".join(problems) or "no reason given"
        raise BadModel(f"{key.flavour} cannot build it for {key.sm} ({_options(key)}): {reason}")
    if timings is not None:
        with atomic_file(cache) as scratch:
            scratch.write_bytes(bytes(timings.serialize()))
    return bytes(serialized)


def _target(trt: Any, config: Any, sm: str) -> None:
    """Name the GPU, which only TensorRT-RTX lets one do."""
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, sm.upper()), 0)


def _options(key: PlanKey) -> str:
    compatible = key.hardware_compatibility
    return ", ".join([*key.flags, *([] if compatible == "none" else [f"hardware compatibility {compatible}"])])
