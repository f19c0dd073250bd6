"""How well an item goes with what the user did: by what followed what, and by attributes. See ``kernels`` for the
arguments."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trirank_backend.compiled import kernel
from trirank_backend.features.batch import Items, Lines
from trirank_backend.features.table import DENSE_AT

TRANSITION_DECAY, ATTRIBUTE_DECAY = 0.6, 0.8
"""Weight of an event relative to the one after it; the weights of a history sum to 1."""
_SCATTER = 2654435769
"""2^32 divided by the golden ratio: consecutive rows land far apart (Knuth, vol. 3, 6.4)."""


@kernel
def transition(items: Items, lines: Lines, line: int, first: int, end: int, dense: NDArray[np.float32]) -> None:
    """The mean log count of the candidate as a follower of the history's events, newer ones weighing more."""
    past, total = lines.history_rows[line], 0.0
    for event in range(len(past)):
        if past[event] >= 0:
            total = total * TRANSITION_DECAY + 1
    if total == 0 or len(items.followers) == 0:
        return
    # The followers of a history are some thousands, its candidates some hundreds: those are found by hashing.
    size = 4
    while size < 2 * (end - first):
        size *= 2
    rows, sums = np.full(size, -1, np.int32), np.zeros(size, np.float32)
    for at in range(first, end):
        row = lines.rows[at]
        if row >= 0:
            rows[_slot(rows, row)] = row
    weight = 1 / total
    for event in range(len(past) - 1, -1, -1):
        row = past[event]
        if row < 0:
            continue
        for pair in range(items.follower_starts[row], items.follower_starts[row + 1]):
            slot = _slot(rows, items.followers[pair])
            if rows[slot] >= 0:
                sums[slot] += np.float32(weight) * items.follower_weights[pair]
        weight *= TRANSITION_DECAY
    for at in range(first, end):
        if lines.rows[at] >= 0:
            dense[at, DENSE_AT.transition] = sums[_slot(rows, lines.rows[at])]


@kernel
def _slot(rows: NDArray[np.int32], row: int) -> int:
    """Where ``row`` is, or would be, in a table of a power of two of rows, -1 where there is none."""
    mask = len(rows) - 1
    slot = ((row * _SCATTER) >> 12) & mask
    while rows[slot] >= 0 and rows[slot] != row:
        slot = (slot + 1) & mask
    return slot


@kernel
def attribute_match(
    items: Items,
    lines: Lines,
    line: int,
    first: int,
    end: int,
    profile: NDArray[np.float32],
    dense: NDArray[np.float32],
) -> None:
    """The cosine of the candidate's attributes, weighted by rarity, with those of the history's events, summed with
    weights that fall with age. ``profile`` [A] comes and goes as zeros."""
    past, total = lines.history_rows[line], 0.0
    slots = items.attributes.shape[1]
    for event in range(len(past)):
        if past[event] >= 0:
            total = total * ATTRIBUTE_DECAY + 1
    if total == 0 or slots == 0:
        return
    weight = 1 / total
    for event in range(len(past) - 1, -1, -1):
        row = past[event]
        if row < 0:
            continue
        for slot in range(slots):
            attribute = items.attributes[row, slot]
            if attribute > 0:
                profile[attribute] += weight * items.attribute_idf[attribute] * items.attribute_scale[row]
        weight *= ATTRIBUTE_DECAY
    for at in range(first, end):
        row = lines.rows[at]
        if row >= 0:
            found = np.float32(0)
            for slot in range(slots):
                attribute = items.attributes[row, slot]
                found += profile[attribute] * items.attribute_idf[attribute]
            dense[at, DENSE_AT.attribute_match] = found * items.attribute_scale[row]
    for event in range(len(past)):
        if past[event] >= 0:
            for slot in range(slots):
                profile[items.attributes[past[event], slot]] = 0
