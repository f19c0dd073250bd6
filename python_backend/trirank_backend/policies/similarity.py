"""What rules that spread a page out share: vectors of candidates side by side, how near they are, who comes next."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trirank_backend.compiled import kernel

SCALE = np.float32(1 / 127**2)
"""Dot product of two vectors → their cosine."""


@kernel
def gather(
    order: NDArray[np.int32],
    count: int,
    rows: NDArray[np.int32],
    score: NDArray[np.float32],
    vectors: NDArray[np.int8],
    relevance: NDArray[np.float32],
    side_by_side: NDArray[np.float32],
) -> None:
    """Fill in relevance [count, or more] from 0 to 1, and vectors [dimensions, as many]: loops over candidates then run
    over neighbours in memory, several at a time."""
    least = most = score[order[0]]
    for at in range(count):
        one = score[order[at]]
        least, most = min(least, one), max(most, one)
    spread = np.float64(most) - np.float64(least)  # of two finite numbers it may be none in float32
    for at in range(count):
        relevance[at] = np.float32((np.float64(score[order[at]]) - least) / spread) if spread > 0 else np.float32(0)
        row = rows[order[at]]
        for dimension in range(vectors.shape[1]):
            side_by_side[dimension, at] = vectors[row, dimension]


@kernel
def padded(count: int) -> int:
    """The next odd multiple of 16: lines of so many numbers do not fall on the same cache sets."""
    return ((count + 15) // 32) * 32 + 16


@kernel
def similarities(
    side_by_side: NDArray[np.float32], chosen: int, scale: np.float32, similar: NDArray[np.float32]
) -> None:
    """Fill in [count] dot products with the chosen one, times ``scale``: eight dimensions at a time, so that the sums
    are read and written an eighth as often."""
    similar[:] = 0
    for at in range(0, side_by_side.shape[0], 8):
        a, b, c, d = side_by_side[at], side_by_side[at + 1], side_by_side[at + 2], side_by_side[at + 3]
        e, f, g, h = side_by_side[at + 4], side_by_side[at + 5], side_by_side[at + 6], side_by_side[at + 7]
        of_a, of_b, of_c, of_d = a[chosen] * scale, b[chosen] * scale, c[chosen] * scale, d[chosen] * scale
        of_e, of_f, of_g, of_h = e[chosen] * scale, f[chosen] * scale, g[chosen] * scale, h[chosen] * scale
        for i in range(len(similar)):
            similar[i] += ((a[i] * of_a + b[i] * of_b) + (c[i] * of_c + d[i] * of_d)) + (
                (e[i] * of_e + f[i] * of_f) + (g[i] * of_g + h[i] * of_h)
            )


@kernel
def first_of_greatest(values: NDArray[np.float32]) -> int:
    """Where the greatest stands first. Four maxima are kept at a time, since each comparison waits for the one before;
    compilers may not split them by themselves, for NaN's sake."""
    a = b = c = d = np.float32(-np.inf)
    end = len(values) & ~3
    for at in range(0, end, 4):
        a = values[at] if values[at] > a else a
        b = values[at + 1] if values[at + 1] > b else b
        c = values[at + 2] if values[at + 2] > c else c
        d = values[at + 3] if values[at + 3] > d else d
    greatest = max(max(a, b), max(c, d))
    for at in range(end, len(values)):
        greatest = values[at] if values[at] > greatest else greatest
    for at in range(len(values)):
        if values[at] == greatest:
            return at
    return 0


@kernel
def take_first(
    order: NDArray[np.int32],
    count: int,
    taken: NDArray[np.int64],
    found: int,
    reason: int,
    reasons: NDArray[np.int32],
) -> None:
    """Put the ``found`` ones that were taken, places in the order, in front; those that come to stand higher get a
    reason."""
    before = order[:count].copy()
    front = np.zeros(count, np.bool_)
    position = 0
    for at in taken[:found]:
        if front[at]:  # nothing checks bounds here, so each is put in one place whatever was taken
            continue
        front[at] = True
        order[position] = before[at]
        if at > position:
            reasons[before[at]] |= reason
        position += 1
    for at in range(count):
        if not front[at]:
            order[position] = before[at]
            position += 1
