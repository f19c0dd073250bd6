"""Users in one SQLite file: the embedded store, for one machine. In WAL mode readers wait for nobody."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from trirank import contract
from trirank.contract import EventKind

from trirank_backend.errors import InvalidStore, StoreFailed
from trirank_backend.histories import Events
from trirank_backend.master_keys import MasterKeys
from trirank_backend.stores.events import KEPT_KINDS, MOST, RECORD, Event, Past, Stored, merged, newest, records_of
from trirank_backend.stores.sealing import (
    IS_SEALED,
    NOT_SEALED,
    Codec,
    Plain,
    Sealed,
    new_envelopes,
    rotated,
)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS users (user_id INTEGER PRIMARY KEY, records BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS events (
    place INTEGER PRIMARY KEY AUTOINCREMENT, event_id TEXT NOT NULL UNIQUE, user_id INTEGER NOT NULL,
    item_id INTEGER NOT NULL, kind INTEGER NOT NULL, timestamp INTEGER NOT NULL, request_id TEXT NOT NULL,
    position INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS events_of_user ON events (user_id);
CREATE TABLE IF NOT EXISTS counts (
    item_id INTEGER PRIMARY KEY, impressions INTEGER NOT NULL, clicks INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS consumers (name TEXT PRIMARY KEY, place INTEGER NOT NULL) WITHOUT ROWID;
"""
_SEALED = """
ALTER TABLE events ADD COLUMN sealed BLOB;
CREATE TABLE keys (number INTEGER PRIMARY KEY, envelope BLOB NOT NULL);
"""
"""Besides, of a sealed store, whose users and events have names in the place of ids and nothing else in the clear."""
_COLUMNS = ", ".join(Event._fields)
_PLAIN_VERSION, _SEALED_VERSION = 1, 2
_CHECKPOINTS = 30
_OPENING_S = 5.0
_COUNTED = {EventKind.IMPRESSION.value: (1, 0), EventKind.CLICK.value: (0, 1)}


class SqliteStore:
    """See store.Store.

    Attributes:
        remote: no.

    Args:
        path: of the file, which is made if it is not there.
        timeout_s: how long to wait for another one that writes.
        masters: with which a new one is sealed, and this one was; None: it is not.
    """

    remote = False

    def __init__(self, path: Path, timeout_s: float, masters: MasterKeys | None = None) -> None:
        self._path, self._masters = path, masters
        wanted = _PLAIN_VERSION if masters is None else _SEALED_VERSION
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Its other files get the same mode. Never open one that is there: closing it again would drop all locks
            # that this process has on it (fcntl(2)), SQLite's own among them.
            with suppress(FileExistsError):
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            # Whoever opens it first makes it, and others wait for that, however little they wait later.
            opening_s = max(timeout_s, _OPENING_S)
            self._connection = sqlite3.connect(path, timeout=opening_s, isolation_level=None, check_same_thread=False)
            self._write_ahead(time.monotonic() + opening_s)
            # Every commit reaches the disk before it is answered for.
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute("PRAGMA secure_delete = ON")  # an erased user's bytes are overwritten
            with self._transaction():
                version = self._connection.execute("PRAGMA user_version").fetchone()[0]
                if version not in (0, _PLAIN_VERSION, _SEALED_VERSION):
                    known = f"{_PLAIN_VERSION} and {_SEALED_VERSION}"
                    raise InvalidStore(f"{path} is of version {version}, this one reads {known}; name another file")
                if version == 0:
                    if self._connection.execute("SELECT name FROM sqlite_master").fetchone():
                        raise InvalidStore(f"{path} is a SQLite file of something else; name another file")
                    self._create(wanted)
                    version = wanted
            if version != wanted:
                raise InvalidStore(f"{path} is {NOT_SEALED if masters else IS_SEALED}")
            self._codec: Codec = Plain() if masters is None else Sealed(masters, self._envelopes)
            self._connection.execute(f"PRAGMA busy_timeout = {int(timeout_s * 1_000)}")
        except (OSError, sqlite3.Error, StoreFailed) as error:
            raise InvalidStore(
                f"user store {path} cannot be opened ({error}); name another file, or put a copy in its place"
            ) from error

    def _create(self, version: int) -> None:
        schema = _SCHEMA + (_SEALED if version == _SEALED_VERSION else "")
        for statement in filter(str.strip, schema.split(";")):
            self._connection.execute(statement)
        if self._masters is not None:
            self._put_envelopes(new_envelopes(self._masters))
        self._connection.execute(f"PRAGMA user_version = {version}")

    def _envelopes(self) -> dict[int, bytes]:
        return dict(self._rows("SELECT number, envelope FROM keys"))

    def _put_envelopes(self, envelopes: Mapping[int, bytes]) -> None:
        self._connection.executemany("INSERT OR REPLACE INTO keys VALUES (?, ?)", list(envelopes.items()))

    def rotate(self) -> None:
        """See store.Store."""
        if self._masters is None:
            raise InvalidStore(f"{self._path} is not sealed, so it has no keys")
        with self._transaction():
            self._put_envelopes(rotated(self._masters, self._envelopes()))

    def _write_ahead(self, until: float) -> None:
        """Turn WAL mode on. SQLite does not wait where two turn it on at once, lest they wait for each other: whoever
        comes second is told at once that the file is locked, and tries again."""
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:  # noqa: PERF203
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(0.005)

    def get(self, users: list[int]) -> dict[int, Past]:
        """See store.Store."""
        found = {}
        try:
            for user in users:  # one statement that stays prepared; one of many values would be another for each count
                name = self._codec.name(user)
                row = self._connection.execute("SELECT records FROM users WHERE user_id = ?", (name,)).fetchone()
                if row is not None:
                    found[user] = Past.of(self._codec.records(name, row[0]))
        except (sqlite3.Error, ValueError) as error:
            raise self._failed(error) from error
        return found

    def add(self, events: list[Event]) -> list[bool]:
        """See store.Store. One transaction, whatever the number."""
        with self._transaction():
            fresh = [self._insert(event) for event in events]
            new = [event for event, is_new in zip(events, fresh, strict=True) if is_new]
            by_user: dict[int, list[tuple[int, int, int]]] = {}
            for event in new:
                if event.user_id != contract.ANONYMOUS_USER and event.kind in KEPT_KINDS:
                    by_user.setdefault(event.user_id, []).append((event.item_id, event.timestamp, event.kind))
            for user, records in by_user.items():
                self._write(user, np.concatenate([self._read(user), np.array(records, RECORD)]))
            self._connection.executemany(
                "INSERT INTO counts VALUES (?, ?, ?) ON CONFLICT (item_id) DO UPDATE SET"
                " impressions = impressions + excluded.impressions, clicks = clicks + excluded.clicks",
                [(event.item_id, *_COUNTED[event.kind]) for event in new if event.kind in _COUNTED],
            )
        return fresh

    def put(self, histories: list[tuple[int, Events]]) -> None:
        """See store.Store. One transaction."""
        with self._transaction():
            for user, events in histories:
                self._write(user, merged(self._read(user), records_of(events)))

    def users(self) -> Iterator[int]:
        """See store.Store."""
        found = self._rows(f"SELECT user_id, {'records' if self._codec.sealed else 'NULL'} FROM users")
        return iter(sorted(self._codec.user(name, records) for name, records in found))

    def erase(self, user: int) -> int:
        """See store.Store."""
        with self._transaction():
            name = self._codec.name(user)
            row = self._connection.execute("SELECT length(records) FROM users WHERE user_id = ?", (name,)).fetchone()
            remembered = self._codec.count(row[0]) if row else 0
            self._connection.execute("DELETE FROM users WHERE user_id = ?", (name,))
            logged = self._connection.execute("DELETE FROM events WHERE user_id = ?", (name,)).rowcount
        for _ in range(_CHECKPOINTS):  # what is in the write-ahead log still holds the old pages
            busy = self._rows("PRAGMA wal_checkpoint(TRUNCATE)")[0][0]
            if not busy:
                break
            time.sleep(0.1)
        else:
            raise StoreFailed(
                f"user {user} is forgotten, but others are reading {self._path}, and its write-ahead log still holds "
                "the bytes; say it again"
            )
        return max(remembered, logged)

    def log(self, after: str = "", limit: int = 10_000) -> list[Stored]:
        """See store.Store."""
        rows = self._rows(
            f"SELECT place, {_COLUMNS}, {'sealed' if self._codec.sealed else 'NULL'} FROM events"
            " WHERE place > ? ORDER BY place LIMIT ?",
            (int(after or 0), limit),
        )
        return [Stored(str(place), self._codec.of_event(Event(*shown), sealed)) for place, *shown, sealed in rows]

    def unread(self, group: str, limit: int = 10_000) -> list[Stored]:
        """See store.Store."""
        found = self._rows("SELECT place FROM consumers WHERE name = ?", (group,))
        return self.log(str(found[0][0]) if found else "", limit)

    def acknowledge(self, group: str, read: list[Stored]) -> None:
        """See store.Store."""
        if read:
            with self._transaction():
                self._connection.execute(
                    "INSERT INTO consumers VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET"
                    " place = max(place, excluded.place)",
                    (group, max(int(stored.place) for stored in read)),
                )

    def counts(self) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
        """See store.Store."""
        rows = self._rows("SELECT item_id, impressions, clicks FROM counts ORDER BY item_id")
        ids, impressions, clicks = np.array(rows, np.int64).reshape(-1, 3).T
        return ids, np.minimum(impressions, MOST).astype(np.int32), np.minimum(clicks, MOST).astype(np.int32)

    def is_durable(self) -> bool:
        """See store.Store."""
        return True

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _insert(self, event: Event) -> bool:
        """Add to the log; whether it was not there."""
        columns, values = _COLUMNS, cast(tuple[Any, ...], self._codec.shown(event))
        if self._codec.sealed:  # a plain file has no such column
            columns, values = f"{columns}, sealed", (*values, self._codec.event(event))
        marks = ", ".join("?" * len(values))
        done = self._connection.execute(
            f"INSERT INTO events ({columns}) VALUES ({marks}) ON CONFLICT (event_id) DO NOTHING", values
        )
        return done.rowcount > 0

    def _read(self, user: int) -> NDArray[np.void]:
        name = self._codec.name(user)
        row = self._connection.execute("SELECT records FROM users WHERE user_id = ?", (name,)).fetchone()
        return self._codec.records(name, row[0]) if row else np.empty(0, RECORD)

    def _write(self, user: int, records: NDArray[np.void]) -> None:
        stored = self._codec.past(user, newest(records))
        self._connection.execute("INSERT OR REPLACE INTO users VALUES (?, ?)", (self._codec.name(user), stored))

    def _rows(self, statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._failed(error) from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        except (sqlite3.Error, ValueError) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> StoreFailed:
        return StoreFailed(f"user store {self._path} did not answer ({error})")
