"""``mmr``: maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998). One after the other the candidate is taken
that has the greatest

    (1 − diversity) · r − diversity · (greatest similarity to what was taken before),

r being its score, scaled to 0 … 1 within the page, and similarity the cosine of attributes.Attributes.vectors.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from trirank.contract import Reason

from trirank_backend.compiled import kernel
from trirank_backend.policies.page import Page
from trirank_backend.policies.rule import Phase, Position, Release, Rule, Step

SCALE = np.float32(1 / 127**2)
"""Dot product of two vectors → their cosine."""


class Mmr(Rule):
    """See the top of this file.

    Attributes:
        within: how many positions are filled so; None: TOP_K. The others follow as they were.
    """

    rule: Literal["mmr"] = "mmr"
    phase: ClassVar[Phase] = Phase.ORDER
    reason: ClassVar[Reason | None] = Reason.DIVERSITY
    diversity: Annotated[float, Field(gt=0, lt=1)] = 0.3
    within: Position | None = None

    def bind(self, release: Release) -> Step:
        """The step for a release."""
        vectors, diversity, bit = release.items.vectors, np.float32(self.diversity), Reason.DIVERSITY.value

        def step(page: Page) -> None:
            page.sort()
            mmr(
                page.order, page.count, page.rows, page.score, vectors, self.within or page.top_k, diversity, bit,
                page.reasons,
            )  # fmt: skip

        return step


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
    """Relevance [count] from 0 to 1, and vectors [dimensions, count]: loops over candidates then run over neighbours in
    memory, several at a time."""
    least = most = score[order[0]]
    for at in range(count):
        one = score[order[at]]
        least, most = min(least, one), max(most, one)
    spread = most - least
    for at in range(count):
        relevance[at] = (score[order[at]] - least) / spread if spread > 0 else np.float32(0)
        row = rows[order[at]]
        for dimension in range(vectors.shape[1]):
            side_by_side[dimension, at] = vectors[row, dimension]


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
    for position in range(found):
        at = taken[position]
        front[at] = True
        order[position] = before[at]
        if at > position:
            reasons[before[at]] |= reason
    position = found
    for at in range(count):
        if not front[at]:
            order[position] = before[at]
            position += 1


@kernel
def mmr(
    order: NDArray[np.int32],
    count: int,
    rows: NDArray[np.int32],
    score: NDArray[np.float32],
    vectors: NDArray[np.int8],
    within: int,
    diversity: np.float32,
    reason: int,
    reasons: NDArray[np.int32],
) -> None:
    """Reorder the first ``within``."""
    if count < 2:
        return
    size = vectors.shape[1]
    relevance = np.empty(count, np.float32)
    side_by_side = np.empty((size, count), np.float32)
    gather(order, count, rows, score, vectors, relevance, side_by_side)
    gain, nearest = relevance * (np.float32(1) - diversity), np.full(count, -np.inf, np.float32)
    similar = np.empty(count, np.float32)
    found = min(within, count)
    taken = np.empty(found, np.int64)
    chosen = 0
    for position in range(found):
        best = np.float32(-np.inf)
        for at in range(count):
            value = gain[at] - (diversity * nearest[at] if position else np.float32(0))
            if value > best:
                best, chosen = value, at
        taken[position] = chosen
        gain[chosen] = -np.inf
        similar[:] = 0
        for dimension in range(size):
            weight = side_by_side[dimension, chosen] * SCALE
            line = side_by_side[dimension]
            for at in range(count):
                similar[at] += line[at] * weight
        for at in range(count):
            nearest[at] = max(nearest[at], similar[at])
    take_first(order, count, taken, found, reason, reasons)
