"""What the ranker is told of a candidate and of a request, in numbers: one pass over the candidates each.

Every kernel of a candidate has the arguments (Items, Lines, one column [S] float32 a feature, signals [S] int32), fills the
columns of places that have an item, and sets the Signal bits that come of them. Kernels of a request have columns [B].
The table of features (``table.py``) says which columns belong to a kernel, in the order of its first line.

The same in numpy, slowly, is in the tests.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from trirank.contract import Behaviour, Signal

from trirank_backend.compiled import kernel
from trirank_backend.features.batch import Lines

TIME_GAPS = 16
"""Buckets of log2(minutes since the event)."""
DAY_S = 86_400
NEW_DAYS = 14
_NEW_ITEM, _PURCHASED = Signal.NEW_ITEM.value, Signal.PURCHASED.value
_SEEN_ITEM, _SEEN_PRODUCT = Signal.SEEN_ITEM.value, Signal.SEEN_PRODUCT.value
_SEEN_BRAND, _SEEN_CATEGORY = Signal.SEEN_BRAND.value, Signal.SEEN_CATEGORY.value
_PURCHASE = Behaviour.PURCHASE.value
_TURN = 2 * math.pi


class Items(NamedTuple):
    """The catalogue's columns that kernels read; M items and the row for "no item". See catalogue.Catalogue.

    Attributes:
        prices, popularity: [M+1] float32, standardised logarithms.
        brands, categories: [M+1] int32 ids of the joint vocabulary, 0: missing.
        words: [M+1, 8] uint64, the titles' trigrams.
        token_idf: [V] float32, rarity of each id of the joint vocabulary as a token of titles.
    """

    prices: NDArray[np.float32]
    popularity: NDArray[np.float32]
    brands: NDArray[np.int32]
    categories: NDArray[np.int32]
    products: NDArray[np.int32]
    created_at: NDArray[np.int64]
    titles: NDArray[np.int32]
    words: NDArray[np.uint64]
    token_idf: NDArray[np.float32]


@kernel
def static(items: Items, lines: Lines, out: Any, signals: NDArray[np.int32]) -> None:
    """What the catalogue says of the item, whoever asks."""
    price, popularity = out
    for at, row in enumerate(lines.rows):
        if row >= 0:
            price[at] = items.prices[row]
            popularity[at] = items.popularity[row]


@kernel
def retrieval(items: Items, lines: Lines, out: Any, signals: NDArray[np.int32]) -> None:
    """Retrieval's scores: whether there is one, standardised within the line, comparable between lines, and its rank."""
    given, standardised, logarithm, rank = out
    for line in range(len(lines.starts) - 1):
        first, end = lines.starts[line], lines.starts[line + 1]
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
            continue
        mean, squares = total / count, 0.0
        for at in places[:count]:
            squares += (lines.scores[at] - mean) ** 2
        deviation = max(math.sqrt(squares / count), 1e-6)
        if not falling:  # retrieval mostly sends its best first, and then there is nothing to sort
            places[:count] = places[np.argsort(-lines.scores[places[:count]], kind="mergesort")]
        for place in range(count):
            at = places[place]
            score = float(lines.scores[at])
            given[at] = 1
            standardised[at] = (score - mean) / deviation
            logarithm[at] = math.copysign(math.log1p(abs(score)), score)
            rank[at] = 1 / math.log2(2 + place)


@kernel
def age(items: Items, lines: Lines, out: Any, signals: NDArray[np.int32]) -> None:
    """How long the item has been there."""
    (days_log,) = out
    for line in range(len(lines.starts) - 1):
        now = lines.timestamps[line]
        for at in range(lines.starts[line], lines.starts[line + 1]):
            row = lines.rows[at]
            if row < 0 or items.created_at[row] <= 0:
                continue
            days = max(now - items.created_at[row], 0) / DAY_S
            days_log[at] = math.log1p(days) / 5
            if days < NEW_DAYS:
                signals[at] |= _NEW_ITEM


@kernel
def seen(items: Items, lines: Lines, out: Any, signals: NDArray[np.int32]) -> None:
    """Events of the history with the same item, product, brand and category, as logarithms."""
    of_item, of_product, of_brand, of_category = out
    length = lines.history_rows.shape[1]
    log1p = np.log1p(np.arange(length + 1))
    for line in range(len(lines.starts) - 1):
        past = lines.history_rows[line]
        if (past < 0).all():
            continue
        first, end = lines.starts[line], lines.starts[line + 1]
        size = end - first
        rows = lines.rows[first:end]
        products, brands, categories = items.products[rows], items.brands[rows], items.categories[rows]
        count = np.zeros((4, size), np.int32)
        by_item, by_product, by_brand, by_category = count[0], count[1], count[2], count[3]
        for event in range(length):
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
        for at in range(size):
            if rows[at] < 0:
                continue
            place = first + at
            of_item[place], of_product[place] = log1p[by_item[at]], log1p[by_product[at]]
            of_brand[place], of_category[place] = log1p[by_brand[at]], log1p[by_category[at]]
            if by_item[at] > 0:
                signals[place] |= _SEEN_ITEM
            if by_product[at] > 0:
                signals[place] |= _SEEN_PRODUCT
            if by_brand[at] > 0:
                signals[place] |= _SEEN_BRAND
            if by_category[at] > 0:
                signals[place] |= _SEEN_CATEGORY


@kernel
def session(items: Items, lines: Lines, out: Any, signals: NDArray[np.int32]) -> None:
    """Of a request: who asks, how much is known of them, and what they typed."""
    anonymous, history_length, has_query, query_length = out
    most = math.log1p(lines.history_rows.shape[1])
    for line in range(len(lines.starts) - 1):
        tokens = (lines.query[line] > 0).sum()
        anonymous[line] = lines.anonymous[line]
        history_length[line] = math.log1p((lines.history_rows[line] >= 0).sum()) / most
        has_query[line] = tokens > 0
        query_length[line] = tokens / lines.query.shape[1]


@kernel
def clock(items: Items, lines: Lines, out: Any, signals: NDArray[np.int32]) -> None:
    """Of a request: time of day and day of the week (UTC), as points on circles."""
    hour_sin, hour_cos, weekday_sin, weekday_cos = out
    for line in range(len(lines.starts) - 1):
        now = lines.timestamps[line]
        hour, weekday = now % DAY_S / DAY_S * _TURN, now // DAY_S % 7 / 7 * _TURN
        hour_sin[line], hour_cos[line] = math.sin(hour), math.cos(hour)
        weekday_sin[line], weekday_cos[line] = math.sin(weekday), math.cos(weekday)


@kernel
def behaviours(rows: NDArray[np.int32], codes: NDArray[np.int32], first: int, out: NDArray[np.int32]) -> None:
    """[B, H] id of what was done in each event, from the joint vocabulary's ``first`` on."""
    for line, event in np.ndindex(rows.shape):
        if rows[line, event] >= 0:
            out[line, event] = first + codes[line, event]


@kernel
def time_gaps(
    rows: NDArray[np.int32], then: NDArray[np.int64], now: NDArray[np.int64], first: int, out: NDArray[np.int32]
) -> None:
    """[B, H] id of how long ago each event was; left "missing" where nobody knows when."""
    for line, event in np.ndindex(rows.shape):
        if rows[line, event] >= 0 and then[line, event] >= 0:
            minutes = max(now[line] - then[line, event], 0) / 60
            out[line, event] = first + min(int(math.log2(1 + minutes)), TIME_GAPS - 1)
