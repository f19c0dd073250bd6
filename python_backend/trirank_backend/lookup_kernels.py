"""Ids → rows of the catalogue, and repeats among them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trirank_backend.compiled import kernel


@kernel
def find_rows(ids: NDArray[np.int64], wanted: NDArray[np.int64], rows: NDArray[np.int32]) -> None:
    """Fill in the row of each wanted id among ascending ``ids``; -1 for one that is not there.

    All binary searches go on together, a halving at a time: each waits for memory, and so they wait at the same time
    (benchmarks/rerank.py has the times, beside one search after the other and a hash table).
    """
    rows[:] = 0
    left = len(ids)
    if left == 0:
        rows[:] = -1
        return
    while left > 1:
        half = left >> 1
        for at in range(len(wanted)):
            rows[at] += half if ids[rows[at] + half] <= wanted[at] else 0
        left -= half
    for at in range(len(wanted)):
        if ids[rows[at]] != wanted[at]:
            rows[at] = -1


@kernel
def look_up_state(
    ids: NDArray[np.int64],
    of_prices: NDArray[np.float32],
    of_stock: NDArray[np.int32],
    of_blocked: NDArray[np.int32],
    wanted: NDArray[np.int64],
    prices: NDArray[np.float32],
    stock: NDArray[np.int32],
    blocked: NDArray[np.int32],
) -> None:
    """Fill in what has changed of each wanted item; NaN, -1 and 0: nothing."""
    places = np.empty(len(wanted), np.int32)
    find_rows(ids, wanted, places)
    for at in range(len(wanted)):
        place = places[at]
        prices[at], stock[at], blocked[at] = np.nan, -1, 0
        if place >= 0:
            prices[at], stock[at], blocked[at] = of_prices[place], of_stock[place], of_blocked[place]


@kernel
def look_up_counts(
    ids: NDArray[np.int64],
    of_impressions: NDArray[np.int32],
    of_clicks: NDArray[np.int32],
    wanted: NDArray[np.int64],
    impressions: NDArray[np.int32],
    clicks: NDArray[np.int32],
) -> None:
    """Fill in how often each wanted item was shown and clicked."""
    places = np.empty(len(wanted), np.int32)
    find_rows(ids, wanted, places)
    for at in range(len(wanted)):
        place = places[at]
        impressions[at], clicks[at] = 0, 0
        if place >= 0:
            impressions[at], clicks[at] = of_impressions[place], of_clicks[place]


@kernel
def ascending(ids: NDArray[np.int64]) -> Any:
    """Whether each is greater than the one before."""
    for at in range(1, len(ids)):  # noqa: SIM110  # compiled
        if ids[at] <= ids[at - 1]:
            return False
    return True


@kernel
def drop_repeats(
    wanted: NDArray[np.int64],
    starts: NDArray[np.int64],
    padding: int,
    rows: NDArray[np.int32],
    counts: NDArray[np.int32],
) -> None:
    """Take the row from each id that stands earlier in its line; count [B, 2] unknown ids and repeats."""
    for line in range(len(starts) - 1):
        first, end = starts[line], starts[line + 1]
        size = 16
        while size < 2 * (end - first):
            size *= 2
        found = np.full(size, -1, np.int64)  # a hash set with open addressing: places of ids, -1 where there is room
        for at in range(first, end):
            one = wanted[at]
            if one == padding:
                rows[at] = -1
                continue
            # Fibonacci hashing (Knuth, The Art of Computer Programming 3, 6.4): the product's upper bits are mixed
            # well.
            mixed = (np.uint64(one) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
            slot = np.int64(mixed & np.uint64(size - 1))
            while found[slot] >= 0 and wanted[found[slot]] != one:
                slot = (slot + 1) & (size - 1)
            if found[slot] >= 0:
                rows[at] = -1
                counts[line, 1] += 1
            else:
                found[slot] = at
                counts[line, 0] += rows[at] < 0
