"""The ranker's scores of requests, and the number that training watches."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from trirank_build.errors import Diverged
from trirank_build.evaluation import metrics
from trirank_build.features.examples import Examples

_BATCH = 256

LARGEST_WEIGHT = np.float32(10)
"""Of one choice; inverse propensities have no bound, and a few would be all that is learned from."""


def score(model: nn.Module, examples: Examples) -> NDArray[np.float32]:
    """[R, N] the mean over tasks of the ranker's scores, as the default policy weighs them.

    Raises:
        Diverged: scores are no numbers.
    """
    model.eval()
    device = next(model.parameters()).device
    parts = []
    with torch.inference_mode():
        for start in range(0, len(examples), _BATCH):
            which = np.arange(start, min(start + _BATCH, len(examples)))
            packed = examples.whole(which).packed
            tensors = {name: torch.from_numpy(array).to(device) for name, array in packed.tensors().items()}
            parts.append(model(**tensors).mean(-1).cpu().numpy())
    scores = np.concatenate(parts)
    if not np.isfinite(scores).all():
        raise Diverged("the ranker scores candidates with what is no number; lower learning_rate and train again")
    return scores


def log_propensities(positions: NDArray[np.int32], bias: float) -> NDArray[np.float32]:
    """log k^-bias: of the chance that a position k (from 1; 0: not known, taken as looked at) was looked at."""
    return np.float32(-bias) * np.log(np.maximum(positions, 1), dtype=np.float32)


def propensity_weights(positions: NDArray[np.int32], bias: float) -> NDArray[np.float32]:
    """One over the chance that a position was looked at, clipped."""
    return np.minimum(np.exp(-log_propensities(positions, bias)), LARGEST_WEIGHT)


def valid_ndcg(model: nn.Module, examples: Examples, position_bias: float = 0.0) -> float:
    """Mean NDCG@10 over requests with anything relevant.

    Args:
        position_bias: above 0 each request counts what its choices' positions do on average, so that a ranker is not
            chosen for agreeing with the order that was shown.
    """
    return mean_ndcg(metrics.ties_broken(score(model, examples)), examples, position_bias)


def retrieval_ndcg(examples: Examples, position_bias: float = 0.0) -> float:
    """The same of the order in which candidates came."""
    width = examples.rows.shape[1]
    return mean_ndcg(np.broadcast_to(-np.arange(width, dtype=np.float32), examples.rows.shape), examples, position_bias)


def mean_ndcg(scores: NDArray[np.float32], examples: Examples, position_bias: float = 0.0) -> float:
    """The same of any scores [R, N]."""
    gains = metrics.order_gains(scores, examples.labels, examples.rows >= 0)
    found = metrics.ndcg(gains, metrics.ideal_gains(examples.labels, examples.missed))
    known = ~np.isnan(found)
    if not position_bias or not known.any():
        return float(np.nanmean(found))
    weights = propensity_weights(examples.positions, position_bias)
    counts = (examples.labels * weights).sum(1) / np.maximum(examples.labels.sum(1), 1e-9)
    return float(np.average(found[known], weights=np.maximum(counts[known], 1e-9)))
