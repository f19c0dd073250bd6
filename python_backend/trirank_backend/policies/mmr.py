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
from trirank_backend.policies.similarity import SCALE, first_of_greatest, gather, padded, similarities, take_first


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
    # A multiple of what processors take at a time: the places behind the last candidate are never the best.
    width = padded(count)
    relevance = np.full(width, -np.inf, np.float32)
    side_by_side = np.zeros((vectors.shape[1], width), np.float32)
    gather(order, count, rows, score, vectors, relevance, side_by_side)
    gain, nearest = relevance * (np.float32(1) - diversity), np.full(width, -np.inf, np.float32)
    found = min(within, count)
    taken = np.empty(found, np.int64)
    similar, worth = np.empty(width, np.float32), np.empty(width, np.float32)
    taken[0] = chosen = first_of_greatest(gain)
    for position in range(1, found):
        gain[chosen] = -np.inf
        similarities(side_by_side, chosen, SCALE, similar)
        for at in range(width):  # without a branch, so that several are done at a time
            closer = nearest[at] if nearest[at] > similar[at] else similar[at]
            nearest[at] = closer
            worth[at] = gain[at] - diversity * closer
        taken[position] = chosen = first_of_greatest(worth)
    take_first(order, count, taken, found, reason, reasons)
