"""``pin``: one item at one position, whatever its score, if it is among the candidates and no filter left it out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
from trirank.contract import Reason

from trirank_backend.policies.page import Page
from trirank_backend.policies.rule import ItemId, Phase, Position, Release, Rule, Step


class Pin(Rule):
    """Puts ``item`` at ``position``, 1 being the first. Its variants give way to it."""

    rule: Literal["pin"] = "pin"
    phase: ClassVar[Phase] = Phase.PLACE
    reason: ClassVar[Reason | None] = Reason.PINNED
    item: ItemId
    position: Position

    def positions(self) -> list[int]:
        """Its own."""
        return [self.position]

    def absent(self, release: Release) -> Iterator[str]:
        """The item, where the catalogue does not have it."""
        if not len(release.rows([self.item])):
            yield f"item {self.item} is not in the catalogue"

    def row(self, release: Release) -> int:
        """Of the item; -1: the catalogue does not have it."""
        found = release.rows([self.item])
        return int(found[0]) if len(found) else -1

    def hold(self, release: Release) -> Step:
        """The step that says of the item, before all others, that it shall stay."""
        row = self.row(release)

        def step(page: Page) -> None:
            if page.held is None:
                page.held = np.zeros(len(page.rows), np.bool_)
            if row >= 0:
                page.held |= page.rows == row

        return step

    def bind(self, release: Release) -> Step:
        """The step for a release."""
        row = self.row(release)

        def step(page: Page) -> None:
            page.sort()
            place = page.find(row) if row >= 0 else -1
            if place >= 0:
                page.put(place, self.position, Reason.PINNED.value)

        return step
