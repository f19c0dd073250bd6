"""Users' past events: the batch that features read, and the embedded store that serves them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from trirank.contract import PAD_ITEM_ID

from trirank_backend.errors import InvalidRelease

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


class UserStore(Protocol):
    """Where histories come from; the same tests run on every kind."""

    def get(self, user_ids: list[int]) -> dict[int, Events]:
        """Events of the users that are known."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...


_OF_USER = "SELECT item_ids, behaviours, timestamps FROM histories WHERE user_id = ?"


class SqliteUserStore:
    """Histories in one SQLite file, a row a user, columns as little-endian blobs."""

    def __init__(self, path: Path) -> None:
        """Open read-only.

        Raises:
            InvalidRelease: there is no such store.
        """
        try:
            self._connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
            self._connection.execute("SELECT 1 FROM histories LIMIT 1")
        except sqlite3.Error as error:
            raise InvalidRelease(f"user store {path} cannot be read ({error}); assemble again") from error

    def get(self, user_ids: list[int]) -> dict[int, Events]:
        """Events of the users that are known."""
        found = {}
        for (
            user_id
        ) in user_ids:  # one statement that stays prepared; one of many values would be another for each count
            row = self._connection.execute(_OF_USER, (user_id,)).fetchone()
            if row is not None:
                ids, behaviours, times = row
                found[user_id] = Events(
                    np.frombuffer(ids, np.int64), np.frombuffer(behaviours, np.int32), np.frombuffer(times, np.int64)
                )
        return found

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    @staticmethod
    def write(path: Path, users: Iterable[tuple[int, Events]]) -> None:
        """Create a store; ``path`` must not exist yet."""
        connection = sqlite3.connect(path)
        try:
            connection.execute(
                "CREATE TABLE histories (user_id INTEGER PRIMARY KEY, item_ids BLOB NOT NULL,"
                " behaviours BLOB NOT NULL, timestamps BLOB NOT NULL)"
            )
            connection.executemany(
                "INSERT INTO histories VALUES (?, ?, ?, ?)",
                (
                    (
                        user_id,
                        events.item_ids.astype("<i8").tobytes(),
                        events.behaviours.astype("<i4").tobytes(),
                        events.timestamps.astype("<i8").tobytes(),
                    )
                    for user_id, events in users
                ),
            )
            connection.commit()
        finally:
            connection.close()
