"""One line's scores → its best K after a policy, in one pass and one sort."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from trirank.contract import Reason

from trirank_backend.compiled import kernel

NOT_FINITE = -1
_BOOSTED = Reason.BOOSTED.value


class Rules(NamedTuple):
    """A policy as numbers.

    Attributes:
        task_weights: [T] float32.
        boosted: [S] int32 Signal bits, and ``boosts`` [S] float32 what each adds.
        excluded: Signal bits any of which drops a candidate.
    """

    task_weights: NDArray[np.float32]
    boosted: NDArray[np.int32]
    boosts: NDArray[np.float32]
    excluded: int
    deduplicate: bool


class Columns(NamedTuple):
    """What is read of the catalogue, and the Reason bits of each Signal mask."""

    item_ids: NDArray[np.int64]
    products: NDArray[np.int32]
    reasons: NDArray[np.int32]


@kernel
def rank_line(
    columns: Columns,
    rules: Rules,
    task_scores: NDArray[np.float32],
    rows: NDArray[np.int32],
    signals: NDArray[np.int32],
    top_k: int,
    ids: NDArray[np.int64],
    scores: NDArray[np.float32],
    reasons: NDArray[np.int32],
) -> Any:
    """Fill in ids, scores and reasons [K], best first; equal scores keep the order in which the candidates came.

    Args:
        task_scores: [N, T] of the ranker.
        rows: [N] of the catalogue, -1: not to be ranked; signals [N] Signal bits.

    Returns:
        How many there are, and how many a rule dropped (variants of a better one not counted); NOT_FINITE and the place
        of a candidate whose score is not a number or infinite.
    """
    places = np.empty(len(rows), np.int64)
    totals = np.empty(len(rows), np.float32)
    count = filtered = 0
    for at in range(len(rows)):
        if rows[at] < 0:
            continue
        if signals[at] & rules.excluded:
            filtered += 1
            continue
        total = np.float32(0)
        for task in range(len(rules.task_weights)):
            total += task_scores[at, task] * rules.task_weights[task]
        for signal in range(len(rules.boosted)):
            if signals[at] & rules.boosted[signal]:
                total += rules.boosts[signal]
        if not math.isfinite(total):
            return NOT_FINITE, at
        places[count], totals[count] = at, total
        count += 1
    size = 16
    while size < 2 * count:
        size *= 2
    taken = np.full(size, -1, np.int32)  # products, in a hash set with open addressing
    found = 0
    for place in np.argsort(-totals[:count], kind="mergesort"):
        if found == top_k:
            break
        at = places[place]
        row = rows[at]
        product = columns.products[row]
        if rules.deduplicate and product >= 0:
            slot = product & (size - 1)
            while taken[slot] >= 0 and taken[slot] != product:
                slot = (slot + 1) & (size - 1)
            if taken[slot] == product:
                continue
            taken[slot] = product
        ids[found], scores[found] = columns.item_ids[row], totals[place]
        reason = columns.reasons[signals[at]]
        for signal in range(len(rules.boosted)):
            if signals[at] & rules.boosted[signal]:
                reason |= _BOOSTED
        reasons[found] = reason
        found += 1
    return found, filtered
