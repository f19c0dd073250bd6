"""How well the words of a query and of an item's title understand each other. See ``kernels`` for the arguments.

Each word of the query gets a column of likenesses over all words, in scratch that is filled from the lexicon's lists
and emptied again; then every word of every candidate's title is looked up in it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from trirank.contract import Signal

from trirank_backend.compiled import kernel
from trirank_backend.features.batch import Items, Lines
from trirank_backend.features.table import DENSE_AT
from trirank_backend.words.lexicon import (
    FULL,
    NUMBER,
    QUERY_WORDS,
    TRIGRAM_HASHES,
    UNIT,
    Lessons,
    Lexicon,
)

_K1, _B = 1.5, 0.75
_LETTERS, _MEANING, _TOLD, _EITHER = 0, 1, 2, 3
KINDS = 4
"""Likenesses of a word of the query and one of the title: by letters, by meaning, as training told; and room."""
INTENT_SHARE = 0.2
"""From this probability on, a query counts as asking for a category; more than four it never asks for."""
_MATCHES_INTENT = Signal.MATCHES_INTENT.value
_NUMBER, _UNIT, _FULL = NUMBER, UNIT, FULL


class Scratch(NamedTuple):
    """Room for one line, of V words.

    Attributes:
        like: [V+1, QUERY_WORDS, KINDS] uint8, of FULL.
        pair: [V+1] float32 weights of a head's words after the query's last one.
        wanted: [TRIGRAM_HASHES+1] float32 rarity of the query's trigrams.
    """

    like: NDArray[np.uint8]
    pair: NDArray[np.float32]
    wanted: NDArray[np.float32]

    @classmethod
    def of(cls, words: int) -> Scratch:
        """For V words; none of them: nothing is understood."""
        return cls(
            np.zeros((words + 1, QUERY_WORDS, KINDS), np.uint8), np.zeros(words + 1, np.float32),
            np.zeros(TRIGRAM_HASHES + 1 if words else 1, np.float32),
        )  # fmt: skip


@kernel
def intent(
    items: Items,
    lines: Lines,
    line: int,
    first: int,
    end: int,
    dense: NDArray[np.float32],
    signals: NDArray[np.int32],
) -> None:
    """How likely the query asks for the item's category."""
    wanted, shares = lines.understood.intents[line], lines.understood.shares[line]
    if wanted[0] == 0:
        return
    for at in range(first, end):
        row = lines.rows[at]
        if row < 0 or items.categories[row] == 0:
            continue
        for place in range(len(wanted)):
            if wanted[place] == items.categories[row]:
                dense[at, DENSE_AT.query_intent] = shares[place]
                if shares[place] >= INTENT_SHARE:
                    signals[at] |= _MATCHES_INTENT


@kernel
def encoded(lexicon: Lexicon, lines: Lines, line: int, first: int, end: int, dense: NDArray[np.float32]) -> None:
    """The cosine by a team's own text encoder."""
    query = lines.understood.encoded[line]
    if lexicon.encoded.shape[1] == 0 or not query.any():
        return
    for at in range(first, end):
        row = lines.rows[at]
        if row < 0:
            continue
        cosine = np.float32(0)
        for number in range(len(query)):
            cosine += np.float32(lexicon.encoded[row, number]) * query[number]
        dense[at, DENSE_AT.encoder_cosine] = cosine / 127


@kernel
def understood(
    lexicon: Lexicon,
    lessons: Lessons,
    lines: Lines,
    line: int,
    first: int,
    end: int,
    scratch: Scratch,
    dense: NDArray[np.float32],
) -> None:
    """Columns of WORDS_TABLE.

    Args:
        scratch: zeros, and zeros again afterwards.
    """
    query = lines.understood.ids[line]
    count = (query > 0).sum()
    if count == 0 or lexicon.titles.shape[1] == 0:
        return
    vectors = lines.understood.vectors[line]
    own, lift, mass = vectors[0], vectors[1], vectors[2]
    like, pair, wanted = scratch.like, scratch.pair, scratch.wanted
    last = -1  # the last word that is neither number nor unit
    rarity_of_all, numbers = np.float32(0), 0
    for word in range(count):
        number = query[word]
        kind = lexicon.kinds[number]
        rarity_of_all += lexicon.rarity[number]
        numbers += kind == _NUMBER
        if kind != _NUMBER and kind != _UNIT:
            last = word
        for at in range(lexicon.near_starts[number], lexicon.near_starts[number + 1]):
            near = lexicon.near_words[at]
            like[near, word, _LETTERS] = lexicon.near_letters[at]
            like[near, word, _MEANING] = lexicon.near_meaning[at]
        for at in range(lessons.told_starts[number], lessons.told_starts[number + 1]):
            like[lessons.told_words[at], word, _TOLD] = lessons.told[at]
        for kind_of in range(_EITHER):
            like[number, word, kind_of] = _FULL
    if last >= 0:
        for at in range(lessons.pair_starts[query[last]], lessons.pair_starts[query[last] + 1]):
            pair[lessons.pair_words[at]] = lessons.pair_weights[at]
    rarity_of_all = max(rarity_of_all, np.float32(1e-6))
    for hashed in lines.understood.trigrams[line]:
        if hashed == 0:
            break
        wanted[hashed] = lexicon.trigram_rarity[hashed]

    words_said = np.float32(math.log1p(count))
    rarity_said = rarity_of_all / count
    unknown_said = lines.understood.unknown[line]
    best = np.zeros((QUERY_WORDS, KINDS), np.uint8)
    times = np.zeros(QUERY_WORDS, np.int32)
    place = np.zeros(QUERY_WORDS, np.int32)
    for at in range(first, end):
        row = lines.rows[at]
        if row < 0:
            continue
        title, head = lexicon.titles[row], lexicon.heads[row]
        best[:count] = 0
        times[:count] = 0
        length, pairs = 0, 0
        title_rarity, title_found = np.float32(0), np.float32(0)
        lesson, parts = np.float32(0), 0
        before, measured = 0, 0
        for spot in range(len(title)):
            word_of_title = title[spot]
            if word_of_title == 0:
                break
            length += 1
            rarity, in_query = lexicon.rarity[word_of_title], False
            is_head = head - 2 <= spot < head
            for word in range(count):
                for kind_of in range(KINDS):
                    best[word, kind_of] = max(best[word, kind_of], like[word_of_title, word, kind_of])
                if query[word] == word_of_title:
                    in_query = True
                    if times[word] == 0:
                        place[word] = spot
                    times[word] += 1
                    if word > 0 and before == query[word - 1]:
                        pairs += 1
                        measured += lexicon.kinds[query[word - 1]] == _NUMBER
            title_rarity += rarity
            if in_query:
                title_found += rarity
            else:
                lesson += lessons.extra[word_of_title]
                parts += 1
                if is_head:
                    lesson += lessons.head[word_of_title]
                    parts += 1
            if is_head and last >= 0:
                lesson += pair[word_of_title]
                parts += 1
            before = word_of_title
        if length == 0:
            continue
        bm25, coverage, found, found_numbers, found_head = np.float32(0), np.float32(0), 0, 0, 0
        nearest, farthest = length, -1
        sums, least = np.zeros(KINDS, np.float32), np.ones(KINDS, np.float32)
        norm = _K1 * (1 - _B + _B * length / lexicon.mean_length[0])
        for word in range(count):
            number = query[word]
            rarity = lexicon.rarity[number]
            if times[word] > 0:
                found += 1
                coverage += rarity
                bm25 += rarity * times[word] * (_K1 + 1) / (times[word] + norm)
                nearest, farthest = min(nearest, place[word]), max(farthest, place[word])
                found_numbers += lexicon.kinds[number] == _NUMBER
                found_head += place[word] < head
            else:
                lesson += lessons.missing[number]
                parts += 1
            best[word, _EITHER] = max(best[word, _LETTERS], best[word, _MEANING])
            for kind_of in range(KINDS):
                value = np.float32(best[word, kind_of] / _FULL)
                sums[kind_of] += value * rarity
                least[kind_of] = min(least[kind_of], value)
        head_meaning, head_found, head_last = np.float32(0), False, False
        for spot in range(max(head - 2, 0), min(head, length)):
            for word in range(count):
                head_meaning = max(head_meaning, np.float32(like[title[spot], word, _MEANING] / _FULL))
                if spot == min(head, length) - 1 and title[spot] == query[word]:
                    head_found = True
                    head_last = head_last or word == last
        title_start = False
        for word in range(count):
            title_start = title_start or title[0] == query[word]
        product, lifted, massed = np.float32(0), np.float32(0), np.float32(0)
        vector = lexicon.vectors[row]
        for number in range(len(vector)):
            value = np.float32(vector[number])
            product += value * own[number]
            lifted += value * lift[number]
            massed += value * mass[number]
        grams, gram_weight = 0, np.float32(0)
        for hashed in lexicon.trigrams[row]:
            if hashed == 0:
                break
            grams += 1
            gram_weight += wanted[hashed]
        dense[at, DENSE_AT.word_bm25] = bm25
        dense[at, DENSE_AT.word_coverage] = coverage / rarity_of_all
        dense[at, DENSE_AT.word_share] = found / count
        dense[at, DENSE_AT.word_last] = 0.5 if last < 0 else times[last] > 0
        dense[at, DENSE_AT.word_numbers] = found_numbers / numbers if numbers > 0 else 0.5
        dense[at, DENSE_AT.word_measures] = measured / numbers if numbers > 0 else 0.5
        dense[at, DENSE_AT.word_pairs] = pairs / max(count - 1, 1)
        dense[at, DENSE_AT.word_span] = found / (farthest - nearest + 1) if found > 0 else 0
        dense[at, DENSE_AT.title_word_coverage] = title_found / max(title_rarity, np.float32(1e-6))
        dense[at, DENSE_AT.title_start] = title_start
        dense[at, DENSE_AT.head_coverage] = found_head / count
        dense[at, DENSE_AT.head_found] = head_found
        dense[at, DENSE_AT.head_last] = head_last
        dense[at, DENSE_AT.letters_mean] = sums[0] / rarity_of_all
        dense[at, DENSE_AT.letters_least] = least[0]
        dense[at, DENSE_AT.letters_last] = 0.5 if last < 0 else best[last, _LETTERS] / _FULL
        dense[at, DENSE_AT.meaning_mean] = sums[1] / rarity_of_all
        dense[at, DENSE_AT.meaning_least] = least[1]
        dense[at, DENSE_AT.meaning_last] = 0.5 if last < 0 else best[last, _MEANING] / _FULL
        dense[at, DENSE_AT.likeness_mean] = sums[3] / rarity_of_all
        dense[at, DENSE_AT.likeness_least] = least[3]
        dense[at, DENSE_AT.head_meaning] = head_meaning
        dense[at, DENSE_AT.told_mean] = sums[2] / rarity_of_all
        dense[at, DENSE_AT.told_least] = least[2]
        dense[at, DENSE_AT.vector_cosine] = product / 127
        dense[at, DENSE_AT.trigram_bm25] = gram_weight / (1 + grams / 64)
        dense[at, DENSE_AT.neighbours_lift] = lifted / 127
        dense[at, DENSE_AT.neighbours_mass] = massed / 127
        dense[at, DENSE_AT.lesson] = lesson / math.sqrt(max(parts, 1))
        dense[at, DENSE_AT.query_words] = words_said
        dense[at, DENSE_AT.query_rarity] = rarity_said
        dense[at, DENSE_AT.query_unknown] = unknown_said

    for word in range(count):
        number = query[word]
        like[number] = 0
        for at in range(lexicon.near_starts[number], lexicon.near_starts[number + 1]):
            like[lexicon.near_words[at]] = 0
        for at in range(lessons.told_starts[number], lessons.told_starts[number + 1]):
            like[lessons.told_words[at]] = 0
        for at in range(lessons.pair_starts[number], lessons.pair_starts[number + 1]):
            pair[lessons.pair_words[at]] = 0
    for hashed in lines.understood.trigrams[line]:
        wanted[hashed] = 0
