"""What goes into a call and what comes out of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trirank.contract import ANONYMOUS_USER, Behaviour, Reason, Status

ItemIds = Sequence[int] | Sequence[str] | NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """A user's own past, for callers that keep it themselves; all three of one length, oldest first.

    Attributes:
        item_ids: [H] ints or strings.
        behaviours: [H] codes; one Behaviour for all, or one each.
        timestamps: [H] seconds since 1970; None: unknown.
    """

    item_ids: ItemIds
    behaviours: Behaviour | Sequence[int] | NDArray[Any] = Behaviour.CLICK
    timestamps: Sequence[int] | NDArray[Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRequest:
    """Candidates to be ranked for one user at one moment.

    Attributes:
        item_ids: [N] candidates, 1 to 1,024; ints, or strings that the catalogue was built with.
        user_id: an int or a string; None: anonymous.
        query: what was searched for; empty: a recommendation.
        scenario: the rerank policy; None: ``search`` with a query, ``home`` without.
        top_k: how many to return, 1 to 1,024.
        retrieval_scores: [N] what retrieval thought of each candidate; finite; any scale.
        history: replaces what the server has stored of the user.
        timestamp: seconds since 1970; None: the server's clock.
        filters: what this page shall leave out: any of ``region`` (text), ``min_price``, ``max_price``, ``min_stock``.
        request_id: any text of up to 128 bytes; the server logs it, and feedback refers to it.
        trace: whether the answer shall tell which rule of the policy moved which item (RankResponse.trace).
    """

    item_ids: ItemIds
    user_id: int | str | None = None
    query: str = ""
    scenario: str | None = None
    top_k: int = 10
    retrieval_scores: Sequence[float] | NDArray[Any] | None = None
    history: History | None = None
    timestamp: int | None = None
    filters: Mapping[str, Any] | None = None
    request_id: str = ""
    trace: bool = False

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> RankRequest:
        """A recorded request: plain JSON with this class's names, and user_id -1 for an anonymous user."""
        history = raw.get("history")
        return cls(
            **{
                **raw,
                "user_id": None if raw.get("user_id") == ANONYMOUS_USER else raw.get("user_id"),
                "history": None if history is None else History(**history),
            }
        )


@dataclass(frozen=True, slots=True)
class RankedItem:
    """One line of an answer; ``position`` counts from 1."""

    position: int
    item_id: int | str
    score: float
    reasons: Reason


@dataclass(frozen=True, slots=True, eq=False)
class RankResponse:
    """The best K, best first. Iterating gives RankedItem; the arrays are there for those who want speed.

    Attributes:
        item_ids: [K] int64, or strings where strings were sent, without padding.
        scores: [K] float32.
        reasons: [K] int32 bit masks of Reason.
        status: bit mask on the answer as a whole.
        unknown: candidates that the catalogue does not know, dropped.
        duplicates: candidates sent more than once, dropped but for the first.
        filtered: candidates that the policy, the catalogue or the request's filters ruled out.
        trace: where it was asked for, a dict with ``policy``, ``rules`` and ``items``; of each item its ``position``
            (None: not shown), its ``score``, the ``tasks``' scores, the ``moves`` of the rules and what it was
            ``dropped_by``.
    """

    item_ids: NDArray[Any]
    scores: NDArray[np.float32]
    reasons: NDArray[np.int32]
    status: Status
    unknown: int = 0
    duplicates: int = 0
    filtered: int = 0
    trace: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.item_ids)

    def __iter__(self) -> Iterator[RankedItem]:
        rows = zip(self.item_ids.tolist(), self.scores.tolist(), self.reasons.tolist(), strict=True)
        for position, (item_id, score, reasons) in enumerate(rows, start=1):
            yield RankedItem(position, item_id, score, Reason(reasons))

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Columns: item_id [K] int64, or strings where strings were sent; score [K] float32; reasons [K] int32."""
        return {"item_id": self.item_ids, "score": self.scores, "reasons": self.reasons}

    def to_polars(self) -> Any:
        """A polars.DataFrame of ``to_arrays``; needs polars."""
        import polars

        return polars.DataFrame(self.to_arrays())

    def to_pandas(self) -> Any:
        """A pandas.DataFrame of ``to_arrays``; needs pandas."""
        import pandas

        return pandas.DataFrame(self.to_arrays())

    @property
    def degraded(self) -> bool:
        """Whether less was done than usual: by the server to keep the deadline, or by the client, which then gives the
        candidates in retrieval's order."""
        return bool(self.status & Status.DEGRADED)

    def to_dicts(self) -> list[dict[str, Any]]:
        """One JSON-ready dict an item."""
        return [
            {
                "position": item.position,
                "item_id": item.item_id,
                "score": item.score,
                "reasons": [str(reason.name).lower() for reason in Reason if reason in item.reasons],
            }
            for item in self
        ]
