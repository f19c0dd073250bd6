"""What the ranker is trained to do.

Letters: B requests, N candidates, T tasks; P places of a sequence with a known next item, K negatives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMPTY = -1e4
"""Logit of what takes no part; finite, so that half precision survives it."""


def targets_of(labels: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    """Gains [B, N] → targets [B, N, T]: ``label >= threshold``, or the label itself where the threshold is 0."""
    limit = torch.tensor(thresholds, dtype=labels.dtype, device=labels.device)
    graded = labels[..., None]
    return torch.where(limit > 0, (graded >= limit).to(labels.dtype), graded)


def listwise_softmax(
    scores: Tensor, targets: Tensor, valid: Tensor, weights: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """Softmax cross-entropy over each request's candidates (ListNet's top-one form, Cao et al. 2007).

    Args:
        scores, targets: [B, N, T].
        valid: [B, N]; padding takes no part.
        weights: [B, N] what each target counts; None: all alike.
        offsets: [B, N] added to the scores, for what else the choice depended on than how good a candidate is.

    Returns:
        [T] means over the requests that have something to learn from; 0 where none has.
    """
    logits = _with(scores, offsets).masked_fill(~valid[..., None], EMPTY).log_softmax(1)
    target = targets * valid[..., None]
    total = target.sum(1)  # [B, T]
    # Divided by the targets without weights: with them, what was chosen alone would weigh 1 wherever it stood.
    counted = target if weights is None else target * weights[..., None]
    losses = -(counted * logits).sum(1) / total.clamp_min(1e-6)
    return _mean_of(losses, (total > 0).to(scores.dtype))


def pointwise(
    scores: Tensor, targets: Tensor, valid: Tensor, weights: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """Cross-entropy of each candidate by itself; scores are then log-odds. Graded targets are taken as shares of the
    largest one in the batch. Arguments and result as of listwise_softmax; it takes no weights, since what was not
    chosen counts as much."""
    assert weights is None
    top = targets.amax((0, 1)).clamp_min(1.0)
    logits = _with(scores, offsets)
    losses = F.binary_cross_entropy_with_logits(logits, targets / top, reduction="none") * valid[..., None]
    return losses.sum((0, 1)) / valid.sum().clamp_min(1)


def lambda_loss(
    scores: Tensor, targets: Tensor, valid: Tensor, weights: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """Logistic loss of each pair, weighted by what swapping it would change in NDCG (LambdaRank, Burges et al. 2006;
    LambdaLoss, Wang et al. 2018, the metric-driven weights), and by the better one's weight. Arguments and result as
    of listwise_softmax; ranks are those of the scores alone, as they are served."""
    parts, logits = [], _with(scores, offsets)
    for task in range(scores.shape[-1]):
        score, logit = (each[..., task].masked_fill(~valid, EMPTY) for each in (scores, logits))
        gain = targets[..., task] * valid
        order = score.detach().argsort(1, descending=True)
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(1, order.shape[1] + 1, device=order.device)
                                                .expand_as(order))  # fmt: skip
        discount = torch.log2(1 + rank.to(score.dtype))
        places = torch.log2(2 + torch.arange(gain.shape[1], device=gain.device, dtype=gain.dtype))
        ideal = (gain.sort(1, descending=True).values / places).sum(1)  # [B]
        better = (gain[:, :, None] > gain[:, None, :]) & valid[:, :, None] & valid[:, None, :]
        change = (gain[:, :, None] - gain[:, None, :]) * (1 / discount[:, :, None] - 1 / discount[:, None, :]).abs()
        weight = torch.where(better, change.abs() / ideal.clamp_min(1e-6)[:, None, None], 0)
        if weights is not None:
            weight = weight * weights[:, :, None]
        losses = (weight * F.softplus(-(logit[:, :, None] - logit[:, None, :]))).sum((1, 2))
        parts.append(_mean_of(losses, (ideal > 0).to(score.dtype)))
    return torch.stack(parts)


RANKING_LOSSES = {"listwise": listwise_softmax, "pointwise": pointwise, "lambda": lambda_loss}


def sampled_softmax(chosen: Tensor, others: Tensor, same: Tensor, log_q: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Softmax cross-entropy of each place's next item against sampled ones.

    Args:
        chosen: [P] logits of the next items.
        others: [P, K] logits of the negatives.
        same: [P, K] whether a negative is the next item itself; it takes no part.
        log_q: of the next items [P] and the negatives [K]; subtracted from the logits, the result approaches the
            softmax over all items (Bengio and Senécal 2008; Yi et al. 2019).
    """
    if log_q is not None:
        chosen, others = chosen - log_q[0], others - log_q[1]
    logits = torch.cat([chosen[:, None], others.masked_fill(same, EMPTY)], 1)
    return -logits.log_softmax(1)[:, 0].mean()


class TaskWeights(nn.Module):
    """One loss of the tasks' [T]: weights learned from each task's uncertainty (Kendall et al., "Multi-task learning
    using uncertainty", CVPR 2018), or given."""

    def __init__(self, weights: Tensor | None, tasks: int) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.zeros(tasks)) if weights is None else None
        self.register_buffer("given", weights)

    def forward(self, losses: Tensor) -> Tensor:
        if self.learned is not None:
            return (losses * torch.exp(-self.learned) + self.learned).mean()
        assert isinstance(self.given, Tensor)
        return (losses * self.given).sum() / self.given.sum()


def _with(scores: Tensor, offsets: Tensor | None) -> Tensor:
    """[B, N, T] scores, with what is added to them."""
    return scores if offsets is None else scores + offsets[..., None]


def _mean_of(values: Tensor, counted: Tensor) -> Tensor:
    """Mean over requests [B, …] where ``counted`` is 1."""
    return (values * counted).sum(0) / counted.sum(0).clamp_min(1)
