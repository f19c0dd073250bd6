"""Requests → the ranker's tensors. Training, evaluation and serving all call ``pack``; there is no second one.

Everything is vectorised over the whole batch: B requests, N candidates each, L events of history, F fields.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from trirank.contract import Behaviour, PackedShape, Signal

from trirank_backend.catalogue import Catalogue
from trirank_backend.errors import InvalidRelease

STATIC_DENSE = ("price", "popularity")
"""Numbers of an item that the catalogue holds: log price and log count of interactions, standardised."""
DENSE = (
    *STATIC_DENSE,
    "has_retrieval_score",
    "retrieval_score",  # standardised within the request
    "retrieval_score_log",  # sign(s) log(1 + |s|), comparable between requests
    "retrieval_rank",  # 1 / log2(1 + rank)
    "age",  # log days since the item was created
    "seen_item",  # log(1 + events of the history with …)
    "seen_product",
    "seen_brand",
    "seen_category",
    "query_coverage",  # share of the query's tokens in the title, weighted by rarity
    "title_coverage",  # share of the title's tokens in the query
    "query_bigrams",  # share of the query's neighbouring tokens that are neighbours in the title
    "query_last_token",  # whether the last token, often the noun, is in the title
    "first_match",  # 1 / (1 + place of the title's first token that is in the query)
    "title_length",  # share of the title's places that are filled
    # Letter trigrams of the query's words found in the title forgive spelling and inflection:
    "fuzzy_coverage",  # mean share over the words
    "fuzzy_words",  # share of the words that are mostly there
    "fuzzy_worst",  # smallest share
    "fuzzy_last",  # share of the last word
)
CONTEXT = (
    "anonymous",
    "history_length",
    "has_query",
    "query_length",
    "hour_sin",
    "hour_cos",
    "weekday_sin",
    "weekday_cos",
)
INPUTS = (
    "item", "brand", "category", "price", "attributes", "text", "behaviour", "time_gap", "retrieval",
    "dense", "context",
)  # fmt: skip
"""Groups of inputs that a recipe can leave out."""
HISTORY_EXTRA = ("behaviour", "time_gap")
"""Fields of an event after those of its item."""
TIME_GAPS = 16
"""Buckets of log2(minutes since the event)."""
MATCH_COVERAGE = 0.5
"""From this share of the query on, a candidate counts as matching it."""
NEW_DAYS = 14
DAY_S = 86_400
FUZZY_SHARE = 0.6
"""From this share of its trigrams on, a word of the query counts as there."""
_NONE = np.array([-1, -1, 0, 0], np.int32)[:, None, None]
_SIGNALS = np.array(
    [
        Signal.NEW_ITEM,
        Signal.SEEN_ITEM,
        Signal.SEEN_PRODUCT,
        Signal.SEEN_BRAND,
        Signal.SEEN_CATEGORY,
        Signal.PURCHASED,
        Signal.MATCHES_QUERY,
    ],
    np.int32,
)
_BITS = np.array([bin(value).count("1") for value in range(1 << 16)], np.uint8)


@dataclass(frozen=True)
class FeatureSpec:
    """What was fixed when the features were fitted on the training split.

    All categorical values share one vocabulary in which each table has its own range; 0 is "missing".

    Attributes:
        history_length: L.
        query_length: Q.
        item_fields: names of the F fields of an item, e.g. ``item, category, brand, price, title_0, …``.
        tables: table name → (first id, size) in the joint vocabulary.
        tasks: names of the T score columns.
        timed: whether timestamps are times; if not they only order events.
        embed_text: whether the ranker sees the query's tokens (and items have title fields); if not, text only
            counts through how well query and title match.
        folded: rows of the catalogue, the one for "no item" included, where the ranker has one vector a row instead
            of summing those of its fields; the packed field of an item is then its row + 1. 0: not folded.
    """

    history_length: int
    query_length: int
    item_fields: tuple[str, ...]
    tables: dict[str, tuple[int, int]]
    tasks: tuple[str, ...]
    timed: bool = True
    embed_text: bool = True
    without: tuple[str, ...] = ()
    dense: tuple[str, ...] = field(default=DENSE)
    context: tuple[str, ...] = field(default=CONTEXT)
    folded: int = 0

    @property
    def vocabulary_size(self) -> int:
        """Rows of an embedding table over the joint vocabulary."""
        return max(first + size for first, size in self.tables.values())

    @property
    def shape(self) -> PackedShape:
        """Sizes of the packed tensors."""
        item_fields = 1 if self.folded else len(self.item_fields)
        return PackedShape(
            history_length=self.history_length,
            history_fields=item_fields + len(HISTORY_EXTRA),
            query_length=self.query_length,
            item_fields=item_fields,
            dense=len(self.dense),
            context=len(self.context),
            tasks=len(self.tasks),
        )

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> FeatureSpec:
        """Read what ``save`` wrote.

        Raises:
            InvalidRelease: it is missing, damaged, or of features that this code does not make.
        """
        try:
            raw: dict[str, Any] = json.loads(path.read_text())
            raw["tables"] = {name: (first, size) for name, (first, size) in raw["tables"].items()}
            fixed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
            spec = cls(**fixed)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InvalidRelease(f"feature specification {path} cannot be read ({error}); train again") from error
        if spec.dense != DENSE or spec.context != CONTEXT:
            raise InvalidRelease(
                f"{path} was fitted for dense {spec.dense} and context {spec.context}, this version makes "
                f"{DENSE} and {CONTEXT}; train again, or install the version that trained it"
            )
        return spec


@dataclass(frozen=True)
class RequestBatch:
    """B requests after look-ups.

    Attributes:
        rows: [B, N] int32 catalogue rows, -1: padding or unknown.
        retrieval_scores: [B, N] float32; NaN: none was given.
        query: [B, Q] int32 token ids.
        query_trigrams: [B, W, 64] uint8, see text.query_trigrams.
        timestamps: [B] int64 seconds since 1970.
        anonymous: [B] bool.
        history_rows, history_behaviours, history_timestamps: [B, L], newest last, rows -1 where there is none.
    """

    rows: NDArray[np.int32]
    retrieval_scores: NDArray[np.float32]
    query: NDArray[np.int32]
    query_trigrams: NDArray[np.uint8]
    timestamps: NDArray[np.int64]
    anonymous: NDArray[np.bool_]
    history_rows: NDArray[np.int32]
    history_behaviours: NDArray[np.int32]
    history_timestamps: NDArray[np.int64]


@dataclass(frozen=True)
class Packed:
    """The ranker's inputs (see contract.ranker_inputs), and signals int32 [B, N] for the rerank policies."""

    history: NDArray[np.int32]
    query: NDArray[np.int32]
    candidates: NDArray[np.int32]
    dense: NDArray[np.float32]
    context: NDArray[np.float32]
    signals: NDArray[np.int32]

    def tensors(self) -> dict[str, NDArray[np.int32] | NDArray[np.float32]]:
        """The ranker's inputs by name."""
        return {name: getattr(self, name) for name in ("history", "query", "candidates", "dense", "context")}


class Packer:
    """Packs batches for one catalogue.

    Args:
        token_idf: [V] float32, rarity of each id of the joint vocabulary as a token of titles.
    """

    def __init__(self, spec: FeatureSpec, catalogue: Catalogue, token_idf: NDArray[np.float32]) -> None:
        self.spec = spec
        self.catalogue = catalogue
        self.token_idf = token_idf
        fields = spec.item_fields
        self._brand, self._category = fields.index("brand"), fields.index("category")
        self._behaviour_first = spec.tables["behaviour"][0]
        self._gap_first = spec.tables["time_gap"][0]
        self._hidden = _hidden(spec)

    def pack(self, batch: RequestBatch) -> Packed:
        """All tensors of a batch. An item's features depend on nothing but the item and the request."""
        candidates = self.catalogue.fields[batch.rows]  # [B, N, F]
        gaps = None
        if self.spec.timed:
            minutes = np.maximum(batch.timestamps[:, None] - batch.history_timestamps, 0) / 60
            gaps = np.minimum(np.log2(1 + minutes), TIME_GAPS - 1).astype(np.int32)
        past = self.catalogue.fields[batch.history_rows]  # [B, L, F]
        dense, signals = self._dense(batch, candidates, past)
        if self.spec.folded:  # fields that the recipe leaves out are left out of the folded vectors
            candidates, past = self.items(batch.rows), self.items(batch.history_rows)
        history = self._events(past, batch.history_rows, batch.history_behaviours, gaps)
        query = batch.query if self.spec.embed_text else np.zeros_like(batch.query)
        context = self._context(batch)
        if self.spec.without:  # a policy's signals do not depend on what the ranker sees
            if "text" in self.spec.without:
                query = np.zeros_like(query)
            for tensor, columns in zip((history, candidates, dense, context), self._hidden, strict=True):
                tensor[..., columns] = 0
        return Packed(history, query, candidates, dense, context, signals)

    def items(self, rows: NDArray[np.int32]) -> NDArray[np.int32]:
        """[..., F] the fields of items as the ranker sees them; folded: [..., 1] their rows + 1, 0 for none."""
        if self.spec.folded:
            return (rows + 1)[..., None].astype(np.int32, copy=False)
        fields = self.catalogue.fields[rows]
        fields[..., self._hidden[1]] = 0
        return fields

    def history(self, rows: NDArray[np.int32], behaviours: NDArray[np.int32]) -> NDArray[np.int32]:
        """[B, L, F+2] a history as the ranker sees it, of any length, seen from no particular moment."""
        items = self.items(rows) if self.spec.folded else self.catalogue.fields[rows]
        history = self._events(items, rows, behaviours, None)
        history[..., self._hidden[0]] = 0
        return history

    def _events(
        self,
        items: NDArray[np.int32],
        rows: NDArray[np.int32],
        behaviours: NDArray[np.int32],
        gaps: NDArray[np.int32] | None,
    ) -> NDArray[np.int32]:
        history = np.zeros((*items.shape[:2], items.shape[2] + len(HISTORY_EXTRA)), np.int32)
        history[..., :-2] = items
        known = rows >= 0
        history[..., -2] = np.where(known, self._behaviour_first + behaviours, 0)
        if gaps is not None:
            history[..., -1] = np.where(known, self._gap_first + gaps, 0)
        return history

    def _dense(
        self, batch: RequestBatch, candidates: NDArray[np.int32], history: NDArray[np.int32]
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        # A request is small, so what counts is the number of numpy calls: kinds that are treated alike share one.
        catalogue, rows = self.catalogue, batch.rows
        valid = rows >= 0
        dense = np.zeros((*rows.shape, len(DENSE)), np.float32)
        flags = np.zeros((*rows.shape, len(_SIGNALS)), np.int32)
        dense[..., :2] = catalogue.dense[rows]
        if (given := ~np.isnan(batch.retrieval_scores)).any():
            dense[..., 2:6] = _retrieval(batch.retrieval_scores, given & valid)
        if self.spec.timed:
            created = catalogue.created_at[rows]
            days = np.maximum(batch.timestamps[:, None] - created, 0) / DAY_S
            known = created > 0
            dense[..., 6] = np.where(known, np.log1p(days) / 5, 0)
            flags[..., 0] = known & (days < NEW_DAYS)
        if (batch.history_rows >= 0).any():
            seen, purchased = self._seen(batch, candidates, history)
            dense[..., 7:11] = np.log1p(seen)
            flags[..., 1:5] = seen > 0
            flags[..., 5] = purchased
        if batch.query.any() and catalogue.titles.shape[1]:
            dense[..., 11:17] = self._text_match(catalogue.titles[rows], batch.query)
            dense[..., 17:21] = _fuzzy_match(catalogue.trigrams[rows], batch.query_trigrams)
            dense[..., 11:21] *= batch.query.any(1)[:, None, None]  # others of the batch may have no query
            flags[..., 6] = dense[..., 11] >= MATCH_COVERAGE
        dense *= valid[..., None]
        return dense, np.where(valid, catalogue.signals[rows] | flags @ _SIGNALS, 0).astype(np.int32, copy=False)

    # The three below put the axis that is summed over first: numpy then adds whole rows, several times faster than
    # reducing many short ones.

    def _seen(
        self, batch: RequestBatch, candidates: NDArray[np.int32], history: NDArray[np.int32]
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

    def _context(self, batch: RequestBatch) -> NDArray[np.float32]:
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


def _hidden(spec: FeatureSpec) -> tuple[list[int], list[int], list[int], list[int]]:
    """Columns of history, candidates, dense and context that ``spec.without`` names."""
    without = set(spec.without)
    item_fields = ("row",) if spec.folded else spec.item_fields
    fields = [
        at
        for at, name in enumerate(item_fields)
        if name in without
        or (name.startswith("attribute_") and "attributes" in without)
        or (name.startswith("title_") and "text" in without)
    ]
    extra = [len(item_fields) + at for at, name in enumerate(HISTORY_EXTRA) if name in without]
    retrieval = range(DENSE.index("has_retrieval_score"), DENSE.index("retrieval_rank") + 1)
    groups = {
        "retrieval": retrieval,
        "dense": [at for at in range(len(DENSE)) if at not in retrieval],
        "text": range(DENSE.index("query_coverage"), len(DENSE)),
        "price": [DENSE.index("price")],
    }
    dense = sorted({column for name in without & groups.keys() for column in groups[name]})
    return fields + extra, fields, dense, list(range(len(CONTEXT))) if "context" in without else []


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
