"""Users' past events, and the batch of them that features read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from trirank.contract import PAD_ITEM_ID

UNKNOWN_TIME = -1
"""Timestamp of an event of which nobody knows when it was."""


@dataclass(frozen=True)
class Events:
    """One user's events, oldest first: ids int64 [H], behaviours int32 [H], timestamps int64 [H]."""

    item_ids: NDArray[np.int64]
    behaviours: NDArray[np.int32]
    timestamps: NDArray[np.int64]

    def before(self, timestamp: int, length: int) -> Events:
        """The newest ``length`` events that lie before ``timestamp`` (seconds since 1970)."""
        end = int(np.searchsorted(self.timestamps, timestamp, side="left"))
        part = slice(max(0, end - length), end)
        return Events(self.item_ids[part], self.behaviours[part], self.timestamps[part])


@dataclass(frozen=True)
class HistoryBatch:
    """Events of B users, the newest in the last column, padded in front.

    Attributes:
        item_ids: [B, L] int64, -1 where there is no event.
        behaviours: [B, L] int32 Behaviour codes, 0 where there is no event.
        timestamps: [B, L] int64 seconds since 1970; UNKNOWN_TIME where nobody knows.
    """

    item_ids: NDArray[np.int64]
    behaviours: NDArray[np.int32]
    timestamps: NDArray[np.int64]

    @classmethod
    def of(cls, users: list[Events | None], length: int) -> HistoryBatch:
        """Right-align the newest ``length`` events of each user."""
        shape = (len(users), length)
        batch = cls(np.full(shape, PAD_ITEM_ID, np.int64), np.zeros(shape, np.int32), np.zeros(shape, np.int64))
        for row, events in enumerate(users):
            if events is not None and (count := min(len(events.item_ids), length)):
                batch.item_ids[row, -count:] = events.item_ids[-count:]
                batch.behaviours[row, -count:] = events.behaviours[-count:]
                batch.timestamps[row, -count:] = events.timestamps[-count:]
        return batch
