"""What the ranker is told of candidates and requests, in numbers: one pass over each line's own candidates.

``fill`` goes through the lines and calls the kernels of the table of features (``table.py``) on each. A kernel of
candidates fills its columns of ``dense`` [S, D] at the places ``first`` to ``end`` that have an item, and sets the
Signal bits that come of them; a kernel of requests fills its columns of ``context`` [B, C]. All of it is one compiled
call: a call each cost more than what they calculate.

The same in numpy, slowly, is in the tests.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from trirank.contract import Behaviour, Signal

from trirank_backend.compiled import kernel
from trirank_backend.features.batch import Items, Lines
from trirank_backend.features.past_kernels import attribute_match, transition
from trirank_backend.features.table import CONTEXT_AT, DENSE_AT
from trirank_backend.features.text_kernels import letters, tokens
from trirank_backend.features.word_kernels import Scratch, encoded, intent, understood
from trirank_backend.words.lexicon import Lessons, Lexicon

TIME_GAPS = 16
"""Buckets of log2(minutes since the event)."""
DAY_S = 86_400
NEW_DAYS = 14
_NEW_ITEM, _PURCHASED = Signal.NEW_ITEM.value, Signal.PURCHASED.value
_SEEN_ITEM, _SEEN_PRODUCT = Signal.SEEN_ITEM.value, Signal.SEEN_PRODUCT.value
_SEEN_BRAND, _SEEN_CATEGORY = Signal.SEEN_BRAND.value, Signal.SEEN_CATEGORY.value
_PURCHASE = Behaviour.PURCHASE.value
_TURN = 2 * math.pi


@kernel
def static(items: Items, lines: Lines, first: int, end: int, dense: NDArray[np.float32]) -> None:
    """What the catalogue says of the item, whoever asks."""
    for at in range(first, end):
        row = lines.rows[at]
        if row >= 0:
            dense[at, DENSE_AT.price] = items.prices[row]
            dense[at, DENSE_AT.popularity] = items.popularity[row]
            dense[at, DENSE_AT.sentiment] = items.sentiment[row]
            dense[at, DENSE_AT.reviews] = items.reviews[row]


@kernel
def retrieval(lines: Lines, first: int, end: int, dense: NDArray[np.float32]) -> None:
    """Retrieval's scores: whether there is one, standardised within the line, comparable between lines, and its
    rank."""
    count, total = 0, 0.0
    falling, last = True, np.float32(np.inf)
    places = np.empty(end - first, np.int64)
    for at in range(first, end):
        score = lines.scores[at]
        if lines.rows[at] >= 0 and not math.isnan(score):
            places[count] = at
            count += 1
            total += score
            falling = falling and score <= last
            last = score
    if count == 0:
        return
    mean, squares = total / count, 0.0
    for at in places[:count]:
        squares += (lines.scores[at] - mean) ** 2
    deviation = max(math.sqrt(squares / count), 1e-6)
    if not falling:  # retrieval mostly sends its best first, and then there is nothing to sort
        places[:count] = places[np.argsort(-lines.scores[places[:count]], kind="mergesort")]
    for place in range(count):
        at = places[place]
        score = float(lines.scores[at])
        dense[at, DENSE_AT.has_retrieval_score] = 1
        dense[at, DENSE_AT.retrieval_score] = (score - mean) / deviation
        dense[at, DENSE_AT.retrieval_score_log] = math.copysign(math.log1p(abs(score)), score)
        dense[at, DENSE_AT.retrieval_rank] = 1 / math.log2(2 + place)


@kernel
def age(
    items: Items,
    lines: Lines,
    now: int,
    first: int,
    end: int,
    dense: NDArray[np.float32],
    signals: NDArray[np.int32],
) -> None:
    """How long the item has been there."""
    for at in range(first, end):
        row = lines.rows[at]
        if row < 0 or items.created_at[row] <= 0:
            continue
        days = max(now - items.created_at[row], 0) / DAY_S
        dense[at, DENSE_AT.age] = math.log1p(days) / 5
        if days < NEW_DAYS:
            signals[at] |= _NEW_ITEM


@kernel
def seen(
    items: Items,
    lines: Lines,
    line: int,
    first: int,
    end: int,
    dense: NDArray[np.float32],
    signals: NDArray[np.int32],
) -> None:
    """Events of the history with the same item, product, brand and category, as logarithms."""
    past = lines.history_rows[line]
    if (past < 0).all():
        return
    size = end - first
    rows = lines.rows[first:end]
    products, brands, categories = items.products[rows], items.brands[rows], items.categories[rows]
    count = np.zeros((4, size), np.int32)
    by_item, by_product, by_brand, by_category = count[0], count[1], count[2], count[3]
    for event in range(len(past)):
        row = past[event]
        if row < 0:
            continue
        # Plain loops over short columns, which the compiler turns into vector instructions.
        for at in range(size):
            by_item[at] += rows[at] == row
        if lines.history_behaviours[line, event] == _PURCHASE:
            for at in range(size):
                if rows[at] == row:
                    signals[first + at] |= _PURCHASED
        product, brand, category = items.products[row], items.brands[row], items.categories[row]
        if product >= 0:
            for at in range(size):
                by_product[at] += products[at] == product
        if brand > 0:
            for at in range(size):
                by_brand[at] += brands[at] == brand
        if category > 0:
            for at in range(size):
                by_category[at] += categories[at] == category
    log1p = np.log1p(np.arange(len(past) + 1))
    for at in range(size):
        if rows[at] < 0:
            continue
        place = first + at
        dense[place, DENSE_AT.seen_item] = log1p[by_item[at]]
        dense[place, DENSE_AT.seen_product] = log1p[by_product[at]]
        dense[place, DENSE_AT.seen_brand] = log1p[by_brand[at]]
        dense[place, DENSE_AT.seen_category] = log1p[by_category[at]]
        if by_item[at] > 0:
            signals[place] |= _SEEN_ITEM
        if by_product[at] > 0:
            signals[place] |= _SEEN_PRODUCT
        if by_brand[at] > 0:
            signals[place] |= _SEEN_BRAND
        if by_category[at] > 0:
            signals[place] |= _SEEN_CATEGORY


@kernel
def session(lines: Lines, line: int, context: NDArray[np.float32]) -> None:
    """Who asks, how much is known of them, and what they typed."""
    count = (lines.query[line] > 0).sum()
    events = (lines.history_rows[line] >= 0).sum()
    context[line, CONTEXT_AT.anonymous] = lines.anonymous[line]
    context[line, CONTEXT_AT.history_length] = math.log1p(events) / math.log1p(lines.history_rows.shape[1])
    context[line, CONTEXT_AT.has_query] = count > 0
    context[line, CONTEXT_AT.query_length] = count / lines.query.shape[1]


@kernel
def clock(now: int, line: int, context: NDArray[np.float32]) -> None:
    """Time of day and day of the week (UTC), as points on circles."""
    hour, weekday = now % DAY_S / DAY_S * _TURN, now // DAY_S % 7 / 7 * _TURN
    context[line, CONTEXT_AT.hour_sin], context[line, CONTEXT_AT.hour_cos] = math.sin(hour), math.cos(hour)
    context[line, CONTEXT_AT.weekday_sin], context[line, CONTEXT_AT.weekday_cos] = math.sin(weekday), math.cos(weekday)


@kernel
def events(
    rows: NDArray[np.int32],
    codes: NDArray[np.int32],
    then: NDArray[np.int64],
    now: NDArray[np.int64],
    timed: bool,
    first_behaviour: int,
    first_gap: int,
    history: NDArray[np.int32],
) -> None:
    """What was done in each event, and how long ago, in the last two fields of ``history`` [B, H, F+2] (see
    table.HISTORY_EXTRA); ids count from ``first_behaviour`` and ``first_gap`` on, and 0 is "nobody knows"."""
    width = history.shape[2]
    for line in range(rows.shape[0]):
        for event in range(rows.shape[1]):
            if rows[line, event] < 0:
                continue
            history[line, event, width - 2] = first_behaviour + codes[line, event]
            if timed and then[line, event] >= 0:
                minutes = max(now[line] - then[line, event], 0) / 60
                history[line, event, width - 1] = first_gap + min(int(math.log2(1 + minutes)), TIME_GAPS - 1)


@kernel
def fill(
    items: Items,
    lines: Lines,
    timed: bool,
    dense: NDArray[np.float32],
    context: NDArray[np.float32],
    signals: NDArray[np.int32],
    lexicon: Lexicon,
    lessons: Lessons,
    scratch: Scratch,
) -> None:
    """Fill zeros with all features of a batch. Those that need times are left 0 where timestamps are none."""
    profile = np.zeros(len(items.attribute_idf), np.float32)
    for line in range(len(lines.starts) - 1):
        first, end, now = lines.starts[line], lines.starts[line + 1], lines.timestamps[line]
        for at in range(first, end):
            signals[at] = items.signals[lines.rows[at]]
        static(items, lines, first, end, dense)
        retrieval(lines, first, end, dense)
        if timed:
            age(items, lines, now, first, end, dense, signals)
            clock(now, line, context)
        seen(items, lines, line, first, end, dense, signals)
        tokens(items, lines, line, first, end, dense, signals)
        letters(items, lines, line, first, end, dense)
        transition(items, lines, line, first, end, dense)
        attribute_match(items, lines, line, first, end, profile, dense)
        understood(lexicon, lessons, lines, line, first, end, scratch, dense)
        intent(items, lines, line, first, end, dense, signals)
        encoded(lexicon, lines, line, first, end, dense)
        session(lines, line, context)
