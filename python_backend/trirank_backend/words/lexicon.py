"""What a release knows of words: arrays that kernels read, mapped into memory.

Words have numbers from 1 to V, the most frequent first; 0 is none, or one that no title has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trirank_backend.errors import InvalidRelease

FOLDER = "words"
QUERY_WORDS = 10
"""Words of a query that are read."""
TITLE_WORDS = 24
TRIGRAMS = 64
"""Letter trigrams of a title or a query that are read."""
TRIGRAM_HASHES = 1 << 15
DIM = 64
"""Width of words' vectors."""
VECTORS = 3
"""Of a query: its own, and what was better than its list, and good, after queries like it."""
INTENTS = 16
"""Categories that a query may ask for, the likeliest ones."""
FULL = 255.0
"""What a likeness of 1 is stored as; of vectors' numbers 127 is 1."""
LETTERS, NUMBER, UNIT = 0, 1, 2
"""Kinds of words."""


class Lexicon(NamedTuple):
    """What titles alone tell, of M items and V words.

    Attributes:
        titles: [M+1, TITLE_WORDS] int32, 0-padded behind.
        heads: [M+1] int32 how many of them name the product.
        trigrams: [M+1, TRIGRAMS] int32 hashes of the titles' letter trigrams from 1, 0-padded.
        vectors: [M+1, DIM] int8, 127 times a vector of length 1; zeros where there is none.
        rarity: [V+1] float32, log of one over the share of titles that have the word.
        kinds: [V+1] int8.
        trigram_rarity: [TRIGRAM_HASHES+1] float32.
        word_vectors: [V+1, DIM] float32, of length 1 or 0.
        near_starts: [V+2] int64; what is near word w is at ``near_starts[w]`` to ``near_starts[w + 1]``.
        near_words: [E] int32.
        near_letters: [E] uint8 share of trigrams that both have (Jaccard), times FULL.
        near_meaning: [E] uint8 cosine of their vectors, times FULL.
        mean_length: [1] float32 words of a title.
        encoded: [M+1, H] int8, 127 times the titles' vectors by a team's own encoder; H = 0 without one.
    """

    titles: NDArray[np.int32]
    heads: NDArray[np.int32]
    trigrams: NDArray[np.int32]
    vectors: NDArray[np.int8]
    rarity: NDArray[np.float32]
    kinds: NDArray[np.int8]
    trigram_rarity: NDArray[np.float32]
    word_vectors: NDArray[np.float32]
    near_starts: NDArray[np.int64]
    near_words: NDArray[np.int32]
    near_letters: NDArray[np.uint8]
    near_meaning: NDArray[np.uint8]
    mean_length: NDArray[np.float32]
    encoded: NDArray[np.int8]


class Lessons(NamedTuple):
    """What training requests tell of words, queries and titles.

    Attributes:
        told_starts: [V+2] int64; titles' words that word w of a query asks for.
        told_words: [E] int32.
        told: [E] uint8 how much each is asked for; FULL: as much as w itself.
        pair_starts: [V+2] int64; heads' words after a query that ends with w.
        pair_words: [P] int32.
        pair_weights: [P] float32.
        missing, head, extra: [V+1] float32 weights of a query's word that the title lacks, and of a head's word and
            of any word of the title that the query lacks.
        queries: [Q, DIM] float32 of length 1, those of training.
        intent_classes: [C] int32 ids, in the joint vocabulary, of the categories that queries asked for.
        intent_prior, intent_sizes: [C] float32 logs of how often each was asked for, and of how many words with.
        intent_starts: [V+2] int64; categories that word w was used for.
        intent_places: [I] int32 places in ``intent_classes``.
        intent_weights: [I] float32 what the word adds to the category's logarithm (naive Bayes).
        intent_temperature: [1] float32 what the sums are divided by.
        lifts, masses: [Q, DIM] float32 sums of their titles' vectors, weighted by how much better than its list's
            mean each was, and by how good it was.
    """

    told_starts: NDArray[np.int64]
    told_words: NDArray[np.int32]
    told: NDArray[np.uint8]
    pair_starts: NDArray[np.int64]
    pair_words: NDArray[np.int32]
    pair_weights: NDArray[np.float32]
    missing: NDArray[np.float32]
    head: NDArray[np.float32]
    extra: NDArray[np.float32]
    queries: NDArray[np.float32]
    lifts: NDArray[np.float32]
    masses: NDArray[np.float32]
    intent_classes: NDArray[np.int32]
    intent_prior: NDArray[np.float32]
    intent_sizes: NDArray[np.float32]
    intent_starts: NDArray[np.int64]
    intent_places: NDArray[np.int32]
    intent_weights: NDArray[np.float32]
    intent_temperature: NDArray[np.float32]

    @classmethod
    def none(cls, words: int) -> Lessons:
        """Of V words, nothing learned."""
        starts, weights = np.zeros(words + 2, np.int64), np.zeros(words + 1, np.float32)
        pairs, told, values = np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(0, np.float32)
        profiles = np.zeros((0, DIM), np.float32)
        return cls(
            starts, pairs, told, starts, pairs, values, weights, weights, weights, *(profiles,) * 3,
            pairs, values, values, starts, pairs, values, np.ones(1, np.float32),
        )  # fmt: skip


class QueryWords(NamedTuple):
    """B queries.

    Attributes:
        ids: [B, QUERY_WORDS] int32, in their order, 0-padded behind.
        unknown: [B] float32 share of the words that no title has.
        trigrams: [B, TRIGRAMS] int32 hashes from 1, 0-padded.
        vectors: [B, VECTORS, DIM] float32.
        intents: [B, INTENTS] int32 categories that it most likely asks for, ids of the joint vocabulary, 0-padded.
        shares: [B, INTENTS] float32 how likely each is.
        encoded: [B, H] float32 by a team's own encoder, of length 1; H = 0 without one.
    """

    ids: NDArray[np.int32]
    unknown: NDArray[np.float32]
    trigrams: NDArray[np.int32]
    vectors: NDArray[np.float32]
    intents: NDArray[np.int32]
    shares: NDArray[np.float32]
    encoded: NDArray[np.float32]

    @classmethod
    def none(cls, count: int, width: int = 0) -> QueryWords:
        """Of queries that nobody reads; ``width``: H."""
        return cls(
            np.zeros((count, QUERY_WORDS), np.int32), np.zeros(count, np.float32),
            np.zeros((count, TRIGRAMS), np.int32), np.zeros((count, VECTORS, DIM), np.float32),
            np.zeros((count, INTENTS), np.int32), np.zeros((count, INTENTS), np.float32),
            np.zeros((count, width), np.float32),
        )  # fmt: skip


def no_lexicon(items: int) -> Lexicon:
    """Of M items without words."""
    rows, none = items + 1, np.zeros(0, np.uint8)
    return Lexicon(
        titles=np.zeros((rows, 0), np.int32), heads=np.zeros(rows, np.int32), trigrams=np.zeros((rows, 0), np.int32),
        vectors=np.zeros((rows, 0), np.int8), rarity=np.zeros(1, np.float32), kinds=np.zeros(1, np.int8),
        trigram_rarity=np.zeros(1, np.float32), word_vectors=np.zeros((1, DIM), np.float32),
        near_starts=np.zeros(2, np.int64), near_words=np.zeros(0, np.int32), near_letters=none, near_meaning=none,
        mean_length=np.ones(1, np.float32), encoded=np.zeros((rows, 0), np.int8),
    )  # fmt: skip


def save_arrays(arrays: Lexicon | Lessons, directory: Path) -> None:
    """Write one ``.npy`` file a column."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, column in arrays._asdict().items():
        np.save(directory / f"{name}.npy", column)


def load_lexicon(directory: Path, items: int) -> Lexicon:
    """Map what ``save_arrays`` wrote, read-only.

    Raises:
        InvalidRelease: a column is missing, damaged, or not of ``items`` items; compiled code looks at none again.
    """
    found = Lexicon(**_columns(directory, no_lexicon(0)))
    rows, words = items + 1, len(found.rarity)
    whole = (
        found.titles.shape == (rows, TITLE_WORDS)
        and found.heads.shape == (rows,)
        and found.trigrams.shape == (rows, TRIGRAMS)
        and found.vectors.shape == (rows, DIM)
        and found.kinds.shape == (words,)
        and found.word_vectors.shape == (words, DIM)
        and found.trigram_rarity.shape == (TRIGRAM_HASHES + 1,)
        and found.mean_length.shape == (1,)
        and len(found.encoded) == rows
        and _within(found.titles, words)
        and _within(found.trigrams, TRIGRAM_HASHES + 1)
        and _is_lists(found.near_starts, words, found.near_words, found.near_letters, found.near_meaning)
    )
    if not whole:
        raise InvalidRelease(f"{directory} is no lexicon for {items} items; assemble again")
    return found


def load_lessons(directory: Path, words: int) -> Lessons:
    """The same of lessons on ``words`` words."""
    found = Lessons(**_columns(directory, Lessons.none(0)))
    whole = (
        all(column.shape == (words + 1,) for column in (found.missing, found.head, found.extra))
        and all(column.shape == (len(found.queries), DIM) for column in (found.queries, found.lifts, found.masses))
        and _is_lists(found.told_starts, words + 1, found.told_words, found.told)
        and _is_lists(found.pair_starts, words + 1, found.pair_words, found.pair_weights)
        and _is_lists(
            found.intent_starts, words + 1, found.intent_places, found.intent_weights, names=len(found.intent_prior)
        )
        and len(found.intent_prior) == len(found.intent_sizes) == len(found.intent_classes)
        and found.intent_temperature.shape == (1,)
    )
    if not whole:
        raise InvalidRelease(f"{directory} holds no lessons on {words} words; assemble again")
    return found


def load_words(directory: Path) -> list[str]:
    """[V] the words themselves, from a ``words`` folder."""
    try:
        return list(json.loads((directory / "words.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InvalidRelease(f"{directory / 'words.json'} cannot be read ({error}); assemble again") from error


def _columns(directory: Path, like: Any) -> dict[str, NDArray[Any]]:
    columns = {}
    for name, wanted in like._asdict().items():
        path = directory / f"{name}.npy"
        try:
            columns[name] = np.load(path, mmap_mode="r").view(np.ndarray)
        except (OSError, ValueError) as error:
            raise InvalidRelease(f"{path} cannot be read ({error}); assemble again") from error
        if columns[name].dtype != wanted.dtype or columns[name].ndim != wanted.ndim:
            raise InvalidRelease(f"{path} is no column of {wanted.dtype}; assemble again")
    return columns


def _within(values: NDArray[Any], end: int) -> bool:
    return not values.size or (values.min() >= 0 and values.max() < end)


def _is_lists(
    starts: NDArray[np.int64], words: int, named: NDArray[np.int32], *values: NDArray[Any], names: int | None = None
) -> bool:
    """Whether ``starts`` parts ``named``, numbers below ``names``, and its values into a list for each of ``words``
    numbers."""
    return bool(
        len(starts) == words + 1
        and starts[0] == 0
        and starts[-1] == len(named)
        and all(len(each) == len(named) for each in values)
        and not (np.diff(starts) < 0).any()
        and _within(named, words if names is None else names)
    )
