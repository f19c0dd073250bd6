"""Requests of a dataset → batches of packed tensors, by the same code that serves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from trirank.contract import ANONYMOUS_USER
from trirank_backend.features import Packed, RequestBatch
from trirank_backend.text import query_trigrams

from trirank_build.data.dataset import Dataset
from trirank_build.features.fitting import Features

_TIME_BITS = 40


class HistoryIndex:
    """All events, found by user and time: what was known at any moment, and nothing later."""

    def __init__(self, events: pl.DataFrame, features: Features) -> None:
        events = events.sort("user_id", "timestamp", maintain_order=True)
        self._users, user = np.unique(events["user_id"].to_numpy(), return_inverse=True)
        self._times = events["timestamp"].to_numpy()
        self._keys = (user.astype(np.int64) << _TIME_BITS) + self._times
        self._rows = features.catalogue.rows(events["item_id"].to_numpy())
        self._behaviours = events["behaviour"].to_numpy().astype(np.int32)

    def before(
        self, users: NDArray[np.int64], times: NDArray[np.int64], length: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
        """Rows, behaviours, timestamps [B, length] of the newest events before each time, newest last."""
        if not len(self._users):
            empty = np.zeros((len(users), length), np.int32)
            return empty - 1, empty, empty.astype(np.int64)
        place = np.minimum(np.searchsorted(self._users, users), len(self._users) - 1)
        known = self._users[place] == users
        first = np.searchsorted(self._keys, place.astype(np.int64) << _TIME_BITS)
        end = np.searchsorted(self._keys, (place.astype(np.int64) << _TIME_BITS) + times)
        at = end[:, None] - np.arange(length, 0, -1)[None, :]
        there = (at >= first[:, None]) & known[:, None]
        at = np.where(there, at, 0)
        return (
            np.where(there, self._rows[at], -1).astype(np.int32),
            np.where(there, self._behaviours[at], 0).astype(np.int32),
            np.where(there, self._times[at], 0),
        )


@dataclass(frozen=True)
class Batch:
    """Packed tensors with what came of them.

    Attributes:
        labels: [B, N] float32 gains; 0 where padded.
        valid: [B, N] bool.
    """

    packed: Packed
    labels: NDArray[np.float32]
    valid: NDArray[np.bool_]


class Examples:
    """The requests of one split as padded arrays; R requests of at most N candidates.

    Attributes:
        rows: [R, N] int32; -1: padding.
        scores: [R, N] float32; NaN: none.
        labels: [R, N] float32.
        missed: R lists of gains that retrieval did not find.
    """

    def __init__(
        self, dataset: Dataset, split: str, features: Features, limit: int | None = None, seed: int = 0
    ) -> None:
        requests = dataset.split(split)
        if limit is not None and requests.height > limit:
            requests = requests.sample(limit, seed=seed).sort("timestamp", maintain_order=True)
        self.requests = requests
        self._features = features
        self._history = HistoryIndex(dataset.events, features)
        self._users = requests["user_id"].to_numpy()
        self._times = requests["timestamp"].to_numpy()
        self._query = features.text.encode(requests["query"].to_list(), features.spec.query_length)
        self._trigrams = query_trigrams(requests["query"].to_list())
        lengths = requests["item_ids"].list.len().to_numpy().astype(np.int64)
        there = np.arange(lengths.max())[None, :] < lengths[:, None]
        self.rows = np.full(there.shape, -1, np.int32)
        self.rows[there] = features.catalogue.rows(requests["item_ids"].explode().to_numpy())
        self.scores = np.full(there.shape, np.nan, np.float32)
        self.scores[there] = requests["retrieval_scores"].explode().to_numpy()
        self.labels = np.zeros(there.shape, np.float32)
        self.labels[there] = requests["labels"].explode().to_numpy()
        self.missed: list[list[float]] = requests["missed"].to_list()

    def __len__(self) -> int:
        return len(self.rows)

    def batch(
        self,
        which: NDArray[np.int64],
        rows: NDArray[np.int32],
        scores: NDArray[np.float32],
        labels: NDArray[np.float32],
    ) -> Batch:
        """Pack the given candidates [B, N] of the requests ``which`` [B]."""
        spec = self._features.spec
        past = self._history.before(self._users[which], self._times[which], spec.history_length)
        packed = self._features.packer.pack(
            RequestBatch(
                rows=rows,
                retrieval_scores=scores,
                query=self._query[which],
                query_trigrams=self._trigrams[which],
                timestamps=self._times[which],
                anonymous=self._users[which] == ANONYMOUS_USER,
                history_rows=past[0],
                history_behaviours=past[1],
                history_timestamps=past[2],
            )
        )
        return Batch(packed, labels, rows >= 0)

    def whole(self, which: NDArray[np.int64]) -> Batch:
        """All candidates of the requests ``which`` [B], as they would be served."""
        return self.batch(which, self.rows[which], self.scores[which], self.labels[which])

    def sample(
        self,
        which: NDArray[np.int64],
        rng: np.random.Generator,
        candidates: int,
        random_negatives: int,
        with_scores: bool,
    ) -> Batch:
        """Training candidates: what was chosen, a sample of what was not, and random items where no scores go.

        A request whose choice retrieval missed has no score for it; then none of its candidates keeps one, as in
        serving, where scores come for all candidates or for none.
        """
        rows, scores, labels = self.rows[which], self.scores[which], self.labels[which]
        if candidates < rows.shape[1]:
            priority = rng.random(rows.shape) + (labels > 0) - 2 * (rows < 0)
            kept = np.sort(np.argpartition(-priority, candidates - 1, axis=1)[:, :candidates], axis=1)
            at = np.arange(len(which))[:, None]
            rows, scores, labels = rows[at, kept], scores[at, kept], labels[at, kept]
        if with_scores:
            unscored = (np.isnan(scores) & (rows >= 0)).any(1)
            scores = np.where(unscored[:, None], np.nan, scores)
        else:
            scores = np.full_like(scores, np.nan)
            if random_negatives:
                drawn = rng.integers(len(self._features.catalogue), size=(len(which), random_negatives)).astype(
                    np.int32
                )
                taken = (drawn[:, :, None] == np.where(labels > 0, rows, -1)[:, None, :]).any(2)
                rows = np.concatenate([rows, np.where(taken, -1, drawn)], 1)
                labels = np.concatenate([labels, np.zeros(drawn.shape, np.float32)], 1)
                scores = np.full(rows.shape, np.nan, np.float32)
        return self.batch(which, rows, scores, labels)
