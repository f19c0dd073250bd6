"""A team's own text encoder: an ONNX graph in the shape in which sentence-transformers exports them, and its tokeniser.

``model.onnx``       or ``onnx/model.onnx``: ``input_ids``, ``attention_mask`` and perhaps ``token_type_ids`` [B, L]
                     INT64 → states [B, L, H] or vectors [B, H] FP32, as the first output
``tokenizer.json``   of the tokenizers library
``1_Pooling/config.json``   which states make a vector; their mean where it is missing

Items are encoded when features are fitted, a query when it is asked and was not lately.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from trirank_backend.errors import InvalidRelease

GRAPH, TOKENIZER, POOLING = "model.onnx", "tokenizer.json", "1_Pooling/config.json"
GRAPHS = (GRAPH, "onnx/model.onnx")
"""Where the graph may lie."""
FILES = (*GRAPHS, TOKENIZER, POOLING)
_DENSE = "2_Dense"
FOLDER = "encoder"
LONGEST = 64
"""Tokens of a text that are read."""
_BATCH = 128
_FIRST, _MEAN = "pooling_mode_cls_token", "pooling_mode_mean_tokens"
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class SentenceEncoder:
    """Texts → vectors of length one.

    Args:
        folder: see the module.
        threads: of one call.

    Raises:
        InvalidRelease: a file is missing or damaged, or the graph takes or gives something else.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        graph = next((folder / name for name in GRAPHS if (folder / name).is_file()), folder / GRAPH)
        if beside := sorted(path.name for path in graph.parent.glob("*.onnx_data*")):
            raise InvalidRelease(f"{graph} keeps its weights beside it ({beside[0]}); export it as one file")
        if (folder / _DENSE).exists():
            raise InvalidRelease(f"{folder} has a layer {_DENSE} behind its pooling, which the graph must contain")
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
            self._session = onnxruntime.InferenceSession(
                str(graph.resolve()), options, providers=["CPUExecutionProvider"]
            )
            asked = json.loads((folder / POOLING).read_text()) if (folder / POOLING).is_file() else {}
            modes = [name for name, on in asked.items() if name.startswith("pooling_mode_") and on is True]
        except Exception as error:  # neither library's exceptions share a public base
            raise InvalidRelease(
                f"{folder} holds no text encoder ({str(error).splitlines()[0]}); it wants {GRAPH} and {TOKENIZER} as "
                "sentence-transformers exports them"
            ) from error
        if strange := [mode for mode in modes if mode not in (_FIRST, _MEAN)] or modes[1:]:
            raise InvalidRelease(f"{folder / POOLING} asks for {', '.join(strange)}; {_MEAN} or {_FIRST} can be had")
        self._by_first = _FIRST in modes
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(LONGEST)
        self._inputs = [node.name for node in self._session.get_inputs()]
        if others := [name for name in self._inputs if name not in _INPUTS]:
            raise InvalidRelease(f"{graph} takes {', '.join(others)}; a text encoder takes {_INPUTS}")
        self.width = self.encode(["a"]).shape[1]
        """H."""

    def encode(self, texts: list[str]) -> NDArray[np.float32]:
        """[B, H] float32 of length one; zeros for a text without tokens."""
        order = np.argsort([len(text) for text in texts], kind="stable")
        parts = [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]
        vectors = np.concatenate([self._some([texts[at] for at in part]) for part in parts])
        out = np.empty_like(vectors)
        out[order] = vectors
        return out

    def _some(self, texts: list[str]) -> NDArray[np.float32]:
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        width = max(1, *map(len, ids)) if ids else 1
        given = np.zeros((2, len(ids), width), np.int64)
        for row, tokens in enumerate(ids):
            given[0, row, : len(tokens)], given[1, row, : len(tokens)] = tokens, 1
        named = {"input_ids": given[0], "attention_mask": given[1], "token_type_ids": np.zeros_like(given[0])}
        try:
            states = np.asarray(self._session.run(None, {name: named[name] for name in self._inputs})[0], np.float32)
        except Exception as error:  # ONNX Runtime's own exceptions share no public base
            raise InvalidRelease(
                f"the text encoder fails on {len(ids)} texts of {width} tokens ({str(error).splitlines()[0]}); export "
                "it with dynamic axes of batch and sequence"
            ) from error
        if states.ndim == 3 and states.shape[:2] == given.shape[1:]:
            mask = given[1][..., None].astype(np.float32)
            states = states[:, 0] if self._by_first else (states * mask).sum(1) / np.maximum(mask.sum(1), 1)
        if states.ndim != 2 or len(states) != len(ids):
            raise InvalidRelease(
                f"the text encoder gives {list(states.shape)} for {len(ids)} texts of {width} tokens; its first output "
                "must be states [B, L, H] or vectors [B, H]"
            )
        states = states * (given[1].any(1))[:, None]
        length = np.sqrt((states**2).sum(1, keepdims=True))
        return np.asarray(np.divide(states, length, out=np.zeros_like(states), where=length > 1e-9), np.float32)
