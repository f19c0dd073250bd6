"""``mix``: one score from what the ranker says of each task, and from margin, freshness and retrieval.

    score = Σ_t tasks[t] · f(s_t) + margin · m + freshness · 2^(−age / half_life) + retrieval · z

where s_t is the ranker's score for task t, f the identity (``scale = "logit"``) or 1 / (1 + e^−s) (``"probability"``:
weights are then worth of a click, a cart, a purchase), m the item's margin as a share of its price (0 where it is not
known), age the days since the item came (an unknown age counts as infinite), and z the retrieval score standardised
within the request (0 where there is none).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from trirank_backend.compiled import kernel
from trirank_backend.errors import BrokenScores
from trirank_backend.policies.page import Page
from trirank_backend.policies.rule import DAY_S, LARGEST, Amount, Phase, Release, Rule, Step

Weight = Annotated[float, Field(allow_inf_nan=False, ge=-LARGEST, le=LARGEST)]


class Mix(Rule):
    """See the top of this file.

    Attributes:
        tasks: task → weight; None: all of the ranker's alike, 1 in sum.
        half_life_days: after which freshness counts half.
    """

    rule: Literal["mix"] = "mix"
    phase: ClassVar[Phase] = Phase.SCORE
    tasks: dict[str, Weight] | None = None
    scale: Literal["logit", "probability"] = "logit"
    margin: Weight = 0.0
    freshness: Weight = 0.0
    half_life_days: Amount = 14.0
    retrieval: Weight = 0.0

    @model_validator(mode="after")
    def _weighs_something(self) -> Mix:
        weights = [*(self.tasks or {"": 1.0}).values(), self.margin, self.freshness, self.retrieval]
        if not any(weights):
            raise ValueError("all weights are 0, so that all scores would be alike; give one another weight")
        return self

    def problems(self, release: Release) -> Iterator[str]:
        """Tasks that the ranker does not have."""
        if unknown := sorted(set(self.tasks or {}) - set(release.tasks)):
            yield f"tasks {', '.join(unknown)} are none of the ranker's: {', '.join(release.tasks)}"

    def bind(self, release: Release) -> Step:
        """The step for a release."""
        weigh = self.tasks if self.tasks is not None else dict.fromkeys(release.tasks, 1 / len(release.tasks))
        weights = Weights(
            tasks=np.array([weigh.get(task, 0.0) for task in release.tasks], np.float32),
            probability=self.scale == "probability",
            margin=self.margin,
            freshness=self.freshness,
            half_life_s=self.half_life_days * DAY_S,
            retrieval=self.retrieval,
        )
        items = release.items

        def step(page: Page) -> None:
            broken = mix(
                page.order, page.count, page.tasks, page.rows, page.retrieval, items.margins, items.created_at, weights,
                page.moment, page.score,
            )  # fmt: skip
            if broken >= 0:
                raise BrokenScores(
                    f"the ranker gave item {items.ids[page.rows[broken]]} the scores {page.tasks[broken].tolist()}, "
                    "which are no finite numbers; serve the release before, and look at how this one was exported"
                )
            page.sorted = False

        return step


class Weights(NamedTuple):
    """A Mix as numbers; tasks are [T] float32."""

    tasks: NDArray[np.float32]
    probability: bool
    margin: float
    freshness: float
    half_life_s: float
    retrieval: float


@kernel
def mix(
    order: NDArray[np.int32],
    count: int,
    tasks: NDArray[np.float32],
    rows: NDArray[np.int32],
    retrieval: NDArray[np.float32],
    margins: NDArray[np.float32],
    created_at: NDArray[np.int64],
    weights: Weights,
    moment: int,
    score: NDArray[np.float32],
) -> Any:
    """Fill in the scores; gives a place whose score is no finite number, or -1."""
    mean, deviation, given = 0.0, 1.0, 0
    with_retrieval = weights.retrieval != 0.0 and len(retrieval) > 0
    if with_retrieval:
        squares = 0.0
        for at in range(count):
            one = retrieval[order[at]]
            if not np.isnan(one):
                given += 1
                mean += one
                squares += np.float64(one) * one
        mean /= max(given, 1)
        deviation = math.sqrt(max(squares / max(given, 1) - mean * mean, 0.0))
    for at in range(count):
        place = order[at]
        total = np.float32(0)
        for task in range(len(weights.tasks)):
            one = tasks[place, task]
            if not math.isfinite(one):  # which a probability of 1 would hide
                return place
            if weights.probability:
                one = np.float32(1) / (np.float32(1) + np.exp(-one))
            total += one * weights.tasks[task]
        row = rows[place]
        if weights.margin != 0.0 and not np.isnan(margins[row]):
            total += np.float32(weights.margin * margins[row])
        if weights.freshness != 0.0 and created_at[row] > 0:
            age = max(moment - created_at[row], 0)
            total += np.float32(weights.freshness * 2.0 ** (-age / weights.half_life_s))
        if with_retrieval and deviation > 0 and not np.isnan(retrieval[place]):
            total += np.float32(weights.retrieval * (retrieval[place] - mean) / deviation)
        if not math.isfinite(total):
            return place
        score[place] = total
    return -1
