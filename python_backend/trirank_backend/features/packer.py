"""Requests → the ranker's tensors. Training, evaluation and serving all pack with this; there is no second one."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trirank_backend.catalogue import Catalogue, read_only
from trirank_backend.features.batch import Items, Lines, Packed
from trirank_backend.features.kernels import events, fill
from trirank_backend.features.spec import FeatureSpec
from trirank_backend.features.table import (
    CONTEXT,
    CONTEXT_TABLE,
    HISTORY_EXTRA,
    STATIC_DENSE,
    fields_left_out,
    left_out,
    table_of,
)
from trirank_backend.features.transitions import Transitions
from trirank_backend.features.word_kernels import Scratch
from trirank_backend.words.lexicon import Lessons, Lexicon, no_lexicon


class Packer:
    """Packs batches for one catalogue.

    Args:
        token_idf: [V] float32, rarity of each id of the joint vocabulary as a token of titles, or as an attribute.
        transitions: which item follows which; None: nothing was counted.
        lexicon, lessons: of words, where the specification has them understood.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        catalogue: Catalogue,
        token_idf: NDArray[np.float32],
        transitions: Transitions | None = None,
        lexicon: Lexicon | None = None,
        lessons: Lessons | None = None,
    ) -> None:
        self.spec = spec
        self.catalogue = catalogue
        self.token_idf = token_idf
        self.transitions = Transitions.none(len(catalogue)) if transitions is None else transitions
        self.lexicon = no_lexicon(len(catalogue)) if lexicon is None else lexicon
        words = len(self.lexicon.rarity) - 1
        self.lessons = Lessons.none(words) if lessons is None else lessons
        self.kernel_items = _items(spec, catalogue, token_idf, self.transitions)
        self._kernel_words = (
            Lexicon(*(read_only(column) for column in self.lexicon)),
            Lessons(*(read_only(column) for column in self.lessons)),
        )
        # Of each thread its own, and kept: fresh memory would cost more than what is calculated in it.
        self._scratch = threading.local()
        self._hidden_dense = left_out(table_of(spec.dense), spec.without)
        self._hidden_context = left_out(CONTEXT_TABLE, spec.without)
        names = ("row",) if spec.folded else spec.item_fields
        self._hidden_fields = fields_left_out(names, spec.without)
        self._hidden_history = fields_left_out((*names, *HISTORY_EXTRA), spec.without)
        self._shows_query = spec.embed_text and "text" not in spec.without

    def pack(self, lines: Lines) -> Packed:
        """All tensors of a batch. An item's features depend on nothing but the item and its line."""
        places = len(lines.rows)
        dense = np.zeros((places, len(self.spec.dense)), np.float32)
        context = np.zeros((len(lines.timestamps), len(CONTEXT)), np.float32)
        signals = np.empty(places, np.int32)
        if (scratch := getattr(self._scratch, "room", None)) is None:
            scratch = self._scratch.room = Scratch.of(len(self.lexicon.rarity) - 1)
        fill(self.kernel_items, lines, self.spec.timed, dense, context, signals, *self._kernel_words, scratch)
        # A policy's signals do not depend on what the ranker is allowed to see.
        if self._hidden_dense:
            dense[:, self._hidden_dense] = 0
        if self._hidden_context:
            context[:, self._hidden_context] = 0
        query = lines.query if self._shows_query else np.zeros_like(lines.query)
        history = self._events(
            lines.history_rows, lines.history_behaviours, lines.history_timestamps, lines.timestamps, self.spec.timed
        )
        return Packed(history, query, self.items(lines.rows), dense, context, signals)

    def items(self, rows: NDArray[np.int32]) -> NDArray[np.int32]:
        """[..., F] the fields of items as the ranker sees them; folded: [..., 1] their rows + 1, 0 for none."""
        if self.spec.folded:
            return (rows + 1)[..., None].astype(np.int32, copy=False)
        fields = self.catalogue.fields[rows]
        if self._hidden_fields:
            fields[..., self._hidden_fields] = 0
        return fields

    def history(self, rows: NDArray[np.int32], behaviours: NDArray[np.int32]) -> NDArray[np.int32]:
        """[B, H, F+2] a history as the ranker sees it, of any length H, seen from no particular moment."""
        rows, behaviours = np.ascontiguousarray(rows, np.int32), np.ascontiguousarray(behaviours, np.int32)
        return self._events(rows, behaviours, np.zeros(rows.shape, np.int64), np.zeros(len(rows), np.int64), False)

    def _events(
        self,
        rows: NDArray[np.int32],
        behaviours: NDArray[np.int32],
        then: NDArray[np.int64],
        now: NDArray[np.int64],
        timed: bool,
    ) -> NDArray[np.int32]:
        items, tables = self.items(rows), self.spec.tables
        history = np.zeros((*rows.shape, items.shape[2] + len(HISTORY_EXTRA)), np.int32)
        history[..., : items.shape[2]] = items
        events(rows, behaviours, then, now, timed, tables["behaviour"][0], tables["time_gap"][0], history)
        if self._hidden_history:
            history[..., self._hidden_history] = 0
        return history


def _items(spec: FeatureSpec, catalogue: Catalogue, token_idf: NDArray[np.float32], transitions: Transitions) -> Items:
    """The catalogue as kernels read it."""
    slots = [at for at, name in enumerate(spec.item_fields) if name.startswith("attribute_")]
    first, size = spec.tables.get("attribute", (0, 1))
    attributes = np.ascontiguousarray(np.maximum(catalogue.fields[:, slots] - first, 0), np.int32)
    idf = np.concatenate([np.zeros(1, np.float32), token_idf[first + 1 : first + size]])
    length = np.sqrt((idf[attributes] ** 2).sum(1))
    columns: dict[str, NDArray[Any]] = {
        "prices": catalogue.dense[:, STATIC_DENSE.index("price")],
        "popularity": catalogue.dense[:, STATIC_DENSE.index("popularity")],
        "sentiment": catalogue.dense[:, STATIC_DENSE.index("sentiment")],
        "reviews": catalogue.dense[:, STATIC_DENSE.index("reviews")],
        "brands": catalogue.fields[:, spec.item_fields.index("brand")],
        "categories": catalogue.fields[:, spec.item_fields.index("category")],
        "products": catalogue.products,
        "created_at": catalogue.created_at,
        "signals": catalogue.signals,
        "titles": catalogue.titles,
        "words": catalogue.trigrams.view(np.uint64),
        "token_idf": token_idf,
        "attributes": attributes,
        "attribute_idf": idf,
        "attribute_scale": np.divide(1, length, out=np.zeros(len(length), np.float32), where=length > 0),
        "follower_starts": transitions.starts,
        "followers": transitions.rows,
        "follower_weights": transitions.weights,
    }
    return Items(**{name: read_only(column) for name, column in columns.items()})
