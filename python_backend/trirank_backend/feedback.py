"""The model ``feedback``: what users did is checked, stored, and counted."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from trirank import contract
from trirank.contract import EventKind

from trirank_backend.errors import BackendError, InvalidInput, StoreFailed, shortened
from trirank_backend.policies import load_policies
from trirank_backend.release import FEATURES, POLICIES
from trirank_backend.requests import Tensors
from trirank_backend.stores.events import Event
from trirank_backend.stores.overlay import COUNTS, write_overlay
from trirank_backend.stores.store import Store, open_store
from trirank_backend.surroundings import COUNTS_VARIABLE, SERVED_VARIABLE, USERS_VARIABLE

EARLIEST = 631_152_000
"""1990: an earlier moment is none in seconds since 1970."""
COUNT_EVERY_S = 3.0
_FIELDS = ("event_id", "user_id", "item_id", "kind", "timestamp", "request_id", "position")
_KINDS = {kind.name.lower(): kind.value for kind in EventKind}
_LIMIT = 2**63
_NUMBER = re.compile(r"-?[0-9]{1,19}")

_TOLD = 10
"""Strange items that an error names."""

_log = logging.getLogger("trirank")


def _is_text(value: str) -> bool:
    """Whether it can be written; JSON may hold half a character."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class Known:
    """Which items the release that is served now has, and of what kind its ids are."""

    def __init__(self, link: Path) -> None:
        self._link = link
        self._release: Path | None = None
        self._ids = self._ids_before = np.zeros(0, np.int64)
        self._kinds: dict[str, str] = {}
        self._takes_unknown, self._problem = False, ""
        self._next = 0.0

    def refresh(self) -> None:
        """Look whether another release is served.

        Raises:
            StoreFailed: none could be read so far.
        """
        if (now := time.monotonic()) >= self._next:
            self._next = now + 1.0
            self._look()
        if self._release is None:
            raise StoreFailed(f"{self._problem}, so no item can be looked up; tell it again")

    def _look(self) -> None:
        release = self._link.resolve()
        if release == self._release:
            return
        try:
            ids = np.load(release / FEATURES / "catalogue" / "ids.npy", mmap_mode="r").view(np.ndarray)
            kinds = json.loads((release / "manifest.json").read_text()).get("ids", {})
            keeping = any(policy.keep_unknown for policy in load_policies(release / FEATURES / POLICIES).values())
        except (OSError, ValueError, BackendError) as error:
            self._problem = f"release {release} cannot be read ({error})"
            _log.warning("%s; items are looked up in the release before", self._problem)
            return
        self._ids_before = self._ids
        self._release, self._ids, self._kinds, self._takes_unknown = release, ids, kinds, keeping

    def own_id(self, what: str, value: Any, where: str) -> int:
        """An id as the release has it: numbers as they are, text by its hash.

        Raises:
            InvalidInput: it is neither.
        """
        if isinstance(value, str) and _is_text(value):
            if self._kinds.get(what) == "strings":
                return contract.stable_id(value)
            if _NUMBER.fullmatch(value):
                value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not -_LIMIT <= value < _LIMIT:
            kind = "text" if self._kinds.get(what) == "strings" else "a number of at most 64 bits"
            raise InvalidInput(f"{where}: {what}_id is {shortened(value)}; ids of this catalogue are {kind}")
        return value

    def check_items(self, events: list[Event]) -> None:
        """Raises InvalidInput where an item is not in the catalogue, nor in that of the release before, whose pages are
        still being looked at, and no policy shows such."""
        if self._takes_unknown:
            return
        ids = np.array([event.item_id for event in events], np.int64)
        strange = np.flatnonzero(~_are_in(self._ids, ids))
        if len(strange):
            strange = strange[~_are_in(self._ids_before, ids[strange])]
        if len(strange):
            told = ", ".join(f"{ids[at]} (event {at})" for at in strange[:_TOLD].tolist())
            raise InvalidInput(
                f"item {told}{f' and {len(strange) - _TOLD} more are' if len(strange) > _TOLD else ' is'} not in the "
                f"catalogue of release {self._release and self._release.name}; leave them out or serve a newer one"
            )


def _are_in(known: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each id is among the known ones, which ascend."""
    if not len(known):
        return np.zeros(len(ids), bool)
    found: NDArray[np.bool_] = known[np.minimum(np.searchsorted(known, ids), len(known) - 1)] == ids
    return found


class Feedback:
    """Takes batches of events.

    Args:
        known: what the served release says of ids.
    """

    def __init__(self, store: Store, known: Known, clock: Callable[[], float] = time.time) -> None:
        self._store, self._known, self._clock = store, known, clock
        self._counts: CountsWriter | None = None

    @classmethod
    def load(cls) -> Feedback:
        """Open what the surroundings name."""
        # Whoever waits for a ranking comes first: this process takes no core from one that is at work on it.
        os.nice(10)
        with suppress(OSError, AttributeError):  # Linux alone has it, and may not allow it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        address = os.environ[USERS_VARIABLE]
        loaded = cls(open_store(address), Known(Path(os.environ[SERVED_VARIABLE])))
        if place := os.environ.get(COUNTS_VARIABLE):
            loaded._counts = CountsWriter(address, Path(place))
        return loaded

    def close(self) -> None:
        """Let go of the store."""
        if self._counts is not None:
            self._counts.stop()
        self._store.close()

    def __call__(self, requests: list[Tensors], deadlines: list[float] | None = None) -> list[Tensors | BackendError]:
        """STORED of each request. Events of all requests are stored in one step; those of a request that has a wrong
        one are not stored at all."""
        try:
            self._known.refresh()
        except StoreFailed as error:
            return [error] * len(requests)
        answers: list[Tensors | BackendError] = []
        batches: list[list[list[Event]]] = []
        for tensors in requests:
            try:
                batches.append([self._events(text) for text in tensors["EVENTS"][:, 0].tolist()])
                answers.append({})
            except InvalidInput as error:  # noqa: PERF203  # belongs to this request
                batches.append([])
                answers.append(error)
        every = [event for batch in batches for row in batch for event in row]
        try:
            fresh = iter(self._store.add(every) if every else ())
        except StoreFailed as error:
            return [error if isinstance(answer, dict) else answer for answer in answers]
        for at, batch in enumerate(batches):
            if isinstance(answers[at], dict):
                counts = [[sum(next(fresh) for _ in row), len(row)] for row in batch]
                stored = np.array([[new, of - new] for new, of in counts], np.int32)
                answers[at] = {"STORED": stored}
        return answers

    def _events(self, text: bytes) -> list[Event]:
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"EVENTS is no JSON ({error})") from None
        if not isinstance(rows, list) or not 1 <= len(rows) <= contract.MAX_EVENTS:
            what = f"{len(rows)} events" if isinstance(rows, list) else f"{type(rows).__name__}"
            raise InvalidInput(
                f"EVENTS holds {what}; it is a JSON array of 1 to {contract.MAX_EVENTS}: send several batches"
            )
        latest = int(self._clock()) + contract.FUTURE_S
        events = [self._event(f"event {at}", row, latest) for at, row in enumerate(rows)]
        first: dict[str, int] = {}
        for at, event in enumerate(events):
            if (other := first.setdefault(event.event_id, at)) != at:
                raise InvalidInput(
                    f"event {at} has the event_id {event.event_id!r} of event {other}; each event has one of its own"
                )
        self._known.check_items(events)
        return events

    def _event(self, where: str, row: Any, latest: int) -> Event:
        if not isinstance(row, dict) or (unknown := sorted(row.keys() - set(_FIELDS))):
            what = f"has the unknown key {shortened(unknown[0])}" if isinstance(row, dict) else f"is {shortened(row)}"
            raise InvalidInput(f"{where} {what}; an event is an object of {', '.join(_FIELDS)}")
        for name, most in (("event_id", contract.MAX_EVENT_ID_BYTES), ("request_id", contract.MAX_REQUEST_ID_BYTES)):
            value = row.get(name, "")
            if not isinstance(value, str) or not _is_text(value) or len(value.encode()) > most:
                raise InvalidInput(f"{where}: {name} is {str(value)[:80]!r}; it is text of at most {most} bytes")
        if not row.get("event_id"):
            raise InvalidInput(f"{where} has no event_id; it needs one, so that it can be sent twice and counts once")
        if not isinstance(row.get("kind"), str) or row["kind"] not in _KINDS:
            raise InvalidInput(f"{where}: kind is {shortened(row.get('kind'))}; kinds are {', '.join(_KINDS)}")
        timestamp, position = row.get("timestamp"), row.get("position", 0)
        if isinstance(timestamp, bool) or not isinstance(timestamp, int) or not EARLIEST <= timestamp <= latest:
            late = isinstance(timestamp, int) and timestamp > latest
            hint = "it lies in the future; set the caller's clock right" if late else "write seconds since 1970"
            raise InvalidInput(f"{where}: timestamp is {shortened(timestamp)}, the latest is {latest}; {hint}")
        if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position <= contract.MAX_TOP_K:
            raise InvalidInput(
                f"{where}: position is {shortened(position)}; it goes from 1 to {contract.MAX_TOP_K}, and 0 is unknown"
            )
        user = row.get("user_id")
        return Event(
            row["event_id"],
            contract.ANONYMOUS_USER if user is None else self._known.own_id("user", user, where),
            self._known.own_id("item", row.get("item_id"), where),
            _KINDS[row["kind"]],
            min(timestamp, latest - contract.FUTURE_S),  # a clock that is ahead hides nothing from the next request
            row.get("request_id", ""),
            position,
        )


class CountsWriter:
    """Puts the store's counts where rerank reads them, again and again, in a thread with a connection of its own."""

    def __init__(self, address: str, path: Path) -> None:
        self._address, self._path = address, path
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="trirank-counts", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join(2 * COUNT_EVERY_S)

    def _work(self) -> None:
        before: bytes | None = None
        store: Store | None = None
        pause = 0.0
        while not self._stopped.wait(pause):
            began = time.monotonic()
            try:
                store = store or open_store(self._address)
                ids, impressions, clicks = store.counts()
                records = np.zeros(len(ids), COUNTS)
                records["id"], records["impressions"], records["clicks"] = ids, impressions, clicks
                if (now := records.tobytes()) != before:
                    write_overlay(self._path, records)
                    before = now
            except Exception as error:  # told, and tried again: nobody else writes counts
                _log.warning("counts of feedback are as old as they are: %s", error)
            # Of a large catalogue it takes long, and this process has other things to do.
            pause = max(COUNT_EVERY_S, 20 * (time.monotonic() - began))
        if store is not None:
            store.close()
