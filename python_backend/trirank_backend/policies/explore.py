"""``explore``: shows new items sometimes, more often the less is known of them, and less the more they disappoint.

Of an item that was shown n times and clicked c times, with prior a clicks in b showings, the click rate is taken to be
distributed as Beta(a + c, b − a + n − c). ``thompson`` draws from it (Thompson 1933; Chapelle and Li, NeurIPS 2011);
``ucb`` takes mean + z · standard deviation of it. Added to the score is

    weight · (logit(drawn) − logit(a / b)),

so that an item that does as well as expected gets nothing on average. All draws of a request come from its seed, which
is made of its user, query and candidates: a repeat is answered alike, as long as no filter, stock or count changes.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from trirank.contract import Reason

from trirank_backend.compiled import kernel
from trirank_backend.policies.page import Page
from trirank_backend.policies.rule import DAY_S, Amount, Phase, Positive, Release, Rule, Step


class Explore(Rule):
    """See the top of this file.

    Attributes:
        younger_days: which items count as new.
        until: showings after which an item is no longer explored.
        prior_clicks, prior_showings: a and b.
        z: of ``ucb``, standard deviations.
    """

    rule: Literal["explore"] = "explore"
    phase: ClassVar[Phase] = Phase.SCORE
    reason: ClassVar[Reason | None] = Reason.EXPLORED
    method: Literal["thompson", "ucb"] = "thompson"
    younger_days: Amount = 14.0
    until: Positive = 1_000
    weight: Amount = 1.0
    prior_clicks: Amount = 1.0
    prior_showings: Amount = 20.0
    z: Annotated[float, Field(ge=0, le=10)] = 1.0

    @model_validator(mode="after")
    def _prior(self) -> Explore:
        if self.prior_clicks >= self.prior_showings:
            raise ValueError(f"prior_clicks is {self.prior_clicks:g}, of {self.prior_showings:g} prior_showings")
        return self

    def bind(self, release: Release) -> Step:
        """The step for a release."""
        created_at = release.items.created_at
        younger = int(self.younger_days * DAY_S)
        a, b = self.prior_clicks, self.prior_showings
        z = self.z if self.method == "ucb" else -1.0

        def step(page: Page) -> None:
            explore(
                page.order, page.count, page.rows, created_at, page.impressions, page.clicks, page.moment, younger,
                self.until, a, b, z, self.weight, page.seed, page.score, page.reasons,
            )  # fmt: skip
            page.sorted = False

        return step


@kernel
def explore(
    order: NDArray[np.int32],
    count: int,
    rows: NDArray[np.int32],
    created_at: NDArray[np.int64],
    impressions: NDArray[np.int32],
    clicks: NDArray[np.int32],
    moment: int,
    younger_s: int,
    until: int,
    a: float,
    b: float,
    z: float,
    weight: float,
    seed: int,
    score: NDArray[np.float32],
    reasons: NDArray[np.int32],
) -> None:
    """Add to the scores of new items; z below 0: Thompson sampling."""
    np.random.seed(seed)  # noqa: NPY002  # numba's own generator, of this thread
    start = math.log(a / (b - a))
    for at in range(count):
        place = order[at]
        created = created_at[rows[place]]
        if created <= 0 or moment - created >= younger_s:
            continue
        shown, clicked = 0, 0
        if len(impressions):
            shown, clicked = impressions[place], min(clicks[place], impressions[place])
        if shown >= until:
            continue
        good, bad = a + clicked, b - a + shown - clicked
        if z < 0:
            rate = np.random.beta(good, bad)  # noqa: NPY002
        else:
            mean = good / (good + bad)
            rate = mean + z * math.sqrt(mean * (1 - mean) / (good + bad + 1))
        rate = min(max(rate, 1e-6), 1 - 1e-6)
        score[place] += np.float32(weight * (math.log(rate / (1 - rate)) - start))
        reasons[place] |= _EXPLORED


_EXPLORED = Reason.EXPLORED.value
