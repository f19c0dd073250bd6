"""Whether an ONNX graph says what the module says, whatever the bucket, the batch or the padding."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from trirank import contract
from trirank_backend.features import FeatureSpec
from trirank_backend.features.table import left_out, table_of
from trirank_backend.scoring import exact_engines, rankers_of

from trirank_build.errors import BadModel
from trirank_build.models.forms.form import Quantised

MODULE_LIMIT = 1e-4
"""Largest difference between module and graph."""
PADDING_LIMIT = 1e-5
"""Largest difference that padding or company in a batch may make."""
QUANTISED_SHARE = 0.02
"""Of the scores' standard deviation: the limit of all differences where numbers are rounded on their way. One that lies
in the middle may go to either side, and then differs by a whole step."""


@dataclass(frozen=True)
class Parity:
    """Largest absolute differences of scores.

    Attributes:
        by_bucket: candidates → module against graph.
        padding: graph on N candidates against graph on the same padded to the next bucket.
        batching: graph on one request against the same request among others.
    """

    by_bucket: dict[int, float]
    padding: float
    batching: float

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def sample_inputs(spec: FeatureSpec, batch: int, candidates: int, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Random but lawful tensors: events fill the end of the history, tokens the front of the query."""
    shape = spec.shape
    tensors: dict[str, NDArray[Any]] = {}
    for tensor in contract.ranker_inputs(shape):
        size = (batch, *(candidates if axis < 0 else axis for axis in tensor.shape))
        if tensor.dtype == "INT32":
            tensors[tensor.name] = rng.integers(0, spec.vocabulary_size, size).astype(np.int32)
            if spec.folded and tensor.name in ("history", "candidates"):  # an item is one row of its own table
                tensors[tensor.name][..., 0] = rng.integers(0, spec.folded, size[:-1])
        else:
            tensors[tensor.name] = rng.normal(size=size).astype(np.float32)
    tensors["dense"][..., left_out(table_of(spec.dense), spec.without)] = 0  # as serving packs them
    events = rng.integers(0, shape.history_length + 1, batch)
    tensors["history"] *= np.arange(shape.history_length)[None, :, None] >= shape.history_length - events[:, None, None]
    first, codes = spec.tables["behaviour"]
    tensors["history"][..., -2] = np.where(
        tensors["history"][..., -2] > 0, first + 1 + tensors["history"][..., -2] % (codes - 1), 0
    )
    return tensors


def check_parity(module: nn.Module, path: Path, spec: FeatureSpec) -> Parity:
    """Measure on random tensors.

    Raises:
        BadModel: a difference is above its limit, or the graph fails on some number of requests or candidates.
    """
    _, run = next(rankers_of(path, exact_engines()))

    def ranker(tensors: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        try:
            return run(tensors)
        except Exception as error:  # ONNX Runtime's own exceptions share no public base
            size = tensors["candidates"].shape[:2]
            raise BadModel(
                f"the ONNX graph fails on {size[0]} requests of {size[1]} candidates ({str(error).splitlines()[0]}); a "
                "constant of the export's sample size is in the way of the batch or the candidates"
            ) from error

    rng = np.random.default_rng(1)
    by_bucket, spreads = {}, []
    for bucket in contract.BUCKETS:
        tensors = sample_inputs(spec, 2, bucket, rng)
        with torch.inference_mode():
            expected = module(**{name: torch.from_numpy(array) for name, array in tensors.items()}).numpy()
        spreads.append(float(expected.std()))
        by_bucket[bucket] = float(np.abs(ranker(tensors) - expected).max())
    padding = batching = 0.0
    for count in (1, 37, 64, 200):
        tensors = sample_inputs(spec, 3, count, rng)
        alone = ranker(tensors)
        padded = dict(tensors)
        for name in ("candidates", "dense"):
            wide = np.zeros((3, contract.bucket_for(count), tensors[name].shape[2]), tensors[name].dtype)
            wide[:, :count] = tensors[name]
            padded[name] = wide
        padding = max(padding, float(np.abs(ranker(padded)[:, :count] - alone).max()))
        single = ranker({name: array[:1] for name, array in tensors.items()})
        batching = max(batching, float(np.abs(single - alone[:1]).max()))
    worst = max(by_bucket.values())
    rounds = any(isinstance(part, Quantised) for part in module.modules())
    module_limit, padding_limit = (QUANTISED_SHARE * min(spreads),) * 2 if rounds else (MODULE_LIMIT, PADDING_LIMIT)
    if not worst <= module_limit:
        raise BadModel(f"the ONNX graph differs from the module by {worst:.2g}; the limit is {module_limit:.2g}")
    for what, difference in (("padding", padding), ("other requests of a batch", batching)):
        if not difference <= padding_limit:
            raise BadModel(
                f"scores depend on {what}: they differ by {difference:.2g}, the limit is {padding_limit:.2g}; "
                "a candidate's score may depend on itself and the request alone"
            )
    return Parity(by_bucket, padding, batching)
