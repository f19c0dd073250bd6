"""What the ranker is trained to do."""

from __future__ import annotations

import torch
from torch import Tensor


def listwise_softmax(scores: Tensor, labels: Tensor, valid: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    """Softmax cross-entropy over each request's candidates (ListNet's top-one form, Cao et al. 2007).

    Args:
        scores: [B, N, T].
        labels: [B, N] gains.
        valid: [B, N]; padding takes no part.
        thresholds: [T]; a task's target is ``label >= threshold``, or the label itself where it is 0.

    Returns:
        The mean over the tasks and requests that have something to learn from; 0 where none has.
    """
    logits = scores.masked_fill(~valid[..., None], -1e4).log_softmax(1)  # [B, N, T]
    limit = torch.tensor(thresholds, dtype=labels.dtype)
    graded = labels[..., None].expand_as(scores)
    target = torch.where(limit > 0, (graded >= limit).to(scores.dtype), graded) * valid[..., None]
    total = target.sum(1)  # [B, T]
    losses = -(target * logits).sum(1) / total.clamp_min(1e-6)
    counted = (total > 0).to(scores.dtype)
    return (losses * counted).sum() / counted.sum().clamp_min(1)
