"""Requests on their way to the ranker: what was looked up of them, and what they are packed into.

A *line* is one row of a request: a user, a moment, a query and candidates. Candidates of all lines of a batch stand one
after the other in flat columns, so that a line costs what it has and not what the widest of its company has.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trirank_backend.words.lexicon import QueryWords


class Items(NamedTuple):
    """The catalogue as kernels read it: M items and the row for "no item", see catalogue.Catalogue. All read-only.

    Attributes:
        brands, categories: [M+1] int32 ids of the joint vocabulary, 0: missing.
        prices, popularity: [M+1] float32, standardised logarithms.
        sentiment, reviews: [M+1] float32 standardised share of positive reviews, log of their number; 0: none.
        words: [M+1, 8] uint64, the titles' trigrams.
        token_idf: [V] float32, rarity of each id of the joint vocabulary as a token of titles, or as an attribute.
        attributes: [M+1, S] int32 numbers below A, 0: missing.
        attribute_idf: [A] float32, their rarity, from token_idf.
        attribute_scale: [M+1] float32, one over the length of an item's vector of attributes; 0 without any.
        follower_starts, followers, follower_weights: see transitions.Transitions.
    """

    brands: NDArray[np.int32]
    categories: NDArray[np.int32]
    products: NDArray[np.int32]
    prices: NDArray[np.float32]
    popularity: NDArray[np.float32]
    sentiment: NDArray[np.float32]
    reviews: NDArray[np.float32]
    created_at: NDArray[np.int64]
    signals: NDArray[np.int32]
    titles: NDArray[np.int32]
    words: NDArray[np.uint64]
    token_idf: NDArray[np.float32]
    attributes: NDArray[np.int32]
    attribute_idf: NDArray[np.float32]
    attribute_scale: NDArray[np.float32]
    follower_starts: NDArray[np.int64]
    followers: NDArray[np.int32]
    follower_weights: NDArray[np.float32]


class Lines(NamedTuple):
    """B lines after look-ups, S places for candidates in all.

    Attributes:
        starts: [B+1] int64; line b has the places ``starts[b]`` to ``starts[b + 1]``.
        rows: [S] int32 catalogue rows, -1: padding or unknown.
        scores: [S] float32 retrieval scores; NaN: none was given.
        query: [B, Q] int32 token ids, 0-padded behind.
        words: [B, W, 8] uint64, see text.query_trigrams.
        timestamps: [B] int64 seconds since 1970.
        anonymous: [B] bool.
        history_rows, history_behaviours: [B, H] int32, newest last; rows are -1 where there is no event.
        history_timestamps: [B, H] int64; histories.UNKNOWN_TIME where nobody knows.
        understood: see words.lexicon.QueryWords.
    """

    starts: NDArray[np.int64]
    rows: NDArray[np.int32]
    scores: NDArray[np.float32]
    query: NDArray[np.int32]
    words: NDArray[np.uint64]
    timestamps: NDArray[np.int64]
    anonymous: NDArray[np.bool_]
    history_rows: NDArray[np.int32]
    history_behaviours: NDArray[np.int32]
    history_timestamps: NDArray[np.int64]
    understood: QueryWords


class Packed(NamedTuple):
    """The ranker's inputs (see contract.ranker_inputs), and signals int32 [S] for the rerank policies.

    ``candidates``, ``dense`` and ``signals`` have the places of Lines as their first axis, or after ``by_line`` the two
    axes [B, N].
    """

    history: NDArray[np.int32]
    query: NDArray[np.int32]
    candidates: NDArray[np.int32]
    dense: NDArray[np.float32]
    context: NDArray[np.float32]
    signals: NDArray[np.int32]

    def tensors(self) -> dict[str, NDArray[np.int32] | NDArray[np.float32]]:
        """The ranker's inputs by name."""
        return {name: getattr(self, name) for name in ("history", "query", "candidates", "dense", "context")}

    def by_line(self) -> Packed:
        """Lines of equal length stacked; nothing is copied."""
        lines = len(self.context)
        return self._replace(
            candidates=self.candidates.reshape(lines, -1, self.candidates.shape[-1]),
            dense=self.dense.reshape(lines, -1, self.dense.shape[-1]),
            signals=self.signals.reshape(lines, -1),
        )


def even_starts(lines: int, width: int) -> NDArray[np.int64]:
    """``starts`` of lines that have ``width`` places each."""
    return np.arange(lines + 1, dtype=np.int64) * width
