"""One call, from request to answer or error, without the sending: what both clients share.

A client asks a Call for an attempt, sends it, and tells the Call how it went; the Call says what comes next. So the
rules on deadlines, retries, hedges and servers are here once, and neither threads nor event loops are.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from trirank import _codec, contract
from trirank._budget import LateTimes, TokenBucket
from trirank._channels import Target
from trirank._errors import (
    ClientClosed,
    DeadlineExceeded,
    IncompatibleServer,
    InvalidRequest,
    Overloaded,
    RankError,
    ServerError,
    Unavailable,
    kind_of,
)
from trirank._events import EVENTS, Event, tell
from trirank._options import Balancing, EjectionPolicy, EventHooks, HedgePolicy, OnFailure, RetryPolicy
from trirank._pool import Endpoint, Pool
from trirank._types import RankRequest, RankResponse
from trirank.contract import Status

_PUSHBACK = "grpc-retry-pushback-ms"
_ATTEMPT_MEANS, _BLAMED_MEANS, _SHORT_S, _CONNECT_S = 10.0, 3.0, 0.05, 1.0
"""An attempt gets so many times the mean of answered calls before another server is tried. Given so many times of it,
and no less than so many seconds, a server that has not answered is to blame, and not its caller's haste. A first
attempt, which connects and asks for the contract, gets longer, and a server that has answered nobody yet."""
_SKEW_S = 0.005
"""A server that says "too late" with more time left than this has another clock, and one that says "waited too long" so
much before that can be true."""


@dataclass
class Attempt:
    """One message to one server.

    Attributes:
        timeout_s: for the call: what is left of the deadline, or less where another server could still be tried.
        hedge: whether it runs beside another one.
        reserved: whether a retry has been paid for it already, since its time is limited.
        sent_moment: whether the deadline goes along as a moment.
        stamped: when that was written; 0: not yet.
    """

    endpoint: Endpoint
    started: float
    timeout_s: float
    hedge: bool = False
    reserved: bool = False
    sent_moment: bool = False
    stamped: float = 0.0


class Again(Exception):
    """An answer was no good; another server shall be asked."""


class Core:
    """What a client is told once: servers, policies, hooks."""

    def __init__(
        self,
        target: Target,
        *,
        deadline_s: float,
        model: str,
        retry: RetryPolicy | None,
        hedge: HedgePolicy | None,
        balancing: Balancing,
        ejection: EjectionPolicy | None,
        on_failure: OnFailure,
        metadata: Mapping[str, str] | None,
        event_hooks: EventHooks | None,
    ) -> None:
        if balancing not in ("least_loaded", "round_robin"):
            raise InvalidRequest(f"balancing is {balancing!r}; it is least_loaded or round_robin")
        _checked_failure(on_failure)
        if unknown := sorted(set(event_hooks or ()) - set(EVENTS)):
            raise InvalidRequest(f"event_hooks has {', '.join(unknown)}; events are {', '.join(EVENTS)}")
        self.target = target
        self.deadline_s = checked_deadline(deadline_s)
        self.model = model
        self.retry = retry or RetryPolicy(max_attempts=1)
        self.hedge = hedge
        self.on_failure: OnFailure = on_failure
        self.metadata = [(name.lower(), value) for name, value in (metadata or {}).items()]
        self.hooks = {name: list(hooks) for name, hooks in (event_hooks or {}).items()}
        self.pool = Pool(target.resolve(), balancing, ejection or EjectionPolicy())
        self.retries = TokenBucket(self.retry.budget, start=10.0)
        self.hedges = TokenBucket(hedge.budget if hedge else 0.0)
        self.times = LateTimes(hedge.quantile) if hedge else None
        self.ids: dict[str, str] = {}
        """Whether the servers' ids of ``item`` and ``user`` are numbers or strings; empty: not known."""
        self.closed = False
        self._process = os.getpid()

    def check_usable(self) -> None:
        """Raises ClientClosed if the client was closed, or made before this process was forked."""
        if self.closed:
            raise ClientClosed("this client is closed; make a new one")
        if os.getpid() != self._process:
            raise ClientClosed(
                f"this client was made in process {self._process} and is used in {os.getpid()}, which was forked from "
                "it; gRPC's connections do not survive that: make a client in each process, after the fork"
            )

    def learn(self, config: Any) -> None:
        """Take from a server's configuration what its ids are."""
        found = {what: config.parameters[name].string_value for what, name in contract.ID_PARAMETERS.items()
                 if name in config.parameters}  # fmt: skip
        self.ids = found

    @property
    def kinds(self) -> dict[str, str]:
        """``item_ids`` and ``user_ids`` → numbers or strings, where it is known."""
        return {contract.ID_PARAMETERS[what]: kind for what, kind in self.ids.items()}

    def attempt_limit_s(self, endpoint: Endpoint) -> float:
        """How long one attempt may take at this server before another one is tried; infinite: to the end."""
        if len(self.pool) == 1 or not self.pool.others_than(endpoint):
            return math.inf
        if not endpoint.checked:  # it connects first, and asks for the contract
            return max(_CONNECT_S, self.retry.attempt_timeout_s or 0.0)
        if self.retry.attempt_timeout_s is not None:
            return self.retry.attempt_timeout_s
        return max(_SHORT_S, _ATTEMPT_MEANS * self.pool.mean_s) if self.pool.mean_s else math.inf

    def hedge_delay_s(self, attempt: Attempt) -> float | None:
        """After how long from now an attempt is given company; None: not at all."""
        late = self.times.value if self.times else None
        if self.hedge is None or late is None or not self.pool.others_than(attempt.endpoint):
            return None
        delay = max(self.hedge.min_delay_s, late)
        return max(0.0, attempt.started + delay - time.monotonic()) if delay < attempt.timeout_s else None


class Call:
    """One call of ``rank``."""

    def __init__(
        self, core: Core, request: RankRequest, deadline_s: float | None, on_failure: OnFailure | None
    ) -> None:
        core.check_usable()
        self._core = core
        self._request = request
        self._on_failure = core.on_failure if on_failure is None else _checked_failure(on_failure)
        deadline = core.deadline_s if deadline_s is None else checked_deadline(deadline_s)
        self._began = time.monotonic()
        self._ends = self._began + deadline
        self._moment_us = int((time.time() + deadline) * 1e6)
        self._message, self._names = _codec.encode(request, core.model)
        if core.ids:
            try:
                _codec.check_kinds(request, self._names, core.ids)
            except InvalidRequest:  # a release of another kind may have been promoted since: ask again
                core.pool.forget_contracts()
        self._sent = self._retried = 0
        self._tried: frozenset[str] = frozenset()
        self._address = ""
        self._event = Event("request", request) if core.hooks else None
        core.retries.earn()
        if core.hedge:
            core.hedges.earn()
        self.metadata: list[tuple[str, str]] | None = None
        self._tell("request")

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self._ends - time.monotonic()

    def attempt(self) -> Attempt:
        """The next message to send; ``self.metadata`` goes with it.

        Raises:
            DeadlineExceeded: there is no time left for it.
            Unavailable: there is no server, or no token.
        """
        core = self._core
        if self.left_s <= 0:
            raise self._error(DeadlineExceeded, "no time was left to call a server")
        if self.metadata is None:
            added = self._event.metadata if self._event is not None else []
            self.metadata = [*core.metadata, *core.target.credentials_metadata(), *added]
        attempt = self._to(core.pool.pick(self._tried), "attempt")
        self._limit(attempt)
        return attempt

    def hedge(self) -> Attempt | None:
        """A second message beside the one under way, if there is a server for it and the budget pays for it."""
        if self.left_s <= 0 or not self._core.hedges.ready:
            return None
        endpoint = self._core.pool.pick_hedge(self._tried)
        if endpoint is None:
            return None
        if not self._core.hedges.take():
            self._core.pool.done(endpoint, healthy=None)
            return None
        return self._to(endpoint, "hedge")

    def _limit(self, attempt: Attempt) -> None:
        """Give an attempt what is left of the deadline, or less where another server could still be tried after it: a
        retry is put aside for it then, so that no call ends before its deadline for want of one."""
        core = self._core
        attempt.timeout_s = self.left_s
        limit = core.attempt_limit_s(attempt.endpoint)
        if limit >= attempt.timeout_s or self._retried + 1 >= core.retry.max_attempts:
            self._settle(attempt)
        elif attempt.reserved or core.retries.reserve():
            attempt.reserved, attempt.timeout_s = True, limit

    def _settle(self, attempt: Attempt) -> None:
        """Give back what was put aside for an attempt."""
        if attempt.reserved:
            attempt.reserved = False
            self._core.retries.release()

    def _to(self, endpoint: Endpoint, event: str) -> Attempt:
        self._tried |= {endpoint.address}
        self._sent += 1
        agrees = self._core.pool.clock_agrees(endpoint)
        self._address = endpoint.address
        self._tell(event)
        return Attempt(endpoint, time.monotonic(), self.left_s, hedge=event == "hedge", sent_moment=agrees)

    def message(self, attempt: Attempt) -> bytes:
        """The ModelInferRequest to send now, so that what came before, a handshake for instance, is no wait in a
        server's queue."""
        if not attempt.sent_moment:
            return self._message
        attempt.stamped = time.monotonic()
        return _codec.with_deadline(self._message, self._moment_us, int(time.time() * 1e6))

    def answered(self, attempt: Attempt, reply: Any) -> RankResponse:
        """An attempt was answered.

        Raises:
            IncompatibleServer: the answer is not of the contract.
            ServerError: it holds scores that are no numbers.
        """
        self._settle(attempt)
        try:
            response = _codec.decode(reply, self._names)
        except (IncompatibleServer, ServerError) as error:
            found = self._error(type(error), str(error), attempt)
            if isinstance(error, IncompatibleServer):
                self._core.pool.unfit(attempt.endpoint)
            else:
                self._core.pool.done(attempt.endpoint, healthy=False, began=attempt.started)
            if not self._core.pool.others_than(attempt.endpoint):
                raise found from None
            self._try_again(found)
            raise Again from None
        self._core.pool.done(attempt.endpoint, healthy=True, began=attempt.started)
        if self._core.times is not None:
            self._core.times.add(time.monotonic() - attempt.started)
        self._tell("response", response=response)
        return response

    def given_up(self, attempt: Attempt, lost: bool = False) -> None:
        """An attempt was cancelled, by its caller or because the hedge beside it was faster (``lost``): it took that
        long at least, which has to count, or hedges would learn from fast calls alone."""
        self._settle(attempt)
        self._core.pool.done(attempt.endpoint, healthy=None)
        if lost and not attempt.hedge and self._core.times is not None:
            self._core.times.add(time.monotonic() - attempt.started)

    def outdone(self, attempt: Attempt, error: grpc.RpcError) -> None:
        """An attempt failed, but another one beside it goes on or has answered."""
        self._settle(attempt)
        self._note(attempt, error)

    def failed(self, attempt: Attempt, error: grpc.RpcError) -> float:
        """An attempt failed; gives the seconds to wait before the next one.

        Raises:
            RankError: there is to be no other.
        """
        core = self._core
        if core.closed:
            self.given_up(attempt)
            raise self._error(ClientClosed, "this client was closed while it waited for an answer", attempt)
        kind, details, clocks_differ = self._note(attempt, error)
        found = self._error(kind, details, attempt, error.code())
        if kind is DeadlineExceeded and not clocks_differ and attempt.reserved and self.left_s > _SKEW_S:
            attempt.reserved = False
            core.retries.redeem()
            self._retried += 1
            self._tell("retry", error=found)
            return 0.0
        self._settle(attempt)
        if clocks_differ:
            if not attempt.sent_moment:
                raise found
            return 0.0
        pause = self._pause(kind, attempt, error)
        if pause is None or pause >= self.left_s:
            raise found
        self._try_again(found)
        return pause

    def _note(self, attempt: Attempt, error: grpc.RpcError) -> tuple[type[RankError], str, bool]:
        """Tell the pool how an attempt failed; gives the error that it is, its words, and whether the server must have
        another clock, since it found more time gone than there was."""
        status, details = error.code(), error.details() or error.code().name
        kind, too_late = kind_of(status, details), contract.TOO_LATE in details
        gone, whole = time.monotonic() - attempt.stamped, self._ends - attempt.stamped
        hasty = contract.WAITED in details and gone < contract.PATIENCE * whole - _SKEW_S
        clocks_differ = hasty or (too_late and self.left_s > _SKEW_S)
        if clocks_differ and attempt.sent_moment:
            self._core.pool.clock_differs(attempt.endpoint)
        healthy = None if too_late else self._healthy(kind, status, attempt)
        if status is grpc.StatusCode.UNAVAILABLE and kind is Unavailable:
            attempt.endpoint.checked = False  # what comes back at this address may be of another version
        self._core.pool.done(attempt.endpoint, healthy, attempt.started)
        return kind, details, clocks_differ

    def _try_again(self, found: RankError) -> None:
        """Pay for another attempt.

        Raises:
            RankError: ``found``, where there is to be none.
        """
        if self._retried + 1 >= self._core.retry.max_attempts or not self._core.retries.take():
            raise found
        self._retried += 1
        self._tell("retry", error=found)

    def checked(self, attempt: Attempt, config: Any | None) -> bool:
        """What came of asking a server for its contract, from its configuration (None: it does not tell). Whether the
        attempt can go on there; else another server is to be tried.

        Raises:
            IncompatibleServer: it speaks another contract, and there is no other server.
            InvalidRequest: the request's ids are of another kind than the catalogue's.
            DeadlineExceeded: asking took all the time there was.
        """
        said = str(contract.CONTRACT_VERSION) if config is None else _contract_of(config)
        if said != str(contract.CONTRACT_VERSION):
            self._settle(attempt)
            self._core.pool.unfit(attempt.endpoint)
            if self._core.pool.others_than(attempt.endpoint) and len(self._tried) < len(self._core.pool):
                return False
            raise self._error(
                IncompatibleServer,
                f"{self._core.model} is of contract {said}, this client speaks {contract.CONTRACT_VERSION}; "
                "install the trirank that fits the server, or serve a release that fits the client",
                attempt,
            )
        attempt.endpoint.checked = True
        if config is not None:
            self._core.learn(config)
            try:
                _codec.check_kinds(self._request, self._names, self._core.ids)
            except BaseException:
                self.given_up(attempt)
                raise
        attempt.started = time.monotonic()
        self._limit(attempt)
        if attempt.timeout_s <= 0:
            self.given_up(attempt)
            raise self._error(DeadlineExceeded, "no time was left after the server was asked for its contract", attempt)
        return True

    def unexpected(self, error: Exception) -> RankError:
        """What nobody thought of, as an error of ours: the channel was closed meanwhile, or gRPC would not take it."""
        if self._core.closed:
            return self._error(ClientClosed, "this client was closed while it was used")
        return self._error(Unavailable, f"the call could not be made ({type(error).__name__}: {error})")

    def cancelled(self) -> None:
        """The caller has ended the call."""
        self._tell("cancelled")

    def config_request(self) -> Any:
        """Asks for what ``checked`` looks at."""
        return service_pb2.ModelConfigRequest(name=self._core.model)

    def fallback(self, error: RankError) -> RankResponse:
        """What the caller gets instead of an error.

        Raises:
            RankError: the error, where the caller wants it, or where the request itself is at fault.
        """
        if self._on_failure == "raise" or isinstance(error, InvalidRequest | ClientClosed):
            self._tell("error", error=error)
            raise error
        response = retrieval_order(self._request, _codec.candidate_ids(self._request)[0], self._names)
        self._tell("fallback", response=response, error=error)
        return response

    def _pause(self, kind: type[RankError], attempt: Attempt, error: grpc.RpcError) -> float | None:
        """Seconds before another attempt; None: it would be of no use."""
        others = self._core.pool.others_than(attempt.endpoint)
        if kind not in (Unavailable, Overloaded) and not (others and kind in (ServerError, IncompatibleServer)):
            return None
        said = dict(error.trailing_metadata() or ()).get(_PUSHBACK)
        if said is not None:
            try:
                wanted = int(said)
            except ValueError:
                return None
            return wanted / 1e3 if wanted >= 0 else None
        if others and len(self._tried) < len(self._core.pool):
            return 0.0  # a server that has not been tried need not be spared
        policy = self._core.retry
        return random.uniform(0, min(policy.max_backoff_s, policy.backoff_s * 2**self._retried))

    def _error(
        self, kind: type[RankError], message: str, attempt: Attempt | None = None, status: Any = None
    ) -> RankError:
        return kind(
            message,
            address=attempt.endpoint.address if attempt else self._address,
            elapsed_s=time.monotonic() - self._began,
            status=status,
            attempts=self._sent,
        )

    def _healthy(self, kind: type[RankError], status: grpc.StatusCode, attempt: Attempt) -> bool | None:
        """What an error says of its server: that it works, that it does not, or (None) nothing."""
        if issubclass(kind, InvalidRequest):
            return True
        if kind is Overloaded or status is grpc.StatusCode.CANCELLED:
            return None
        if kind is DeadlineExceeded and attempt.timeout_s < max(
            _SHORT_S, _BLAMED_MEANS * (self._core.pool.mean_s or 0)
        ):
            return None
        return False

    def _tell(self, name: str, response: RankResponse | None = None, error: RankError | None = None) -> None:
        event = self._event
        if event is not None:
            event.address, event.attempts = self._address, self._sent
            event.elapsed_s = time.monotonic() - self._began
            event.response, event.error = response, error
            tell(self._core.hooks, event, name)


def retrieval_order(request: RankRequest, ids: NDArray[np.int64], names: dict[int, str]) -> RankResponse:
    """The candidates as retrieval had them, repeats left out, marked as degraded.

    By RETRIEVAL_SCORES where the request has them, else in the order they were sent.

    Args:
        ids, names: of the candidates, see _codec.candidate_ids.
    """
    scores = request.retrieval_scores
    order = np.arange(len(ids))
    given = np.asarray(scores, np.float32) if scores is not None else -order.astype(np.float32)
    if scores is not None:
        order = np.argsort(-given, kind="stable")
    _, first = np.unique(ids[order], return_index=True)
    kept = order[np.sort(first)][: request.top_k]
    return RankResponse(
        item_ids=_codec.own_ids(ids[kept], names),
        scores=given[kept],
        reasons=np.zeros(len(kept), np.int32),
        status=Status.DEGRADED,
        duplicates=len(ids) - len(first),
    )


def checked_deadline(deadline_s: float) -> float:
    """Raises InvalidRequest if it is not a positive number of seconds."""
    if not deadline_s > 0:
        raise InvalidRequest(f"deadline_s is {deadline_s}; it is seconds, above 0")
    return deadline_s


def _checked_failure(on_failure: OnFailure) -> OnFailure:
    if on_failure not in ("raise", "retrieval_order"):
        raise InvalidRequest(f"on_failure is {on_failure!r}; it is raise or retrieval_order")
    return on_failure


def _contract_of(config: Any) -> str:
    """The version that a model's configuration names; of one that names none, whether its answers are ours."""
    said: str = config.parameters[contract.CONTRACT_PARAMETER].string_value if config.parameters else ""
    if said:
        return said
    outputs = {tensor.name for tensor in config.output}
    return str(contract.CONTRACT_VERSION) if outputs >= {s.name for s in contract.OUTPUTS} else "none"
