"""Ranking the whole catalogue: what users chose next, among all items there are.

The published protocol of sequential recommendation, without its shortcut: with ``negatives`` a choice is ranked among
so many sampled items instead, which flatters every method and not all alike (Krichene and Rendle, KDD 2020), and is
here only to compare with papers that did so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trirank_build.errors import Diverged
from trirank_build.features.examples import Examples
from trirank_build.retrieval.scores import count_above, own_scores
from trirank_build.retrieval.tasks import CatalogueTasks, Scorer, sample_negatives

_CHUNK = 256
TOP = 10


@dataclass(frozen=True)
class Found:
    """What a method made of the tasks.

    Attributes:
        ranks: [R] of the choice, from 0; items of equal score count half.
        top: [R, K] rows, best first; of sampled candidates: empty.
    """

    ranks: NDArray[np.float64]
    top: NDArray[np.int32]

    def ndcg(self, k: int = 10) -> NDArray[np.float64]:
        """[R] with one choice to find, 1 / log2(2 + rank)."""
        return np.where(self.ranks < k, 1 / np.log2(2 + self.ranks), 0)

    def hit(self, k: int = 10) -> NDArray[np.float64]:
        """[R] whether it was found; with one choice to find, also the recall."""
        return (self.ranks < k).astype(np.float64)

    def mrr(self) -> NDArray[np.float64]:
        """[R]"""
        return 1 / (1 + self.ranks)


def rank_catalogue(
    tasks: CatalogueTasks, scorer: Scorer, negatives: int | None = None, seed: int = 0, top_k: int = TOP
) -> Found:
    """Rank every task's choice among all items, or among ``negatives`` drawn from what its user never met.

    Args:
        top_k: best items to keep of each task; 0 saves a third of the time.

    Raises:
        Diverged: scores are no numbers.
    """
    ranks, tops = np.zeros(len(tasks)), np.zeros((len(tasks), 0 if negatives else min(top_k, tasks.items)), np.int32)
    rng = np.random.default_rng(seed)
    for start in range(0, len(tasks), _CHUNK):
        which = np.arange(start, min(start + _CHUNK, len(tasks)))
        scores, targets = scorer(tasks, which), tasks.targets[which]
        own = scores.of(targets[:, None])[:, 0] if negatives is not None else own_scores(scores, targets)
        if not np.isfinite(own).all():  # NaN is above nothing and below nothing, so it would look like a perfect rank
            raise Diverged("the ranker scores items with what is no number; lower learning_rate and train again")
        if negatives is not None:
            others = sample_negatives(tasks, which, negatives, rng)
            against = scores.of(others)
            ranks[which] = (against > own[:, None]).sum(1) + (against == own[:, None]).sum(1) / 2
            continue
        banned = tasks.banned(which)
        if banned is not None:
            others_seen = banned[1] != targets[banned[0]]
            banned = banned[0][others_seen], banned[1][others_seen]
        above, equal = count_above(scores, own, banned)
        ranks[which] = above + (equal - 1) / 2
        if tops.shape[1]:
            tops[which] = scores.top(tops.shape[1], banned)[0]
    return Found(ranks, tops)


def valid_ndcg(tasks: CatalogueTasks, scorer: Scorer) -> float:
    """Mean NDCG@10."""
    return float(rank_catalogue(tasks, scorer, top_k=0).ndcg().mean()) if len(tasks) else 0.0


def rank_retrieved(scores: NDArray[np.float32], tasks: CatalogueTasks, examples: Examples) -> Found:
    """Where ``scores`` [R, N] of the candidates put each task's choice; one that retrieval missed comes after all."""
    valid = examples.rows >= 0
    hit = (examples.labels > 0) & valid
    own = np.where(hit, scores, -np.inf).max(1)
    found = hit.any(1)
    others = valid & ~hit
    above = (others & (scores > own[:, None])).sum(1) + (others & (scores == own[:, None])).sum(1) / 2
    order = np.argsort(np.where(valid, -scores, np.inf), axis=1, kind="stable")[:, :TOP]
    return Found(np.where(found, above, tasks.items), np.take_along_axis(examples.rows, order, 1))
