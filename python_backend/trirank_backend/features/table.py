"""All numbers that the ranker is given, declared once: name, input groups of a recipe that leave it out, kernel.

To add one: an entry here, beside its kernel's other features and in the order that the kernel fills them; the reference in
tests/python_backend/reference.py is its test. Columns of the packed tensors are in the order of these tables, and a release
remembers their names, so that no release meets other features than it was trained with.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

from trirank_backend.features import kernels, text_kernels


class Feature(NamedTuple):
    """One number.

    Attributes:
        groups: inputs (see INPUTS) each of which contains it.
        timed: whether it means nothing, and is left 0, where timestamps only order events.
    """

    name: str
    groups: tuple[str, ...]
    kernel: Callable[..., None]
    timed: bool = False


DENSE_TABLE = (
    Feature("price", ("price", "dense"), kernels.static),
    Feature("popularity", ("dense",), kernels.static),
    Feature("has_retrieval_score", ("retrieval",), kernels.retrieval),
    Feature("retrieval_score", ("retrieval",), kernels.retrieval),  # standardised within the request
    Feature("retrieval_score_log", ("retrieval",), kernels.retrieval),  # sign(s) log(1 + |s|)
    Feature("retrieval_rank", ("retrieval",), kernels.retrieval),  # 1 / log2(1 + rank)
    Feature("age", ("dense",), kernels.age, timed=True),  # log days since the item was created
    Feature("seen_item", ("dense",), kernels.seen),  # log(1 + events of the history with …)
    Feature("seen_product", ("dense",), kernels.seen),
    Feature("seen_brand", ("dense",), kernels.seen),
    Feature("seen_category", ("dense",), kernels.seen),
    Feature("query_coverage", ("text", "dense"), text_kernels.tokens),  # share of the query in the title, by rarity
    Feature("title_coverage", ("text", "dense"), text_kernels.tokens),  # share of the title's tokens in the query
    Feature("query_bigrams", ("text", "dense"), text_kernels.tokens),  # share of neighbours that are neighbours there
    Feature("query_last_token", ("text", "dense"), text_kernels.tokens),  # often the noun
    Feature("first_match", ("text", "dense"), text_kernels.tokens),  # 1 / (1 + place in the title)
    Feature("title_length", ("text", "dense"), text_kernels.tokens),  # share of the title's places that are filled
    Feature("fuzzy_coverage", ("text", "dense"), text_kernels.letters),  # mean share of trigrams over the words
    Feature("fuzzy_words", ("text", "dense"), text_kernels.letters),  # share of the words that are mostly there
    Feature("fuzzy_worst", ("text", "dense"), text_kernels.letters),  # smallest share
    Feature("fuzzy_last", ("text", "dense"), text_kernels.letters),  # share of the last word
)
"""Of a candidate."""
CONTEXT_TABLE = (
    Feature("anonymous", ("context",), kernels.session),
    Feature("history_length", ("context",), kernels.session),
    Feature("has_query", ("context",), kernels.session),
    Feature("query_length", ("context",), kernels.session),
    Feature("hour_sin", ("context",), kernels.clock, timed=True),
    Feature("hour_cos", ("context",), kernels.clock, timed=True),
    Feature("weekday_sin", ("context",), kernels.clock, timed=True),
    Feature("weekday_cos", ("context",), kernels.clock, timed=True),
)
"""Of a request."""
DENSE = tuple(feature.name for feature in DENSE_TABLE)
CONTEXT = tuple(feature.name for feature in CONTEXT_TABLE)
STATIC_DENSE = tuple(feature.name for feature in DENSE_TABLE if feature.kernel is kernels.static)
"""Numbers of an item that the catalogue holds: log price and log count of interactions, standardised."""
HISTORY_EXTRA = ("behaviour", "time_gap")
"""Fields of an event after those of its item."""
INPUTS = (
    "item", "brand", "category", "price", "attributes", "text", "behaviour", "time_gap", "retrieval",
    "dense", "context",
)  # fmt: skip
"""Groups of inputs that a recipe can leave out."""


class Pass(NamedTuple):
    """A kernel and the columns that it fills, in its order."""

    kernel: Callable[..., None]
    columns: tuple[int, ...]


def passes(table: tuple[Feature, ...], timed: bool) -> list[Pass]:
    """The kernels of a table, each once."""
    named = [(at, feature) for at, feature in enumerate(table) if timed or not feature.timed]
    grouped = groupby(named, key=lambda pair: pair[1].kernel)
    return [Pass(kernel, tuple(at for at, _ in members)) for kernel, members in grouped]


def left_out(table: tuple[Feature, ...], without: tuple[str, ...]) -> list[int]:
    """Columns of a table that a recipe leaves out."""
    return [at for at, feature in enumerate(table) if set(feature.groups) & set(without)]


def fields_left_out(names: tuple[str, ...], without: tuple[str, ...]) -> list[int]:
    """The same of an item's or an event's fields."""
    return [at for at, name in enumerate(names) if _group(name) in without]


def _group(field: str) -> str:
    return {"attribute": "attributes", "title": "text"}.get(field.split("_")[0], field)
