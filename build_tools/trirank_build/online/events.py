"""A store's log of events as files: taken out once, in parts, and read again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from trirank_backend.files import PRIVATE, whole_file
from trirank_backend.sealed_files import SealedFile, keys_for, lines_of
from trirank_backend.stores.events import Event
from trirank_backend.stores.store import Store

from trirank_build.artefacts import fits
from trirank_build.errors import BadData

GROUP = "trirank"


def all_events(store: Store, after: str = "") -> Iterator[Event]:
    """The events of a store's log, oldest first."""
    while part := store.log(after):
        yield from (stored.event for stored in part)
        after = part[-1].place


def take_out(store: Store, folder: Path, group: str = GROUP) -> int:
    """Write what a group has not read yet to a folder, a file a part, for its owner alone; gives how many events. Each
    part is on the disk before it is acknowledged: a part that was written and not acknowledged comes again, in the
    same file.

    Raises:
        StoreFailed: the store does not answer; what is written stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    masters, count = keys_for(folder), 0
    while part := store.unread(group):
        file = folder / f"events-{_sortable(part[0].place)}.jsonl"
        lines = [json.dumps(stored.event).encode() for stored in part]
        if masters is not None:
            key = SealedFile.again(file, masters)
            lines = [key.line(number, line) for number, line in enumerate(lines, 1)]
        with fits(file), whole_file(file, PRIVATE) as stream:
            stream.writelines(line + b"\n" for line in lines)
        store.acknowledge(group, part)
        count += len(part)
    return count


def _sortable(place: str) -> str:
    """A place so that its text sorts as it does; Redis' places have two numbers."""
    return "_".join(f"{int(part):020}" for part in place.split("-"))


def events_of(folder: Path) -> Iterator[Event]:
    """Events of a folder, each once, in their order.

    Raises:
        BadData: there is no file, or one is damaged.
    """
    files = sorted(folder.glob("events-*.jsonl"))
    if not files:
        raise BadData(f"{folder} holds no events-*.jsonl; write some with `trirank users log --out {folder}`")
    seen: set[str] = set()
    for file in files:
        for number, text, _ in lines_of(file):
            if text is None:
                raise BadData(f"{file}, line {number} was changed, or is of another file; take it out again")
            try:
                event = Event(*json.loads(text))
            except (ValueError, TypeError) as error:
                raise BadData(f"{file}, line {number} is no event ({error}); take it out again") from error
            if event.event_id not in seen:
                seen.add(event.event_id)
                yield event
