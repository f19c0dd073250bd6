"""The list of candidates of one line, on its way through a policy."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trirank_backend.attributes import Attributes
from trirank_backend.catalogue import Catalogue, read_only
from trirank_backend.compiled import kernel


class Items(NamedTuple):
    """The catalogue as rules read it, see catalogue.Catalogue and attributes.Attributes. All read-only."""

    ids: NDArray[np.int64]
    products: NDArray[np.int32]
    signals: NDArray[np.int32]
    created_at: NDArray[np.int64]
    prices: NDArray[np.float32]
    margins: NDArray[np.float32]
    brands: NDArray[np.int32]
    categories: NDArray[np.int32]
    sellers: NDArray[np.int32]
    regions: NDArray[np.uint64]
    vectors: NDArray[np.int8]
    sketches: NDArray[np.uint8]

    @classmethod
    def of(cls, catalogue: Catalogue, attributes: Attributes) -> Items:
        """Both of a release."""
        of_catalogue = ("ids", "products", "signals", "created_at")
        return cls(
            **{name: read_only(getattr(catalogue, name)) for name in of_catalogue},
            **{name: read_only(getattr(attributes, name)) for name in cls._fields if name not in of_catalogue},
        )


class Page:
    """N candidates of one line. Arrays that are not of the order go by place: the candidate's number in the request.

    Attributes:
        rows, signals: [N] int32 catalogue row (-1: not to be ranked) and Signal bits.
        tasks: [N, T] float32 of the ranker; retrieval: [N] float32, NaN where none was given, or [0].
        prices, stock: [N] float32 and int32 of now; NaN and -1: unknown.
        impressions, clicks: [N] int32 counts of feedback, or [0].
        score: [N] float32; reasons: [N] int32 bits of Reason that rules set.
        order: [N] int32, places; the first ``count`` are still there, best first where ``sorted``.
        filtered: how many a rule dropped for what they are; variants of better ones are not counted.
        held: [N] bool, places that a later rule will put where it wants, or None.
        fixed: position → place that a rule put there, and ``base`` the order before the first of them.
        moment: seconds since 1970; seed: of all chance in this request; query: stable_id of what was searched for, 0:
            nothing.
    """

    __slots__ = (
        "base", "clicks", "count", "filtered", "fixed", "held", "impressions", "moment", "order", "prices", "query",
        "reasons", "retrieval", "rows", "score", "seed", "signals", "sorted", "stock", "tasks", "top_k",
    )  # fmt: skip
    base: NDArray[np.int32] | None
    clicks: NDArray[np.int32]
    held: NDArray[np.bool_] | None
    impressions: NDArray[np.int32]

    def __init__(
        self,
        rows: NDArray[np.int32],
        signals: NDArray[np.int32],
        tasks: NDArray[np.float32],
        retrieval: NDArray[np.float32],
        top_k: int,
        moment: int = 0,
        seed: int = 0,
        query: int = 0,
    ) -> None:
        size = len(rows)
        self.rows, self.signals, self.tasks, self.retrieval = rows, signals, tasks, retrieval
        self.top_k, self.moment, self.seed, self.query = top_k, moment, seed, query
        self.prices, self.stock = np.empty(size, np.float32), np.empty(size, np.int32)
        self.impressions = self.clicks = _NO_COUNTS
        self.score, self.reasons = np.zeros(size, np.float32), np.zeros(size, np.int32)
        self.order = np.empty(size, np.int32)
        self.count = self.filtered = 0
        self.sorted = False
        self.held, self.base = None, None
        self.fixed: dict[int, int] = {}

    def sort(self) -> None:
        """Best first; equal scores keep the order in which the candidates came."""
        if not self.sorted:
            sort(self.order, self.count, self.score)
            self.sorted = True

    def put(self, place: int, position: int, reason: int) -> None:
        """Fix a place at a position, 1 being the first; what else is fixed stays where it is."""
        if self.base is None:
            self.base = self.order.copy()
        self.fixed = {at: other for at, other in self.fixed.items() if other != place} | {position: place}
        self.reasons[place] |= reason
        positions = np.array(sorted(self.fixed), np.int32)
        settle(
            self.base, self.count, positions, np.array([self.fixed[at] for at in positions.tolist()], np.int32),
            self.order,
        )  # fmt: skip

    def find(self, row: int) -> int:
        """Place of a catalogue row among those that are still there; -1: it is not."""
        return int(find(self.order, self.count, self.rows, row))


_NO_COUNTS = np.zeros(0, np.int32)


class Live(NamedTuple):
    """What has changed of the candidates since the release was assembled (stores.overlay); [0]: nothing of any item.

    Attributes:
        prices, stock, blocked: [N] float32 (NaN: as in the release), int32 (-1: as in the release), int32 (0 or 1).
    """

    prices: NDArray[np.float32]
    stock: NDArray[np.int32]
    blocked: NDArray[np.int32]


class Asked(NamedTuple):
    """What the request's FILTERS say.

    Attributes:
        region: 1 + the region's number; 0: any. min_stock: pieces. least, most: prices.
    """

    region: int
    min_stock: int
    least: float
    most: float


@kernel
def admit(
    rows: NDArray[np.int32],
    live: Live,
    prices_of: NDArray[np.float32],
    signals_of: NDArray[np.int32],
    regions_of: NDArray[np.uint64],
    unavailable: int,
    asked: Asked,
    everything: bool,
    prices: NDArray[np.float32],
    stock: NDArray[np.int32],
    order: NDArray[np.int32],
) -> Any:
    """Take up what can be had and was not refused; fill in prices and stock of now. Gives how many, and how many not.

    Args:
        unavailable: the Signal bit; everything: whether what is sold out or blocked is taken up too.
    """
    count = filtered = 0
    priced = asked.least > -np.inf or asked.most < np.inf
    for at in range(len(rows)):
        row = rows[at]
        if row < 0:
            continue
        price = prices_of[row]
        pieces = 0 if signals_of[row] & unavailable else -1
        blocked = False
        if len(live.prices):
            if not np.isnan(live.prices[at]):
                price = live.prices[at]
            if live.stock[at] >= 0:
                pieces = live.stock[at]
            blocked = live.blocked[at] != 0
        prices[at], stock[at] = price, pieces
        refused = (
            (not everything and (blocked or pieces == 0))
            or (asked.region != 0 and not (regions_of[row] >> np.uint64(asked.region - 1)) & np.uint64(1))
            or (priced and not asked.least <= price <= asked.most)
            or 0 <= pieces < asked.min_stock
        )
        if refused:
            filtered += 1
        else:
            order[count] = at
            count += 1
    return count, filtered


@kernel
def sort(order: NDArray[np.int32], count: int, score: NDArray[np.float32]) -> None:
    """Best first; of what is equal that comes first which came first.

    A radix sort of the scores' bits, a byte at a time from the last one: each pass keeps the order of what is equal in
    its byte, and no two scores are compared.
    """
    worth = np.empty(count, np.float32)
    for at in range(count):
        worth[at] = score[order[at]] + np.float32(0)  # -0 becomes 0
    keys = worth.view(np.uint32)
    starts = np.zeros((4, 256), np.int32)
    for at in range(count):
        # IEEE 754: numbers above 0 are in the order of their bits, those below in reverse; and the best comes first.
        bits = keys[at]
        keys[at] = bits if bits & np.uint32(0x80000000) else ~(bits | np.uint32(0x80000000))
        for byte in range(4):
            starts[byte, (keys[at] >> np.uint32(8 * byte)) & np.uint32(255)] += 1
    other_keys, other_order = np.empty(count, np.uint32), np.empty(count, np.int32)
    own_order = order[:count]
    for byte in range(4):
        shift, total = np.uint32(8 * byte), 0
        for value in range(256):
            here = starts[byte, value]
            starts[byte, value] = total
            total += here
        for at in range(count):
            value = (keys[at] >> shift) & np.uint32(255)
            other_keys[starts[byte, value]] = keys[at]
            other_order[starts[byte, value]] = own_order[at]
            starts[byte, value] += 1
        keys, other_keys = other_keys, keys
        own_order, other_order = other_order, own_order  # after four passes each is its own again


@kernel
def find(order: NDArray[np.int32], count: int, rows: NDArray[np.int32], row: int) -> int:
    """See Page.find."""
    for at in range(count):
        if rows[order[at]] == row:
            return order[at]
    return -1


@kernel
def settle(
    base: NDArray[np.int32],
    count: int,
    positions: NDArray[np.int32],
    places: NDArray[np.int32],
    order: NDArray[np.int32],
) -> None:
    """``base`` with ``places`` at their ascending ``positions`` (from 1), the others around them in their order. What
    is put behind the end stands at the end."""
    fixed, at, last = 0, 0, len(positions)
    for position in range(1, count + 1):
        if fixed < last and (positions[fixed] == position or count - position < last - fixed):
            order[position - 1] = places[fixed]
            fixed += 1
            continue
        while (places == base[at]).any():
            at += 1
        order[position - 1] = base[at]
        at += 1


@kernel
def emit(
    order: NDArray[np.int32],
    found: int,
    rows: NDArray[np.int32],
    signals: NDArray[np.int32],
    score: NDArray[np.float32],
    because: NDArray[np.int32],
    of_signals: NDArray[np.int32],
    item_ids: NDArray[np.int64],
    ids: NDArray[np.int64],
    scores: NDArray[np.float32],
    reasons: NDArray[np.int32],
) -> None:
    """Write the first ``found`` out.

    Args:
        of_signals: Reason bits of each Signal mask.
    """
    for at in range(found):
        place = order[at]
        ids[at] = item_ids[rows[place]]
        scores[at] = score[place]
        reasons[at] = of_signals[signals[place]] | because[place]
