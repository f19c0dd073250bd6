"""Real servers and a network that breaks: the documented error or a right answer, in time, for both clients."""

from __future__ import annotations

import asyncio
import datetime
import multiprocessing
import shutil
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import trirank
import trustme
from support import bare_server
from trirank import (
    AsyncRankClient,
    EjectionPolicy,
    HedgePolicy,
    RankClient,
    RankRequest,
    RetryPolicy,
    Status,
    Tls,
    _codec,
    contract,
)
from trirank import _core as core
from trirank._channels import make_stub
from trirank_build.errors import ServeError
from trirank_build.repository.configs import config_text
from trirank_build.repository.release import model_config, recorded_requests
from trirank_build.serving.ports import Ports
from trirank_build.serving.server import TritonServer

sys.path.insert(0, str(Path(__file__).parents[1] / "client"))
from proxy import FaultyProxy

SLACK_S = 0.5
"""The machine's; the benchmark has how late answers really are."""
REQUEST = RankRequest(item_ids=[1, 2, 3, 4, 5], top_k=5)
RIGHT = 3
"""Items of its answer: two of the five are variants of others."""


class Sync:
    """Calls through RankClient."""

    def __init__(self, *arguments, **options):
        self.client = RankClient(*arguments, **options)

    def rank(self, *arguments, **options):
        return self.client.rank(*arguments, **options)

    def close(self):
        self.client.close()


class Async:
    """Calls through AsyncRankClient, each from outside its loop."""

    def __init__(self, *arguments, **options):
        self.loop = asyncio.new_event_loop()

        async def make():
            return AsyncRankClient(*arguments, **options)

        self.client = self.loop.run_until_complete(make())

    def rank(self, *arguments, **options):
        return self.loop.run_until_complete(self.client.rank(*arguments, **options))

    def close(self):
        self.loop.run_until_complete(self.client.close())
        self.loop.close()


@pytest.fixture(params=[Sync, Async])
def make(request):
    """Makes clients and closes them."""
    made = []

    def new(*arguments, **options):
        made.append(request.param(*arguments, **options))
        return made[-1]

    yield new
    for client in made:
        client.close()


@pytest.fixture
def proxy(server):
    made = FaultyProxy(server.grpc)
    yield made
    made.stop()


def timed(call, deadline_s):
    """What a call gives or raises; and that it was in time."""
    started = time.monotonic()
    try:
        return call()
    except trirank.RankError as error:
        return error
    finally:
        assert time.monotonic() - started < deadline_s + SLACK_S


def nobody():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_refused(make, server):
    error = timed(lambda: make(nobody(), deadline_s=1).rank(REQUEST), 1)
    assert isinstance(error, trirank.Unavailable)
    assert error.attempts == 3
    client = make([nobody(), server.grpc], deadline_s=1)
    assert [len(timed(lambda: client.rank(REQUEST), 1)) for _ in range(10)] == [RIGHT] * 10


@pytest.mark.parametrize("mode", ["reset", "refuse"])
def test_broken_before_the_call(make, server, proxy, mode):
    proxy.become(mode)
    assert isinstance(timed(lambda: make(proxy.address, deadline_s=1).rank(REQUEST), 1), trirank.Unavailable)
    assert len(timed(lambda: make([proxy.address, server.grpc], deadline_s=1).rank(REQUEST), 1)) == RIGHT


def test_reset_in_flight(make, server, proxy):
    seen, patient = [], RetryPolicy(attempt_timeout_s=2.5)
    hooks = {"retry": [lambda event: seen.append(type(event.error))]}
    client = make([proxy.address, server.grpc], deadline_s=3, balancing="round_robin", retry=patient, event_hooks=hooks)
    for _ in range(4):
        client.rank(REQUEST)
    proxy.become("slow", 1.0)
    reset = threading.Timer(0.15, proxy.become, ["reset"])
    reset.start()
    answers = [timed(lambda: client.rank(REQUEST), 3) for _ in range(4)]
    reset.join()
    assert [len(answer) for answer in answers] == [RIGHT] * 4
    assert trirank.Unavailable in seen


def test_half_open(make, server, proxy):
    client = make(proxy.address, deadline_s=0.4)
    client.rank(REQUEST, deadline_s=5)
    proxy.become("swallow")
    assert isinstance(timed(lambda: client.rank(REQUEST), 0.4), trirank.DeadlineExceeded)
    degraded = timed(lambda: client.rank(REQUEST, on_failure="retrieval_order"), 0.4)
    assert degraded.degraded
    assert degraded.item_ids.tolist() == [1, 2, 3, 4, 5]


def test_slow(make, proxy):
    proxy.become("slow", 1.0)
    assert isinstance(timed(lambda: make(proxy.address, deadline_s=0.4).rank(REQUEST), 0.4), trirank.DeadlineExceeded)
    proxy.become("slow", 0.02)
    assert len(timed(lambda: make(proxy.address, deadline_s=5).rank(REQUEST), 5)) == RIGHT


def test_a_hedge_saves_a_call_that_hangs(make, server, proxy):
    hedge = HedgePolicy(min_delay_s=0.02)
    client = make([proxy.address, server.grpc], deadline_s=2, hedge=hedge, balancing="round_robin", retry=None)
    for _ in range(60):
        client.rank(REQUEST)
    proxy.become("swallow")
    answers = [timed(lambda: client.rank(REQUEST), 2) for _ in range(4)]
    assert [len(answer) for answer in answers] == [RIGHT] * 4
    assert all(endpoint.under_way == 0 for endpoint in client.client._core.pool.endpoints)


def test_a_server_that_failed_is_left_alone_and_comes_back(make, server, proxy):
    ejection = EjectionPolicy(failures=2, pause_s=0.5, slow_start_s=0)
    client = make([proxy.address, server.grpc], deadline_s=2, balancing="round_robin", ejection=ejection)
    for _ in range(4):
        client.rank(REQUEST)
    proxy.become("refuse")
    for _ in range(10):
        assert len(client.rank(REQUEST)) == RIGHT
    (ejected,) = [each for each in client.client._core.pool.endpoints if each.left_alone_until]
    assert ejected.address == proxy.address
    proxy.become("pass")
    time.sleep(1.2)
    for _ in range(20):
        client.rank(REQUEST)
    before = ejected.failures
    assert before == 0


def test_restarted_in_the_middle(world, server):
    first = TritonServer(world.release)
    first.wait_ready()
    port = int(first.grpc.rpartition(":")[2])
    alone = [kind(first.grpc, deadline_s=0.5) for kind in (Sync, Async)]
    both = [kind([first.grpc, server.grpc], deadline_s=2, balancing="round_robin") for kind in (Sync, Async)]
    for client in (*alone, *both, *both):
        client.rank(REQUEST, deadline_s=5)
    first.stop()
    for _ in range(5):
        for client in alone:
            error = timed(lambda client=client: client.rank(REQUEST), 0.5)
            assert isinstance(error, trirank.Unavailable | trirank.DeadlineExceeded)
        for client in both:
            assert len(timed(lambda client=client: client.rank(REQUEST), 2)) == RIGHT
    with TritonServer(world.release, ports=Ports(grpc=port)) as again:
        again.wait_ready()
        deadline = time.monotonic() + 5
        for client in alone:
            while isinstance(
                answer := timed(lambda client=client: client.rank(REQUEST, deadline_s=2), 2), trirank.RankError
            ):
                assert time.monotonic() < deadline, answer
            assert len(answer) == RIGHT
    for client in (*alone, *both):
        client.close()


def test_overload(world):
    """Far more than can be done in time: every call ends in time, with an answer or one of two errors. On a server of
    its own: where deadlines pass as Triton 2.51 answers it may abort (docs/serving.md), and took a hundred other tests
    along once."""
    with TritonServer(world.release) as server:
        server.wait_ready()
        with RankClient(server.grpc, deadline_s=0.03, retry=None) as client:
            wide = RankRequest(item_ids=list(range(1, 1001)), top_k=10)
            client.rank(wide, deadline_s=5)
            with ThreadPoolExecutor(64) as pool:
                found = list(pool.map(lambda _: timed(lambda: client.rank(wide), 0.03), range(100)))
            after = timed(lambda: client.rank(REQUEST, deadline_s=5), 5)
        said = server.log.read_text(errors="replace")
    if "ASSERTION FAILED: prior > 0" in said or "Signal (11) received" in said:
        pytest.skip("Triton aborted where a deadline passed as it answered: triton-inference-server/server #7368")
    errors = [each for each in found if isinstance(each, trirank.RankError)]
    assert errors
    assert {type(each) for each in errors} <= {trirank.DeadlineExceeded, trirank.Overloaded}
    assert len(after) == RIGHT


def test_what_is_too_late_is_not_worked_on(server):
    """Callers that have gone cost the ranker little: stages refuse what has passed its deadline."""

    def done():
        return int(server.statistics()["ranker"].get("inference_stats", {}).get("success", {}).get("count", 0))

    # Moments without deadlines of gRPC's: Triton 2.51 may abort where it cancels what is answered (docs/serving.md).
    message, _ = _codec.encode(RankRequest(item_ids=list(range(1, 1001)), top_k=10), contract.ENSEMBLE)
    with RankClient(server.grpc, deadline_s=10) as client:
        client.rank(REQUEST)
    before = done()
    assert before > 0
    with grpc.insecure_channel(server.grpc) as channel, ThreadPoolExecutor(64) as pool:
        stub = make_stub(channel)

        def refused(_):
            now = time.time()
            try:
                stub.ModelInfer(_codec.with_deadline(message, int((now + 0.02) * 1e6), int(now * 1e6)), timeout=20)
            except grpc.RpcError as error:
                return error.details()
            return ""

        found = [words for words in pool.map(refused, range(300)) if words]
    assert found
    said = (contract.TOO_LATE, contract.OVERLOADED, contract.WAITED)
    assert all(any(words in each for words in said) for each in found), set(found)
    assert done() - before < 300


def test_a_clock_that_is_behind(make, server, monkeypatch):
    """A moment that has passed by the server's clock, with time left by ours: the clocks differ."""
    behind = SimpleNamespace(time=lambda: time.time() - 3600, monotonic=time.monotonic)
    monkeypatch.setattr(core, "time", behind)
    client = make(server.grpc, deadline_s=2)
    assert len(client.rank(REQUEST)) == RIGHT
    (endpoint,) = client.client._core.pool.endpoints
    assert not client.client._core.pool.clock_agrees(endpoint)
    assert len(client.rank(REQUEST)) == RIGHT


def test_a_cancelled_task_frees_its_place(server, proxy):
    async def run():
        async with AsyncRankClient(proxy.address, deadline_s=30) as client:
            await client.rank(REQUEST)
            proxy.become("slow", 5.0)
            tasks = [asyncio.ensure_future(client.rank(REQUEST)) for _ in range(8)]
            await asyncio.sleep(0.2)
            (endpoint,) = client._core.pool.endpoints
            assert endpoint.under_way == 8
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(each, asyncio.CancelledError) for each in ended)
            assert endpoint.under_way == 0

    asyncio.run(run())


def test_another_contract_is_told_once(make, world, tmp_path):
    release = shutil.copytree(world.release, tmp_path / "release")
    config = model_config(release, "rank")
    config.parameters["contract"].string_value = "99"
    (release / "models" / "rank" / "config.pbtxt").write_text(config_text(config))
    with TritonServer(release) as other:
        with pytest.raises(ServeError, match="is of contract 99"):
            other.wait_ready()
        deadline = time.monotonic() + 60
        with RankClient(other.grpc) as probe:
            while not probe.ready():
                assert time.monotonic() < deadline
        error = timed(lambda: make(other.grpc, deadline_s=5).rank(REQUEST), 5)
        assert isinstance(error, trirank.IncompatibleServer)
        assert f"is of contract 99, this client speaks {contract.CONTRACT_VERSION}; install" in str(error)


def test_many_in_order(server, world):
    requests = recorded_requests(world.release)
    with RankClient(server.grpc, deadline_s=10) as client:
        one_by_one = [client.rank(request).item_ids.tolist() for request in requests]
        assert [a.item_ids.tolist() for a in client.rank_many(requests, concurrency=8)] == one_by_one
        bad = [requests[0], RankRequest(item_ids=[1], top_k=0), requests[1]]
        found = client.rank_many(bad, return_errors=True)
        assert [type(each).__name__ for each in found] == ["RankResponse", "InvalidRequest", "RankResponse"]
        with pytest.raises(trirank.InvalidRequest):
            client.rank_many(bad)
        assert client.server_info()["address"] == server.grpc

    async def run():
        async with AsyncRankClient(server.grpc, deadline_s=10) as client:
            assert await client.ready()
            assert (await client.server_info())["name"] == "triton"
            found = await client.rank_many(requests, concurrency=8)
            mixed = await client.rank_many(bad, return_errors=True)
            return [a.item_ids.tolist() for a in found], [type(each).__name__ for each in mixed]

    assert asyncio.run(run()) == (one_by_one, ["RankResponse", "InvalidRequest", "RankResponse"])


def child(client, answers):
    try:
        client.rank(REQUEST)
    except trirank.RankError as error:
        answers.put((type(error).__name__, str(error)))


def test_a_forked_process_is_told(server):
    with RankClient(server.grpc, deadline_s=5) as client:
        client.rank(REQUEST)
        context = multiprocessing.get_context("fork")
        answers = context.Queue()
        process = context.Process(target=child, args=(client, answers))
        process.start()
        name, words = answers.get(timeout=20)
        process.join(20)
        assert name == "ClientClosed"
        assert "make a client in each process" in words
        assert len(client.rank(REQUEST)) == RIGHT


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def encrypted(world, authority, tmp_path_factory):
    """Triton with mutual TLS."""
    folder = tmp_path_factory.mktemp("tls")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    own = authority.issue_cert("localhost", "127.0.0.1")
    own.private_key_pem.write_to_path(folder / "server.key")
    own.cert_chain_pems[0].write_to_path(folder / "server.pem")
    # A copy: Python leaves compiled files beside what a bare server imports.
    release = shutil.copytree(world.release, folder / "release")
    with bare_server(
        release / "models", folder, "--model-control-mode=none", "--grpc-use-ssl=true",
        "--grpc-use-ssl-mutual=true", f"--grpc-server-cert={folder / 'server.pem'}",
        f"--grpc-server-key={folder / 'server.key'}", f"--grpc-root-cert={folder / 'ca.pem'}",
    ) as address:  # fmt: skip
        yield address, folder


def identity(authority, folder, name, **options):
    cert = authority.issue_cert("client", **options)
    cert.private_key_pem.write_to_path(folder / f"{name}.key")
    cert.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    return folder / f"{name}.pem", folder / f"{name}.key"


def test_mutual_tls(make, encrypted, authority, tmp_path):
    address, folder = encrypted
    cert, key = identity(authority, tmp_path, "client")
    client = make(address, deadline_s=20, tls=Tls(folder / "ca.pem", cert, key), token=lambda: "secret")
    assert len(client.rank(REQUEST)) == RIGHT


@pytest.mark.parametrize(
    "fault", ["no encryption", "no identity", "an unknown authority", "an expired identity", "another name"]
)
def test_certificates_that_do_not_fit(make, encrypted, authority, tmp_path, fault):
    address, folder = encrypted
    stranger = trustme.CA()
    stranger.cert_pem.write_to_path(tmp_path / "stranger.pem")
    past = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=2)
    cert, key = identity(authority, tmp_path, "good")
    old = identity(authority, tmp_path, "old", not_after=past)
    tls = {
        "no encryption": None,
        "no identity": Tls(folder / "ca.pem"),
        "an unknown authority": Tls(tmp_path / "stranger.pem", cert, key),
        "an expired identity": Tls(folder / "ca.pem", *old),
        "another name": Tls(folder / "ca.pem", cert, key, server_name="elsewhere"),
    }[fault]
    error = timed(lambda: make(address, deadline_s=1, tls=tls).rank(REQUEST), 1)
    assert isinstance(error, trirank.Unavailable | trirank.DeadlineExceeded)


def test_an_expired_server(world, authority, tmp_path):
    past = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=2)
    own = authority.issue_cert("127.0.0.1", not_after=past)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    own.private_key_pem.write_to_path(tmp_path / "server.key")
    own.cert_chain_pems[0].write_to_path(tmp_path / "server.pem")
    release = shutil.copytree(world.release, tmp_path / "release")
    with bare_server(
        release / "models", tmp_path, "--grpc-use-ssl=true", f"--grpc-server-cert={tmp_path / 'server.pem'}",
        f"--grpc-server-key={tmp_path / 'server.key'}",
    ) as address:  # fmt: skip
        with RankClient(address, deadline_s=1, tls=Tls(tmp_path / "ca.pem")) as client:
            error = timed(lambda: client.rank(REQUEST), 1)
        assert isinstance(error, trirank.Unavailable | trirank.DeadlineExceeded)


def test_certificates_are_read_again(make, encrypted, authority, tmp_path):
    address, folder = encrypted
    past = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=2)
    cert, key = identity(authority, tmp_path, "client", not_after=past)
    client = make(address, deadline_s=1, tls=Tls(folder / "ca.pem", cert, key))
    assert isinstance(timed(lambda: client.rank(REQUEST), 1), trirank.RankError)
    key.write_bytes(b"half a key")  # being written: nothing changes yet
    time.sleep(1.1)
    assert isinstance(timed(lambda: client.rank(REQUEST), 1), trirank.RankError)
    identity(authority, tmp_path, "client")
    time.sleep(1.1)
    assert len(client.rank(REQUEST, deadline_s=10)) == RIGHT


def test_retries_stay_within_their_budget(make, proxy):
    proxy.become("refuse")
    client = make(proxy.address, deadline_s=1, retry=RetryPolicy(max_attempts=5, backoff_s=0.0))
    attempts = sum(timed(lambda: client.rank(REQUEST), 1).attempts for _ in range(100))
    assert attempts <= 100 + 100 * 0.1 + 10


def test_a_name_with_several_addresses(make, server, monkeypatch):
    """As behind a headless service: the name's addresses change, and the client goes with them."""
    from trirank import _channels as channels

    port = int(server.grpc.rpartition(":")[2])
    there = ["127.0.0.1"]
    monkeypatch.setattr(
        channels.socket, "getaddrinfo", lambda host, port, type: [(2, 1, 6, "", (each, port)) for each in there]
    )
    client = make(f"dns:///trirank.test:{port}", deadline_s=5, resolve_every_s=0.2)
    assert len(client.rank(REQUEST)) == RIGHT
    there[:] = ["127.0.0.1", "127.0.0.2"]
    deadline = time.monotonic() + 10
    while len(client.client._core.pool) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        client.rank(REQUEST)
    there[:] = ["127.0.0.1"]
    while len(client.client._core.pool) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        client.rank(REQUEST)
    assert client.rank(REQUEST).status & Status.DEGRADED == 0
