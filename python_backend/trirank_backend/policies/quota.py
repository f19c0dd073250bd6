"""``quota``: how many categories (brands, sellers) there are at least among the first, and how much of one at most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator
from trirank.contract import Reason

from trirank_backend.compiled import kernel
from trirank_backend.policies.cap import Field_, column, unknown_field
from trirank_backend.policies.page import Page
from trirank_backend.policies.rule import Phase, Position, Positive, Release, Rule, Step


class Quota(Rule):
    """Among the first ``within``: at least ``different`` values of the field, at most ``at_most`` items of one. The
    best that fits comes next; a position from which on only new values reach the number takes one. Items without a
    value count as one value of their own. Where candidates do not suffice, it goes as far as they do.

    Attributes:
        at_most: None: any number.
    """

    rule: Literal["quota"] = "quota"
    phase: ClassVar[Phase] = Phase.ORDER
    reason: ClassVar[Reason | None] = Reason.QUOTA
    field: Field_ = "category"
    within: Position = 10
    different: Positive = 1
    at_most: Positive | None = None

    @model_validator(mode="after")
    def _can_be_met(self) -> Quota:
        if self.different > self.within:
            raise ValueError(f"{self.different} different ones do not fit within {self.within} positions")
        if self.different == 1 and self.at_most is None:
            raise ValueError("it asks for nothing; say how many different ones there shall be, or at_most")
        return self

    def absent(self, release: Release) -> Iterator[str]:
        """A field of which the catalogue knows nothing."""
        return unknown_field(release, self.field)

    def bind(self, release: Release) -> Step:
        """The step for a release."""
        codes, bit = column(release.items, self.field), Reason.QUOTA.value
        values = len(release.attributes.names[self.field]) + 1

        def step(page: Page) -> None:
            page.sort()
            quota(
                page.order, page.count, page.rows, codes, values, self.within, self.different,
                self.at_most or self.within, bit, page.reasons,
            )  # fmt: skip

        return step


@kernel
def quota(
    order: NDArray[np.int32],
    count: int,
    rows: NDArray[np.int32],
    codes: NDArray[np.int32],
    values: int,
    within: int,
    different: int,
    at_most: int,
    reason: int,
    reasons: NDArray[np.int32],
) -> None:
    """Reorder the first ``within``."""
    before = order[:count].copy()
    gone = np.zeros(count, np.bool_)
    many = np.zeros(values, np.int32)  # of each value so far; the last one is that of code -1
    there, end = 0, min(within, count)
    for position in range(end):
        # The three wishes in the order in which they give way: a new value where it is due, no more of one, any.
        due = different - there >= end - position
        best_new, best_room, best = -1, -1, -1
        for at in range(count):
            if gone[at]:
                continue
            held = many[codes[rows[before[at]]]]
            if best < 0:
                best = at
            if best_room < 0 and held < at_most:
                best_room = at
            if held == 0:
                best_new = at
                break
        at = best
        if due and best_new >= 0:
            at = best_new
        elif best_room >= 0:
            at = best_room
        code = codes[rows[before[at]]]
        there += many[code] == 0
        many[code] += 1
        gone[at] = True
        order[position] = before[at]
        if at != best:  # a better one was passed over
            reasons[before[at]] |= reason
    position = end
    for at in range(count):
        if not gone[at]:
            order[position] = before[at]
            position += 1
