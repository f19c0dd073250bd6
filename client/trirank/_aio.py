"""The asynchronous client: the same methods, for an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, overload

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from trirank import contract
from trirank._channels import Target, make_stub
from trirank._client import cannot_ask
from trirank._core import Again, Attempt, Call, Core, checked_deadline
from trirank._errors import ClientClosed, RankError, Unavailable, from_grpc
from trirank._feedback import FeedbackCall, FeedbackEvent, FeedbackResult
from trirank._options import Balancing, EjectionPolicy, EventHooks, HedgePolicy, OnFailure, RetryPolicy, Tls
from trirank._types import RankRequest, RankResponse


class AsyncRankClient:
    """RankClient for asyncio: the same arguments, the same rules, its methods awaited. For one event loop.

    A call whose task is cancelled is cancelled at the server too, so that it waits in no queue.
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
        self._background: set[asyncio.Task[None]] = set()

    async def rank(
        self, request: RankRequest, *, deadline_s: float | None = None, on_failure: OnFailure | None = None
    ) -> RankResponse:
        """See RankClient.rank."""
        call = Call(self._core, request, deadline_s, on_failure)
        try:
            while True:
                attempt = call.attempt()
                error = None
                if not attempt.endpoint.checked:
                    fits, error = await self._shake_hands(call, attempt)
                    if not fits and error is None:
                        continue
                if error is None:
                    answered, attempt, outcome = await self._send(call, attempt)
                    if answered:
                        try:
                            return call.answered(attempt, outcome)
                        except Again:
                            continue
                    error = outcome
                await asyncio.sleep(call.failed(attempt, error))
        except RankError as failure:
            return call.fallback(failure)
        except Exception as unknown:
            return call.fallback(call.unexpected(unknown))
        except BaseException:  # CancelledError among them
            call.cancelled()
            raise

    @overload
    async def rank_many(
        self,
        requests: Iterable[RankRequest],
        *,
        concurrency: int = ...,
        deadline_s: float | None = ...,
        return_errors: Literal[False] = ...,
    ) -> list[RankResponse]: ...
    @overload
    async def rank_many(
        self,
        requests: Iterable[RankRequest],
        *,
        concurrency: int = ...,
        deadline_s: float | None = ...,
        return_errors: Literal[True],
    ) -> list[RankResponse | RankError]: ...
    async def rank_many(
        self,
        requests: Iterable[RankRequest],
        *,
        concurrency: int = 16,
        deadline_s: float | None = None,
        return_errors: bool = False,
    ) -> Any:
        """See RankClient.rank_many."""
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}; it is 1 or more")
        places = asyncio.Semaphore(concurrency)

        async def one(request: RankRequest) -> RankResponse | RankError:
            async with places:
                try:
                    return await self.rank(request, deadline_s=deadline_s)
                except RankError as error:
                    if return_errors:
                        return error
                    raise

        tasks = [asyncio.ensure_future(one(request)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def feedback(self, events: Sequence[FeedbackEvent], *, deadline_s: float | None = None) -> FeedbackResult:
        """See RankClient.feedback."""
        call = FeedbackCall(self._core, events, deadline_s)
        while True:
            endpoint = call.attempt()
            try:
                stub = self._stub(endpoint.address)
                metadata = [*self._core.metadata, *self._core.target.credentials_metadata()]
                reply = await stub.ModelInfer(call.message, timeout=call.timeout_s, metadata=metadata)
            except grpc.RpcError as error:
                await asyncio.sleep(call.failed(endpoint, error))
            except BaseException as error:
                raise call.given_up(endpoint, error) from None
            else:
                return call.answered(endpoint, reply)

    async def ready(self, *, deadline_s: float | None = None) -> bool:
        """See RankClient.ready."""
        self._core.check_usable()
        request = service_pb2.ModelReadyRequest(name=self._core.model)
        for endpoint in self._core.pool.endpoints:
            try:
                if (await self._ask(endpoint.address, "ModelReady", request, deadline_s)).ready:
                    return True
            except RankError:  # noqa: PERF203  # the next one may answer
                continue
        return False

    async def server_info(self, *, deadline_s: float | None = None) -> dict[str, str]:
        """See RankClient.server_info."""
        self._core.check_usable()
        last: RankError = Unavailable("there is no server to call")
        for endpoint in self._core.pool.endpoints:
            try:
                message = service_pb2.ServerMetadataRequest()
                reply = await self._ask(endpoint.address, "ServerMetadata", message, deadline_s)
                found = {"name": reply.name, "version": reply.version, "address": endpoint.address}
                with suppress(RankError):  # some tell their configuration to nobody
                    asked = service_pb2.ModelConfigRequest(name=self._core.model)
                    self._core.learn((await self._ask(endpoint.address, "ModelConfig", asked, deadline_s)).config)
                return found | self._core.kinds
            except RankError as error:  # noqa: PERF203  # the next one may answer
                last = error
        raise last

    async def close(self) -> None:
        """See RankClient.close."""
        self._core.closed = True
        for task in self._background:
            task.cancel()
        channels, self._channels = [channel for _, channel, _ in self._channels.values()], {}
        for channel in channels:
            await channel.close()

    async def _send(self, call: Call, attempt: Attempt) -> tuple[bool, Attempt, Any]:
        """Whether it was answered, which attempt, and with what: the reply or the error."""
        under_way: dict[asyncio.Task[Any], Attempt] = {}
        self._start(call, attempt, under_way)
        answered = False
        try:
            done, _ = await asyncio.wait(under_way, timeout=self._core.hedge_delay_s(attempt))
            if not done and (hedge := call.hedge()) is not None:
                self._start(call, hedge, under_way)
            while True:
                done, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                task = next(iter(done))
                one = under_way.pop(task)
                if task.cancelled():  # not by us: the channel was closed
                    call.given_up(one)
                    raise ClientClosed("this client was closed while it waited for an answer")
                error = task.exception()
                if error is None:
                    answered = True
                    return True, one, task.result()
                if not isinstance(error, grpc.RpcError):
                    call.given_up(one)
                    raise error
                if not under_way:
                    return False, one, error
                call.outdone(one, error)
        finally:
            for task, one in under_way.items():
                task.cancel()
                call.given_up(one, lost=answered)

    def _start(self, call: Call, attempt: Attempt, under_way: dict[asyncio.Task[Any], Attempt]) -> None:
        try:
            stub = self._stub(attempt.endpoint.address)
        except BaseException:
            call.given_up(attempt)
            raise

        async def send() -> Any:
            return await stub.ModelInfer(call.message(attempt), timeout=attempt.timeout_s, metadata=call.metadata)

        under_way[asyncio.ensure_future(send())] = attempt

    async def _shake_hands(self, call: Call, attempt: Attempt) -> tuple[bool, Any]:
        """Whether the server speaks our contract, else another one is to be tried; and the error that asking failed
        with, if any."""

        async def ask() -> Any:
            stub = self._stub(attempt.endpoint.address)
            return await stub.ModelConfig(call.config_request(), timeout=attempt.timeout_s, metadata=call.metadata)

        task = asyncio.ensure_future(ask())
        try:
            await asyncio.wait([task])
        except BaseException:
            task.cancel()
            call.given_up(attempt)
            raise
        if task.cancelled():  # not by us: the channel was closed
            call.given_up(attempt)
            raise ClientClosed("this client was closed while it waited for an answer")
        error = task.exception()
        if error is None:
            return call.checked(attempt, task.result().config), None
        if not isinstance(error, grpc.RpcError):
            call.given_up(attempt)
            raise error
        return (call.checked(attempt, None), None) if cannot_ask(error) else (False, error)

    async def _ask(self, address: str, method: str, message: Any, deadline_s: float | None) -> Any:
        deadline = self._core.deadline_s if deadline_s is None else checked_deadline(deadline_s)
        started = time.perf_counter()
        metadata = [*self._core.metadata, *self._core.target.credentials_metadata()]
        try:
            return await getattr(self._stub(address), method)(message, timeout=deadline, metadata=metadata)
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
        except asyncio.CancelledError:
            if self._core.closed:  # the channel was closed, and that is what it says then
                raise ClientClosed("this client was closed while it waited for an answer") from None
            raise

    def _stub(self, address: str) -> Any:
        generation = self._core.target.refresh()
        if self._core.target.due():
            self._in_background(self._resolve())
        kept = self._channels.get(address)
        if kept is None or kept[0] != generation:
            self._core.check_usable()
            if kept is not None:
                self._in_background(_retired(kept[1]))
            channel = self._core.target.channel(address, grpc.aio)
            kept = (generation, channel, make_stub(channel))
            self._channels[address] = kept
        return kept[2]

    async def _resolve(self) -> None:
        try:
            addresses = await asyncio.get_running_loop().run_in_executor(None, self._core.target.resolve)
        except Unavailable:  # the names' server may be back next time; until then the old list serves
            return
        for endpoint in self._core.pool.update(addresses):
            if (kept := self._channels.pop(endpoint.address, None)) is not None:
                self._in_background(_retired(kept[1]))

    def _in_background(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def __aenter__(self) -> AsyncRankClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _retired(channel: Any, grace_s: float = 60.0) -> None:
    """Close a channel once calls that go over it have ended."""
    await channel.close(grace_s)
