"""``filter``: leaves out candidates for what they are. What is sold out or blocked is left out without a rule."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from trirank.contract import Signal

from trirank_backend.compiled import kernel
from trirank_backend.policies.page import Page
from trirank_backend.policies.rule import (
    DAY_S,
    Amount,
    Codes,
    Phase,
    Positive,
    Release,
    SelectingRule,
    Step,
    choose,
)


class Filter(SelectingRule):
    """Drops what the selection chooses, and what is outside the limits; an unknown price or age is outside of any.

    Attributes:
        bought: what the user has bought; the same as the signal PURCHASED.
        min_price, max_price: in the catalogue's currency.
        min_age_days, max_age_days: since the item came into the catalogue.
        min_stock: pieces; an item of whose stock nothing is known stays.
    """

    rule: Literal["filter"] = "filter"
    phase: ClassVar[Phase] = Phase.SCORE
    bought: bool = False
    min_price: Amount | None = None
    max_price: Amount | None = None
    min_age_days: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    max_age_days: Amount | None = None
    min_stock: Positive | None = None

    @model_validator(mode="after")
    def _limits(self) -> Filter:
        for what in ("price", "age_days"):
            least, most = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if least is not None and most is not None and least > most:
                raise ValueError(f"min_{what} is {least:g}, above max_{what} {most:g}: nothing would be left")
        return self

    def names_nothing(self) -> bool:
        """Whether no candidate can be meant, by the limits either."""
        limits = (self.min_price, self.max_price, self.min_age_days, self.max_age_days, self.min_stock)
        return super().names_nothing() and not self.bought and all(limit is None for limit in limits)

    def of_signals(self) -> int:
        """Its signals as bits."""
        return super().of_signals() | (Signal.PURCHASED.value if self.bought else 0)

    def bind(self, release: Release) -> Step:
        """The step for a release."""
        chooser, codes = self.chooser(release), Codes.of(release.items)
        limits = np.array(
            [
                -np.inf if self.min_price is None else np.float32(self.min_price),  # as prices are
                np.inf if self.max_price is None else np.float32(self.max_price),
                -np.inf if self.min_age_days is None else self.min_age_days * DAY_S,
                np.inf if self.max_age_days is None else self.max_age_days * DAY_S,
                0 if self.min_stock is None else self.min_stock,
            ]
        )
        limits.flags.writeable = False

        def step(page: Page) -> None:
            kept = filter_out(
                page.order, page.count, page.rows, page.prices, page.stock, choose(chooser, codes, page),
                codes.created_at, limits, page.moment,
            )  # fmt: skip
            page.filtered += page.count - kept
            page.count = kept

        return step


@kernel
def filter_out(
    order: NDArray[np.int32],
    count: int,
    rows: NDArray[np.int32],
    prices: NDArray[np.float32],
    stock: NDArray[np.int32],
    mask: NDArray[np.bool_],
    created_at: NDArray[np.int64],
    limits: NDArray[np.float64],
    moment: int,
) -> Any:
    """Keep the others in their order; gives how many.

    Args:
        limits: least and greatest price, least and greatest age in seconds, least stock.
    """
    priced = limits[0] > -np.inf or limits[1] < np.inf
    aged = limits[2] > -np.inf or limits[3] < np.inf
    kept = 0
    for at in range(count):
        place = order[at]
        row = rows[place]
        if mask[place]:
            continue
        if priced and not limits[0] <= prices[place] <= limits[1]:
            continue
        if aged and not (created_at[row] > 0 and limits[2] <= moment - created_at[row] <= limits[3]):
            continue
        if 0 <= stock[place] < limits[4]:
            continue
        order[kept] = place
        kept += 1
    return kept
