"""The ranker inside the Python backend: ONNX Runtime on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

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

    def __call__(self, tensors: dict[str, Any]) -> NDArray[np.float32]:
        """Scores [B, N, T]."""
        scores: NDArray[np.float32] = self._session.run(["scores"], {name: tensors[name] for name in self.input_names})[
            0
        ]
        return scores
