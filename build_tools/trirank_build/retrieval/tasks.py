"""Choices to be found again among all items, and what scores all items.

As a service takes them and as the published protocols of sequential recommendation do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from trirank.contract import Behaviour

from trirank_build.data.dataset import GAINS, Dataset
from trirank_build.errors import BadData
from trirank_build.features.examples import HistoryIndex
from trirank_build.features.fitting import Features
from trirank_build.models.sequence import SequenceRanker
from trirank_build.retrieval.scores import BLOCK, Contender, Pairs, Products, Scores, scores_of

HISTORY = 50
"""Newest events that a contender sees."""

Scorer = Callable[["CatalogueTasks", NDArray[np.int64]], Scores]
"""Tasks and which of them [B] → scores of all items."""


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

    def seen(self, which: NDArray[np.int64]) -> Pairs:
        """Pairs of a place in ``which`` and a row that its user had to do with before."""
        return self.index.seen(self.users[which], self.times[which])

    def banned(self, which: NDArray[np.int64]) -> Pairs | None:
        """What of ``seen`` is not to be offered; None: all may be."""
        return self.seen(which) if self.exclude_seen else None


def sample_negatives(
    tasks: CatalogueTasks, which: NDArray[np.int64], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """[B, count] different rows that are neither the choice nor seen before; of few items some may come twice."""
    if tasks.items > BLOCK:
        return _sample_of_many(tasks, which, count, rng)
    banned = np.zeros((len(which), tasks.items), bool)
    place, rows = tasks.seen(which)
    banned[place, rows] = True
    banned[np.arange(len(which)), tasks.targets[which]] = True
    draws = np.empty((len(which), count), np.int64)
    for task in range(len(which)):
        free = np.flatnonzero(~banned[task])
        draws[task] = rng.choice(free, count, replace=len(free) < count)
    return draws


def _sample_of_many(
    tasks: CatalogueTasks, which: NDArray[np.int64], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """The same where a draw is seldom one of those that are not wanted: draw, and draw those again."""
    place, rows = tasks.seen(which)
    numbers = np.arange(len(which), dtype=np.int64)
    unwanted = np.concatenate([place * tasks.items + rows, numbers * tasks.items + tasks.targets[which]])
    met = int(np.bincount(np.unique(unwanted) // tasks.items).max(initial=0))
    if 2 * (met + count) > tasks.items:
        raise BadData(
            f"{count:,} items that a user never met are to be drawn of {tasks.items:,}, of which one user met {met:,}; "
            "draw half of the others at most"
        )
    draws = rng.integers(tasks.items, size=(len(which), count))
    while True:
        keys = numbers[:, None] * tasks.items + draws
        again = np.isin(keys, unwanted)
        order = np.argsort(keys, axis=1, kind="stable")
        ordered = np.take_along_axis(keys, order, 1)
        twice = np.concatenate([np.zeros((len(which), 1), bool), ordered[:, 1:] == ordered[:, :-1]], 1)
        again[numbers[:, None], order] |= twice
        if not again.any():
            return draws
        draws[again] = rng.integers(tasks.items, size=int(again.sum()))


def contender_scorer(contender: Contender) -> Scorer:
    """Every item by what a baseline makes of the history."""
    return lambda tasks, which: scores_of(contender, tasks.histories(which, HISTORY)[0])


def state_scorer(model: SequenceRanker, features: Features) -> Scorer:
    """Every item by its affinity to the user's state: what pre-training teaches."""
    model.eval()
    device = next(model.parameters()).device
    both = item_vectors(model, features)
    items, prior = both[:, :-1], both[:, -1]

    def scores(tasks: CatalogueTasks, which: NDArray[np.int64]) -> Scores:
        model.eval()
        rows, behaviours = tasks.histories(which, features.spec.history_length)
        history = torch.from_numpy(features.packer.history(rows, behaviours)).to(device)
        with torch.inference_mode():
            states = model.comparable(model.next_state(history), items[:1])[0]
        return Products(states, items, prior)

    return scores


def item_vectors(model: SequenceRanker, features: Features) -> Tensor:
    """[M, D + 1] all items as a state's product is taken with them, and in the last column what is added to it."""
    device = next(model.parameters()).device
    count, nobody = len(features.catalogue), torch.zeros(1, model.prior.in_features, device=device)
    both = torch.empty(count, model.prior.in_features + 1, device=device)
    with torch.inference_mode():
        for first in range(0, count, BLOCK):
            rows = np.arange(first, min(first + BLOCK, count), dtype=np.int32)
            vectors = model.item_vectors(torch.from_numpy(features.packer.items(rows)).to(device))
            part = both[first : first + BLOCK]
            _, part[:, :-1], part[:, -1] = model.comparable(nobody, vectors)
    return both
