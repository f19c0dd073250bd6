"""`trirank users`: a store's users, from a dataset, to a file, and gone."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from trirank import contract
from trirank.contract import EventKind
from trirank_backend.histories import Events
from trirank_backend.sealed_files import SealedFile
from trirank_backend.stores.events import Event
from trirank_backend.stores.store import Store

from trirank_build.artefacts import atomic_file
from trirank_build.errors import BadData
from trirank_build.online.events import all_events

if TYPE_CHECKING:
    import polars as pl

_CHUNK = 1_000


def import_users(events: pl.DataFrame, store: Store) -> int:
    """Add the histories of a dataset's events to a store; gives how many users that are. What is there stays, and what
    is there already is not added twice.

    Raises:
        StoreFailed: the store does not answer. Users before that are in it, and it can be done again.
    """
    count, chunk = 0, []
    for user, history in histories(events):
        chunk.append((user, history))
        if len(chunk) == _CHUNK:
            store.put(chunk)
            chunk = []
        count += 1
    if chunk:
        store.put(chunk)
    return count


def histories(events: pl.DataFrame) -> Iterator[tuple[int, Events]]:
    """Each user's newest events, oldest first."""
    import polars as pl

    grouped = (
        events.sort("user_id", "timestamp", maintain_order=True)
        .group_by("user_id", maintain_order=True)
        .agg("item_id", pl.col("behaviour").cast(pl.Int32), "timestamp")
    )
    for user, items, behaviours, times in zip(*(grouped[column] for column in grouped.columns), strict=True):
        newest = slice(-contract.MAX_HISTORY, None)
        yield user, Events(items.to_numpy()[newest], behaviours.to_numpy()[newest], times.to_numpy()[newest])


def copy_users(source: Store, target: Store) -> tuple[int, int]:
    """Put all events of a store's log into an empty one, and then what is remembered of users besides; gives how many
    of each. Counts are those of the log; who has read how far is not copied.

    Raises:
        StoreFailed: one of them does not answer; then begin again with an empty one.
    """
    events, after = 0, ""
    while part := source.log(after):
        target.add([stored.event for stored in part])
        events, after = events + len(part), part[-1].place
    users = 0
    for user in source.users():
        past = source.get([user]).get(user)
        if past is None:
            continue
        there = target.get([user]).get(user)
        lacking = np.setdiff1d(past.disliked, [] if there is None else there.disliked)  # when, nobody knows any more
        disliked = Events(lacking, np.full(len(lacking), EventKind.DISLIKE, np.int32), np.zeros(len(lacking), np.int64))
        target.put([(user, past.events), (user, disliked)])
        users += 1
    return events, users


def export_user(store: Store, users: list[int]) -> dict[str, Any]:
    """All that a store has of a user, as JSON.

    Args:
        users: the ids that may be theirs; the first one of whom anything is known, is.
    """
    logged_users = {event.user_id for event in all_events(store)} if len(users) > 1 else set()
    pasts = store.get(users)
    user = next((user for user in users if user in pasts or user in logged_users), users[0])
    past = pasts.get(user)
    remembered = [] if past is None else [
        {"item_id": item, "kind": EventKind(behaviour).name.lower(), "timestamp": moment}
        for item, behaviour, moment in zip(
            past.events.item_ids.tolist(), past.events.behaviours.tolist(), past.events.timestamps.tolist(), strict=True
        )
    ]  # fmt: skip
    disliked = [] if past is None else past.disliked.tolist()
    logged = [
        {**event._asdict(), "kind": EventKind(event.kind).name.lower()}
        for event in all_events(store)
        if event.user_id == user
    ]
    return {"user_id": user, "remembered": remembered, "disliked": disliked, "events": logged}


def export_users(store: Store, target: Path) -> int:
    """Write all users' pasts as JSON lines; gives how many. The file is whole or not there."""
    count = 0
    with atomic_file(target) as scratch, scratch.open("w") as stream:
        scratch.chmod(0o600)
        for user in store.users():
            past = store.get([user]).get(user)
            if past is None:
                continue
            row = {
                "user_id": user,
                "item_ids": past.events.item_ids.tolist(),
                "behaviours": past.events.behaviours.tolist(),
                "timestamps": past.events.timestamps.tolist(),
                "disliked": past.disliked.tolist(),
            }
            stream.write(json.dumps(row) + "\n")
            count += 1
    return count


def erase_from_files(folder: Path, users: set[int], wait_s: float = 5.0) -> int:
    """Overwrite what files of events (``users log``) and of requests (``--log-requests``) have of users; gives how many
    lines. In their places stand blanks, so that a server may go on writing to a file meanwhile; a line that it is
    writing is waited for.

    Raises:
        BadData: there is no such file, or one has lines that nobody can read: whose they are cannot be told. All others
            are done then.
        InvalidStore: one is sealed, and its master key is not there.
    """
    count, until = 0, time.monotonic() + wait_s
    while True:
        files = sorted([*folder.glob("events-*.jsonl"), *folder.glob("requests-*.jsonl")])
        if not files:
            raise BadData(f"{folder} holds no events-*.jsonl and no requests-*.jsonl; name a folder of logs")
        found = {file: _erase_from(file, users) for file in files}
        count += sum(done.lines for done in found.values())
        if all(done.is_whole for done in found.values()) or time.monotonic() > until:
            break
        time.sleep(0.1)
    if unread := {file: done.unread for file, done in found.items() if done.unread}:
        file, lines = next(iter(unread.items()))
        raise BadData(
            f"{count} lines are erased, but {sum(unread.values())} in {len(unread)} files cannot be read ({lines} in "
            f"{file}), and may be theirs: put the file's .key back, or delete the file"
        )
    return count


class _Done(NamedTuple):
    """Of a file: lines that were overwritten, lines that cannot be read, and whether the last line is whole."""

    lines: int
    unread: int
    is_whole: bool


def _erase_from(file: Path, users: set[int]) -> _Done:
    count, unread, place, line, key = 0, 0, 0, b"\n", SealedFile.open(file)
    with file.open("r+b") as stream:
        for number, line in enumerate(stream.read().splitlines(keepends=True), 1):
            text = line if key is None else key.plain(number, line.rstrip(b"\n"))
            # A line that begins with a blank and is none was begun to be overwritten once.
            begun = line.startswith(b" ") and bool(line.strip())
            user = _user_of(text)
            if begun or user in users:
                stream.seek(place)
                stream.write(b" " * len(line.rstrip(b"\n")))
                count += 1
            elif user is None and line.strip() and line.endswith(b"\n"):
                unread += 1
            place += len(line)
        stream.flush()
        os.fsync(stream.fileno())
    return _Done(count, unread, line.endswith(b"\n"))


def _user_of(line: bytes | None) -> int | None:
    if line is None:
        return None
    try:
        found = json.loads(line)
        return int(found["user_id"]) if isinstance(found, dict) else Event(*found).user_id
    except (ValueError, TypeError, KeyError):  # a last line that is not whole: it is not read either
        return None
