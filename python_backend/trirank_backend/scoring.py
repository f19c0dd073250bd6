"""The ranker inside the Python backend: ONNX Runtime on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from trirank.contract import PackedShape, ranker_inputs, ranker_outputs

from trirank_backend.errors import InvalidRelease


class OnnxRanker:
    """Runs ``model.onnx``.

    Args:
        threads: of one call. One is best where several instances share the cores.

    Raises:
        InvalidRelease: the graph cannot be read.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        # Without numbers ONNX Runtime starts a spinning thread a core in every instance.
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own exceptions share no public base
            raise InvalidRelease(f"ranker {path} cannot be loaded ({error}); export again") from error
        self.input_names = tuple(node.name for node in self._session.get_inputs())

    def check(self, shape: PackedShape) -> None:
        """Hold the graph to the contract.

        Raises:
            InvalidRelease: a tensor is missing, or has another type or a fixed axis of another length.
        """
        for kind, nodes, specs in (
            ("input", self._session.get_inputs(), ranker_inputs(shape)),
            ("output", self._session.get_outputs(), ranker_outputs(shape)),
        ):
            found = {node.name: node for node in nodes}
            if set(found) != {spec.name for spec in specs}:
                raise InvalidRelease(f"ranker {kind}s are {sorted(found)}, not {sorted(s.name for s in specs)}")
            for spec in specs:
                node = found[spec.name]
                dtype = {"INT32": "tensor(int32)", "FP32": "tensor(float)"}[spec.dtype]
                dims = [dim if isinstance(dim, int) else -1 for dim in node.shape]
                if node.type != dtype or dims != [-1, *spec.shape]:
                    raise InvalidRelease(
                        f"ranker {kind} {spec.name} is {node.type} {node.shape}; "
                        f"the contract says {dtype} {['batch', *spec.shape]} (-1: dynamic)"
                    )

    def __call__(self, tensors: dict[str, Any]) -> NDArray[np.float32]:
        """Scores [B, N, T]."""
        scores: NDArray[np.float32] = self._session.run(["scores"], {name: tensors[name] for name in self.input_names})[
            0
        ]
        return scores
