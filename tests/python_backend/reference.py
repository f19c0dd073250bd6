"""Features in plain numpy, vectorised over batches of lines of one length: what the kernels are held to.

Written before the kernels and without them; slower by an order of magnitude.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from trirank.contract import Behaviour, Signal
from trirank_backend.features import CONTEXT, DENSE, HISTORY_EXTRA, Lines

TIME_GAPS, NEW_DAYS, DAY_S, MATCH_COVERAGE, FUZZY_SHARE = 16, 14, 86_400, 0.5, 0.6
_NONE = np.array([-1, -1, 0, 0], np.int32)[:, None, None]
_SIGNALS = np.array(
    [
        Signal.NEW_ITEM, Signal.SEEN_ITEM, Signal.SEEN_PRODUCT, Signal.SEEN_BRAND, Signal.SEEN_CATEGORY,
        Signal.PURCHASED, Signal.MATCHES_QUERY,
    ],
    np.int32,
)  # fmt: skip
_BITS = np.array([bin(value).count("1") for value in range(1 << 16)], np.uint8)


class _Batch:
    """Lines of one length, with rows and scores [B, N]."""

    def __init__(self, lines: Lines) -> None:
        count = len(lines.timestamps)
        self.rows, self.retrieval_scores = lines.rows.reshape(count, -1), lines.scores.reshape(count, -1)
        self.query, self.timestamps, self.anonymous = lines.query, lines.timestamps, lines.anonymous
        self.words = lines.words.view(np.uint8)
        self.history_rows, self.history_behaviours = lines.history_rows, lines.history_behaviours
        self.history_timestamps = lines.history_timestamps


class ReferencePacker:
    """Packer of an unfolded specification that leaves nothing out."""

    def __init__(self, spec: Any, catalogue: Any, token_idf: NDArray[np.float32], transitions: Any) -> None:
        self.spec, self.catalogue, self.token_idf = spec, catalogue, token_idf
        rows = np.repeat(np.arange(len(catalogue) + 1), np.diff(transitions.starts))
        self._follows = np.zeros((len(catalogue) + 1,) * 2, np.float32)
        self._follows[rows, transitions.rows] = transitions.weights
        slots = [at for at, name in enumerate(spec.item_fields) if name.startswith("attribute_")]
        has = np.zeros((len(catalogue) + 1, spec.vocabulary_size), np.float32)
        for slot in slots:
            ids = catalogue.fields[:, slot]
            np.add.at(has, (np.arange(len(ids)), ids), np.where(ids > 0, token_idf[ids], 0))
        lengths = np.sqrt(
            (np.where(catalogue.fields[:, slots] > 0, token_idf[catalogue.fields[:, slots]], 0) ** 2).sum(1)
        )
        self._tastes = has / np.maximum(lengths, 1e-12)[:, None]
        self._brand, self._category = spec.item_fields.index("brand"), spec.item_fields.index("category")

    def pack(self, lines: Lines) -> dict[str, NDArray[Any]]:
        """Every tensor of Packed, by line."""
        batch = _Batch(lines)
        candidates, past = self.catalogue.fields[batch.rows], self.catalogue.fields[batch.history_rows]
        dense, signals = self._dense(batch, candidates, past)
        history = np.zeros((*past.shape[:2], past.shape[2] + len(HISTORY_EXTRA)), np.int32)
        history[..., :-2] = past
        known = batch.history_rows >= 0
        history[..., -2] = np.where(known, self.spec.tables["behaviour"][0] + batch.history_behaviours, 0)
        if self.spec.timed:
            minutes = np.maximum(batch.timestamps[:, None] - batch.history_timestamps, 0) / 60
            gaps = np.minimum(np.log2(1 + minutes), TIME_GAPS - 1).astype(np.int32)
            known = known & (batch.history_timestamps >= 0)
            history[..., -1] = np.where(known, self.spec.tables["time_gap"][0] + gaps, 0)
        query = batch.query if self.spec.embed_text else np.zeros_like(batch.query)
        return {
            "history": history, "query": query, "candidates": candidates, "dense": dense,
            "context": self._context(batch), "signals": signals,
        }  # fmt: skip

    def _dense(
        self, batch: _Batch, candidates: NDArray[np.int32], history: NDArray[np.int32]
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        catalogue, rows = self.catalogue, batch.rows
        valid = rows >= 0
        dense = np.zeros((*rows.shape, len(DENSE)), np.float32)
        flags = np.zeros((*rows.shape, len(_SIGNALS)), np.int32)
        dense[..., :4] = catalogue.dense[rows]
        if (given := ~np.isnan(batch.retrieval_scores)).any():
            dense[..., 4:8] = _retrieval(batch.retrieval_scores, given & valid)
        if self.spec.timed:
            created = catalogue.created_at[rows]
            days = np.maximum(batch.timestamps[:, None] - created, 0) / DAY_S
            known = created > 0
            dense[..., 8] = np.where(known, np.log1p(days) / 5, 0)
            flags[..., 0] = known & (days < NEW_DAYS)
        if (batch.history_rows >= 0).any():
            seen, purchased = self._seen(batch, candidates, history)
            dense[..., 9:13] = np.log1p(seen)
            flags[..., 1:5] = seen > 0
            flags[..., 5] = purchased
        if batch.query.any() and catalogue.titles.shape[1]:
            dense[..., 13:19] = self._text_match(catalogue.titles[rows], batch.query)
            dense[..., 19:23] = _fuzzy_match(catalogue.trigrams[rows], batch.words)
            dense[..., 13:23] *= batch.query.any(1)[:, None, None]  # others of the batch may have no query
            flags[..., 6] = dense[..., 13] >= MATCH_COVERAGE
        dense[..., 23] = np.einsum("bl,bln->bn", _ages(batch.history_rows, 0.6),
                                   self._follows[batch.history_rows[:, :, None], rows[:, None, :]])  # fmt: skip
        taste = np.einsum("bl,blv->bv", _ages(batch.history_rows, 0.8), self._tastes[batch.history_rows])
        dense[..., 24] = np.einsum("bv,bnv->bn", taste, self._tastes[rows])
        dense *= valid[..., None]
        return dense, np.where(valid, catalogue.signals[rows] | flags @ _SIGNALS, 0).astype(np.int32, copy=False)

    def _seen(
        self, batch: _Batch, candidates: NDArray[np.int32], history: NDArray[np.int32]
    ) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
        """[B, N, 4] events of the history with the same item, product, brand, category; [B, N] whether bought."""
        products, past_rows = self.catalogue.products, batch.history_rows
        ours = np.stack(
            [batch.rows, products[batch.rows], candidates[..., self._brand], candidates[..., self._category]],
            1,
        )  # [B, 4, N]
        past = np.stack([past_rows, products[past_rows], history[..., self._brand], history[..., self._category]])
        # "None" is -1 for rows and products and 0 for fields; it must not match another "none".
        past = np.where(past > _NONE, past, -2).transpose(2, 1, 0)[..., None]  # [L, B, 4, 1]
        equal = ours == past  # [L, B, 4, N]
        bought = (batch.history_behaviours == Behaviour.PURCHASE).T[:, :, None]  # [L, B, 1]
        counts = equal.view(np.uint8).sum(0, dtype=np.uint16)  # [B, 4, N]
        return counts.transpose(0, 2, 1), (equal[:, :, 0] & bought).any(0)

    def _text_match(self, titles: NDArray[np.int32], query: NDArray[np.int32]) -> NDArray[np.float32]:
        """[B, N, 6]: query_coverage to title_length of DENSE, from titles [B, N, T] and query [B, Q]."""
        query = query[:, : int((query > 0).sum(1).max())]  # most queries are shorter than the longest allowed
        real = query > 0
        words = np.where(real, query, -1).T[:, :, None]  # [Q, B, 1]
        equal = np.ascontiguousarray(titles.transpose(2, 0, 1))[:, None] == words  # [T, Q, B, N]
        in_title, in_query = equal.any(0), equal.any(1)  # [Q, B, N], [T, B, N]
        weight = np.where(real, self.token_idf[query], 0)  # [B, Q]
        tokens = real.sum(1)  # [B]
        length = np.count_nonzero(titles, axis=2)  # [B, N]
        pairs = (equal[:-1, :-1] & equal[1:, 1:]).any(0).sum(0)
        last = in_title[np.maximum(tokens - 1, 0), np.arange(len(query))]
        return np.stack(
            [
                (in_title * weight.T[:, :, None]).sum(0) / np.maximum(weight.sum(-1), 1e-6)[:, None],
                in_query.sum(0) / np.maximum(length, 1),
                pairs / np.maximum(tokens - 1, 1)[:, None],
                last,
                np.where(in_query.any(0), 1 / (1 + in_query.argmax(0)), 0),
                length / titles.shape[2],
            ],
            axis=-1,
        ).astype(np.float32)

    def _context(self, batch: _Batch) -> NDArray[np.float32]:
        events = (batch.history_rows >= 0).sum(1)
        tokens = (batch.query > 0).sum(1)
        context = np.zeros((len(batch.rows), len(CONTEXT)), np.float32)
        context[:, 0] = batch.anonymous
        context[:, 1] = np.log1p(events) / np.log1p(self.spec.history_length)
        context[:, 2] = tokens > 0
        context[:, 3] = tokens / self.spec.query_length
        if self.spec.timed:
            turns = np.stack([batch.timestamps % DAY_S / DAY_S, batch.timestamps // DAY_S % 7 / 7], 1) * (2 * np.pi)
            context[:, 4::2] = np.sin(turns)
            context[:, 5::2] = np.cos(turns)
        return context


def _ages(history: NDArray[np.int32], decay: float) -> NDArray[np.float32]:
    """[B, L] weights of events that sum to 1: each ``decay`` times that of the next."""
    there = history >= 0
    after = there[:, ::-1].cumsum(1)[:, ::-1] - there
    weights = np.where(there, decay**after, 0)
    return (weights / np.maximum(weights.sum(1, keepdims=True), 1e-12)).astype(np.float32)


def _fuzzy_match(titles: NDArray[np.uint8], words: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[B, N, 4]: fuzzy_coverage to fuzzy_last of DENSE, from Bloom filters [B, N, 64] and [B, W, 64]."""
    count = words.any(2).sum(1)  # [B]
    words = words[:, : max(int(count.max()), 1)].view(np.uint16)  # [B, W, 32], 16 bits a look-up
    size = np.maximum(_BITS[words].sum(-1, dtype=np.int32), 1).T[:, :, None]  # [W, B, 1]
    there = words.any(2).T[:, :, None]
    ours = np.ascontiguousarray(titles.view(np.uint16).transpose(2, 0, 1))[:, None]  # [32, 1, B, N]
    shared = _BITS[ours & words.transpose(2, 1, 0)[..., None]].sum(0, dtype=np.uint16)  # [W, B, N]
    covered = np.where(there, shared / size, 0)
    words_there = np.maximum(count, 1)[:, None]
    return np.stack(
        [
            covered.sum(0) / words_there,
            (covered > FUZZY_SHARE).sum(0) / words_there,
            np.where(there, covered, 1).min(0) * (count > 0)[:, None],
            covered[np.maximum(count - 1, 0), np.arange(len(count))],
        ],
        axis=-1,
    ).astype(np.float32)


def _retrieval(scores: NDArray[np.float32], given: NDArray[np.bool_]) -> NDArray[np.float32]:
    """[B, N, 4]: given, standardised, signed log, reciprocal log rank; zeros where none was given."""
    count = np.maximum(given.sum(1, keepdims=True), 1)
    filled = np.where(given, scores, 0).astype(np.float64)
    mean = filled.sum(1, keepdims=True) / count
    centred = np.where(given, filled - mean, 0)
    deviation = np.sqrt((centred**2).sum(1, keepdims=True) / count)
    order = np.argsort(np.where(given, -filled, np.inf), axis=1, kind="stable")
    rank = 1 + np.argsort(order, axis=1, kind="stable")
    columns = (
        given,
        centred / np.maximum(deviation, 1e-6),
        np.sign(filled) * np.log1p(np.abs(filled)),
        1 / np.log2(1 + rank),
    )
    return np.where(given[..., None], np.stack(columns, axis=-1), 0).astype(np.float32)
