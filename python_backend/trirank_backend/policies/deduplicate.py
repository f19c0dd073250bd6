"""``deduplicate``: of candidates that are alike, only the best stays.

Alike are variants of a product, and items whose titles are nearly the same: MinHash (Broder, 1997) of the titles'
letter trigrams, 32 hashes of which 8 bits are kept (Li and König, WWW 2010), in bands of four or more, as long as they
can be, so that only titles that agree in a whole band are compared at all: from 0.78 on none is missed, below that a
few. Identical ids have been dropped before, by preprocess.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from trirank.contract import Reason

from trirank_backend.attributes import SKETCH
from trirank_backend.compiled import kernel
from trirank_backend.policies.page import Page
from trirank_backend.policies.rule import Phase, Release, Rule, Step

_MIX = 0x9E3779B97F4A7C15
_BEST = Reason.BEST_VARIANT.value


class Deduplicate(Rule):
    """See the top of this file.

    Attributes:
        variants: whether one of each product stays.
        titles: share of trigrams (Jaccard) from which titles count as the same; None: they are not compared.
    """

    rule: Literal["deduplicate"] = "deduplicate"
    phase: ClassVar[Phase] = Phase.CHOOSE
    reason: ClassVar[Reason | None] = Reason.BEST_VARIANT
    variants: bool = True
    titles: Annotated[float, Field(ge=0.5, le=1)] | None = None

    @model_validator(mode="after")
    def _compares_something(self) -> Deduplicate:
        if not self.variants and self.titles is None:
            raise ValueError("neither variants nor titles are compared; say one of them")
        return self

    def bind(self, release: Release) -> Step:
        """The step for a release."""
        items = release.items
        bands = items.sketches.view(np.uint32)
        least = SKETCH + 1 if self.titles is None else round(self.titles * SKETCH)

        def step(page: Page) -> None:
            page.sort()
            held = _NOBODY if page.held is None else page.held
            page.count = keep_best(
                page.order, page.count, page.rows, items.products, bands, self.variants, least, held, page.reasons,
            )  # fmt: skip

        return step


_NOBODY = np.zeros(0, np.bool_)


@kernel
def keep_best(
    order: NDArray[np.int32],
    count: int,
    rows: NDArray[np.int32],
    products: NDArray[np.int32],
    bands: NDArray[np.uint32],
    variants: bool,
    least: int,
    held: NDArray[np.bool_],
    reasons: NDArray[np.int32],
) -> Any:
    """Keep the first of each kind, in order; gives how many.

    Args:
        bands: [M+1, SKETCH / 4] the sketches, four hashes in a number.
        least: hashes that have to agree for titles to be the same; above SKETCH: they are not compared.
        held: [N] or [0]; what is held stays, and others like it go whatever their score.
    """
    size = 16
    while size < 2 * count:
        size *= 2
    mask = size - 1
    by_product = np.full(size, -1, np.int32)  # hash sets with open addressing, of places that stay
    # So many hashes may differ, and each spoils one band: one more band than that, and one is whole (pigeonholes).
    banded = 0 if least > SKETCH else min(bands.shape[1], SKETCH - least + 1)
    by_band = np.full((banded, size), -1, np.int32)  # these hold numbers of candidates, in order
    spots = np.zeros(banded, np.int64)
    # A band's fours as one number; more than two are mixed, and what is mixed alike is compared and told apart.
    fours = bands.shape[1] // max(banded, 1)
    keys = np.empty((count if banded else 0, banded), np.uint64)
    for at in range(len(keys)):
        row = rows[order[at]]
        for band in range(banded):
            key = np.uint64(0)
            for four in range(band * fours, (band + 1) * fours):
                key = (key << np.uint64(32) | key >> np.uint64(32)) * np.uint64(_MIX) ^ np.uint64(bands[row, four])
            keys[at, band] = key
    gone = np.zeros(count, np.bool_)
    # What is held first: the others give way to it.
    turns = 2 if len(held) else 1
    for turn in range(turns):
        for at in range(count):
            place = order[at]
            if len(held) and held[place] != (turn == 0):
                continue
            row = rows[place]
            product = products[row]
            winner = np.int32(-1)
            slot = np.int64(product) & mask
            if variants and product >= 0:
                while by_product[slot] >= 0 and products[rows[by_product[slot]]] != product:
                    slot = (slot + 1) & mask
                winner = by_product[slot]
            titled = False
            if banded and winner < 0:
                for band in range(bands.shape[1]):
                    titled |= bands[row, band] != 0
            for band in range(banded if titled else 0):
                key = keys[at, band]
                spot = np.int64(key * np.uint64(_MIX) >> np.uint64(40)) & mask
                while by_band[band, spot] >= 0 and winner < 0:
                    other = by_band[band, spot]
                    if keys[other, band] == key:  # a slot may hold what has another band, whose place was taken
                        agree = 0
                        for four in range(bands.shape[1]):
                            differs = bands[row, four] ^ bands[rows[order[other]], four]
                            for byte in range(4):
                                agree += (differs >> np.uint32(8 * byte)) & np.uint32(255) == 0
                        if agree >= least:
                            winner = order[other]
                    spot = (spot + 1) & mask
                spots[band] = spot  # where there is room for it, if it stays
            if winner >= 0 and turn == turns - 1:
                gone[at] = True
                reasons[winner] |= _BEST
                continue
            if variants and product >= 0 and by_product[slot] < 0:
                by_product[slot] = place
            for band in range(banded if titled else 0):
                while by_band[band, spots[band]] >= 0:  # held ones beside another one that is held
                    spots[band] = (spots[band] + 1) & mask
                by_band[band, spots[band]] = at
    kept = 0
    for at in range(count):
        if not gone[at]:
            order[kept] = order[at]
            kept += 1
    return kept
