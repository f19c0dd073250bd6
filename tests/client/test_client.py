"""The client's errors, its life, and its public face. Calls that succeed are in tests/e2e."""

from __future__ import annotations

import inspect
import socket
from concurrent import futures

import grpc
import pytest
import trirank
from trirank import RankClient, RankRequest
from tritonclient.grpc import service_pb2_grpc

REQUEST = RankRequest(item_ids=[1])


@pytest.fixture
def faulty():
    """A KServe server whose every call fails with the status put into it."""

    class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
        status = grpc.StatusCode.INTERNAL

        def ModelInfer(self, request, context):
            context.abort(self.status, "on purpose")

    server, servicer = grpc.server(futures.ThreadPoolExecutor(2)), Servicer()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, trirank.InvalidRequest),
        (grpc.StatusCode.DEADLINE_EXCEEDED, trirank.DeadlineExceeded),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, trirank.Overloaded),
        (grpc.StatusCode.UNAVAILABLE, trirank.Unavailable),
        (grpc.StatusCode.NOT_FOUND, trirank.IncompatibleServer),
        (grpc.StatusCode.UNIMPLEMENTED, trirank.IncompatibleServer),
        (grpc.StatusCode.INTERNAL, trirank.ServerError),
        (grpc.StatusCode.UNKNOWN, trirank.ServerError),
    ],
)
def test_every_status_has_its_error(faulty, status, error):
    servicer, address = faulty
    servicer.status = status
    with RankClient(address) as client, pytest.raises(error, match="on purpose") as caught:
        client.rank(REQUEST)
    assert caught.value.address == address
    assert caught.value.elapsed_s > 0


def test_nobody_listening():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with RankClient(address, deadline_s=2) as client:
        assert not client.ready()
        with pytest.raises(trirank.Unavailable):
            client.rank(REQUEST)


def test_a_server_that_never_answers_costs_the_deadline_and_no_more():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with RankClient(f"127.0.0.1:{silent.getsockname()[1]}", deadline_s=0.2) as client:
            with pytest.raises((trirank.DeadlineExceeded, trirank.Unavailable)) as caught:
                client.rank(REQUEST)
        assert caught.value.elapsed_s < 5


@pytest.mark.parametrize("deadline", [0, -1, float("nan")])
def test_a_deadline_is_positive(deadline):
    with pytest.raises(trirank.InvalidRequest, match="deadline_s"):
        RankClient("127.0.0.1:1", deadline_s=deadline)
    with RankClient("127.0.0.1:1") as client, pytest.raises(trirank.InvalidRequest, match="deadline_s"):
        client.rank(REQUEST, deadline_s=deadline)


def test_all_errors_are_rank_errors():
    for name in trirank.__all__:
        thing = getattr(trirank, name)
        if inspect.isclass(thing) and issubclass(thing, Exception):
            assert issubclass(thing, trirank.RankError)


def test_the_public_face_is_complete():
    public = {name for name in vars(trirank) if not name.startswith("_") and not inspect.ismodule(vars(trirank)[name])}
    assert public - {"annotations"} == set(trirank.__all__) - {"__version__"}
    for name in public & set(trirank.__all__):
        assert inspect.getdoc(getattr(trirank, name)), name


def test_both_clients_are_alike():
    for name in ("__init__", "rank", "rank_many", "ready", "server_info", "close"):
        one, other = (inspect.signature(getattr(kind, name)) for kind in (trirank.RankClient, trirank.AsyncRankClient))
        assert str(one) == str(other), name


def test_a_recorded_request_reads_back():
    request = RankRequest.from_dict({"item_ids": [1], "user_id": -1, "history": {"item_ids": [4]}})
    assert request.user_id is None
    assert request.history.item_ids == [4]
