"""``bury``: takes from the score of some candidates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
from pydantic import model_validator
from trirank.contract import Reason

from trirank_backend.policies.boost import lifting
from trirank_backend.policies.rule import Amount, Phase, Release, Rule, Selection, Step, check_signals


class Bury(Rule, Selection):
    """Takes ``by`` from the score of what the selection chooses."""

    rule: Literal["bury"] = "bury"
    phase: ClassVar[Phase] = Phase.SCORE
    reason: ClassVar[Reason | None] = Reason.BURIED
    by: Amount

    @model_validator(mode="after")
    def _chooses(self) -> Bury:
        check_signals(self, self)
        return self

    def absent(self, release: Release) -> Iterator[str]:
        """Names and items that the release does not have."""
        return self.missing(release)

    def bind(self, release: Release) -> Step:
        """The step for a release."""
        return lifting(self.chooser(release), release, np.float32(-self.by), Reason.BURIED)
