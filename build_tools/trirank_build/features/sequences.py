"""The users' training events as sequences for pre-training: what came next, everywhere it is known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadData
from trirank_build.features.fitting import Features
from trirank_build.features.runs import run_begins


class SequenceBatch(NamedTuple):
    """B sequences of at most T events.

    Attributes:
        history: [B, T, F+2] int32, as the ranker takes it; oldest first, padded in front. Time gaps are left out: at
            serving they count from the request, and here each event is a moment of its own.
        rows: [B, T] int32 catalogue rows; -1: padding.
        following: [B, T] int32 rows of what came next; -1 where that is not known, or the same item again.
    """

    history: NDArray[np.int32]
    rows: NDArray[np.int32]
    following: NDArray[np.int32]


class Sequences:
    """Windows of up to L + 1 events of one user each, every event the next one of exactly one window."""

    def __init__(self, dataset: Dataset, features: Features, since: int | None = None) -> None:
        """``since``: windows that end at this time or later alone."""
        events = dataset.training_events()
        user = events["user_id"].to_numpy()
        self._features = features
        self._rows = features.catalogue.rows(events["item_id"].to_numpy())
        self._behaviours = events["behaviour"].to_numpy().astype(np.int32)
        first = np.flatnonzero(run_begins(user))
        last = np.append(first[1:], len(user))
        length = features.spec.history_length
        # Cut from the newest event backwards, so that the window that is short is the oldest.
        windows = -(-np.maximum(last - first - 1, 0) // length)
        of = np.repeat(np.arange(len(first)), windows)
        nth = np.arange(len(of)) - np.repeat(np.cumsum(windows) - windows, windows)
        self._end = last[of] - nth * length
        self._start = np.maximum(self._end - length - 1, first[of])
        # A window in which nothing but the same item follows has nothing to teach.
        changes = np.cumsum(np.append(0, self._rows[1:] != self._rows[:-1])) if len(user) else np.zeros(0, np.int64)
        teaching = changes[self._end - 1] > changes[self._start]
        if since is not None:
            teaching &= events["timestamp"].to_numpy()[self._end - 1] >= since
        self._start, self._end = self._start[teaching], self._end[teaching]
        if not len(self._start):
            raise BadData("no user chose two different items in the training split, so there is no next item to "
                          'pre-train on; say pretraining.objective = "none", or bring a longer log')  # fmt: skip

    def __len__(self) -> int:
        return len(self._start)

    def plan(self, rng: np.random.Generator, batch_size: int) -> list[NDArray[np.int64]]:
        """All windows in a new order, cut into batches. Short ones are padded to the longest of their batch: batches of
        alike lengths would be faster, but every step would follow users of one kind, and NDCG fell when we tried."""
        order = rng.permutation(len(self))
        return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]

    def batch(self, which: NDArray[np.int64]) -> SequenceBatch:
        """The windows ``which``."""
        start, end = self._start[which], self._end[which]
        longest = int((end - start).max())
        at = end[:, None] - np.arange(longest, 0, -1)[None, :]
        known = at >= start[:, None]
        at = np.where(known, at, 0)
        rows = np.where(known, self._rows[at], -1).astype(np.int32)
        behaviours = np.where(known, self._behaviours[at], 0)
        now, after = rows[:, :-1], rows[:, 1:]
        history = self._features.packer.history(now, behaviours[:, :-1])
        following = np.where((now >= 0) & (after != now), after, -1)
        return SequenceBatch(history, now, following)
