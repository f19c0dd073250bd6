"""``dpp``: the set that is relevant and spread out, by a determinantal point process (Chen, Zhang and Zhou, "Fast
greedy MAP inference", NeurIPS 2018).

The kernel is L_ij = q_i q_j S_ij with q = exp(w r), r the score scaled to 0 … 1 within the page, S the cosine of
attributes.Attributes.vectors times SHARE off the diagonal, so that no set is impossible for having more items than
vectors have dimensions, and w = (1 − diversity) / (2 diversity), as in section 5 there with θ = 1 − diversity.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from trirank.contract import Reason

from trirank_backend.compiled import kernel
from trirank_backend.policies.page import Page
from trirank_backend.policies.rule import Phase, Position, Release, Rule, Step
from trirank_backend.policies.similarity import SCALE, first_of_greatest, gather, padded, similarities, take_first

SHARE = np.float32(0.95)
_LEAST = np.float32(1e-10)


class Dpp(Rule):
    """See the top of this file.

    Attributes:
        within: how many positions are filled so; None: TOP_K. The others follow as they were.
    """

    rule: Literal["dpp"] = "dpp"
    phase: ClassVar[Phase] = Phase.ORDER
    reason: ClassVar[Reason | None] = Reason.DIVERSE_SET
    diversity: Annotated[float, Field(ge=0.05, lt=1)] = 0.3
    within: Position | None = None

    def bind(self, release: Release) -> Step:
        """The step for a release."""
        vectors, bit = release.items.vectors, Reason.DIVERSE_SET.value
        weight = np.float32((1 - self.diversity) / (2 * self.diversity))

        def step(page: Page) -> None:
            page.sort()
            dpp(
                page.order, page.count, page.rows, page.score, vectors, self.within or page.top_k, weight, bit,
                page.reasons,
            )  # fmt: skip

        return step


@kernel
def dpp(
    order: NDArray[np.int32],
    count: int,
    rows: NDArray[np.int32],
    score: NDArray[np.float32],
    vectors: NDArray[np.int8],
    within: int,
    weight: np.float32,
    reason: int,
    reasons: NDArray[np.int32],
) -> None:
    """Reorder the first ``within``."""
    if count < 2:
        return
    width = padded(count)  # see similarity.padded
    relevance = np.full(width, -np.inf, np.float32)
    side_by_side = np.zeros((vectors.shape[1], width), np.float32)
    gather(order, count, rows, score, vectors, relevance, side_by_side)
    quality = np.exp(weight * relevance)
    left = quality * quality  # what each would add to the determinant
    left[count:] = -np.inf
    wanted = min(within, count)
    # Row k of the Cholesky factor belongs to the k-th one taken.
    factor = np.empty((wanted, width), np.float32)
    taken = np.empty(wanted, np.int64)
    found = 0
    while found < wanted:
        chosen = first_of_greatest(left)
        best = left[chosen]
        if not best >= _LEAST:  # NaN is neither
            break
        taken[found] = chosen
        row = factor[found]
        similarities(side_by_side, chosen, SCALE * SHARE, row)
        for at in range(width):
            row[at] *= quality[at] * quality[chosen]
        for before in range(found):
            share = factor[before, chosen]
            line = factor[before]
            for at in range(width):
                row[at] -= line[at] * share
        scale = np.float32(1 / math.sqrt(best))
        for at in range(width):
            row[at] *= scale
            left[at] -= row[at] * row[at]
        left[chosen] = -np.inf
        found += 1
    take_first(order, count, taken, found, reason, reasons)
