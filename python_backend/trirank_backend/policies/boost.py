"""``boost``: adds to the score of some candidates."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from trirank.contract import Reason

from trirank_backend.compiled import kernel
from trirank_backend.policies.page import Page
from trirank_backend.policies.rule import (
    Amount,
    Chooser,
    Codes,
    Phase,
    Release,
    SelectingRule,
    Step,
    choose,
)


class Boost(SelectingRule):
    """Adds ``by`` to the score of what the selection chooses."""

    rule: Literal["boost"] = "boost"
    phase: ClassVar[Phase] = Phase.SCORE
    reason: ClassVar[Reason | None] = Reason.BOOSTED
    by: Amount

    def bind(self, release: Release) -> Step:
        """The step for a release."""
        return lifting(self.chooser(release), release, np.float32(self.by), Reason.BOOSTED)


def lifting(chooser: Chooser, release: Release, by: np.float32, reason: Reason) -> Step:
    """A step that adds ``by`` to the score of what a chooser takes."""
    codes, bit = Codes.of(release.items), reason.value

    def step(page: Page) -> None:
        lift(page.order, page.count, choose(chooser, codes, page), by, bit, page.score, page.reasons)
        page.sorted = False

    return step


@kernel
def lift(
    order: NDArray[np.int32],
    count: int,
    mask: NDArray[np.bool_],
    by: np.float32,
    reason: int,
    score: NDArray[np.float32],
    reasons: NDArray[np.int32],
) -> None:
    """Add ``by`` to the score of what is chosen, and say so."""
    for at in range(count):
        place = order[at]
        if mask[place]:
            score[place] += by
            reasons[place] |= reason
