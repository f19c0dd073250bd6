"""``sponsored``: positions that are kept for some of the candidates, the best of them first."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from trirank.contract import Reason

from trirank_backend.compiled import kernel
from trirank_backend.policies.page import Page
from trirank_backend.policies.rule import (
    Codes,
    Phase,
    Position,
    Release,
    SelectingRule,
    Step,
    choose,
)


class Sponsored(SelectingRule):
    """Fills ``slots`` with what the selection chooses; a slot for which there is none is not kept free."""

    rule: Literal["sponsored"] = "sponsored"
    phase: ClassVar[Phase] = Phase.PLACE
    reason: ClassVar[Reason | None] = Reason.SPONSORED
    slots: Annotated[list[Position], Field(min_length=1)]

    @model_validator(mode="after")
    def _each_slot_once(self) -> Sponsored:
        if len(set(self.slots)) < len(self.slots):
            raise ValueError(f"slots {self.slots} name a position twice")
        return self

    def positions(self) -> list[int]:
        """Its slots."""
        return self.slots

    def bind(self, release: Release) -> Step:
        """The step for a release."""
        chooser, codes, slots = self.chooser(release), Codes.of(release.items), sorted(self.slots)

        def step(page: Page) -> None:
            page.sort()
            mask = choose(chooser, codes, page)
            mask[list(page.fixed.values())] = False
            places = np.empty(len(slots), np.int32)
            found = first_chosen(page.order, page.count, mask, page.score, places)
            # A slot that nobody sees would hide what stands further up by itself.
            seen = [slot for slot in slots if slot <= page.top_k]
            for place, slot in zip(places[:found].tolist(), seen, strict=False):
                page.put(place, slot, Reason.SPONSORED.value)

        return step


@kernel
def first_chosen(
    order: NDArray[np.int32],
    count: int,
    mask: NDArray[np.bool_],
    score: NDArray[np.float32],
    places: NDArray[np.int32],
) -> Any:
    """Fill in the best places of the mask, which loses them; gives how many."""
    found = 0
    while found < len(places):
        best = -1
        for at in range(count):
            place = order[at]
            if mask[place] and (best < 0 or score[place] > score[best]):
                best = place
        if best < 0:
            break
        mask[best] = False
        places[found] = best
        found += 1
    return found
