"""Ranking the whole catalogue: what users chose next, among all items there are.

The published protocol of sequential recommendation, without its shortcut: with ``negatives`` a choice is ranked among
so many sampled items instead, which flatters every method and not all alike (Krichene and Rendle, KDD 2020), and is
here only to compare with papers that did so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from trirank.contract import Behaviour

from trirank_build.data.dataset import GAINS, Dataset
from trirank_build.errors import Diverged
from trirank_build.evaluation.contenders import HISTORY, Contender
from trirank_build.features.examples import HistoryIndex
from trirank_build.features.fitting import Features
from trirank_build.models.sequence import SequenceRanker

_CHUNK = 256
TOP = 10

Scorer = Callable[["CatalogueTasks", NDArray[np.int64]], NDArray[np.float32]]
"""Tasks and which of them [B] → scores [B, M] of all items."""


@dataclass(frozen=True)
class CatalogueTasks:
    """R choices to be found again.

    Attributes:
        users, times: [R]; what is known is what these users did before these times.
        targets: [R] rows of what they chose.
        gains: [R] what that is worth.
        exclude_seen: whether items that a user had to do with before are left out; a target never is.
        index: all events.
    """

    users: NDArray[np.int64]
    times: NDArray[np.int64]
    targets: NDArray[np.int32]
    gains: NDArray[np.float32]
    exclude_seen: bool
    index: HistoryIndex
    items: int

    @classmethod
    def of(
        cls, dataset: Dataset, split: str, features: Features, limit: int | None = None, seed: int = 0
    ) -> CatalogueTasks:
        """The choices of a split by users of whom something is known."""
        gains = np.array([GAINS.get(behaviour.name, 0) for behaviour in sorted(Behaviour)], np.float32)
        worth = [behaviour.value for behaviour, gain in zip(sorted(Behaviour), gains, strict=True) if gain > 0]
        chosen = dataset.events.filter((pl.col("split") == split) & pl.col("behaviour").is_in(worth))
        index = HistoryIndex(dataset.events, features)
        users, times = chosen["user_id"].to_numpy(), chosen["timestamp"].to_numpy()
        first, end = index.span(users, times)
        kept = np.flatnonzero(end > first)
        if limit is not None and len(kept) > limit:
            kept = np.sort(np.random.default_rng(seed).choice(kept, limit, replace=False))
        return cls(
            users=users[kept],
            times=times[kept],
            targets=features.catalogue.rows(chosen["item_id"].to_numpy())[kept],
            gains=gains[np.searchsorted(sorted(Behaviour), chosen["behaviour"].to_numpy())][kept],
            # Where time is known people come back to what they looked at; in sequences nothing is chosen twice.
            exclude_seen=not dataset.description.timed,
            index=index,
            items=len(features.catalogue),
        )

    def __len__(self) -> int:
        return len(self.users)

    def known(self) -> NDArray[np.int64]:
        """[R] events of each user before the choice."""
        first, end = self.index.span(self.users, self.times)
        return end - first

    def take(self, which: NDArray[np.int64]) -> CatalogueTasks:
        """Some of them."""
        return replace(
            self,
            users=self.users[which],
            times=self.times[which],
            targets=self.targets[which],
            gains=self.gains[which],
        )

    def histories(self, which: NDArray[np.int64], length: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Rows and behaviours [B, length], newest last, rows -1 in front."""
        rows, behaviours, _ = self.index.before(self.users[which], self.times[which], length)
        return rows, behaviours

    def seen(self, which: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Pairs of a place in ``which`` and a row that its user had to do with before."""
        return self.index.seen(self.users[which], self.times[which])


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
        scores = scorer(tasks, which).astype(np.float32, copy=True)
        at, targets = np.arange(len(which)), tasks.targets[which]
        own = scores[at, targets].copy()
        if not np.isfinite(own).all():  # NaN is above nothing and below nothing, so it would look like a perfect rank
            raise Diverged("the ranker scores items with what is no number; lower learning_rate and train again")
        if negatives is not None:
            others = sample_negatives(tasks, which, negatives, rng)
            against = scores[at[:, None], others]
            ranks[which] = (against > own[:, None]).sum(1) + (against == own[:, None]).sum(1) / 2
            continue
        if tasks.exclude_seen:
            place, rows = tasks.seen(which)
            scores[place, rows] = -np.inf
        scores[at, targets] = own
        ranks[which] = (scores > own[:, None]).sum(1) + ((scores == own[:, None]).sum(1) - 1) / 2
        if not tops.shape[1]:
            continue
        top = np.argpartition(-scores, tops.shape[1] - 1, axis=1)[:, : tops.shape[1]]
        order = np.argsort(-np.take_along_axis(scores, top, 1), axis=1, kind="stable")
        tops[which] = np.take_along_axis(top, order, 1)
    return Found(ranks, tops)


def sample_negatives(
    tasks: CatalogueTasks, which: NDArray[np.int64], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """[B, count] different rows that are neither the choice nor seen before."""
    banned = np.zeros((len(which), tasks.items), bool)
    place, rows = tasks.seen(which)
    banned[place, rows] = True
    banned[np.arange(len(which)), tasks.targets[which]] = True
    draws = np.empty((len(which), count), np.int64)
    for task in range(len(which)):
        free = np.flatnonzero(~banned[task])
        draws[task] = rng.choice(free, count, replace=len(free) < count)
    return draws


def valid_ndcg(tasks: CatalogueTasks, scorer: Scorer) -> float:
    """Mean NDCG@10."""
    return float(rank_catalogue(tasks, scorer, top_k=0).ndcg().mean()) if len(tasks) else 0.0


def contender_scorer(contender: Contender) -> Scorer:
    """Every item by what a baseline makes of the history."""
    return lambda tasks, which: contender.scores(tasks.histories(which, HISTORY)[0])


def state_scorer(model: SequenceRanker, features: Features) -> Scorer:
    """Every item by its affinity to the user's state: what pre-training teaches."""
    model.eval()
    device = next(model.parameters()).device
    with torch.inference_mode():
        fields = torch.from_numpy(features.packer.items(np.arange(len(features.catalogue), dtype=np.int32))).to(device)
        items = torch.cat([model.item_vectors(part) for part in torch.split(fields, 65_536)])

    def scores(tasks: CatalogueTasks, which: NDArray[np.int64]) -> NDArray[np.float32]:
        model.eval()
        rows, behaviours = tasks.histories(which, features.spec.history_length)
        history = torch.from_numpy(features.packer.history(rows, behaviours)).to(device)
        with torch.inference_mode():
            state = model.next_state(history)
            return np.asarray(model.logits(state, items).cpu().numpy(), np.float32)

    return scores
