"""The synchronous client."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, overload

import grpc
from tritonclient.grpc import service_pb2

from trirank import contract
from trirank._channels import Target, make_stub
from trirank._core import Again, Attempt, Call, Core, checked_deadline
from trirank._errors import ClientClosed, RankError, Unavailable, from_grpc
from trirank._feedback import FeedbackCall, FeedbackEvent, FeedbackResult
from trirank._options import Balancing, EjectionPolicy, EventHooks, HedgePolicy, OnFailure, RetryPolicy, Tls
from trirank._types import RankRequest, RankResponse

_OLD_CHANNELS_S = 60.0
"""How long calls may go on over a channel that was replaced."""


class RankClient:
    """Asks trirank servers to rank; safe to share between threads, not between processes (make one after the fork).

    Args:
        addresses: ``host:port`` of a server's gRPC endpoint, a list of them, or ``dns:///name:port`` for all addresses
            of a name.
        deadline_s: seconds a call may take in all, retries and hedges included, unless it says otherwise.
        retry: None: never.
        hedge: None: never; otherwise with two servers or more.
        on_failure: ``retrieval_order`` answers with the candidates as retrieval had them, marked as degraded, where
            ``raise`` raises; requests that are at fault themselves are raised always.
        token: a bearer token, or a function that gives one.
        metadata: sent with every call.
        event_hooks: event → functions that are called with a trirank.Event.
        model: the ensemble's name.

    Raises:
        InvalidRequest: an argument is out of range, or a file of ``tls`` cannot be read.
        Unavailable: a name has no address.
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        *,
        deadline_s: float = 1.0,
        retry: RetryPolicy | None = RetryPolicy(),  # noqa: B008  # frozen
        hedge: HedgePolicy | None = None,
        balancing: Balancing = "least_loaded",
        ejection: EjectionPolicy | None = None,
        on_failure: OnFailure = "raise",
        tls: Tls | None = None,
        token: str | Callable[[], str] | None = None,
        metadata: Mapping[str, str] | None = None,
        event_hooks: EventHooks | None = None,
        model: str = contract.ENSEMBLE,
        resolve_every_s: float = 10.0,
    ) -> None:
        self._core = Core(
            Target(addresses, tls, token, resolve_every_s), deadline_s=deadline_s, model=model, retry=retry,
            hedge=hedge, balancing=balancing, ejection=ejection, on_failure=on_failure, metadata=metadata,
            event_hooks=event_hooks,
        )  # fmt: skip
        self._channels: dict[str, tuple[int, Any, Any]] = {}
        self._old: list[tuple[float, Any]] = []
        self._lock = threading.Lock()

    def rank(
        self, request: RankRequest, *, deadline_s: float | None = None, on_failure: OnFailure | None = None
    ) -> RankResponse:
        """Rank the candidates of one request.

        Raises:
            InvalidRequest: the request breaks the contract.
            DeadlineExceeded: no answer in ``deadline_s`` seconds.
            Overloaded, Unavailable, IncompatibleServer, ServerError, ClientClosed: see RankError.
        """
        call = Call(self._core, request, deadline_s, on_failure)
        try:
            while True:
                attempt = call.attempt()
                try:
                    if not attempt.endpoint.checked and not self._shake_hands(call, attempt):
                        continue
                    return self._send(call, attempt)
                except Again:
                    continue
                except _Failed as failure:
                    if pause := call.failed(failure.attempt, failure.error):
                        time.sleep(pause)
        except RankError as error:
            return call.fallback(error)
        except Exception as error:
            return call.fallback(call.unexpected(error))
        except BaseException:  # the caller's own, KeyboardInterrupt for instance
            call.cancelled()
            raise

    @overload
    def rank_many(
        self,
        requests: Iterable[RankRequest],
        *,
        concurrency: int = ...,
        deadline_s: float | None = ...,
        return_errors: Literal[False] = ...,
    ) -> list[RankResponse]: ...
    @overload
    def rank_many(
        self,
        requests: Iterable[RankRequest],
        *,
        concurrency: int = ...,
        deadline_s: float | None = ...,
        return_errors: Literal[True],
    ) -> list[RankResponse | RankError]: ...
    def rank_many(
        self,
        requests: Iterable[RankRequest],
        *,
        concurrency: int = 16,
        deadline_s: float | None = None,
        return_errors: bool = False,
    ) -> Any:
        """Rank many requests, at most ``concurrency`` at a time; answers are in the requests' order.

        Args:
            deadline_s: of each request.
            return_errors: give a RankError in its request's place, rather than raise the first.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}; it is 1 or more")

        def one(request: RankRequest) -> RankResponse | RankError:
            try:
                return self.rank(request, deadline_s=deadline_s)
            except RankError as error:
                if return_errors:
                    return error
                raise

        with ThreadPoolExecutor(concurrency, thread_name_prefix="trirank") as pool:
            return list(pool.map(one, requests))

    def feedback(self, events: Sequence[FeedbackEvent], *, deadline_s: float | None = None) -> FeedbackResult:
        """Tell what users did, 1 to 1,000 events. What is answered is on the server's disk; the users' next requests
        see it. Whether all or none of a batch was taken is certain only when this returns: on an error tell it again,
        the same events, whose ids are known by then.

        Raises:
            InvalidRequest: an event is none; nothing of the batch was stored.
            IncompatibleServer: the server has no user store.
            DeadlineExceeded, Overloaded, Unavailable, ServerError, ClientClosed: see RankError.
        """
        call = FeedbackCall(self._core, events, deadline_s)
        while True:
            endpoint = call.attempt()
            try:
                stub = self._stub(endpoint.address)
                metadata = [*self._core.metadata, *self._core.target.credentials_metadata()]
                reply = stub.ModelInfer(call.message, timeout=call.timeout_s, metadata=metadata)
            except grpc.RpcError as error:
                time.sleep(call.failed(endpoint, error))
            except BaseException as error:
                raise call.given_up(endpoint, error) from None
            else:
                return call.answered(endpoint, reply)

    def ready(self, *, deadline_s: float | None = None) -> bool:
        """Whether the ensemble is loaded on one of the servers. A server whose stages have died may still say so
        (triton-inference-server/server #8604): what proves more is a call of ``rank``."""
        self._core.check_usable()
        request = service_pb2.ModelReadyRequest(name=self._core.model)
        for endpoint in self._core.pool.endpoints:
            try:
                if self._ask(endpoint.address, "ModelReady", request, deadline_s).ready:
                    return True
            except RankError:  # noqa: PERF203  # the next one may answer
                continue
        return False

    def server_info(self, *, deadline_s: float | None = None) -> dict[str, str]:
        """Name, version and address of one of the servers, and whether its ``item_ids`` and ``user_ids`` are numbers or
        strings, where it tells.

        Raises:
            Unavailable: none answers.
        """
        self._core.check_usable()
        last: RankError = Unavailable("there is no server to call")
        for endpoint in self._core.pool.endpoints:
            try:
                reply = self._ask(endpoint.address, "ServerMetadata", service_pb2.ServerMetadataRequest(), deadline_s)
                found = {"name": reply.name, "version": reply.version, "address": endpoint.address}
                with suppress(RankError):  # some tell their configuration to nobody
                    message = service_pb2.ModelConfigRequest(name=self._core.model)
                    self._core.learn(self._ask(endpoint.address, "ModelConfig", message, deadline_s).config)
                return found | self._core.kinds
            except RankError as error:  # noqa: PERF203  # the next one may answer
                last = error
        raise last

    def close(self) -> None:
        """Close all connections; calls in flight fail. Safe to call twice."""
        self._core.closed = True
        with self._lock:
            channels = [channel for _, channel, _ in self._channels.values()] + [channel for _, channel in self._old]
            self._channels, self._old = {}, []
        for channel in channels:
            channel.close()

    def _send(self, call: Call, attempt: Attempt) -> RankResponse:
        """One attempt, or two of which the first to answer wins."""
        if self._core.hedge_delay_s(attempt) is not None:
            return self._send_hedged(call, attempt)
        try:
            stub = self._stub(attempt.endpoint.address)
            reply = stub.ModelInfer(call.message(attempt), timeout=attempt.timeout_s, metadata=call.metadata)
        except grpc.RpcError as error:
            raise _Failed(attempt, error) from None
        except BaseException:
            call.given_up(attempt)
            raise
        return call.answered(attempt, reply)

    def _send_hedged(self, call: Call, attempt: Attempt) -> RankResponse:
        ended: queue.SimpleQueue[tuple[Attempt, Any]] = queue.SimpleQueue()
        under_way: dict[int, tuple[Attempt, Any]] = {}

        def start(one: Attempt) -> None:
            try:
                stub = self._stub(one.endpoint.address)
                future = stub.ModelInfer.future(call.message(one), timeout=one.timeout_s, metadata=call.metadata)
            except BaseException:
                call.given_up(one)
                raise
            under_way[id(one)] = (one, future)
            future.add_done_callback(lambda done: ended.put((one, done)))

        answered = False
        try:
            start(attempt)
            try:
                first, future = ended.get(timeout=self._core.hedge_delay_s(attempt))
            except queue.Empty:
                if (hedge := call.hedge()) is not None:
                    start(hedge)
                first, future = ended.get()
            while True:
                del under_way[id(first)]
                error = future.exception()
                if error is None:
                    answered = True
                    return call.answered(first, future.result())
                if not under_way:
                    raise _Failed(first, error)
                call.outdone(first, error)
                first, future = ended.get()
        finally:
            for one, future in under_way.values():
                future.cancel()
                call.given_up(one, lost=answered)

    def _shake_hands(self, call: Call, attempt: Attempt) -> bool:
        """Whether the server speaks our contract; else another one is to be tried."""
        try:
            stub = self._stub(attempt.endpoint.address)
            reply = stub.ModelConfig(call.config_request(), timeout=attempt.timeout_s, metadata=call.metadata)
        except grpc.RpcError as error:
            if cannot_ask(error):
                return call.checked(attempt, None)
            raise _Failed(attempt, error) from None
        except BaseException:
            call.given_up(attempt)
            raise
        return call.checked(attempt, reply.config)

    def _ask(self, address: str, method: str, message: Any, deadline_s: float | None) -> Any:
        deadline = self._core.deadline_s if deadline_s is None else checked_deadline(deadline_s)
        started = time.perf_counter()
        metadata = [*self._core.metadata, *self._core.target.credentials_metadata()]
        try:
            return getattr(self._stub(address), method)(message, timeout=deadline, metadata=metadata)
        except grpc.RpcError as error:
            if self._core.closed:
                raise ClientClosed("this client was closed while it waited for an answer") from None
            raise from_grpc(error, address=address, elapsed_s=time.perf_counter() - started) from None
        except RankError:
            raise
        except Exception as error:
            if self._core.closed:
                raise ClientClosed("this client was closed while it was used") from None
            raise Unavailable(f"the call could not be made ({error})", address=address) from error

    def _stub(self, address: str) -> Any:
        """Of a server, over a channel with today's certificates."""
        generation = self._core.target.refresh()
        if self._core.target.due():
            threading.Thread(target=self._resolve, name="trirank-resolve", daemon=True).start()
        kept = self._channels.get(address)
        if kept is not None and kept[0] == generation:
            return kept[2]
        with self._lock:
            self._core.check_usable()
            kept = self._channels.get(address)
            if kept is None or kept[0] != generation:
                if kept is not None:
                    self._retire(kept[1])
                channel = self._core.target.channel(address, grpc)
                kept = (generation, channel, make_stub(channel))
                self._channels[address] = kept
            return kept[2]

    def _resolve(self) -> None:
        """Take the servers that a name has now; those that left finish what they have."""
        try:
            gone = self._core.pool.update(self._core.target.resolve())
        except Unavailable:  # the names' server may be back next time; until then the old list serves
            return
        with self._lock:
            for endpoint in gone:
                if (kept := self._channels.pop(endpoint.address, None)) is not None:
                    self._retire(kept[1])

    def _retire(self, channel: Any) -> None:
        """Close a channel once calls that go over it have ended."""
        now = time.monotonic()
        self._old.append((now + _OLD_CHANNELS_S, channel))
        for _, old in [entry for entry in self._old if entry[0] <= now]:
            old.close()
        self._old = [entry for entry in self._old if entry[0] > now]

    def __enter__(self) -> RankClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Failed(Exception):
    """An attempt failed; what comes of it is the Call's to say."""

    def __init__(self, attempt: Attempt, error: Any) -> None:
        super().__init__()
        self.attempt = attempt
        self.error = error


def cannot_ask(error: grpc.RpcError) -> bool:
    """Whether a server does not tell its configurations to such as us; its answers are then checked alone."""
    words = (error.details() or "").lower()
    return error.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED) or "restricted" in words
