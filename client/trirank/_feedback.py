"""What users did, told to a server: written, read, and sent again until it is stored or time is over.

An event has an id, and a server takes each id once; so a batch whose answer was lost is sent again without harm.
"""

from __future__ import annotations

import json
import operator
import random
import struct
import time
import uuid
from asyncio import CancelledError
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from trirank import contract
from trirank._core import Core, checked_deadline
from trirank._errors import (
    ClientClosed,
    DeadlineExceeded,
    IncompatibleServer,
    InvalidRequest,
    Overloaded,
    Unavailable,
    from_grpc,
)
from trirank._pool import Endpoint
from trirank.contract import EventKind

_AGAIN = (Unavailable, Overloaded, DeadlineExceeded)
_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackEvent:
    """One thing that one user did, or was shown.

    Attributes:
        item_id, user_id: as in requests; None: an anonymous user, whose events count for items alone.
        kind: an EventKind, or its name in small letters: impression, view, click, favourite, cart, purchase, dislike.
        timestamp: seconds since 1970; now by default.
        request_id: of the request whose answer it was about, see RankRequest.request_id; empty: unknown.
        position: where the item stood in that answer, from 1; 0: unknown.
        event_id: unique; the same again is the same event. A random one by default.
    """

    item_id: int | str
    kind: EventKind | str
    user_id: int | str | None = None
    timestamp: int = field(default_factory=lambda: int(time.time()))
    request_id: str = ""
    position: int = 0
    event_id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True, slots=True)
class FeedbackResult:
    """How many events were new to the server, and how many it had already."""

    stored: int
    repeated: int


def encode_events(events: Sequence[FeedbackEvent]) -> bytes:
    """The ModelInferRequest of a batch.

    Raises:
        InvalidRequest: there are no events, too many, or one of them is none.
    """
    if not 1 <= len(events) <= contract.MAX_EVENTS:
        raise InvalidRequest(f"{len(events)} events; a batch has 1 to {contract.MAX_EVENTS}: send several")
    rows = []
    for number, event in enumerate(events):
        try:
            kind = EventKind[event.kind.upper()] if isinstance(event.kind, str) else EventKind(event.kind)
        except (KeyError, ValueError):
            names = ", ".join(each.name.lower() for each in EventKind)
            raise InvalidRequest(f"event {number} is of kind {event.kind!r}; kinds are {names}") from None
        try:
            user, item = _plain(event.user_id), _plain(event.item_id)
        except TypeError:
            raise InvalidRequest(
                f"event {number} is of user {event.user_id!r} and item {event.item_id!r}; ids are whole numbers or text"
            ) from None
        rows.append(
            {
                "event_id": event.event_id, "user_id": user, "item_id": item,
                "kind": kind.name.lower(), "timestamp": event.timestamp, "request_id": event.request_id,
                "position": event.position,
            }
        )  # fmt: skip
    try:
        text = json.dumps(rows, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the events cannot be written as JSON ({error}); ids are numbers or text") from None
    message = service_pb2.ModelInferRequest(model_name=contract.FEEDBACK)
    (spec,) = contract.FEEDBACK_REQUEST
    message.inputs.add(name=spec.name, datatype=spec.dtype, shape=(1, 1))
    message.raw_input_contents.append(len(text).to_bytes(4, "little") + text)
    written: bytes = message.SerializeToString()
    return written


def _plain(value: Any) -> Any:
    """Ids as answers have them are numpy's."""
    if value is None or isinstance(value, str):
        return str(value) if value is not None else None
    return operator.index(value)


def decode_events(reply: Any) -> FeedbackResult:
    """The answer.

    Raises:
        IncompatibleServer: it is not of the contract.
    """
    try:
        return FeedbackResult(*struct.unpack("<ii", reply.raw_output_contents[0]))
    except (IndexError, struct.error):
        raise IncompatibleServer("the answer to feedback is not of this client's contract") from None


class FeedbackCall:
    """One batch on its way, without the sending."""

    def __init__(self, core: Core, events: Sequence[FeedbackEvent], deadline_s: float | None) -> None:
        core.check_usable()
        self.message = encode_events(events)
        self._core = core
        self._began = time.monotonic()
        self._ends = self._began + (core.deadline_s if deadline_s is None else checked_deadline(deadline_s))
        self._tried: frozenset[str] = frozenset()
        self._attempts = 0

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self._ends - time.monotonic()

    @property
    def timeout_s(self) -> float:
        """For the attempt that was asked for last: half of what is left while there are servers that were not tried."""
        others = len(self._core.pool) > len(self._tried)
        return max(0.001, self.left_s / 2 if others else self.left_s)

    def attempt(self) -> Endpoint:
        """The server to send it to next."""
        endpoint = self._core.pool.pick(self._tried)
        self._tried |= {endpoint.address}
        self._attempts += 1
        return endpoint

    def answered(self, endpoint: Endpoint, reply: Any) -> FeedbackResult:
        """A server has stored it."""
        self._core.pool.done(endpoint, healthy=None)  # how long a disk takes says nothing about ranking
        return decode_events(reply)

    def given_up(self, endpoint: Endpoint, error: BaseException) -> BaseException:
        """An attempt ended otherwise; gives what to raise. A closed channel says all kinds of things, a cancelled task
        among them."""
        self._core.pool.done(endpoint, healthy=None)
        if self._core.closed and isinstance(error, Exception | CancelledError):
            return ClientClosed("this client was closed while it waited for an answer")
        return error

    def failed(self, endpoint: Endpoint, error: grpc.RpcError) -> float:
        """An attempt failed; gives the seconds to wait before the next one. Every server is asked before the batch is
        given up: another one may have a stub that lives, a store, or the release that an item is of.

        Raises:
            RankError: there is to be no other.
        """
        if self._core.closed:
            self._core.pool.done(endpoint, healthy=None)
            raise ClientClosed("this client was closed while it waited for an answer")
        found = from_grpc(
            error, address=endpoint.address, elapsed_s=time.monotonic() - self._began, attempts=self._attempts
        )
        # Feedback that is not taken is no reason to rank elsewhere; one that cannot be reached is.
        unreachable = isinstance(found, Unavailable) and "user store" not in (error.details() or "")
        self._core.pool.done(endpoint, healthy=False if unreachable else None)
        if isinstance(found, IncompatibleServer) and error.code() is grpc.StatusCode.NOT_FOUND:
            words = f"{endpoint.address} takes no feedback; start it with --users"
            found = IncompatibleServer(words, address=endpoint.address, status=error.code())
        others = len(self._core.pool) > len(self._tried)
        pause = random.uniform(0, min(_LONGEST_PAUSE_S, _PAUSE_S * 2**self._attempts))
        if not (others or isinstance(found, _AGAIN)) or pause >= self.left_s:
            raise found
        return pause
