"""What the client does with answers and failures, against a server whose every word is given. Networks that break are
in tests/e2e/test_client_faults.py."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from concurrent import futures
from contextlib import nullcontext

import grpc
import numpy as np
import pytest
import trirank
from pandas import Series
from trirank import (
    EjectionPolicy,
    HedgePolicy,
    InvalidRequest,
    RankClient,
    RankRequest,
    RankResponse,
    RetryPolicy,
    Status,
    Tls,
    contract,
    packing,
)
from trirank._codec import candidate_ids, check_kinds, own_ids
from trirank._core import retrieval_order
from trirank.observability import log_hooks, merged, opentelemetry_hooks, prometheus_hooks
from tritonclient.grpc import service_pb2, service_pb2_grpc

REQUEST = RankRequest(item_ids=[5, 6, 7], user_id=42, top_k=2)


def answer(scores=(2, 1)):
    reply = service_pb2.ModelInferResponse(model_name="rank")
    values = {
        "RANKED_IDS": np.array([7, 5], np.int64), "SCORES": np.array(scores, np.float32),
        "REASONS": np.zeros(2, np.int32), "STATUS": np.zeros(4, np.int32),
    }  # fmt: skip
    places = packing.places(contract.RESPONSE)
    raw = packing.pack({places[name]: array.tobytes() for name, array in values.items()})
    reply.outputs.add(name="PACKED_RESPONSE", datatype="UINT8", shape=[1, len(raw)])
    reply.raw_output_contents.append(raw)
    return reply


class FailLate(float):
    """A pause, and then a failure."""


class Scripted(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Does what its script says, call by call: a status, a pause in seconds, NaN for a bad answer, or (at its end)
    answers."""

    def __init__(self):
        self.script = []
        self.seen = []
        self.pushback = None
        self.ahead, self.after_s = "", 0.0

    def ModelInfer(self, request, context):
        self.seen.append((request, dict(context.invocation_metadata())))
        if self.ahead and contract.DEADLINE_PARAMETER in request.parameters:
            time.sleep(self.after_s)
            context.abort(grpc.StatusCode.UNAVAILABLE, f"rank did not work on it: {self.ahead}")
        step = self.script.pop(0) if self.script else None
        if isinstance(step, grpc.StatusCode):
            if self.pushback is not None:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", self.pushback),))
            context.abort(step, "on purpose")
        if isinstance(step, FailLate):
            time.sleep(step)
            context.abort(grpc.StatusCode.INTERNAL, "on purpose, and late")
        if step is not None and np.isnan(step):
            return answer(scores=(2, np.nan))
        if step is not None:
            time.sleep(step)
        return answer()


@pytest.fixture
def servers():
    started = []

    def start():
        server, servicer = grpc.server(futures.ThreadPoolExecutor(8)), Scripted()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
        servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        started.append(server)
        return servicer

    yield start
    for server in started:
        server.stop(None)


@pytest.fixture
def server(servers):
    return servers()


def test_an_answer_in_every_form(server):
    with RankClient(server.address) as client:
        found = client.rank(REQUEST)
    assert [item.item_id for item in found] == [7, 5]
    assert found.to_arrays()["score"].tolist() == [2, 1]
    assert found.to_polars()["item_id"].to_list() == [7, 5]
    assert found.to_pandas().columns.tolist() == ["item_id", "score", "reasons"]
    assert not found.degraded


def test_names_come_back_in_columns():
    ids = {contract.stable_id(name): name for name in "ab"}
    sent = np.array(list(ids), np.int64)[::-1]
    found = RankResponse(own_ids(sent, ids), np.zeros(2, np.float32), np.zeros(2, np.int32), Status(0))
    assert found.item_ids.tolist() == ["b", "a"]
    assert found.to_arrays()["item_id"].tolist() == ["b", "a"]
    assert [item.item_id for item in found] == ["b", "a"]
    assert json.dumps(found.to_dicts())


@pytest.mark.parametrize(
    ("request_", "kinds", "words"),
    [
        (
            RankRequest(item_ids=["A-1"]),
            {"item": "numbers"},
            "item 'A-1' is text, and the catalogue's",
        ),
        (
            RankRequest(item_ids=[1, 2]),
            {"item": "strings"},
            "item 1 is a number, and the catalogue's",
        ),
        (RankRequest(item_ids=[1], user_id="ann"), {"item": "numbers", "user": "numbers"}, "user 'ann' is text"),
        (RankRequest(item_ids=["a"], user_id=7), {"item": "strings", "user": "strings"}, "user 7 is a number"),
        (RankRequest(item_ids=["a"], user_id="ann"), {"item": "strings", "user": "strings"}, None),
        (RankRequest(item_ids=["a"], user_id=7), {"item": "strings", "user": "numbers"}, None),
        (RankRequest(item_ids=[1]), {"item": "numbers", "user": "strings"}, None),
        (RankRequest(item_ids=[contract.stable_id("a")]), {"item": "strings", "user": "strings"}, None),
        (RankRequest(item_ids=["a"], user_id="ann"), {}, None),
        (RankRequest(item_ids=Series(["a", "b"], index=[5, 6])), {"item": "strings", "user": "numbers"}, None),
        (RankRequest(item_ids=Series([1, 2], index=[5, 6])), {"item": "numbers", "user": "strings"}, None),
        (RankRequest(item_ids=Series([1, 2], index=[5, 6])), {"item": "strings"}, "item 1 is a number"),
    ],
)
def test_ids_are_of_the_catalogue_s_kind(request_, kinds, words):
    names = candidate_ids(request_)[1]
    with pytest.raises(InvalidRequest, match=words) if words else nullcontext():
        check_kinds(request_, names, kinds)


def test_the_deadline_travels(server):
    with RankClient(server.address, deadline_s=5) as client:
        before = time.time()
        client.rank(REQUEST, deadline_s=0.5)
    parameters = server.seen[0][0].parameters
    assert "timeout" not in parameters  # a queue that heard it would let requests sleep: docs/performance.md
    assert abs(parameters[contract.DEADLINE_PARAMETER].int64_param / 1e6 - before - 0.5) < 0.2
    assert abs(parameters[contract.SENT_PARAMETER].int64_param / 1e6 - before) < 0.2


@pytest.mark.parametrize(
    ("status", "attempts"),
    [
        (grpc.StatusCode.UNAVAILABLE, 3),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 3),
        (grpc.StatusCode.INVALID_ARGUMENT, 1),
        (grpc.StatusCode.INTERNAL, 1),
        (grpc.StatusCode.NOT_FOUND, 1),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 1),
    ],
)
def test_only_what_may_help_is_tried_again(server, status, attempts):
    server.script = [status] * 10
    with RankClient(server.address) as client, pytest.raises(trirank.RankError) as caught:
        client.rank(REQUEST)
    assert caught.value.attempts == len(server.seen) == attempts
    assert caught.value.status is status
    assert caught.value.address == server.address


@pytest.mark.parametrize("status", [grpc.StatusCode.INTERNAL, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE])
def test_another_server_is_tried(servers, status):
    one, other = servers(), servers()
    one.script = [status] * 50
    with RankClient([one.address, other.address], balancing="round_robin") as client:
        for _ in range(6):
            assert len(client.rank(REQUEST)) == 2


@pytest.mark.parametrize(("pushback", "attempts"), [("-1", 1), ("nonsense", 1), ("30", 3), ("60000", 1)])
def test_a_server_that_names_a_pause_is_heard(server, pushback, attempts):
    server.script, server.pushback = [grpc.StatusCode.UNAVAILABLE] * 10, pushback
    started = time.monotonic()
    with RankClient(server.address) as client, pytest.raises(trirank.Unavailable):
        client.rank(REQUEST)
    assert len(server.seen) == attempts
    if attempts == 3:
        assert time.monotonic() - started > 0.06


def test_no_retries_when_told_so(server):
    server.script = [grpc.StatusCode.UNAVAILABLE]
    with RankClient(server.address, retry=None) as client, pytest.raises(trirank.Unavailable):
        client.rank(REQUEST)
    assert len(server.seen) == 1


def test_extra_load_is_bounded(server):
    server.script = [grpc.StatusCode.UNAVAILABLE] * 10_000
    with RankClient(server.address, retry=RetryPolicy(max_attempts=10, backoff_s=0)) as client:
        for _ in range(200):
            with pytest.raises(trirank.Unavailable):
                client.rank(REQUEST)
    assert len(server.seen) <= 200 * 1.1 + 10


def test_a_slow_call_is_hedged_and_the_loser_cancelled(servers):
    one, other = servers(), servers()
    hedge = HedgePolicy(min_delay_s=0.02, budget=1.0)
    events = []
    hooks = {"hedge": [lambda event: events.append(event.address)]}
    with RankClient([one.address, other.address], deadline_s=5, hedge=hedge, event_hooks=hooks) as client:
        for _ in range(60):
            client.rank(REQUEST)
        events.clear()
        one.script = [1.0] * 3
        started = time.monotonic()
        for _ in range(10):
            assert len(client.rank(REQUEST)) == 2
        assert time.monotonic() - started < 1.0
        assert events
        assert all(endpoint.under_way == 0 for endpoint in client._core.pool.endpoints)


def test_hedges_stay_within_their_budget(servers):
    one, other = servers(), servers()
    hedges = []
    one.script = [0, 0, 0, 0.02] * 100  # far more late ones than the budget pays for
    hedge, hooks = HedgePolicy(quantile=0.5, min_delay_s=0), {"hedge": [hedges.append]}
    addresses, nobody = [one.address, other.address], EjectionPolicy(failures=10**6)  # however busy this machine is
    with RankClient(addresses, deadline_s=5, hedge=hedge, ejection=nobody, event_hooks=hooks) as client:
        for _ in range(400):
            client.rank(REQUEST)
    assert 0 < len(hedges) <= 400 * 0.05


def test_retrievals_order_instead_of_an_error(server):
    server.script = [grpc.StatusCode.UNAVAILABLE] * 3
    request = RankRequest(item_ids=[5, 6, 5, 7], retrieval_scores=[0.1, 0.9, 0.8, 0.5], top_k=3)
    with RankClient(server.address, on_failure="retrieval_order") as client:
        found = client.rank(request)
        assert found.degraded
        assert found.item_ids.tolist() == [6, 5, 7]
        assert found.duplicates == 1
        server.script = [grpc.StatusCode.UNAVAILABLE] * 3
        with pytest.raises(trirank.Unavailable):
            client.rank(request, on_failure="raise")
        with pytest.raises(trirank.InvalidRequest):
            client.rank(RankRequest(item_ids=[1], top_k=0))
        server.script = [grpc.StatusCode.INVALID_ARGUMENT]
        with pytest.raises(trirank.InvalidRequest):
            client.rank(request)


def test_retrievals_order_without_scores_is_the_order_sent():
    request = RankRequest(item_ids=["b", "a", "b", "c"], top_k=2)
    found = retrieval_order(request, *candidate_ids(request))
    assert [item.item_id for item in found] == ["b", "a"]
    assert found.scores[0] > found.scores[1]


def test_a_closed_client_says_so(server):
    client = RankClient(server.address)
    client.close()
    client.close()
    with pytest.raises(trirank.ClientClosed, match="closed"):
        client.rank(REQUEST)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"addresses": []}, "no address"),
        ({"addresses": "localhost"}, "write host:port"),
        ({"addresses": "localhost:99999"}, "write host:port"),
        ({"addresses": "10.1.2.3:8001", "token": "secret"}, "would go out unencrypted"),
        ({"balancing": "luck"}, "least_loaded or round_robin"),
        ({"on_failure": "panic"}, "raise or retrieval_order"),
        ({"event_hooks": {"after": []}}, "event_hooks has after"),
        ({"tls": Tls("nowhere.pem")}, "nowhere.pem cannot be read"),
    ],
)
def test_arguments_that_cannot_be(options, words):
    with pytest.raises(trirank.InvalidRequest, match=words):
        RankClient(**{"addresses": "127.0.0.1:1", **options})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Tls(cert_file="a.pem"), lambda: RetryPolicy(max_attempts=0), lambda: RetryPolicy(budget=2),
        lambda: HedgePolicy(quantile=1.0), lambda: HedgePolicy(budget=-1),
    ],
)  # fmt: skip
def test_policies_that_cannot_be(make):
    with pytest.raises(trirank.InvalidRequest):
        make()


def test_a_certificate_cut_short(tmp_path):
    (tmp_path / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\nMIIB")
    with pytest.raises(trirank.InvalidRequest, match=r"ca\.pem is no whole PEM file"):
        RankClient("127.0.0.1:1", tls=Tls(tmp_path / "ca.pem"))


def test_a_name_without_an_address():
    with pytest.raises(trirank.Unavailable, match="no-such-host.invalid has no address"):
        RankClient("dns:///no-such-host.invalid:8001")


def test_metadata_and_tokens_go_along(server):
    tokens = iter(["one", "two"])
    with RankClient(server.address, metadata={"X-Shop": "north"}, token=lambda: next(tokens)) as client:
        client.rank(REQUEST)
        client.rank(REQUEST)
    sent = [metadata for _, metadata in server.seen]
    assert [each["authorization"] for each in sent] == ["Bearer one", "Bearer two"]
    assert {each["x-shop"] for each in sent} == {"north"}


def test_hooks_are_told_in_order_and_may_fail(server, caplog):
    server.script = [grpc.StatusCode.UNAVAILABLE]
    told = []

    def broken(event):
        raise RuntimeError("a hook's own fault")

    names = ("request", "attempt", "retry", "response", "error", "fallback", "hedge")
    hooks = {name: [broken, lambda event: told.append((event.name, event.attempts))] for name in names}
    with RankClient(server.address, event_hooks=hooks) as client:
        assert len(client.rank(REQUEST)) == 2
    assert told == [("request", 0), ("attempt", 1), ("retry", 1), ("attempt", 2), ("response", 2)]
    assert "a hook of 'retry' raised" in caplog.text


def test_metrics(server):
    import prometheus_client

    registry = prometheus_client.CollectorRegistry()
    server.script = [grpc.StatusCode.UNAVAILABLE]
    with RankClient(server.address, event_hooks=prometheus_hooks(registry)) as client:
        client.rank(REQUEST)
        server.script = [grpc.StatusCode.INTERNAL]
        with pytest.raises(trirank.ServerError):
            client.rank(REQUEST)
    value = registry.get_sample_value
    assert value("trirank_client_requests_total", {"outcome": "ok"}) == 1
    assert value("trirank_client_requests_total", {"outcome": "ServerError"}) == 1
    assert value("trirank_client_retries_total") == 1
    assert value("trirank_client_request_seconds_count") == 2


def test_logs_leave_users_out(server, caplog):
    with caplog.at_level(logging.DEBUG, "trirank"):
        with RankClient(server.address, event_hooks=log_hooks()) as client:
            client.rank(REQUEST)
        assert "event=response" in caplog.text
        assert "42" not in caplog.text.replace(server.address, "").split("candidates")[1]
        assert "user_id" not in caplog.text
        with RankClient(server.address, event_hooks=log_hooks(users=True)) as client:
            client.rank(REQUEST)
        assert "user_id=42" in caplog.text
        assert caplog.records[-1].trirank["candidates"] == 3


def test_traces_join_the_servers(server):
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    hooks = merged(opentelemetry_hooks(provider.get_tracer("test")), log_hooks())
    with RankClient(server.address, event_hooks=hooks) as client:
        client.rank(REQUEST)
    (span,) = exporter.get_finished_spans()
    assert span.attributes["server.address"] == server.address
    assert [event.name for event in span.events] == ["attempt"]
    sent = server.seen[0][1]["traceparent"]
    assert sent.split("-")[1] == f"{span.context.trace_id:032x}"
    assert sent.split("-")[2] == f"{span.context.span_id:016x}"


def test_nothing_optional_is_imported():
    code = (
        "import sys, trirank, trirank.observability\n"
        "names = ['opentelemetry', 'prometheus_client', 'polars', 'pandas', 'torch', 'onnx', 'typer', 'rich']\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- servers that are not what they were, callers that leave, networks that are silent ----------------------------


class Handshaking(Scripted):
    """Tells its configuration, after a pause; ``contract`` is what it says of itself."""

    def __init__(self):
        super().__init__()
        self.pause, self.contract, self.asked = 0.0, str(contract.CONTRACT_VERSION), 0

    def ModelConfig(self, request, context):
        self.asked += 1
        time.sleep(self.pause)
        reply = service_pb2.ModelConfigResponse()
        reply.config.parameters["contract"].string_value = self.contract
        return reply


@pytest.fixture
def tellers(monkeypatch, servers):
    monkeypatch.setitem(globals(), "Scripted", Handshaking)
    return servers


def test_a_first_call_keeps_its_deadline(tellers):
    """The handshake's time comes off the deadline, where it used to be given on top."""
    server = tellers()
    server.pause, server.script = 0.25, [1.0]
    with RankClient(server.address, retry=None) as client:
        started = time.monotonic()
        with pytest.raises(trirank.DeadlineExceeded):
            client.rank(REQUEST, deadline_s=0.4)
        assert time.monotonic() - started < 0.6


def test_a_handshake_is_no_answer(tellers):
    """Its time says nothing of how long calls take, which hedges wait for."""
    one, other = tellers(), tellers()
    one.pause = other.pause = 0.15
    with RankClient([one.address, other.address], hedge=HedgePolicy(), deadline_s=5) as client:
        client.rank(REQUEST)
        assert max(client._core.times._times) < 0.14


def test_a_handshake_is_no_wait_in_a_queue(tellers):
    """A server that took it for one would refuse the call, and its clock would be thought to differ."""
    server = tellers()
    server.pause = 0.3
    before = time.time()
    with RankClient(server.address) as client:
        client.rank(REQUEST, deadline_s=5)
    assert server.seen[0][0].parameters[contract.SENT_PARAMETER].int64_param / 1e6 > before + 0.29


def test_an_incompatible_server_is_left_alone_and_others_answer(tellers):
    old, new = tellers(), tellers()
    old.contract = "99"
    with RankClient([old.address, new.address], balancing="round_robin") as client:
        for _ in range(20):
            assert len(client.rank(REQUEST)) == 2
        assert old.asked <= 3
        assert not old.seen


def test_an_incompatible_server_alone_is_told(tellers):
    server = tellers()
    server.contract = "99"
    with RankClient(server.address) as client, pytest.raises(trirank.IncompatibleServer, match="is of contract 99"):
        client.rank(REQUEST)


def test_the_contract_is_asked_again_after_a_server_was_away(tellers):
    """What comes back on an address may be another version."""
    server = tellers()
    with RankClient(server.address, retry=None) as client:
        client.rank(REQUEST)
        client.rank(REQUEST)
        assert server.asked == 1
        server.script = [grpc.StatusCode.UNAVAILABLE]
        with pytest.raises(trirank.Unavailable):
            client.rank(REQUEST)
        server.contract = "99"
        with pytest.raises(trirank.IncompatibleServer):
            client.rank(REQUEST)


def test_a_loser_counts_as_at_least_as_slow_as_it_was(servers):
    one, other = servers(), servers()
    hedge, turns = HedgePolicy(min_delay_s=0.02, budget=1.0), "round_robin"
    with RankClient([one.address, other.address], deadline_s=5, hedge=hedge, balancing=turns) as client:
        for _ in range(60):
            client.rank(REQUEST)
        one.script = [0.5] * 3
        for _ in range(10):
            client.rank(REQUEST)
        # The stopped server's calls were cancelled soon; their times are there, and not only the winners'.
        assert sum(seconds >= 0.02 for seconds in client._core.times._times) >= 2


def test_a_callers_short_deadline_says_nothing_of_a_server(servers):
    one, other = servers(), servers()
    with RankClient([one.address, other.address], retry=None) as client:
        for _ in range(20):
            client.rank(REQUEST)
        one.script, other.script = [0.02] * 30, [0.02] * 30
        for _ in range(12):
            with pytest.raises(trirank.DeadlineExceeded):
                client.rank(REQUEST, deadline_s=0.005)
        assert all(e.left_alone_until == 0 for e in client._core.pool.endpoints)


def test_a_silent_server_does_not_eat_the_whole_budget(servers):
    silent, healthy = servers(), servers()
    with RankClient([silent.address, healthy.address], deadline_s=2.0) as client:
        for _ in range(40):
            client.rank(REQUEST)
        silent.script = [1.5] * 20
        for _ in range(12):
            started = time.monotonic()
            assert len(client.rank(REQUEST)) == 2
            assert time.monotonic() - started < 1.0


def test_an_attempt_may_be_given_a_time_of_its_own(servers):
    silent, healthy = servers(), servers()
    silent.script = [1.0] * 50
    retry = RetryPolicy(attempt_timeout_s=0.1)
    with RankClient([silent.address, healthy.address], deadline_s=2.0, retry=retry) as client:
        for _ in range(6):
            started = time.monotonic()
            assert len(client.rank(REQUEST)) == 2
            assert time.monotonic() - started < 0.9
    with pytest.raises(trirank.InvalidRequest, match="attempt_timeout_s"):
        RetryPolicy(attempt_timeout_s=0)


@pytest.mark.parametrize("words", [contract.TOO_LATE, contract.WAITED])
def test_clocks_that_differ_cost_no_call_however_many_are_under_way(servers, words):
    """Both servers refuse whatever has a moment with it, as clocks ahead of ours would have them do."""
    one, other = servers(), servers()
    one.ahead = other.ahead = words
    with RankClient([one.address, other.address], deadline_s=5) as client:
        with futures.ThreadPoolExecutor(8) as pool:
            assert [len(each) for each in pool.map(client.rank, [REQUEST] * 24)] == [2] * 24


def test_who_did_wait_long_was_turned_away(server):
    server.ahead, server.after_s = contract.WAITED, 0.4
    with RankClient(server.address, retry=None) as client:
        with pytest.raises(trirank.Overloaded, match=contract.WAITED):
            client.rank(REQUEST, deadline_s=1)
        assert client._core.pool.clock_agrees(client._core.pool.endpoints[0])


def test_a_limit_of_an_attempt_ends_no_call_before_its_deadline(servers):
    """Both servers stand still for a moment with more calls under way than there are retries: all are answered."""
    one, other = servers(), servers()
    with RankClient([one.address, other.address], deadline_s=5) as client:
        for _ in range(40):
            client.rank(REQUEST)
        one.script, other.script = [0.3] * 40, [0.3] * 40
        with futures.ThreadPoolExecutor(16) as pool:
            assert [len(each) for each in pool.map(client.rank, [REQUEST] * 32)] == [2] * 32
        assert all(endpoint.under_way == 0 for endpoint in client._core.pool.endpoints)
        assert client._core.retries._reserved == 0


def test_a_first_call_that_fails_while_its_hedge_answers_is_counted(servers):
    one, other = servers(), servers()
    hedge, patient = HedgePolicy(quantile=0.01, min_delay_s=0.02, budget=1.0), RetryPolicy(attempt_timeout_s=4)
    addresses, turns = [one.address, other.address], "round_robin"
    with RankClient(addresses, deadline_s=5, hedge=hedge, retry=patient, balancing=turns) as client:
        for _ in range(60):
            client.rank(REQUEST)
        for _ in range(6):
            one.script, other.script = [FailLate(0.1)], [0.2]
            assert len(client.rank(REQUEST)) == 2
        assert all(endpoint.under_way == 0 for endpoint in client._core.pool.endpoints)
        failing = next(e for e in client._core.pool.endpoints if e.address == one.address)
        assert failing.failures or failing.ejections


def test_a_bad_answer_is_asked_for_elsewhere(servers):
    broken, healthy = servers(), servers()
    broken.script = [np.nan] * 50
    with RankClient([broken.address, healthy.address], balancing="round_robin") as client:
        for _ in range(8):
            assert np.isfinite(client.rank(REQUEST).scores).all()
    with RankClient(broken.address) as client, pytest.raises(trirank.ServerError, match="is nan"):
        client.rank(REQUEST)


def test_whatever_grpc_will_not_take_falls_back(server):
    import asyncio

    async def one(**options):
        async with trirank.AsyncRankClient(server.address, **options) as client:
            return await client.rank(REQUEST, on_failure="retrieval_order")

    assert asyncio.run(one(metadata={"x-shop": "north\nsouth"})).degraded
    assert not asyncio.run(one(token="secret\n")).degraded  # as a file has it


def test_a_cancelled_call_ends_its_span_and_its_metric(server):
    import asyncio

    import prometheus_client
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider, registry = InMemorySpanExporter(), TracerProvider(), prometheus_client.CollectorRegistry()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    hooks = merged(opentelemetry_hooks(provider.get_tracer("test")), prometheus_hooks(registry), log_hooks())
    server.script = [2.0]

    async def cancelled():
        async with trirank.AsyncRankClient(server.address, deadline_s=5, event_hooks=hooks) as client:
            task = asyncio.ensure_future(client.rank(REQUEST))
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert all(e.under_way == 0 for e in client._core.pool.endpoints)

    asyncio.run(cancelled())
    (span,) = exporter.get_finished_spans()
    assert span.attributes["trirank.cancelled"]
    assert registry.get_sample_value("trirank_client_requests_total", {"outcome": "cancelled"}) == 1


def test_a_token_that_cannot_be_had_is_a_failure_like_others(server):
    def broken():
        raise OSError("the vault is sealed")

    with RankClient(server.address, token=broken) as client:
        with pytest.raises(trirank.Unavailable, match=r"the token could not be had \(OSError: the vault is sealed\)"):
            client.rank(REQUEST)
        assert client.rank(REQUEST, on_failure="retrieval_order").degraded
        assert not client.ready()
    assert not server.seen


def test_closing_tells_callers_that_it_was_closed(server):
    import asyncio

    server.script = [2.0]

    async def closed():
        client = trirank.AsyncRankClient(server.address, deadline_s=5)
        task = asyncio.ensure_future(client.rank(REQUEST))
        await asyncio.sleep(0.3)
        await client.close()
        with pytest.raises(trirank.ClientClosed):
            await task
        client = trirank.AsyncRankClient(server.address, deadline_s=5)
        task = asyncio.ensure_future(client.rank(REQUEST))
        await asyncio.sleep(0)  # before anything was sent
        await client.close()
        with pytest.raises(trirank.ClientClosed):
            await task

    asyncio.run(closed())


def test_closing_the_synchronous_client_tells_callers_too(server):
    server.script = [2.0]
    client = RankClient(server.address, deadline_s=5)
    with futures.ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.rank, REQUEST)
        time.sleep(0.3)
        client.close()
        with pytest.raises(trirank.ClientClosed):
            call.result()


def test_each_name_shows_its_own_certificate(monkeypatch):
    from trirank import _channels

    hosts = {"dns:///north.shop:1": ["10.0.0.1:1"], "dns:///south.shop:1": ["10.0.0.2:1"]}
    monkeypatch.setattr(_channels, "_lookup", lambda address: hosts[address])
    target = _channels.Target(list(hosts))
    target.resolve()
    assert [target._name_of(address) for address in ("10.0.0.1:1", "10.0.0.2:1")] == ["north.shop", "south.shop"]
