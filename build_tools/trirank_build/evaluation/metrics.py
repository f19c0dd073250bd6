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
    """[R, N] gains by descending score. Ties keep the candidates' order, see ties_broken; padding comes last."""
    order = np.argsort(np.where(valid, -scores.astype(np.float64), np.inf), axis=1, kind="stable")
    return np.take_along_axis(np.where(valid, labels, 0), order, 1)


def ties_broken(scores: NDArray[np.float32], seed: int = 0) -> NDArray[np.float32]:
    """[R, N] places by score, equal scores in random order: candidates come in retrieval's, and who says the same of
    all is worth what chance is, not what retrieval is."""
    order = np.lexsort((np.random.default_rng(seed).random(scores.shape), scores), axis=1)
    places = np.empty(scores.shape, np.float32)
    np.put_along_axis(places, order, np.broadcast_to(np.arange(scores.shape[1], dtype=np.float32), scores.shape), 1)
    return places


def order_rows(scores: NDArray[np.float32], rows: NDArray[np.int32]) -> NDArray[np.int32]:
    """[R, N] catalogue rows (-1: padding) in the same order as the gains."""
    order = np.argsort(np.where(rows >= 0, -scores.astype(np.float64), np.inf), axis=1, kind="stable")
    return np.take_along_axis(rows, order, 1)


def ideal_gains(labels: Gains, missed: Gains) -> Gains:
    """[R, N + K] gains, best first, of labels [R, N] and those that retrieval missed [R, K], 0-padded."""
    return np.asarray(-np.sort(-np.concatenate([labels, missed], 1), axis=1), np.float32)


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


def coverage(top: NDArray[np.int32], items: int) -> float:
    """Share of the catalogue's ``items`` that stands in any answer; ``top`` [R, K] rows, -1 padded."""
    return len(np.unique(top[top >= 0])) / items


def diversity(top: NDArray[np.int32], fields: NDArray[np.int32]) -> PerRequest:
    """[R] mean distance of an answer's pairs: the share of ``fields`` [M + 1, F] that two items do not share, of those
    that either has (intra-list distance, Ziegler et al. 2005). NaN: fewer than two items, or nothing to compare."""
    values = fields[top]  # [R, K, F]
    left, right = np.triu_indices(top.shape[1], 1)
    one, two = values[:, left], values[:, right]  # [R, pairs, F]
    either = ((one > 0) | (two > 0)).sum(2)
    same = ((one == two) & (one > 0)).sum(2)
    counted = (top[:, left] >= 0) & (top[:, right] >= 0) & (either > 0)
    return _divide(np.where(counted, 1 - same / np.maximum(either, 1), 0).sum(1), counted.sum(1))


def novelty(top: NDArray[np.int32], counts: NDArray[np.int64]) -> PerRequest:
    """[R] mean self-information of an answer's items in bits, -log2 of their share of the training choices ``counts``
    [M], one added to each (Zhou et al. 2010). NaN: no item."""
    share = (counts + 1) / (counts + 1).sum()
    there = top >= 0
    return _divide(np.where(there, -np.log2(share)[top], 0).sum(1), there.sum(1))


def calibration(
    predicted: NDArray[np.float32], observed: NDArray[np.float32], counted: NDArray[np.bool_], bins: int = 10
) -> NDArray[np.float64]:
    """[bins, 3]: candidates, mean predicted and observed share, in bins of equally many (Guo et al., ICML 2017)."""
    order = np.argsort(predicted[counted], kind="stable")
    parts = np.array_split(np.stack([predicted[counted][order], observed[counted][order]], 1).astype(np.float64), bins)
    return np.array([[len(part), *part.mean(0)] for part in parts if len(part)])


def calibration_error(bins: NDArray[np.float64]) -> float:
    """Expected calibration error: mean distance of predicted from observed, over all candidates."""
    return float((bins[:, 0] * np.abs(bins[:, 1] - bins[:, 2])).sum() / max(bins[:, 0].sum(), 1))


def _dcg(gains: Gains, k: int) -> PerRequest:
    top = gains[:, :k].astype(np.float64)
    return np.asarray((top / np.log2(np.arange(2, top.shape[1] + 2))).sum(1))


def _of_relevant(values: NDArray[np.generic], ideal: Gains) -> PerRequest:
    return np.where((ideal > 0).any(1), values, np.nan).astype(np.float64)


def _divide(above: ArrayLike, below: ArrayLike) -> PerRequest:
    part, whole = np.asarray(above, np.float64), np.asarray(below, np.float64)
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1), np.nan)
