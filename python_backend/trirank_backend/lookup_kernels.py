"""Ids → rows of the catalogue, and repeats among them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trirank_backend.compiled import kernel


@kernel
def find_rows(ids: NDArray[np.int64], wanted: NDArray[np.int64], rows: NDArray[np.int32]) -> None:
    """Fill in the row of each wanted id among ascending ``ids``; -1 for one that is not there."""
    for at in range(len(wanted)):
        place = np.searchsorted(ids, wanted[at])
        rows[at] = place if place < len(ids) and ids[place] == wanted[at] else -1


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
