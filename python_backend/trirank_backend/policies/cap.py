"""``cap``: not too many of one brand, category or seller next to each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator
from trirank.contract import Reason

from trirank_backend.compiled import kernel
from trirank_backend.policies.page import Items, Page
from trirank_backend.policies.rule import Phase, Position, Positive, Release, Rule, Step

Field_ = Literal["brand", "category", "seller"]


class Cap(Rule):
    """At most ``at_most`` of one brand (category, seller) among any ``window`` neighbours. What is too many is held
    back until it fits; where nothing fits, the best goes on. Items without one are not counted.

    Attributes:
        within: how many positions are held to it; None: TOP_K. The others follow as they were.
    """

    rule: Literal["cap"] = "cap"
    phase: ClassVar[Phase] = Phase.ORDER
    reason: ClassVar[Reason | None] = Reason.HELD_BACK
    field: Field_
    at_most: Positive = 2
    window: Position = 10
    within: Position | None = None

    @model_validator(mode="after")
    def _caps_something(self) -> Cap:
        if self.at_most >= self.window:
            raise ValueError(f"at_most {self.at_most} of a window of {self.window} is no cap; say less, or a wider one")
        return self

    def absent(self, release: Release) -> Iterator[str]:
        """A field of which the catalogue knows nothing."""
        return unknown_field(release, self.field)

    def bind(self, release: Release) -> Step:
        """The step for a release."""
        codes, bit = column(release.items, self.field), Reason.HELD_BACK.value

        def step(page: Page) -> None:
            page.sort()
            cap(
                page.order, page.count, page.rows, codes, self.at_most, self.window, self.within or page.top_k, bit,
                page.reasons,
            )  # fmt: skip

        return step


def column(items: Items, field: str) -> NDArray[np.int32]:
    """The codes of a field."""
    columns = {"brand": items.brands, "category": items.categories, "seller": items.sellers}
    return columns[field]


def unknown_field(release: Release, field: str) -> Iterator[str]:
    """Says so where no item has the field."""
    if not release.attributes.names[field]:
        yield f"no item of the catalogue has a {field}, so it does nothing"


@kernel
def numbered(codes: NDArray[np.int32], rows: NDArray[np.int32], order: NDArray[np.int32]) -> Any:
    """[N] the codes of candidates, numbered from 0 in the order in which they come; -1: none."""
    size = 16
    while size < 2 * len(order):
        size *= 2
    slots, numbers = np.full(size, -1, np.int32), np.full(size, -1, np.int32)  # a hash table with open addressing
    found, count = np.empty(len(order), np.int32), 0
    for at in range(len(order)):
        code = codes[rows[order[at]]]
        if code < 0:
            found[at] = -1
            continue
        slot = np.int64((np.uint64(code) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)) & (size - 1)
        while slots[slot] >= 0 and slots[slot] != code:
            slot = (slot + 1) & (size - 1)
        if slots[slot] < 0:
            slots[slot], numbers[slot] = code, count
            count += 1
        found[at] = numbers[slot]
    return found


@kernel
def cap(
    order: NDArray[np.int32],
    count: int,
    rows: NDArray[np.int32],
    codes: NDArray[np.int32],
    at_most: int,
    window: int,
    within: int,
    reason: int,
    reasons: NDArray[np.int32],
) -> None:
    """Reorder the first ``within``."""
    before = order[:count].copy()
    kinds = numbered(codes, rows, before)
    gone = np.zeros(count, np.bool_)
    left, near = np.zeros(count, np.int32), np.zeros(count, np.int32)  # of each kind: to be put, among the neighbours
    for at in range(count):
        if kinds[at] >= 0:
            left[kinds[at]] += 1
    fitting = count  # candidates that are still to be put and are not of a kind of which there are enough
    put = np.empty(count, np.int32)
    first = 0  # of those that are still to be put
    for position in range(min(within, count)):
        if position >= window and put[position - window] >= 0:
            leaves = put[position - window]
            if near[leaves] == at_most:
                fitting += left[leaves]
            near[leaves] -= 1
        while gone[first]:
            first += 1
        at = first
        if fitting:
            while gone[at] or (kinds[at] >= 0 and near[kinds[at]] >= at_most):
                at += 1
        put[position] = kind = kinds[at]
        if kind < 0:
            fitting -= 1
        else:
            fitting -= near[kind] < at_most
            left[kind] -= 1
            near[kind] += 1
            if near[kind] == at_most:
                fitting -= left[kind]
        gone[at] = True
        order[position] = before[at]
        for passed in range(first, at):  # what stood before it now stands behind it
            if not gone[passed]:
                reasons[before[passed]] |= reason
    position = min(within, count)
    for at in range(count):
        if not gone[at]:
            order[position] = before[at]
            position += 1
