"""What the client does with answers and failures, against a server whose every word is given. Networks that break are
in tests/e2e/test_client_faults.py."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from concurrent import futures

import grpc
import numpy as np
import pytest
import trirank
from trirank import HedgePolicy, RankClient, RankRequest, RankResponse, RetryPolicy, Status, Tls, contract
from trirank._core import retrieval_order
from trirank.observability import log_hooks, merged, opentelemetry_hooks, prometheus_hooks
from tritonclient.grpc import service_pb2, service_pb2_grpc

REQUEST = RankRequest(item_ids=[5, 6, 7], user_id=42, top_k=2)


def answer():
    reply = service_pb2.ModelInferResponse(model_name="rank")
    values = {
        "RANKED_IDS": np.array([7, 5], np.int64), "SCORES": np.array([2, 1], np.float32),
        "REASONS": np.zeros(2, np.int32), "STATUS": np.zeros(4, np.int32),
    }  # fmt: skip
    for spec in contract.RESPONSE:
        reply.outputs.add(name=spec.name, datatype=spec.dtype, shape=[1, len(values[spec.name])])
        reply.raw_output_contents.append(values[spec.name].tobytes())
    return reply


class Scripted(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Does what its script says, call by call: a status, a pause in seconds, or (at its end) answers."""

    def __init__(self):
        self.script = []
        self.seen = []
        self.pushback = None

    def ModelInfer(self, request, context):
        self.seen.append((request, dict(context.invocation_metadata())))
        step = self.script.pop(0) if self.script else None
        if isinstance(step, grpc.StatusCode):
            if self.pushback is not None:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", self.pushback),))
            context.abort(step, "on purpose")
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
    ids = np.array([contract.stable_id("b"), contract.stable_id("a")])
    found = RankResponse(
        ids, np.zeros(2, np.float32), np.zeros(2, np.int32), Status(0), names={int(ids[0]): "b", int(ids[1]): "a"}
    )
    assert found.to_arrays()["item_id"].tolist() == ["b", "a"]


def test_the_deadline_travels(server):
    with RankClient(server.address, deadline_s=5) as client:
        before = time.time()
        client.rank(REQUEST, deadline_s=0.5)
    parameters = server.seen[0][0].parameters
    assert "timeout" not in parameters  # a queue that heard it would let requests sleep: docs/performance.md
    assert abs(parameters[contract.DEADLINE_PARAMETER].int64_param / 1e6 - before - 0.5) < 0.2


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
    hedge, hooks = HedgePolicy(quantile=0.01, min_delay_s=0), {"hedge": [hedges.append]}
    with RankClient([one.address, other.address], deadline_s=5, hedge=hedge, event_hooks=hooks) as client:
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
    found = retrieval_order(RankRequest(item_ids=["b", "a", "b", "c"], top_k=2))
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
