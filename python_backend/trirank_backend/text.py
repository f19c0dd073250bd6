"""Text to token ids: one tokeniser for titles at build time and queries at serving time."""

from __future__ import annotations

import re
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from trirank_backend.attributes import SKETCH
from trirank_backend.errors import InvalidRelease
from trirank_backend.words.lexicon import QueryWords
from trirank_backend.words.queries import QueryReader

TRIGRAM_BYTES = 64
"""Bytes of a Bloom filter of letter trigrams: about 60 trigrams of a title in 512 bits."""
_TEXTS = 16_384
"""That are tokenised at a time: what the library says of one takes a hundred times its ids."""
QUERY_WORDS = 8
"""Words of a query that are matched letter by letter."""
_WORD = re.compile(r"[^\W\d_]+|\d+")


def title_trigrams(titles: list[str]) -> NDArray[np.uint8]:
    """[B, 64]: the letter trigrams of all words of each title, as a Bloom filter with one hash."""
    filters = bytearray(len(titles) * TRIGRAM_BYTES)
    for row, title in enumerate(titles):
        bits = 0
        for word in _words(title):
            bits |= _bits(word)
        filters[row * TRIGRAM_BYTES : (row + 1) * TRIGRAM_BYTES] = bits.to_bytes(TRIGRAM_BYTES, "big")
    return np.frombuffer(filters, np.uint8).reshape(len(titles), TRIGRAM_BYTES)


def title_sketches(titles: list[str]) -> NDArray[np.uint8]:
    """[B, 32] MinHash of each title's letter trigrams, 8 bits of each hash; zeros: no title."""
    rng = np.random.default_rng(0)
    factors = rng.integers(1, 2**32, SKETCH, np.uint64) | np.uint64(1)
    shifts = rng.integers(0, 2**63, SKETCH, np.uint64)
    sketches = np.zeros((len(titles), SKETCH), np.uint8)
    for row, title in enumerate(titles):
        found = {_hashed(trigram) for word in _words(title) for trigram in _trigrams(word)}
        if found:
            # The upper half of a product by an odd number (Dietzfelbinger et al. 1997), then its least byte.
            mixed = (np.array(list(found), np.uint64)[:, None] * factors + shifts) >> np.uint64(32)
            sketches[row] = np.maximum(mixed.min(0) & np.uint64(0xFF), 1)
    return sketches


def query_trigrams(queries: list[str]) -> NDArray[np.uint64]:
    """[B, 8, 8] uint64: the letter trigrams of each query word, 512 bits a word; zeros behind the last word."""
    size = QUERY_WORDS * TRIGRAM_BYTES
    filters = [
        b"".join([_filter(word) for word in _words(query)[:QUERY_WORDS]]).ljust(size, b"\0") for query in queries
    ]
    return np.frombuffer(bytearray(b"".join(filters)), np.uint64).reshape(len(queries), QUERY_WORDS, TRIGRAM_BYTES // 8)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _places(word: str) -> list[int]:
    return [_hashed(trigram) % (TRIGRAM_BYTES * 8) for trigram in _trigrams(word)]


def _trigrams(word: str) -> list[bytes]:
    marked = f"#{word}#".encode()
    return [marked[at : at + 3] for at in range(len(marked) - 2)]


_hashed = zlib.crc32


@lru_cache(1 << 14)
def _filter(word: str) -> bytes:
    """The 512 bits of one word, as ``title_trigrams`` packs them. People search with the same words again and again."""
    bits = bytearray(TRIGRAM_BYTES)
    for place in _places(word):
        bits[place >> 3] |= 0x80 >> (place & 7)
    return bytes(bits)


@lru_cache(1 << 17)
def _bits(word: str) -> int:
    """The same as a number. A catalogue's titles are made of the same words again and again."""
    return int.from_bytes(_filter.__wrapped__(word), "big")


class TextEncoder:
    """Token ids of the joint vocabulary, cut and 0-padded to a fixed length.

    Args:
        tokenizer: its id 0 is padding.
        offset: where the tokens start in the joint vocabulary: token ``t`` is ``offset + t``.
        reader: of queries whose words are understood; None: they are not.
    """

    def __init__(self, tokenizer: Tokenizer, offset: int, reader: QueryReader | None = None) -> None:
        self._tokenizer = tokenizer
        self.reader = reader
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._offset = offset

    @classmethod
    def load(cls, path: Path, offset: int, reader: QueryReader | None = None) -> TextEncoder:
        """Read a ``tokenizer.json``.

        Raises:
            InvalidRelease: it is missing or damaged.
        """
        try:
            return cls(Tokenizer.from_file(str(path)), offset, reader)
        except Exception as error:  # the library raises bare Exception
            raise InvalidRelease(f"tokeniser {path} cannot be read ({error}); assemble again") from error

    def with_reader(self, reader: QueryReader) -> TextEncoder:
        """The same tokens, and another reader."""
        return TextEncoder(self._tokenizer, self._offset, reader)

    def encode(self, texts: list[str], length: int) -> NDArray[np.int32]:
        """[B, length] int32."""
        ids = np.zeros((len(texts), length), np.int32)
        for start in range(0, len(texts), _TEXTS):
            part = texts[start : start + _TEXTS]
            for row, encoding in enumerate(self._tokenizer.encode_batch_fast(part, add_special_tokens=False), start):
                tokens = [token for token in encoding.ids if token][:length]  # 0 is padding, whatever somebody typed
                ids[row, : len(tokens)] = tokens
        ids[ids > 0] += self._offset
        return ids

    def understood(self, queries: list[str]) -> QueryWords:
        """What kernels read of the queries' words."""
        return QueryWords.none(len(queries)) if self.reader is None else self.reader.read(queries)
