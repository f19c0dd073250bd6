"""What users do: one event as services tell it, and a user's past as the ranker reads it."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from trirank import contract
from trirank.contract import EventKind

from trirank_backend.histories import Events

HISTORY_KINDS = frozenset(kind.value for kind in EventKind if kind not in (EventKind.IMPRESSION, EventKind.DISLIKE))
"""Those that a history is made of; their codes are those of contract.Behaviour."""
KEPT_KINDS = HISTORY_KINDS | {EventKind.DISLIKE.value}
"""Those that a user is remembered by."""
RECORD = np.dtype([("item_id", "<i8"), ("timestamp", "<i8"), ("kind", "<i4")])
"""Of one event of a user's past, as stores keep it."""
MOST = 2**31 - 1
"""Of a count."""


class Event(NamedTuple):
    """One thing that one user did, or was shown.

    Attributes:
        event_id: unique; the same again is the same event.
        kind: contract.EventKind.
        timestamp: seconds since 1970.
        request_id: of the request whose answer it was about; empty: unknown.
        position: where the item stood in it, from 1; 0: unknown.
    """

    event_id: str
    user_id: int
    item_id: int
    kind: int
    timestamp: int
    request_id: str = ""
    position: int = 0


class Stored(NamedTuple):
    """An event as a store's log has it; ``place`` is where in the log, and what comes later has a greater one."""

    place: str
    event: Event


class Past(NamedTuple):
    """What is remembered of a user: what they did, oldest first, and the items that they do not want to see."""

    events: Events
    disliked: NDArray[np.int64]

    @classmethod
    def of(cls, records: NDArray[np.void]) -> Past:
        """From RECORDs in any order; the newest of them."""
        records = newest(records)
        wanted = records["kind"] != EventKind.DISLIKE
        did = records if wanted.all() else records[wanted]
        return cls(
            Events(
                np.ascontiguousarray(did["item_id"]),
                np.ascontiguousarray(did["kind"]),
                np.ascontiguousarray(did["timestamp"]),
            ),
            records["item_id"][~wanted],
        )


def records_of(events: Events) -> NDArray[np.void]:
    """RECORDs of a history."""
    records = np.empty(len(events.item_ids), RECORD)
    records["item_id"], records["kind"] = events.item_ids, events.behaviours
    records["timestamp"] = events.timestamps
    return records


def newest(records: NDArray[np.void]) -> NDArray[np.void]:
    """The newest MAX_HISTORY of what a user did and as many of what they do not want to see, so that neither pushes the
    other out; in order of time, and of one moment in the order in which they came."""
    times = np.ascontiguousarray(records["timestamp"])
    if not (times[1:] >= times[:-1]).all():  # mostly they are in order
        records = records[np.argsort(times, kind="stable")]
    if len(records) <= contract.MAX_HISTORY:
        return records
    disliked = records["kind"] == EventKind.DISLIKE
    kept = [np.flatnonzero(which)[-contract.MAX_HISTORY :] for which in (disliked, ~disliked)]
    return records[np.sort(np.concatenate(kept))]


def merged(kept: NDArray[np.void], new: NDArray[np.void]) -> NDArray[np.void]:
    """The newest of what is kept, and of ``new`` what is not there as often."""
    there = Counter(kept.tolist())
    added = np.ones(len(new), bool)
    for at, record in enumerate(new.tolist()):
        if there[record] > 0:
            there[record] -= 1
            added[at] = False
    return newest(np.concatenate([kept, new[added]]))
