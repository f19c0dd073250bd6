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


def valid_ndcg(model: nn.Module, examples: Examples) -> float:
    """Mean NDCG@10 over requests with anything relevant."""
    valid = examples.rows >= 0
    gains = metrics.order_gains(score(model, examples), examples.labels, valid)
    return float(np.nanmean(metrics.ndcg(gains, metrics.ideal_gains(examples.labels, examples.missed))))
