"""A query as kernels read it: its words' numbers, its trigrams, and its vectors. What is typed often is kept."""

from __future__ import annotations

import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trirank_backend.errors import InvalidRelease
from trirank_backend.words.analysis import NUMBER, Analyser, normalised
from trirank_backend.words.encoder import FOLDER, SentenceEncoder
from trirank_backend.words.lexicon import (
    DIM,
    INTENTS,
    QUERY_WORDS,
    TRIGRAM_HASHES,
    TRIGRAMS,
    VECTORS,
    Lessons,
    Lexicon,
    QueryWords,
    load_words,
)
from trirank_backend.words.spelling import Speller

KEPT = 16_384
"""Queries that are remembered."""
LONGEST = 512
"""Letters of a query that are read."""
NEIGHBOURS = 30
"""Training queries that are asked what answered them."""
LEAST_LIKE = 0.5
"""Cosine of a training query from which it counts."""
STOP = frozenset((
    "a", "an", "the", "of", "for", "with", "in", "to", "and", "or", "on", "by", "at", "from",
    "der", "die", "das", "den", "dem", "für", "mit", "aus", "und", "von", "im",
))  # fmt: skip
"""Words of a query that say nothing of what is wanted."""


class QueryReader:
    """Reads queries against a lexicon and lessons, and by a team's own encoder where there is one.

    Raises:
        InvalidRelease: the encoder's vectors are not as wide as those of the items.
    """

    def __init__(
        self, words: list[str], language: str, speller: Speller, lexicon: Lexicon, lessons: Lessons,
        encoder: SentenceEncoder | None = None,
    ) -> None:  # fmt: skip
        width = lexicon.encoded.shape[1]
        if encoder is not None and encoder.width != width:
            raise InvalidRelease(
                f"the text encoder gives vectors of {encoder.width} numbers, those of the items have {width}; fit the "
                "features with this encoder, or bring the one that they were fitted with"
            )
        self._encoder, self._width = encoder, 0 if encoder is None else width
        self.words, self.analyser, self.speller = words, Analyser(language), speller
        self.lexicon, self.lessons = lexicon, lessons
        self._numbers = {word: number for number, word in enumerate(words, 1)}
        self._read = lru_cache(KEPT)(self._read_one)
        self._encoded = lru_cache(KEPT)(self._encode_one)
        self.key = lru_cache(KEPT)(self._key)

    @classmethod
    def load(cls, directory: Path, language: str, lexicon: Lexicon, lessons: Lessons) -> QueryReader:
        """From a ``words`` folder.

        Raises:
            InvalidRelease: a file is missing or damaged.
        """
        encoder = SentenceEncoder(directory / FOLDER) if lexicon.encoded.shape[1] else None
        return cls(load_words(directory), language, Speller.load(directory), lexicon, lessons, encoder)

    def of(self, lessons: Lessons) -> QueryReader:
        """The same with other lessons, and without an encoder, which they do not change."""
        return QueryReader(self.words, self.analyser.language, self.speller, self.lexicon, lessons)

    def read(self, queries: list[str]) -> QueryWords:
        """Of queries."""
        found = QueryWords.none(len(queries), self._width)
        for at, query in enumerate(queries):
            if query:
                for column, value in zip(found, self._read(query), strict=False):
                    column[at] = value
                if self._width:
                    found.encoded[at] = self._encoded(query)
        return found

    def encoded(self, queries: list[str]) -> NDArray[np.float32]:
        """[B, H] by the team's own encoder, all at once."""
        assert self._encoder is not None
        return self._encoder.encode([query[:LONGEST] for query in queries])

    def _key(self, query: str) -> str:
        """The same for queries of the same words."""
        return " ".join(sorted(set(self.words_of(query)))) or normalised(query)

    def words_of(self, query: str) -> list[str]:
        """A query's words as titles would write them, without those that say nothing."""
        mended = self.speller.mended(normalised(query[:LONGEST]))
        words = self.analyser.words(mended)
        return [word for word in words if word not in STOP] or words

    def _encode_one(self, query: str) -> NDArray[np.float32]:
        assert self._encoder is not None
        return self._encoder.encode([query[:LONGEST]])[0]

    def _read_one(self, query: str) -> tuple[Any, ...]:
        """What QueryWords says of one query, but for ``encoded``."""
        words = self.words_of(query)[:QUERY_WORDS]
        numbers = np.zeros(QUERY_WORDS, np.int32)
        numbers[: len(words)] = [self._numbers.get(word, 0) for word in words]
        known = numbers[numbers > 0]
        # Those that no title has go to the end; how many they are is told apart.
        numbers[:] = 0
        numbers[: len(known)] = known
        unknown = 1 - len(known) / len(words) if words else 0.0
        vectors = np.zeros((VECTORS, DIM), np.float32)
        if len(known):
            vectors[0] = unit(self.lexicon.rarity[known] @ self.lexicon.word_vectors[known])
            self._ask_neighbours(vectors)
        return numbers, unknown, trigrams(words, TRIGRAMS), vectors, *self.intents(known)

    def intents(self, words: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Categories [INTENTS] that a query of these words most likely asks for, and how likely each is.

        Naive Bayes: of a category that a word was never used for, all that the word says is how many words the category
        was asked for with, so that only what a word was used for is added up.
        """
        lessons = self.lessons
        found, shares = np.zeros(INTENTS, np.int32), np.zeros(INTENTS, np.float32)
        classes = lessons.intent_classes
        spans = [slice(lessons.intent_starts[word], lessons.intent_starts[word + 1]) for word in words]
        used = [span for span in spans if span.stop > span.start]
        if not used:
            return found, shares
        sums = lessons.intent_prior - len(used) * lessons.intent_sizes
        for span in used:
            sums[lessons.intent_places[span]] += lessons.intent_weights[span]
        likely = np.exp((sums - sums.max()) / lessons.intent_temperature[0])
        likely /= likely.sum()
        best = np.argsort(-likely, kind="stable")[:INTENTS] if len(likely) <= 64 else _top(likely, INTENTS)
        found[: len(best)], shares[: len(best)] = classes[best], likely[best]
        return found, shares

    def _ask_neighbours(self, vectors: NDArray[np.float32]) -> None:
        queries = self.lessons.queries
        if not len(queries):
            return
        like = queries @ vectors[0]
        near = np.argpartition(-like, NEIGHBOURS)[:NEIGHBOURS] if len(like) > NEIGHBOURS else np.arange(len(like))
        near = near[like[near] > LEAST_LIKE]
        if len(near):
            weights = (like[near] - LEAST_LIKE) ** 2
            vectors[1], vectors[2] = weights @ self.lessons.lifts[near], weights @ self.lessons.masses[near]


def _top(values: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    best = np.argpartition(-values, count)[:count]
    return best[np.argsort(-values[best], kind="stable")]


def trigrams(words: list[str], most: int) -> NDArray[np.int32]:
    """[most] hashes of words' letter trigrams from 1, each once, 0-padded."""
    found: dict[int, None] = {}
    for word in words:
        if word.startswith(NUMBER):
            continue
        marked = f"#{word}#".encode()
        for at in range(len(marked) - 2):
            found[zlib.crc32(marked[at : at + 3]) % TRIGRAM_HASHES + 1] = None
    padded = np.zeros(most, np.int32)
    kept = list(found)[:most]
    padded[: len(kept)] = kept
    return padded


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """[..., D] of length one, or zero."""
    length = np.sqrt((vectors**2).sum(-1, keepdims=True))
    return np.asarray(np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 1e-9), np.float32)
