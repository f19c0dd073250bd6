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

from trirank_backend.errors import InvalidInput, InvalidRelease
from trirank_backend.features import FeatureSpec
from trirank_backend.release import FEATURES

try:
    import openvino
except ImportError:  # an extra of its own
    openvino = None

Tensors = dict[str, NDArray[Any]]
Ranker = Callable[[Tensors], NDArray[np.float32]]
"""The ranker's tensors (contract.ranker_inputs) → scores [B, N, T]."""
_BF16 = frozenset({"avx512_bf16", "amx_bf16"})


class OnnxRanker:
    """Runs ``model.onnx`` with ONNX Runtime. A path's links are followed: large weights lie beside the graph itself.

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
            self._session = onnxruntime.InferenceSession(str(path.resolve()), options, providers=[provider])
        except Exception as error:  # ONNX Runtime's own exceptions share no public base
            raise InvalidRelease(f"ranker {path} cannot be loaded ({error}); export again") from error
        # Without a GPU ONNX Runtime says nothing and takes the CPU.
        if (taken := self._session.get_providers()[0]) != provider:
            raise InvalidRelease(f"ranker {path} runs with {provider}, which finds no GPU; {taken} was taken instead")
        self.input_names = tuple(node.name for node in self._session.get_inputs())

    def __call__(self, tensors: Tensors) -> NDArray[np.float32]:
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
            # Else every process pins its one thread to the same core for the length of a call: two instances then share
            # one core, and a thread that was on another one starts with cold caches.
            "ENABLE_CPU_PINNING": False,
        }  # fmt: skip
        try:
            core = openvino.Core()
            model = core.read_model(str(path.resolve()))
            self.input_names = tuple(tensor.get_any_name() for tensor in model.inputs)
            self._dynamic = core.compile_model(model, "CPU", config).create_infer_request()
            self._fixed = {}
            shapes = {t.get_any_name(): t.partial_shape for t in model.inputs}
            for bucket in contract.BUCKETS:
                model.reshape({name: _fixed(shape, bucket) for name, shape in shapes.items()})
                self._fixed[bucket] = _FixedRequest(core.compile_model(model, "CPU", config), self.input_names)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise InvalidRelease(f"ranker {path} cannot be loaded by OpenVINO ({reason}); export again") from error

    def __call__(self, tensors: Tensors) -> NDArray[np.float32]:
        """Scores [B, N, T]."""
        run = self._fixed.get(tensors["candidates"].shape[1])
        if run is None:
            return self._run_any(tensors)
        rows = range(len(tensors["candidates"]))
        parts = [run({name: tensors[name][at : at + 1] for name in self.input_names}) for at in rows]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _run_any(self, tensors: Tensors) -> NDArray[np.float32]:
        held = {name: np.ascontiguousarray(tensors[name]) for name in self.input_names}
        for name, array in held.items():
            self._dynamic.set_tensor(name, openvino.Tensor(array, shared_memory=True))
        self._dynamic.infer()
        scores: NDArray[np.float32] = self._dynamic.get_output_tensor(0).data.copy()
        return scores


class _FixedRequest:
    """A graph of fixed shapes. Its tensors stay where they are, so that a call copies some kilobytes in and out;
    handing over new tensors takes 40 µs more, a fifth of a small ranker's time."""

    def __init__(self, compiled: Any, input_names: tuple[str, ...]) -> None:
        self._request = compiled.create_infer_request()
        self._inputs = {name: self._request.get_tensor(name).data for name in input_names}
        self._output = self._request.get_output_tensor(0).data

    def __call__(self, tensors: Tensors) -> NDArray[np.float32]:
        for name, place in self._inputs.items():
            if tensors[name].shape != place.shape:  # numpy would stretch some of them to fit
                raise ValueError(f"{name} has shape {tensors[name].shape}, the graph {place.shape}")
            place[...] = tensors[name]
        self._request.infer()
        return self._output.copy()


class GuardedRanker:
    """A ranker as a model of its own, which anybody may call: ids beyond its tables are refused, since not every engine
    looks before it reads there.

    Args:
        limits: tensor → [fields of its last axis, or 1] ids from which on there are none.
    """

    def __init__(self, ranker: Ranker, limits: dict[str, NDArray[np.int64]]) -> None:
        self._ranker = ranker
        self._limits = limits

    @classmethod
    def load(cls, release: Path, graph: Path, engine: str, threads: int = 1) -> GuardedRanker:
        """Of a release.

        Raises:
            InvalidRelease: see ``load_ranker`` and FeatureSpec.load.
        """
        spec = FeatureSpec.load(release / FEATURES / "features.json")
        item = [spec.folded or spec.vocabulary_size]
        fields = spec.shape.item_fields
        limits = {
            "candidates": np.array(item * fields),
            "history": np.array(item * fields + [spec.vocabulary_size] * (spec.shape.history_fields - fields)),
            "query": np.array([spec.vocabulary_size]),
        }
        return cls(load_ranker(graph, engine, threads), limits)

    def __call__(self, requests: list[Tensors], deadlines: list[float]) -> list[Tensors | InvalidInput]:
        """``scores`` of each request. Triton batches only equal shapes, so those that are in order run as one."""
        answers: list[Any] = [self._problem(tensors) for tensors in requests]
        good = [tensors for tensors, problem in zip(requests, answers, strict=True) if problem is None]
        scores = iter(score_batch(self._ranker, good) if good else ())
        return [{"scores": next(scores)} if problem is None else problem for problem in answers]

    def _problem(self, tensors: Tensors) -> InvalidInput | None:
        rows, sent = tensors["candidates"].shape[:2]
        if not rows or tensors["dense"].shape[1] != sent:
            return InvalidInput(
                f"candidates has {rows} rows of {sent}, dense of {tensors['dense'].shape[1]}; send as many"
            )
        if not 1 <= sent <= contract.MAX_CANDIDATES:
            return InvalidInput(f"candidates has {sent} of them; the ranker takes 1 to {contract.MAX_CANDIDATES}")
        for name, limits in self._limits.items():
            # Negative ones are large ones too when read without a sign.
            largest = tensors[name].view(np.uint32).max(axis=tuple(range(tensors[name].ndim - 1)))
            if (largest >= limits).any():
                least, most = tensors[name].min(), tensors[name].max()
                return InvalidInput(
                    f"{name} holds ids from {least} to {most}; the ranker knows 0 to {limits.max() - 1}"
                )
        return None


def score_batch(ranker: Ranker, requests: list[Tensors]) -> list[NDArray[np.float32]]:
    """Scores of requests of one shape, by one run of the ranker."""
    if len(requests) == 1:
        return [ranker(requests[0])]
    joined = {name: np.concatenate([request[name] for request in requests]) for name in requests[0]}
    ends = np.cumsum([len(request["context"]) for request in requests])[:-1]
    return np.split(ranker(joined), ends)


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
