"""How well the query and an item's title match: by tokens, and letter by letter. See ``kernels`` for the arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from trirank.contract import Signal

from trirank_backend.compiled import kernel
from trirank_backend.features.batch import Items, Lines
from trirank_backend.features.table import DENSE_AT

MATCH_COVERAGE = 0.5
"""From this share of the query on, a candidate counts as matching it."""
FUZZY_SHARE = 0.6
"""From this share of its trigrams on, a word of the query counts as there."""
_MATCHES_QUERY = Signal.MATCHES_QUERY.value


@kernel
def tokens(
    items: Items,
    lines: Lines,
    line: int,
    first: int,
    end: int,
    dense: NDArray[np.float32],
    signals: NDArray[np.int32],
) -> None:
    """Tokens of the query in the title."""
    width = items.titles.shape[1]
    count = (lines.query[line] > 0).sum()
    if width == 0 or count == 0:
        return
    query = lines.query[line, :count]
    rarity = items.token_idf[query]
    all_rarity = np.float32(0)
    for each in rarity:
        all_rarity += each
    matched = np.zeros(width, np.bool_)
    for at in range(first, end):
        row = lines.rows[at]
        if row < 0:
            continue
        title = items.titles[row]
        length = 0
        for place in range(width):
            matched[place] = False
            length += title[place] != 0
        covered, pairs, hit = np.float32(0), 0, False
        for word in range(count):
            hit = pair = False
            for place in range(width):
                if title[place] == query[word]:
                    hit = matched[place] = True
                    if word + 1 < count and place + 1 < width and title[place + 1] == query[word + 1]:
                        pair = True
            pairs += pair
            if hit:
                covered += rarity[word]
        share = covered / max(all_rarity, np.float32(1e-6))
        dense[at, DENSE_AT.query_coverage] = share
        dense[at, DENSE_AT.title_coverage] = matched.sum() / max(length, 1)
        dense[at, DENSE_AT.query_bigrams] = pairs / max(count - 1, 1)
        dense[at, DENSE_AT.query_last_token] = hit
        for place in range(width):
            if matched[place]:
                dense[at, DENSE_AT.first_match] = 1 / (1 + place)
                break
        dense[at, DENSE_AT.title_length] = length / width
        if share >= MATCH_COVERAGE:
            signals[at] |= _MATCHES_QUERY


@kernel
def _bits(value: Any) -> Any:
    """How many bits are set; the compiler knows this pattern and takes the processor's own instruction."""
    value = value - ((value >> np.uint64(1)) & np.uint64(0x5555555555555555))
    value = (value & np.uint64(0x3333333333333333)) + ((value >> np.uint64(2)) & np.uint64(0x3333333333333333))
    value = (value + (value >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((value * np.uint64(0x0101010101010101)) >> np.uint64(56))


@kernel
def letters(items: Items, lines: Lines, line: int, first: int, end: int, dense: NDArray[np.float32]) -> None:
    """Letter trigrams of the query's words in the title, which forgives spelling and inflection."""
    words = lines.words[line]
    if items.words.shape[1] == 0 or (lines.query[line] == 0).all():
        return
    sizes = np.zeros(len(words), np.int64)
    count = 0
    for word in range(len(words)):
        for part in words[word]:
            sizes[word] += _bits(part)
        count += sizes[word] > 0
    if count == 0:
        return
    for at in range(first, end):
        row = lines.rows[at]
        if row < 0:
            continue
        total, there, least, share = 0.0, 0, 1.0, 0.0
        for word in range(count):
            shared = 0
            for part in range(words.shape[1]):
                shared += _bits(items.words[row, part] & words[word, part])
            share = shared / sizes[word]
            total += share
            there += share > FUZZY_SHARE
            least = min(least, share)
        dense[at, DENSE_AT.fuzzy_coverage] = total / count
        dense[at, DENSE_AT.fuzzy_words] = there / count
        dense[at, DENSE_AT.fuzzy_worst] = least
        dense[at, DENSE_AT.fuzzy_last] = share
