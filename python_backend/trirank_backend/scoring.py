"""The ranker inside the Python backend: on a CPU ONNX Runtime, which is always there, or OpenVINO; on a GPU ONNX
Runtime with a provider for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from trirank import contract

from trirank_backend.errors import InvalidRelease

try:
    import openvino
except ImportError:  # an extra of its own
    openvino = None

Ranker = Callable[[dict[str, Any]], NDArray[np.float32]]
"""The ranker's tensors (contract.ranker_inputs) → scores [B, N, T]."""
_BF16 = frozenset({"avx512_bf16", "amx_bf16"})


class OnnxRanker:
    """Runs ``model.onnx`` with ONNX Runtime.

    Args:
        threads: of one call. One is best where several instances share the cores.
        provider: ONNX Runtime's execution provider.

    Raises:
        InvalidRelease: the graph cannot be read, or the provider is not there or finds no GPU.
    """

    def __init__(self, path: Path, threads: int = 1, provider: str = "CPUExecutionProvider") -> None:
        if provider not in onnxruntime.get_available_providers():
            have = ", ".join(onnxruntime.get_available_providers())
            raise InvalidRelease(f"ranker {path} runs with {provider}, which this ONNX Runtime lacks (it has {have})")
        options = onnxruntime.SessionOptions()
        # Without numbers ONNX Runtime starts a spinning thread a core in every instance.
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        except Exception as error:  # ONNX Runtime's own exceptions share no public base
            raise InvalidRelease(f"ranker {path} cannot be loaded ({error}); export again") from error
        # Without a GPU ONNX Runtime says nothing and takes the CPU.
        if (taken := self._session.get_providers()[0]) != provider:
            raise InvalidRelease(f"ranker {path} runs with {provider}, which finds no GPU; {taken} was taken instead")
        self.input_names = tuple(node.name for node in self._session.get_inputs())

    def __call__(self, tensors: dict[str, Any]) -> NDArray[np.float32]:
        """Scores [B, N, T]."""
        scores: NDArray[np.float32] = self._session.run(["scores"], {name: tensors[name] for name in self.input_names})[
            0
        ]
        return scores


class OpenVinoRanker:
    """Runs ``model.onnx`` with OpenVINO, which is fast on the INT8 graphs that TensorRT takes.

    Every bucket gets a graph of fixed shapes for one request: working out shapes takes as long as a small ranker
    itself. The requests of a batch go one after the other, which on a CPU costs no more. Requests of any other size
    share a graph of dynamic shapes.

    Args:
        threads: of one call.
        precision: ``f32``, or ``bf16`` where the processor has it; INT8 products stay INT8.

    Raises:
        InvalidRelease: OpenVINO is not installed, or the graph cannot be read.
    """

    def __init__(self, path: Path, threads: int = 1, precision: str = "f32") -> None:
        if openvino is None:
            raise InvalidRelease(
                f"ranker {path} runs with OpenVINO, which is not installed; pip install 'trirank[openvino]', or "
                "assemble with --engine onnxruntime"
            )
        config = {
            "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }  # fmt: skip
        try:
            core = openvino.Core()
            model = core.read_model(str(path))
            self.input_names = tuple(tensor.get_any_name() for tensor in model.inputs)
            self._dynamic = core.compile_model(model, "CPU", config).create_infer_request()
            self._fixed = {}
            shapes = {t.get_any_name(): t.partial_shape for t in model.inputs}
            for bucket in contract.BUCKETS:
                model.reshape({name: _fixed(shape, bucket) for name, shape in shapes.items()})
                self._fixed[bucket] = core.compile_model(model, "CPU", config).create_infer_request()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise InvalidRelease(f"ranker {path} cannot be loaded by OpenVINO ({reason}); export again") from error

    def __call__(self, tensors: dict[str, Any]) -> NDArray[np.float32]:
        """Scores [B, N, T]."""
        request = self._fixed.get(tensors["candidates"].shape[1])
        if request is None:
            return self._run(self._dynamic, {name: tensors[name] for name in self.input_names})
        rows = range(len(tensors["candidates"]))
        parts = [self._run(request, {n: tensors[n][at : at + 1] for n in self.input_names}) for at in rows]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @staticmethod
    def _run(request: Any, tensors: dict[str, Any]) -> NDArray[np.float32]:
        # Tensors that share memory with the arrays, rather than request.infer(tensors), save a tenth of a millisecond.
        held = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        for name, array in held.items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
        request.infer()
        scores: NDArray[np.float32] = request.get_output_tensor(0).data.copy()
        return scores


_ON_GPU = {
    "onnxruntime-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
}
ENGINES: dict[str, Callable[[Path, int], Ranker]] = {
    "onnxruntime": OnnxRanker,
    **{name: partial(OnnxRanker, provider=provider) for name, provider in _ON_GPU.items()},
    "openvino": OpenVinoRanker,
    "openvino-bf16": partial(OpenVinoRanker, precision="bf16"),
}
"""What runs a graph, by name."""


def available_engines() -> list[str]:
    """The engines that can run here."""
    names = ["onnxruntime"]
    names += [name for name, provider in _ON_GPU.items() if provider in onnxruntime.get_available_providers()]
    if openvino is not None:
        names.append("openvino")
        if _BF16 & _processor_flags():
            names.append("openvino-bf16")
    return names


def exact_engines() -> list[str]:
    """Those of them that compute in full precision, whatever the graph."""
    return [name for name in available_engines() if not name.endswith("bf16") and name not in _ON_GPU]


def rankers_of(path: Path, engines: list[str]) -> Iterator[tuple[str, Ranker]]:
    """Name and ranker of those engines that can run a graph, loaded one by one as they are asked for: ONNX Runtime has
    no BF16 products on a CPU, for instance.

    Raises:
        InvalidRelease: none can; the first one's reason.
    """
    found, reasons = False, []
    for name in engines:
        try:
            ranker = load_ranker(path, name)
        except InvalidRelease as error:
            reasons.append(error)
            continue
        found = True
        yield name, ranker
    if not found:
        raise reasons[0]


def load_ranker(path: Path, engine: str = "onnxruntime", threads: int = 1) -> Ranker:
    """A ranker on one of ENGINES.

    Raises:
        InvalidRelease: there is no such engine, it is not installed, or the graph cannot be read.
    """
    if engine not in ENGINES:
        raise InvalidRelease(f"engine {engine!r} is none of {', '.join(ENGINES)}")
    return ENGINES[engine](path, threads)


def _fixed(shape: Any, bucket: int) -> list[int]:
    """One request of ``bucket`` candidates: the batch is the first axis, the only other dynamic one the candidates."""
    return [1 if not at else bucket if dim.is_dynamic else dim.get_length() for at, dim in enumerate(shape)]


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())
