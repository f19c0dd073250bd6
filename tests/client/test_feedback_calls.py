"""Feedback of both clients, against servers whose every word is given."""

from __future__ import annotations

import asyncio
import struct
import threading
import time
from concurrent import futures

import grpc
import pytest
from trirank import (
    AsyncRankClient,
    ClientClosed,
    FeedbackEvent,
    IncompatibleServer,
    InvalidRequest,
    RankClient,
    ServerError,
)
from tritonclient.grpc import service_pb2, service_pb2_grpc

EVENTS = [FeedbackEvent(item_id=5, user_id=1, kind="click")]


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Refuses everything with one status, or stores it; after a pause."""

    def __init__(self, refusal=None, pause_s=0.0):
        self.refusal, self.pause_s, self.asked = refusal, pause_s, 0
        self.reached = threading.Event()

    def ModelInfer(self, request, context):
        self.asked += 1
        self.reached.set()
        time.sleep(self.pause_s)
        if self.refusal is not None:
            context.abort(self.refusal, "on purpose")
        reply = service_pb2.ModelInferResponse(model_name="feedback")
        reply.raw_output_contents.append(struct.pack("<ii", 1, 0))
        return reply


@pytest.fixture
def start():
    started = []

    def run(*servicers):
        addresses = []
        for servicer in servicers:
            server = grpc.server(futures.ThreadPoolExecutor(4))
            service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
            addresses.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
            server.start()
            started.append(server)
        return addresses

    yield run
    for server in started:
        server.stop(None)


def tell(kind, addresses, deadline_s=5):
    if kind is RankClient:
        with RankClient(addresses, deadline_s=deadline_s) as client:
            return client.feedback(EVENTS)

    async def run():
        async with AsyncRankClient(addresses, deadline_s=deadline_s) as client:
            return await client.feedback(EVENTS)

    return asyncio.run(run())


CLIENTS = pytest.mark.parametrize("kind", [RankClient, AsyncRankClient])
REFUSALS = {
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.NOT_FOUND: IncompatibleServer,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
}


@CLIENTS
@pytest.mark.parametrize("status", REFUSALS)
def test_another_server_may_store_what_one_refuses(start, kind, status):
    """One whose stub has died, one without a store, one that still serves the release before."""
    for _ in range(4):  # whichever comes first
        refusing, storing = Server(status), Server()
        assert tell(kind, start(refusing, storing)).stored == 1
        assert storing.asked == 1


@CLIENTS
@pytest.mark.parametrize("status", REFUSALS)
def test_what_all_refuse_is_raised_at_once(start, kind, status):
    servers = [Server(status), Server(status)]
    with pytest.raises(REFUSALS[status]):
        tell(kind, start(*servers), deadline_s=60)
    assert [server.asked for server in servers] == [1, 1]


def test_a_client_that_is_closed_says_so(start):
    slow = Server(pause_s=2)
    client = RankClient(start(slow), deadline_s=30)
    found = []

    def run():
        try:
            client.feedback(EVENTS)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert slow.reached.wait(10)
    client.close()
    thread.join(10)
    assert [type(error) for error in found] == [ClientClosed]


def test_an_asynchronous_client_that_is_closed_says_so_too(start):
    """Nobody cancelled the caller's task, though the channel says that its call was cancelled."""
    slow = Server(pause_s=2)

    async def run():
        client = AsyncRankClient(start(slow), deadline_s=30)
        task = asyncio.ensure_future(client.feedback(EVENTS))
        await asyncio.to_thread(slow.reached.wait, 10)
        await client.close()
        with pytest.raises(ClientClosed):
            await task

    asyncio.run(run())


def test_a_cancelled_task_stays_cancelled(start):
    slow = Server(pause_s=2)

    async def run():
        async with AsyncRankClient(start(slow), deadline_s=30) as client:
            task = asyncio.ensure_future(client.feedback(EVENTS))
            await asyncio.to_thread(slow.reached.wait, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
