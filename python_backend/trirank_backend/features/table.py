"""All numbers that the ranker is given, declared once: name, input groups of a recipe that leave it out, kernel.

To add one: an entry here, and the line in its kernel that fills ``DENSE_AT.name`` (or ``CONTEXT_AT.name``); a kernel
of its own is called in ``kernels.fill``. The reference in tests/python_backend/reference.py is its test. Columns of
the packed tensors are in the order of these tables, and a release remembers their names, so that it never meets other
features than it was trained with. Those of WORDS_TABLE come last, and only where a recipe asks for them.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any, NamedTuple


class Feature(NamedTuple):
    """One number.

    Attributes:
        groups: inputs (see INPUTS) each of which contains it.
        kernel: which of the kernels fills it.
        timed: whether it means nothing, and is left 0, where timestamps only order events.
    """

    name: str
    groups: tuple[str, ...]
    kernel: str
    timed: bool = False


DENSE_TABLE = (
    Feature("price", ("price", "dense"), "static"),
    Feature("popularity", ("dense",), "static"),
    Feature("sentiment", ("reviews", "dense"), "static"),  # share of its reviews that are positive, standardised
    Feature("reviews", ("reviews", "dense"), "static"),  # log of how many there are
    Feature("has_retrieval_score", ("retrieval",), "retrieval"),
    Feature("retrieval_score", ("retrieval",), "retrieval"),  # standardised within the request
    Feature("retrieval_score_log", ("retrieval",), "retrieval"),  # sign(s) log(1 + |s|), comparable between requests
    Feature("retrieval_rank", ("retrieval",), "retrieval"),  # 1 / log2(1 + rank)
    Feature("age", ("dense",), "age", timed=True),  # log days since the item was created
    Feature("seen_item", ("dense",), "seen"),  # log(1 + events of the history with …)
    Feature("seen_product", ("dense",), "seen"),
    Feature("seen_brand", ("dense",), "seen"),
    Feature("seen_category", ("dense",), "seen"),
    Feature("query_coverage", ("text", "dense"), "tokens"),  # share of the query's tokens in the title, by rarity
    Feature("title_coverage", ("text", "dense"), "tokens"),  # share of the title's tokens in the query
    Feature("query_bigrams", ("text", "dense"), "tokens"),  # share of the query's neighbours that are so in the title
    Feature("query_last_token", ("text", "dense"), "tokens"),  # whether the last token, often the noun, is there
    Feature("first_match", ("text", "dense"), "tokens"),  # 1 / (1 + place of the title's first token in the query)
    Feature("title_length", ("text", "dense"), "tokens"),  # share of the title's places that are filled
    # Letter trigrams of the query's words found in the title forgive spelling and inflection:
    Feature("fuzzy_coverage", ("text", "dense"), "letters"),  # mean share over the words
    Feature("fuzzy_words", ("text", "dense"), "letters"),  # share of the words that are mostly there
    Feature("fuzzy_worst", ("text", "dense"), "letters"),  # smallest share
    Feature("fuzzy_last", ("text", "dense"), "letters"),  # share of the last word
    Feature("transition", ("transitions",), "transition"),  # log count of what followed the history's events
    Feature("attribute_match", ("attributes", "dense"), "attribute_match"),  # cosine with those of the history
)
"""Of a candidate."""
_WORDS = ("words", "text", "dense")
WORDS_TABLE = (
    Feature("word_bm25", _WORDS, "understood"),  # of stems, Robertson and Zaragoza 2009
    Feature("word_coverage", _WORDS, "understood"),  # share of the query's words in the title, by rarity
    Feature("word_share", _WORDS, "understood"),  # the same, each alike
    Feature("word_last", _WORDS, "understood"),  # whether the query's last word is there
    Feature("word_numbers", _WORDS, "understood"),  # share of its numbers that are there; 0.5: it has none
    Feature("word_measures", _WORDS, "understood"),  # share of its numbers that are there before what follows them
    Feature("word_pairs", _WORDS, "understood"),  # share of its neighbours that are so in the title
    Feature("word_span", _WORDS, "understood"),  # how close together the title has them
    Feature("title_word_coverage", _WORDS, "understood"),  # share of the title's words in the query, by rarity
    Feature("title_start", _WORDS, "understood"),  # whether the title's first word, often the brand, is in the query
    Feature("head_coverage", _WORDS, "understood"),  # share of the query's words in the part that names the product
    Feature("head_found", _WORDS, "understood"),  # whether that part's last word, the noun, is in the query
    Feature("head_last", _WORDS, "understood"),  # whether it is the query's last word
    # How near the nearest word of the title is to each of the query's: by letters, by meaning, by either.
    Feature("letters_mean", _WORDS, "understood"),  # by rarity
    Feature("letters_least", _WORDS, "understood"),
    Feature("letters_last", _WORDS, "understood"),  # of the last word
    Feature("meaning_mean", _WORDS, "understood"),
    Feature("meaning_least", _WORDS, "understood"),
    Feature("meaning_last", _WORDS, "understood"),
    Feature("likeness_mean", _WORDS, "understood"),
    Feature("likeness_least", _WORDS, "understood"),
    Feature("head_meaning", _WORDS, "understood"),  # of any word of the query and the last two of that part
    Feature("told_mean", _WORDS, "understood"),  # how much the title's words are asked for by the query's (translation)
    Feature("told_least", _WORDS, "understood"),
    Feature("vector_cosine", _WORDS, "understood"),  # of the sums of their words' vectors
    Feature("trigram_bm25", _WORDS, "understood"),  # of letter trigrams
    Feature("neighbours_lift", _WORDS, "understood"),  # like what was better than its list after queries like it
    Feature("neighbours_mass", _WORDS, "understood"),  # like what was good after queries like it
    Feature("lesson", _WORDS, "understood"),  # learned weights of words that are missing, of heads, of what is besides
    Feature("query_words", _WORDS, "understood"),  # log of how many there are
    Feature("query_rarity", _WORDS, "understood"),  # their mean rarity
    Feature("query_unknown", _WORDS, "understood"),  # share that no title has
    Feature("query_intent", _WORDS, "intent"),  # P(category | query) of the item's category
    Feature("encoder_cosine", ("encoder", *_WORDS), "encoded"),  # of query and title, by a team's own text encoder
)
"""Of a candidate, where features.words is on: how well the query's words and the title's understand each other."""
CONTEXT_TABLE = (
    Feature("anonymous", ("context",), "session"),
    Feature("history_length", ("context",), "session"),
    Feature("has_query", ("context",), "session"),
    Feature("query_length", ("context",), "session"),
    Feature("hour_sin", ("context",), "clock", timed=True),
    Feature("hour_cos", ("context",), "clock", timed=True),
    Feature("weekday_sin", ("context",), "clock", timed=True),
    Feature("weekday_cos", ("context",), "clock", timed=True),
)
"""Of a request."""
DENSE = tuple(feature.name for feature in DENSE_TABLE)
WORDS = tuple(feature.name for feature in WORDS_TABLE)
CONTEXT = tuple(feature.name for feature in CONTEXT_TABLE)
DENSE_AT: Any = namedtuple("DENSE_AT", DENSE + WORDS)(*range(len(DENSE + WORDS)))
CONTEXT_AT: Any = namedtuple("CONTEXT_AT", CONTEXT)(*range(len(CONTEXT)))
"""Name → column; numba takes both for constants."""
STATIC_DENSE = tuple(feature.name for feature in DENSE_TABLE if feature.kernel == "static")
"""Numbers of an item that the catalogue holds: log price and log count of interactions, standardised."""
HISTORY_EXTRA = ("behaviour", "time_gap")
"""Fields of an event after those of its item."""
INPUTS = (
    "item", "brand", "category", "price", "attributes", "reviews", "text", "words", "encoder", "behaviour",
    "time_gap", "retrieval", "transitions", "dense", "context",
)  # fmt: skip
"""Groups of inputs that a recipe can leave out."""


def table_of(dense: tuple[str, ...]) -> tuple[Feature, ...]:
    """The declarations of a release's dense columns."""
    return DENSE_TABLE if len(dense) == len(DENSE) else DENSE_TABLE + WORDS_TABLE


def left_out(table: tuple[Feature, ...], without: tuple[str, ...]) -> list[int]:
    """Columns of a table that a recipe leaves out."""
    return [at for at, feature in enumerate(table) if set(feature.groups) & set(without)]


def fields_left_out(names: tuple[str, ...], without: tuple[str, ...]) -> list[int]:
    """The same of an item's or an event's fields."""
    return [at for at, name in enumerate(names) if _group(name) in without]


def _group(field: str) -> str:
    return {"attribute": "attributes", "title": "text"}.get(field.split("_")[0], field)
