"""Ranking metrics, vectorised: one number a request, so that intervals and paired tests can be made of them.

All take ``gains`` [R, N], each request's gains in the order of the ranking under test (0: not relevant, or padding),
and ``ideal`` [R, N], all gains there were to find, best first, those included that retrieval missed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Gains = NDArray[np.float32]
PerRequest = NDArray[np.float64]


def order_gains(scores: NDArray[np.float32], labels: Gains, valid: NDArray[np.bool_]) -> Gains:
    """[R, N] gains by descending score. Ties keep the candidates' order; padding comes last."""
    order = np.argsort(np.where(valid, -scores.astype(np.float64), np.inf), axis=1, kind="stable")
    return np.take_along_axis(np.where(valid, labels, 0), order, 1)


def ideal_gains(labels: Gains, missed: list[list[float]]) -> Gains:
    """[R, N + most missed] gains, best first."""
    width = max((len(gains) for gains in missed), default=0)
    extra = np.zeros((len(labels), width), np.float32)
    for row, gains in enumerate(missed):
        extra[row, : len(gains)] = gains
    together = np.concatenate([labels, extra], 1)
    return np.asarray(-np.sort(-together, axis=1), np.float32)


def ndcg(gains: Gains, ideal: Gains, k: int = 10) -> PerRequest:
    """Normalised discounted cumulative gain, linear gains (Järvelin and Kekäläinen 2002). NaN: nothing relevant."""
    return _divide(_dcg(gains, k), _dcg(ideal, k))


def mrr(gains: Gains, ideal: Gains, k: int | None = None) -> PerRequest:
    """Reciprocal rank of the first relevant one within ``k`` (all by default). NaN: nothing relevant."""
    relevant = gains[:, :k] > 0
    rank = relevant.argmax(1) + 1
    return _of_relevant(np.where(relevant.any(1), 1 / rank, 0), ideal)


def hit(gains: Gains, ideal: Gains, k: int = 10) -> PerRequest:
    """Whether a relevant one stands within ``k``. NaN: nothing relevant."""
    return _of_relevant((gains[:, :k] > 0).any(1), ideal)


def recall(gains: Gains, ideal: Gains, k: int = 10) -> PerRequest:
    """Share of the relevant ones within ``k``. NaN: nothing relevant."""
    return _divide((gains[:, :k] > 0).sum(1), (ideal > 0).sum(1))


def precision(gains: Gains, ideal: Gains, k: int = 10) -> PerRequest:
    """Share of the first ``k`` places that are relevant. NaN: nothing relevant."""
    return _of_relevant((gains[:, :k] > 0).sum(1) / k, ideal)


def f1(gains: Gains, ideal: Gains, k: int = 10) -> PerRequest:
    """Harmonic mean of precision and recall at ``k``. NaN: nothing relevant."""
    p, r = precision(gains, ideal, k), recall(gains, ideal, k)
    total = p + r
    return np.where(total > 0, 2 * p * r / np.where(total > 0, total, 1), total)


def auc(scores: NDArray[np.float32], labels: Gains, valid: NDArray[np.bool_]) -> PerRequest:
    """[R] chance that a relevant candidate scores above one that is not; ties count half (Mann and Whitney 1947).
    NaN where a request has only one kind."""
    relevant = (labels > 0) & valid
    other = (labels <= 0) & valid
    # Average ranks by counting, [R, N]: those below and half of those equal.
    ordered = np.sort(np.where(other, scores, np.inf), axis=1)
    below = np.stack(
        [np.searchsorted(o, s, "left") + np.searchsorted(o, s, "right") for o, s in zip(ordered, scores, strict=True)]
    )
    wins = np.where(relevant, below / 2, 0).sum(1)
    return _divide(wins, relevant.sum(1) * other.sum(1))


def accuracy(scores: NDArray[np.float32], labels: Gains, valid: NDArray[np.bool_], threshold: float) -> PerRequest:
    """[R] share of candidates whose score is on the right side of ``threshold``."""
    right = ((scores >= threshold) == (labels > 0)) & valid
    return _divide(right.sum(1), valid.sum(1))


def _dcg(gains: Gains, k: int) -> PerRequest:
    top = gains[:, :k].astype(np.float64)
    return np.asarray((top / np.log2(np.arange(2, top.shape[1] + 2))).sum(1))


def _of_relevant(values: NDArray[np.generic], ideal: Gains) -> PerRequest:
    return np.where((ideal > 0).any(1), values, np.nan).astype(np.float64)


def _divide(above: ArrayLike, below: ArrayLike) -> PerRequest:
    part, whole = np.asarray(above, np.float64), np.asarray(below, np.float64)
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1), np.nan)
