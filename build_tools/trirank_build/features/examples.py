"""Requests of a dataset → batches of packed tensors, by the same code that serves."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from trirank import History, RankRequest
from trirank.contract import ANONYMOUS_USER
from trirank_backend.features import Lines, Packed, even_starts
from trirank_backend.text import query_trigrams
from trirank_backend.words.lexicon import QueryWords

from trirank_build.data.dataset import OPTIMUM, POSITIONS, Dataset
from trirank_build.errors import BadData
from trirank_build.features.fitting import Features
from trirank_build.features.negatives import NegativeSampler
from trirank_build.features.runs import run_begins
from trirank_build.words.lessons import fold_of

_CHUNK = 20_000
"""Requests that are unpacked at a time."""


class HistoryIndex:
    """All events, found by user and time: what was known at any moment, and nothing later."""

    def __init__(self, events: pl.DataFrame, features: Features) -> None:
        columns = ("user_id", "timestamp", "item_id", "behaviour")
        events = events.select(columns).sort("user_id", "timestamp", maintain_order=True)
        of, self._times = events["user_id"].to_numpy(), events["timestamp"].to_numpy()
        begins = run_begins(of)
        self._users = of[begins]
        # One number for user and time, ascending: times count from the first one, and each user has room for all.
        self._first, last = (int(self._times.min()), int(self._times.max())) if len(of) else (0, 0)
        self._room = last - self._first + 2
        if len(self._users) * self._room > np.iinfo(np.int64).max:
            raise BadData(
                f"{len(self._users):,} users with events over {self._room:,} seconds are more than can be told apart; "
                "look at the unit of the log's times"
            )
        self._keys = (np.cumsum(begins) - 1) * self._room + (self._times - self._first)
        self._rows = features.catalogue.rows(events["item_id"].to_numpy())
        self._behaviours = events["behaviour"].to_numpy().astype(np.int8)

    def before(
        self, users: NDArray[np.int64], times: NDArray[np.int64], length: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
        """Rows, behaviours, timestamps [B, length] of the newest events before each time, newest last."""
        if not len(self._users):
            empty = np.zeros((len(users), length), np.int32)
            return empty - 1, empty, empty.astype(np.int64)
        first, end = self.span(users, times)
        at = end[:, None] - np.arange(length, 0, -1)[None, :]
        there = at >= first[:, None]
        at = np.where(there, at, 0)
        return (
            np.where(there, self._rows[at], -1).astype(np.int32),
            np.where(there, self._behaviours[at], 0).astype(np.int32),
            np.where(there, self._times[at], 0),
        )

    def span(self, users: NDArray[np.int64], times: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[first, end) of each user's events before each time; empty for unknown users."""
        if not len(self._users):
            return np.zeros(len(users), np.int64), np.zeros(len(users), np.int64)
        place = np.minimum(np.searchsorted(self._users, users), len(self._users) - 1)
        begin = place.astype(np.int64) * self._room
        since = np.clip(times, self._first, self._first + self._room - 1) - self._first
        first, end = np.searchsorted(self._keys, begin), np.searchsorted(self._keys, begin + since)
        return first, np.where(self._users[place] == users, end, first)

    def seen(self, users: NDArray[np.int64], times: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """All that each user had to do with before each time, as pairs: number of the user in ``users``, row."""
        first, end = self.span(users, times)
        lengths = end - first
        which = np.repeat(np.arange(len(users)), lengths)
        at = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths) + np.repeat(first, lengths)
        return which, self._rows[at]


@dataclass(frozen=True)
class Batch:
    """Packed tensors with what came of them.

    Attributes:
        labels: [B, N] float32 gains; 0 where padded.
        valid: [B, N] bool.
        rows: [B, N] int32 catalogue rows.
        scores: [B, N] float32 retrieval scores; NaN: none.
        listed: how many of the N come from the request's own list; further negatives follow.
        positions: [B, N] int32 where each stood on the page, from 1; 0: not known.
    """

    packed: Packed
    labels: NDArray[np.float32]
    valid: NDArray[np.bool_]
    rows: NDArray[np.int32]
    scores: NDArray[np.float32]
    listed: int
    positions: NDArray[np.int32]


class Examples:
    """The requests of one split as padded arrays; R requests of at most N candidates.

    They are read from the dataset's file in chunks. With a ``directory`` the arrays are files that are mapped rather
    than held, so that more requests can be trained on than fit in memory; whoever gave it removes it.

    Attributes:
        rows: [R, N] int32; -1: padding.
        scores: [R, N] float32; NaN: none.
        labels: [R, N] float32.
        positions: [R, N] int32 on the page that was shown, from 1; 0: not known.
        missed: [R, K] float32 gains that retrieval did not find, padded with 0.
        users, times: [R] int64.
        optimum: [R, N] float32 what a synthetic shop drew its choices from; None elsewhere.
        queries: [R] as they were typed, of requests in memory; empty otherwise.
    """

    def __init__(
        self,
        dataset: Dataset,
        features: Features,
        count: int,
        width: int,
        missed: int = 0,
        optimum: bool = False,
        directory: Path | None = None,
        split: str = "",
    ) -> None:
        """Room for ``count`` requests of at most ``width`` candidates and ``missed`` further gains."""
        spec = features.spec
        self._features, self.tasks, self.ids = features, spec.tasks, features.catalogue.ids
        self._history = HistoryIndex(dataset.events, features)
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

        def array(name: str, shape: tuple[int, ...], dtype: Any, fill: float) -> NDArray[Any]:
            if directory is None:
                return np.full((count, *shape), fill, dtype)
            mapped: NDArray[Any] = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
                directory / f"{name}.npy", "w+", np.dtype(dtype), (count, *shape)
            )
            mapped[:] = fill
            return mapped

        self.rows = array("rows", (width,), np.int32, -1)
        self.scores = array("scores", (width,), np.float32, np.nan)
        self.labels = array("labels", (width,), np.float32, 0)
        self.positions = array("positions", (width,), np.int32, 0)
        self.missed = array("missed", (missed,), np.float32, 0)
        self.users = array("users", (), np.int64, 0)
        self.times = array("times", (), np.int64, 0)
        self.optimum = array("optimum", (width,), np.float32, -np.inf) if optimum else None
        self.queries: list[str] = []
        self._query = array("query", (spec.query_length,), np.int32, 0)
        self._words = array("words", query_trigrams([""]).shape[1:], np.uint64, 0)
        self._split = split
        self._fold = array("fold", (), np.int8, -1)
        empty = QueryWords.none(0, features.packer.lexicon.encoded.shape[1])
        if spec.words:
            columns = {
                name: array(f"understood_{name}", c.shape[1:], c.dtype, 0) for name, c in empty._asdict().items()
            }
            self._understood = QueryWords(**columns)
        else:  # one row of nothing for all
            self._understood = QueryWords(*(np.broadcast_to(c[0], (count, *c.shape[1:])) for c in QueryWords.none(1)))

    @classmethod
    def read(
        cls,
        dataset: Dataset,
        split: str,
        features: Features,
        limit: int | None = None,
        seed: int = 0,
        directory: Path | None = None,
        since: int | None = None,
    ) -> Examples:
        """The requests of a split, or ``limit`` of them drawn at random, or those of the time ``since`` and later.

        Raises:
            BadData: the split has none.
        """
        sizes = dataset.sizes(split)
        if not sizes.requests:
            raise BadData(f"the dataset has no {split} requests; bring a longer log, or prepare it again")
        kept = np.ones(sizes.requests, bool)
        if limit is not None and sizes.requests > limit:
            kept[:] = False
            kept[np.random.default_rng(seed).choice(sizes.requests, limit, replace=False)] = True
        if since is not None:
            times = dataset.requests.filter(pl.col("split") == split).select("timestamp").collect()["timestamp"]
            kept &= (times >= since).to_numpy()
            if not kept.any():
                raise BadData(f"the dataset has no {split} requests since {since}, when the run to update had learned "
                              "from what there was; add a newer log")  # fmt: skip
        examples = cls(
            dataset, features, int(kept.sum()), sizes.candidates, sizes.missed, sizes.has_optimum, directory, split
        )
        read = filled = 0
        for chunk in dataset.chunks(split, _CHUNK):
            part = chunk.filter(pl.Series(kept[read : read + chunk.height]))
            read += chunk.height
            examples._fill(slice(filled, filled + part.height), part)
            filled += part.height
            if directory is None:
                examples.queries += part["query"].to_list()
        return examples

    def joined(self, other: Examples) -> Examples:
        """These requests and those of ``other``, which must be of the same dataset."""
        both = copy.copy(self)
        for name, fill in (("rows", -1), ("scores", np.nan), ("labels", 0), ("positions", 0), ("missed", 0)):
            one, two = getattr(self, name), getattr(other, name)
            width = max(one.shape[1], two.shape[1])
            parts = [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=fill) for a in (one, two)]
            setattr(both, name, np.concatenate(parts))
        for name in ("users", "times", "_query", "_words", "_fold"):
            setattr(both, name, np.concatenate([getattr(self, name), getattr(other, name)]))
        both._understood = QueryWords._make(
            np.concatenate(columns) for columns in zip(self._understood, other._understood, strict=True)
        )
        both.queries = self.queries + other.queries
        both.optimum = None
        return both

    def seen_by(self, features: Features) -> Examples:
        """The same requests as other features of the same catalogue pack them."""
        if features is self._features:
            return self
        other = copy.copy(self)
        other._features = features
        return other

    def _fill(self, at: slice, part: pl.DataFrame) -> None:
        lengths = part["item_ids"].list.len().to_numpy().astype(np.int64)
        there = np.arange(self.rows.shape[1])[None, :] < lengths[:, None]
        self.rows[at][there] = self._features.catalogue.rows(part["item_ids"].explode().to_numpy())
        self.scores[at][there] = part["retrieval_scores"].explode().to_numpy()
        self.labels[at][there] = part["labels"].explode().to_numpy()
        if POSITIONS in part.columns:
            self.positions[at][there] = part[POSITIONS].explode().to_numpy()
        if self.optimum is not None:
            self.optimum[at][there] = part[OPTIMUM].explode().to_numpy()
        for row, gains in zip(self.missed[at], part["missed"].to_list(), strict=True):
            row[: len(gains)] = gains
        self.users[at], self.times[at] = part["user_id"].to_numpy(), part["timestamp"].to_numpy()
        queries = part["query"].to_list()
        self._query[at] = self._features.text.encode(queries, self._features.spec.query_length)
        self._words[at] = query_trigrams(queries)
        if self._features.spec.words:
            self._understand(at, queries)

    def _understand(self, at: slice, queries: list[str]) -> None:
        """Read queries; those of training with lessons that they have no part in."""
        reader, folds = self._features.text.reader, self._features.folds if self._split == "train" else ()
        assert reader is not None
        whole = QueryWords._make(column[at] for column in self._understood)
        of_fold = np.array([fold_of(reader.key(query)) if folds and query else -1 for query in queries], np.int8)
        self._fold[at] = of_fold
        for fold in np.unique(of_fold):
            own = np.flatnonzero(of_fold == fold)
            texts = [queries[each] for each in own]
            told = (self._features if fold < 0 else folds[fold]).text.understood(texts)
            if fold >= 0 and whole.encoded.shape[1]:
                told = told._replace(encoded=reader.encoded(texts))
            for column, values in zip(whole, told, strict=True):
                column[own] = values

    def __len__(self) -> int:
        return len(self.rows)

    def known(self, which: NDArray[np.int64]) -> NDArray[np.int64]:
        """[B] events of each user before the request."""
        first, end = self._history.span(self.users[which], self.times[which])
        return end - first

    def histories(self, which: NDArray[np.int64], length: int) -> NDArray[np.int32]:
        """[B, length] rows of what each user did before the request, newest last, -1 in front."""
        return self._history.before(self.users[which], self.times[which], length)[0]

    def batch(
        self,
        which: NDArray[np.int64],
        rows: NDArray[np.int32],
        scores: NDArray[np.float32],
        labels: NDArray[np.float32],
        listed: int,
        positions: NDArray[np.int32],
    ) -> Batch:
        """Pack the given candidates [B, N] of the requests ``which`` [B]."""
        spec = self._features.spec
        past = self._history.before(self.users[which], self.times[which], spec.history_length)
        lines = Lines(
            starts=even_starts(*rows.shape),
            rows=rows.reshape(-1).astype(np.int32, copy=False),
            scores=scores.reshape(-1).astype(np.float32, copy=False),
            query=self._query[which],
            words=self._words[which],
            timestamps=self.times[which],
            anonymous=self.users[which] == ANONYMOUS_USER,
            history_rows=past[0],
            history_behaviours=past[1],
            history_timestamps=past[2],
            understood=QueryWords._make(column[which] for column in self._understood),
        )
        packed = self._pack(which, lines, rows.shape[1])
        return Batch(packed, labels, rows >= 0, rows, scores, listed, positions)

    def _pack(self, which: NDArray[np.int64], lines: Lines, width: int) -> Packed:
        """Tensors of lines of one width, each with the lessons on words that its query has no part in."""
        folds = self._fold[which]
        if not self._features.folds or (folds < 0).all():
            return self._features.packer.pack(lines).by_line()
        whole: Packed | None = None
        for fold in np.unique(folds):
            features = self._features if fold < 0 else self._features.folds[fold]
            own = np.flatnonzero(folds == fold)
            places = (own[:, None] * width + np.arange(width)).reshape(-1)
            part = features.packer.pack(_some(lines, own, places, width)).by_line()
            if whole is None:
                whole = Packed(*(np.zeros((len(which), *column.shape[1:]), column.dtype) for column in part))
            for column, values in zip(whole, part, strict=True):
                column[own] = values
        assert whole is not None
        return whole

    def request(self, at: int, scenario: str) -> RankRequest:
        """A request of those in memory as a client would send it, for all its candidates back, with its history."""
        given = self.rows[at] >= 0
        length = self._features.spec.history_length
        rows, behaviours, times = (a[0] for a in self._history.before(self.users[[at]], self.times[[at]], length))
        there, scores = rows >= 0, self.scores[at, given]
        past = None
        if there.any():
            past = History(
                item_ids=self.ids[rows[there]], behaviours=behaviours[there], timestamps=times[there]
            )  # fmt: skip
        return RankRequest(
            item_ids=self.ids[self.rows[at, given]],
            user_id=None if self.users[at] == ANONYMOUS_USER else int(self.users[at]),
            query=self.queries[at],
            scenario=scenario,
            top_k=int(given.sum()),
            retrieval_scores=None if np.isnan(scores).any() else scores,
            history=past,
            timestamp=int(self.times[at]),
        )

    def whole(self, which: NDArray[np.int64]) -> Batch:
        """All candidates of the requests ``which`` [B], as they would be served."""
        return self.batch(
            which, self.rows[which], self.scores[which], self.labels[which], self.rows.shape[1], self.positions[which]
        )

    def sample(
        self,
        which: NDArray[np.int64],
        rng: np.random.Generator,
        candidates: int,
        sampler: NegativeSampler | None,
        with_scores: bool,
    ) -> Batch:
        """Training candidates: what was chosen, a sample of what was not, and drawn items where no scores go.

        A request whose choice retrieval missed has no score for it; then none of its candidates keeps one, as in
        serving, where scores come for all candidates or for none.
        """
        rows, scores, labels = self.rows[which], self.scores[which], self.labels[which]
        positions = self.positions[which]
        if candidates < rows.shape[1]:
            priority = rng.random(rows.shape) + (labels > 0) - 2 * (rows < 0)
            kept = np.sort(np.argpartition(-priority, candidates - 1, axis=1)[:, :candidates], axis=1)
            at = np.arange(len(which))[:, None]
            rows, scores, labels = rows[at, kept], scores[at, kept], labels[at, kept]
            positions = positions[at, kept]
        listed = rows.shape[1]
        if with_scores:
            unscored = (np.isnan(scores) & (rows >= 0)).any(1)
            scores = np.where(unscored[:, None], np.nan, scores)
        else:
            scores = np.full_like(scores, np.nan)
            if sampler is not None:
                chosen = np.where(labels > 0, rows, -1)
                drawn = sampler.draw_each(rng, len(which), chosen)
                taken = (drawn[:, :, None] == chosen[:, None, :]).any(2)
                rows = np.concatenate([rows, np.where(taken, -1, drawn)], 1)
                labels = np.concatenate([labels, np.zeros(drawn.shape, np.float32)], 1)
                scores = np.full(rows.shape, np.nan, np.float32)
                positions = np.concatenate([positions, np.zeros(drawn.shape, np.int32)], 1)
        return self.batch(which, rows, scores, labels, listed, positions)


def _some(lines: Lines, which: NDArray[np.int64], places: NDArray[np.int64], width: int) -> Lines:
    """Some lines of those that have ``width`` places each."""
    parts: dict[str, Any] = {
        name: QueryWords._make(column[which] for column in value) if name == "understood" else value[which]
        for name, value in lines._asdict().items()
        if name not in ("starts", "rows", "scores")
    }
    return Lines(starts=even_starts(len(which), width), rows=lines.rows[places], scores=lines.scores[places], **parts)
