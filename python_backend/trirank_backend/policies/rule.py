"""What every rule is: settings that are checked, one phase, one reason, and a step that works on a page.

To add one: a module with a subclass of Rule, an entry in ``policies.RULES``, a bit of contract.Reason where it acts on
what is shown, and a plain version in tests/python_backend/rules.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from trirank import contract
from trirank.contract import Reason, Signal

from trirank_backend.attributes import NAMED, Attributes
from trirank_backend.compiled import kernel
from trirank_backend.policies.page import Items, Page

Step = Callable[[Page], None]
Position = Annotated[int, Field(ge=1, le=contract.MAX_TOP_K)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
LARGEST = 1e6
"""Of weights and amounts: sums of some such stay finite in float32, with room for squares."""
Amount = Annotated[float, Field(allow_inf_nan=False, gt=0, le=LARGEST)]
ItemId = Annotated[int, Field(ge=-(2**63), lt=2**63)] | Annotated[str, Field(min_length=1)]
DAY_S = 86_400


class Phase(IntEnum):
    """Rules of a later phase stand behind those of an earlier one: they work on what these left."""

    SCORE = 1  # which candidates, and what they are worth
    CHOOSE = 2  # one of those that are alike
    ORDER = 3  # in which order
    PLACE = 4  # at which position, whatever the order


class Release(NamedTuple):
    """What a rule is bound to."""

    items: Items
    attributes: Attributes
    tasks: tuple[str, ...]

    def rows(self, items: list[ItemId]) -> NDArray[np.int32]:
        """Ascending rows of the items that the catalogue has."""
        ids = np.array([item_id(item) for item in items], np.int64)
        places = np.searchsorted(self.items.ids, ids)
        places[places == len(self.items.ids)] = 0
        there = self.items.ids[places] == ids if len(self.items.ids) else np.zeros(len(ids), bool)
        return np.unique(places[there]).astype(np.int32)


def item_id(item: ItemId) -> int:
    """Of an item as a policy names it."""
    return contract.stable_id(item) if isinstance(item, str) else item


class Rule(BaseModel):
    """One rule of a policy.

    Attributes:
        queries: searches that it is for; empty: all requests.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    phase: ClassVar[Phase]
    reason: ClassVar[Reason | None] = None
    queries: list[str] = []

    def bind(self, release: Release) -> Step:
        """The step for a release, with its names as numbers."""
        raise NotImplementedError

    def positions(self) -> list[int]:
        """Positions that it fixes."""
        return []

    def problems(self, release: Release) -> Iterator[str]:
        """What of it does not fit a release."""
        return iter(())

    def absent(self, release: Release) -> Iterator[str]:
        """What it names that the release does not have; such come and go, and it works without."""
        return iter(())


class Selection(BaseModel):
    """Some of the candidates: those of which any of this is true.

    Attributes:
        signals: names of contract.Signal.
        brands, categories, sellers: names, as the catalogue has them.
        items: ids, as callers send them.
        younger_days: items that came into the catalogue less than so many days ago.
    """

    signals: list[str] = []
    brands: list[str] = []
    categories: list[str] = []
    sellers: list[str] = []
    items: list[ItemId] = []
    younger_days: Amount | None = None

    def names_nothing(self) -> bool:
        """Whether no candidate can be meant."""
        lists = (self.signals, self.brands, self.categories, self.sellers, self.items)
        return not any(lists) and self.younger_days is None

    def of_signals(self) -> int:
        """Its signals as bits."""
        return sum(Signal[name].value for name in set(self.signals))

    def chooser(self, release: Release) -> Chooser:
        """The same as numbers."""
        tables: list[NDArray[np.bool_]] = []
        for kind, wanted in zip(NAMED, (self.brands, self.categories, self.sellers), strict=True):
            names = release.attributes.names[kind]
            table = np.zeros(len(names) + 1, np.bool_)  # the last one is that of code -1
            table[[at for at, name in enumerate(names) if name in set(wanted)]] = True
            tables.append(table)
        younger = int((self.younger_days or 0) * DAY_S)
        brands, categories, sellers = tables
        return Chooser(self.of_signals(), brands, categories, sellers, release.rows(self.items), younger)

    def missing(self, release: Release) -> Iterator[str]:
        """Names and items that a release does not have."""
        for kind, wanted in zip(NAMED, (self.brands, self.categories, self.sellers), strict=True):
            if unknown := sorted(set(wanted) - set(release.attributes.names[kind])):
                yield f"no item has the {kind} {', '.join(unknown)}"
        if self.items and (lacking := len(set(self.items)) - len(release.rows(self.items))):
            yield f"{lacking} of {len(set(self.items))} items are not in the catalogue"


class SelectingRule(Rule, Selection):
    """A rule for some of the candidates."""

    @model_validator(mode="after")
    def _means_something(self) -> SelectingRule:
        if unknown := sorted(set(self.signals) - set(Signal.__members__)):
            raise ValueError(f"signals {unknown} do not exist; they are {list(Signal.__members__)}")
        if self.names_nothing():
            fields = ", ".join(Selection.model_fields)
            raise ValueError(f"{type(self).__name__.lower()} is for no item at all; say at least one of {fields}")
        return self

    def absent(self, release: Release) -> Iterator[str]:
        """Names and items that the release does not have."""
        return self.missing(release)


class Chooser(NamedTuple):
    """A Selection as numbers.

    Attributes:
        brands, categories, sellers: [names + 1] bool, the last one of unknown ones.
        rows: ascending int32.
        younger_s: 0: age does not matter.
    """

    signals: int
    brands: NDArray[np.bool_]
    categories: NDArray[np.bool_]
    sellers: NDArray[np.bool_]
    rows: NDArray[np.int32]
    younger_s: int


class Codes(NamedTuple):
    """The columns that a Chooser reads."""

    brands: NDArray[np.int32]
    categories: NDArray[np.int32]
    sellers: NDArray[np.int32]
    created_at: NDArray[np.int64]

    @classmethod
    def of(cls, items: Items) -> Codes:
        """Of a release's items."""
        return cls(items.brands, items.categories, items.sellers, items.created_at)


def choose(chooser: Chooser, codes: Codes, page: Page) -> NDArray[np.bool_]:
    """[N] by place, which of those that are there a chooser takes."""
    mask = np.zeros(len(page.rows), np.bool_)
    mark(chooser, codes, page.order, page.count, page.rows, page.signals, page.moment, mask)
    return mask


@kernel
def mark(
    chooser: Chooser,
    codes: Codes,
    order: NDArray[np.int32],
    count: int,
    rows: NDArray[np.int32],
    signals: NDArray[np.int32],
    moment: int,
    mask: NDArray[np.bool_],
) -> None:
    """See ``choose``."""
    brands, categories, sellers, created_at = codes.brands, codes.categories, codes.sellers, codes.created_at
    of_brands, of_categories, of_sellers = chooser.brands, chooser.categories, chooser.sellers
    listed = chooser.rows
    for at in range(count):
        place = order[at]
        row = rows[place]
        taken = (
            (signals[place] & chooser.signals) != 0
            or of_brands[brands[row]]
            or of_categories[categories[row]]
            or of_sellers[sellers[row]]
        )
        if not taken and chooser.younger_s:
            taken = created_at[row] > 0 and moment - created_at[row] < chooser.younger_s
        if not taken and len(listed):
            spot = np.searchsorted(listed, row)
            taken = spot < len(listed) and listed[spot] == row
        mask[place] = taken


def query_key(text: str) -> int:
    """What a query is known by to rules: upper and lower case, and how much room is between words, are one; 0: none."""
    words = " ".join(text.lower().split())
    return contract.stable_id(words) if words else 0
