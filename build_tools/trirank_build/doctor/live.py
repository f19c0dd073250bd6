"""Rules about a running server, and what has to be asked of it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import grpc
import numpy as np
from trirank import RankClient, RankError, RankRequest, Tls, contract
from trirank._channels import Target
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.grpc import service_pb2, service_pb2_grpc

from trirank_build.doctor.finding import Found, Severity, rule
from trirank_build.doctor.repository import Model, Repository, Surroundings
from trirank_build.doctor.vulnerabilities import of_version, order
from trirank_build.errors import ServeError

TIMEOUT_S = 10.0
_NUMPY = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "FP16": np.float16, "BF16": np.uint16,
    "FP32": np.float32, "FP64": np.float64,
}  # fmt: skip
_NOBODY = "trirank-doctor-no-such-model"
_ENOUGH = 100
"""Executions below which statistics say nothing."""
_BROKEN = (
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNAVAILABLE,
)


@dataclass
class Server:
    """What a server said when it was asked.

    Attributes:
        ready: what its health probe says.
        models: name → state and its reason, of its repository's index.
        repository: configurations of the models that are ready.
        statistics: name → of Triton.
        probes: name → status and words of one inference each; None: it was answered.
        bad_request: model → status of a request that breaks its contract, and what was wrong with it.
        control: ``open`` if it would load a model for anybody, else ``shut``.
        version: of the server.
        closed: interfaces that do not answer this caller, as they are named in Triton's options.
    """

    address: str
    ready: bool = False
    models: dict[str, tuple[str, str]] = field(default_factory=dict)
    repository: Repository = field(default_factory=lambda: Repository({}))
    statistics: dict[str, Any] = field(default_factory=dict)
    probes: dict[str, tuple[grpc.StatusCode, str] | None] = field(default_factory=dict)
    bad_request: dict[str, tuple[str, grpc.StatusCode, str]] = field(default_factory=dict)
    control: str = ""
    version: str = ""
    closed: set[str] = field(default_factory=set)


class Caller(NamedTuple):
    """As whom a server is asked."""

    tls: Tls | None = None
    token: str | None = None


ANYBODY = Caller()


class _WithToken(grpc.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    def __init__(self, metadata: list[tuple[str, str]]) -> None:
        self._metadata = metadata

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        """Send it along."""
        return continuation(details._replace(metadata=[*(details.metadata or []), *self._metadata]), request)


def ask(address: str, requests: list[RankRequest], probe: bool = True, caller: Caller = ANYBODY) -> Server:
    """Ask a server all that the rules want to know: health, configurations, statistics, and with ``probe`` one
    inference of each model that takes single requests, and one that has to fail.

    Args:
        address: ``host:port`` of its gRPC endpoint.
        requests: recorded requests of the release that it serves; without them the ensemble is asked for one item.

    Raises:
        InvalidRequest: a file of ``caller`` cannot be read, or a token would go out unencrypted.
        ServeError: nothing answers there.
    """
    server = Server(address)
    target = Target(address, caller.tls, caller.token)
    with target.channel(address, grpc) as channel:
        own = grpc.intercept_channel(channel, _WithToken(target.credentials_metadata()))
        stub = service_pb2_grpc.GRPCInferenceServiceStub(own)
        try:
            server.ready = stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=TIMEOUT_S).ready
        except grpc.RpcError as error:
            raise ServeError(
                f"no Triton answers at {address} ({error.details()}); give host:port of its gRPC endpoint, and "
                "--tls-ca if it speaks TLS"
            ) from None
        # Where the index is behind a word that this caller does not know, the statistics name the models too; where
        # those are as well, the ensemble does.
        with suppress(grpc.RpcError):
            index = stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=TIMEOUT_S).models
            server.models = {model.name: (model.state, model.reason) for model in index}
        with suppress(grpc.RpcError):
            known = stub.ModelStatistics(service_pb2.ModelStatisticsRequest(), timeout=TIMEOUT_S).model_stats
            server.statistics = {each.name: each for each in known}
        names = [name for name, (state, _) in server.models.items() if state == "READY"] or list(server.statistics)
        names = names or _of_the_ensemble(stub)
        configs = {
            name: stub.ModelConfig(service_pb2.ModelConfigRequest(name=name), timeout=TIMEOUT_S).config
            for name in names
        }
        server.repository = Repository({name: Model(name, config) for name, config in configs.items()})
        server.control = _control(stub)
        server.closed = _closed(stub) | ({"model-repository"} if server.control == "shut" else set())
        with suppress(grpc.RpcError):
            server.version = stub.ServerMetadata(service_pb2.ServerMetadataRequest(), timeout=TIMEOUT_S).version
        if probe:
            _probe(stub, server, requests, caller)
    return server


def _of_the_ensemble(stub: Any) -> list[str]:
    """Names of the models that ``rank`` is made of, and itself; none where there is no such model."""
    try:
        config = stub.ModelConfig(service_pb2.ModelConfigRequest(name=contract.ENSEMBLE), timeout=TIMEOUT_S).config
    except grpc.RpcError:
        return []
    return [contract.ENSEMBLE, *(step.model_name for step in config.ensemble_scheduling.step)]


@rule("LIVE01", Severity.ERROR, "Read the server's log; it says why.", kind="live")
def not_ready(server: Server, around: Surroundings) -> Found:
    """The server's own health probe says that it is not ready."""
    if not server.ready:
        yield server.address, "ServerReady answers no"


@rule("LIVE02", Severity.ERROR, "Read the server's log; it says why the model was not loaded.", kind="live")
def models_not_loaded(server: Server, around: Surroundings) -> Found:
    """A model of the repository is not ready."""
    for name, (state, reason) in sorted(server.models.items()):
        if state != "READY" and reason not in ("", "unloaded"):
            yield name, f"{state}: {reason}"


@rule(
    "LIVE03", Severity.ERROR, "Restart the server, and let readiness be an inference rather than a health probe.",
    "triton-inference-server/server #8604, #7230", kind="live",
)  # fmt: skip
def ready_and_does_not_answer(server: Server, around: Surroundings) -> Found:
    """Health says ready, and an inference fails: a stub process has died, for instance."""
    for name, outcome in sorted(server.probes.items()):
        if outcome is not None and outcome[0] in _BROKEN:
            yield (
                name,
                f"health says {'ready' if server.ready else 'not ready'}, an inference {outcome[0].name}: {outcome[1]}",
            )


@rule("LIVE04", Severity.WARNING, "Answer InvalidInput with TritonError.INVALID_ARG.", kind="live")
def wrong_code_for_a_bad_request(server: Server, around: Surroundings) -> Found:
    """A request that can never succeed is not answered with INVALID_ARGUMENT, so clients retry it."""
    for name, (what, status, words) in sorted(server.bad_request.items()):
        broken = server.probes.get(name) is not None
        if status is not grpc.StatusCode.INVALID_ARGUMENT and not broken:
            yield name, f"{what} was answered with {status.name}: {words}"


@rule(
    "LIVE05", Severity.WARNING,
    "Start with --model-control-mode=none, or restrict the protocol model-repository to a header that only you know.",
    kind="live",
)  # fmt: skip
def anybody_may_load_models(server: Server, around: Surroundings) -> Found:
    """Model control is open to everybody who reaches the port; who can load models can run code."""
    if server.control == "open":
        yield server.address, "a request to load a model was taken up"


@rule(
    "LIVE06", Severity.WARNING, "Let shapes agree (pad to buckets) and look at preferred sizes and instance counts.",
    "triton-inference-server/server #6937, #8156", kind="live",
)  # fmt: skip
def batching_does_not_happen(server: Server, around: Surroundings) -> Found:
    """Requests wait in a queue with dynamic batching, and are executed one by one all the same."""
    for name, model in sorted(server.repository.models.items()):
        found = server.statistics.get(name)
        if found is None or not model.config.HasField("dynamic_batching") or model.config.max_batch_size <= 1:
            continue
        done, times = found.execution_count, found.inference_stats
        if done < _ENOUGH:
            continue
        batch = found.inference_count / done
        waiting, working = times.queue.ns, times.compute_infer.ns
        if batch < 1.1 and waiting > 2 * working:
            queue, infer = (ns / max(1, times.success.count) / 1e6 for ns in (waiting, working))
            yield name, f"mean batch {batch:.2f} of {done} executions, {queue:.1f} ms in the queue, {infer:.1f} at work"


@rule("LIVE07", Severity.WARNING, "Read the server's log; ask the callers.", kind="live")
def many_fail(server: Server, around: Surroundings) -> Found:
    """More than one request in a hundred fails in a model."""
    for name, found in sorted(server.statistics.items()):
        failed, done = found.inference_stats.fail.count, found.inference_stats.success.count
        if failed + done >= _ENOUGH and failed > (failed + done) / 100:
            yield name, f"{failed} of {failed + done} requests failed"


@rule(
    "LIVE08", Severity.WARNING,
    "Serve with a newer Triton where you can (--tritonserver); until then keep interfaces closed and strangers away.",
    "docs/security.md", kind="live",
)  # fmt: skip
def published_vulnerabilities(server: Server, around: Surroundings) -> Found:
    """The server's version has vulnerabilities that were published since, and can be reached."""
    found = of_version(server.version) if server.version else []
    reached = [each for each in found if each.closed_by not in server.closed]
    if reached:
        cves = [cve for each in reached for cve in each.cves]
        shut = sum(len(each.cves) for each in found) - len(cves)
        ways = ", ".join(sorted({each.closed_by for each in reached if each.closed_by}))
        among = f"through {ways} among others; " if ways else ""
        newest = max(reached, key=lambda each: order(each.fixed)).release
        yield (
            server.address,
            f"Triton {server.version} has {len(cves)} ({', '.join(cves[:3])}, …), {among}{shut} more cannot be "
            f"reached, for their interfaces are closed; Triton of {newest} has none of them",
        )


def _closed(stub: Any) -> set[str]:
    """Interfaces that say no to this caller."""
    asked = {
        "shared-memory": (stub.SystemSharedMemoryStatus, service_pb2.SystemSharedMemoryStatusRequest()),
        "trace": (stub.TraceSetting, service_pb2.TraceSettingRequest()),
        "logging": (stub.LogSettings, service_pb2.LogSettingsRequest()),
        "statistics": (stub.ModelStatistics, service_pb2.ModelStatisticsRequest()),
    }
    found = set()
    for name, (call, request) in asked.items():
        try:
            call(request, timeout=TIMEOUT_S)
        except grpc.RpcError:  # noqa: PERF203
            found.add(name)
    return found


def _control(stub: Any) -> str:
    """``open`` if Triton would load a model for us: it then looks for one that there is not."""
    try:
        stub.RepositoryModelLoad(service_pb2.RepositoryModelLoadRequest(model_name=_NOBODY), timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        words = (error.details() or "").lower()
        shut = any(word in words for word in ("not allowed", "restricted", "expecting header", "triton-grpc-protocol"))
        return "shut" if shut or error.code() is grpc.StatusCode.UNIMPLEMENTED else "open"
    return "open"


def _probe(stub: Any, server: Server, requests: list[RankRequest], caller: Caller) -> None:
    steps = server.repository.steps()
    for name, model in server.repository.models.items():
        if (
            name in steps
            or model.config.HasField("sequence_batching")
            or model.config.model_transaction_policy.decoupled
        ):
            continue
        if _is_rank(model):
            with RankClient(server.address, deadline_s=TIMEOUT_S, retry=None, model=name, **caller._asdict()) as client:
                _probe_rank(client, server, name, requests)
        else:
            server.probes[name] = _outcome(stub, _zeros(model))
        wrong = _zeros(model)
        if wrong.inputs:
            wrong.inputs[0].name = "no_such_input"
            found = _outcome(stub, wrong)
            if found is not None and name not in server.bad_request:
                server.bad_request[name] = ("an input that it does not have", *found)


def _probe_rank(client: RankClient, server: Server, name: str, requests: list[RankRequest]) -> None:
    outcomes = (_ranked(client, request) for request in requests or [RankRequest(item_ids=[1])])
    server.probes[name] = next((outcome for outcome in outcomes if outcome is not None), None)
    what = "a scenario that there is not"
    found = _ranked(client, RankRequest(item_ids=[1], scenario="trirank-doctor-no-such-scenario"))
    server.bad_request[name] = (what, *(found or (grpc.StatusCode.OK, "an answer")))


def _ranked(client: RankClient, request: RankRequest) -> tuple[grpc.StatusCode, str] | None:
    try:
        client.rank(request)
    except RankError as error:
        return error.status or grpc.StatusCode.UNKNOWN, str(error)
    return None


def _is_rank(model: Model) -> bool:
    """Whether it is an ensemble of this project's contract."""
    return {tensor.name for tensor in model.config.output} == {spec.name for spec in contract.OUTPUTS}


def _outcome(stub: Any, request: Any) -> tuple[grpc.StatusCode, str] | None:
    try:
        stub.ModelInfer(request, timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        return error.code(), error.details() or ""
    return None


def _zeros(model: Model) -> Any:
    """A lawful request of zeros and empty strings, every variable axis as short as it can be."""
    request = service_pb2.ModelInferRequest(model_name=model.name)
    for tensor in model.config.input:
        if tensor.optional:
            continue
        kind = pb.DataType.Name(tensor.data_type).removeprefix("TYPE_").replace("STRING", "BYTES")
        shape = [max(1, axis) for axis in ([1] if model.config.max_batch_size > 0 else []) + list(tensor.dims)]
        request.inputs.add(name=tensor.name, datatype=kind, shape=shape)
        count = int(np.prod(shape))
        raw = b"\0\0\0\0" * count if kind == "BYTES" else np.zeros(count, _NUMPY.get(kind, np.uint8)).tobytes()
        request.raw_input_contents.append(raw)
    return request
