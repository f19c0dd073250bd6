"""``bury``: takes from the score of some candidates."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from trirank.contract import Reason

from trirank_backend.policies.boost import lifting
from trirank_backend.policies.rule import Amount, Phase, Release, SelectingRule, Step


class Bury(SelectingRule):
    """Takes ``by`` from the score of what the selection chooses."""

    rule: Literal["bury"] = "bury"
    phase: ClassVar[Phase] = Phase.SCORE
    reason: ClassVar[Reason | None] = Reason.BURIED
    by: Amount

    def bind(self, release: Release) -> Step:
        """The step for a release."""
        return lifting(self.chooser(release), release, np.float32(-self.by), Reason.BURIED)
