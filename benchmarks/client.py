"""What does the client cost, and what do hedges save?

    python benchmarks/client.py [--calls N] [--rounds N] [--leak N]

Cost: the same request through this client, through raw grpcio with a message that is ready, and through tritonclient as
its examples use it, in turns, against a server in another process that answers at once with a ready answer; and the
client's own work alone, with nothing sent. Hedges: two real servers with the demo's release, one of which is stopped
(SIGSTOP) for 200 ms now and then; the same load with and without hedges, in turns. It comes from sixteen clients that
know nothing of each other, as from sixteen processes of a service: a single busy client sees calls pile up and
goes round the stopped server by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import numpy as np
import psutil
import tritonclient.grpc as triton
import tritonclient.utils.shared_memory as shm
from results import ROOT, Figure, write
from serving import make_requests
from trirank import AsyncRankClient, HedgePolicy, RankClient, RankError, RankRequest, _codec, packing
from trirank import contract as c
from trirank._channels import OPTIONS
from trirank_build.demo import build
from trirank_build.serving.server import TritonServer
from tritonclient.grpc import service_pb2, service_pb2_grpc

SIZES = (50, 200, 1000)
TOP_K = 10
STALL_S, EVERY_S = 0.2, 3.0
RATE, SECONDS, CALLERS, CLIENTS = 40, 15.0, 32, 16


def ready_answer() -> service_pb2.ModelInferResponse:
    """Ten items, as the ensemble answers."""
    reply = service_pb2.ModelInferResponse(model_name=c.ENSEMBLE)
    values = {
        "RANKED_IDS": np.arange(1, TOP_K + 1, dtype=np.int64), "SCORES": np.linspace(1, 0, TOP_K, dtype=np.float32),
        "REASONS": np.zeros(TOP_K, np.int32), "STATUS": np.zeros(4, np.int32),
    }  # fmt: skip
    places = packing.places(c.RESPONSE)
    raw = packing.pack({places[name]: array.tobytes() for name, array in values.items()})
    reply.outputs.add(name=c.PACKED_RESPONSE.name, datatype=c.PACKED_RESPONSE.dtype, shape=[1, len(raw)])
    reply.raw_output_contents.append(raw)
    return reply


def answer_at_once(ports) -> None:
    """A KServe server that does nothing; runs in its own process."""
    reply = ready_answer()

    class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
        def ModelInfer(self, request, context):
            return reply

    server = grpc.server(futures.ThreadPoolExecutor(1))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(), server)
    ports.put(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    server.wait_for_termination()


def a_request(size: int) -> RankRequest:
    """As a search service has it: arrays of ids and retrieval scores."""
    rng = np.random.default_rng(size)
    ids, scores = rng.choice(10**6, size, replace=False) + 1, np.sort(rng.normal(size=size))[::-1]
    return RankRequest(item_ids=ids, user_id=7, query="coffee grinder", top_k=TOP_K, retrieval_scores=scores)


def with_tritonclient(client: triton.InferenceServerClient, request: RankRequest) -> dict[str, np.ndarray]:
    """The same call as tritonclient's examples write it."""
    bucket = c.bucket_for(len(request.item_ids))
    ids = np.full((1, bucket), c.PAD_ITEM_ID, np.int64)
    ids[0, : len(request.item_ids)] = request.item_ids
    scores = np.zeros((1, bucket), np.float32)
    scores[0, : len(request.item_ids)] = request.retrieval_scores
    arrays = {
        "USER_ID": np.array([[request.user_id]], np.int64), "ITEM_IDS": ids, "TOP_K": np.array([[TOP_K]], np.int32),
        "SCENARIO": np.array([[b"search"]], object), "QUERY": np.array([[request.query.encode()]], object),
        "RETRIEVAL_SCORES": scores,
    }  # fmt: skip
    types = {spec.name: spec.dtype for spec in c.REQUEST}
    inputs = []
    for name, array in arrays.items():
        tensor = triton.InferInput(name, array.shape, types[name])
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    outputs = [triton.InferRequestedOutput(spec.name) for spec in c.RESPONSE if not spec.optional]
    answer = client.infer(c.ENSEMBLE, inputs, outputs=outputs, client_timeout=5)
    return {spec.name: answer.as_numpy(spec.name) for spec in c.RESPONSE if not spec.optional}


def in_turns(ways: dict[str, Callable[[], object]], turns: int) -> np.ndarray:
    """[turns, ways] microseconds: in every turn each way is called once, a different one first each time, so that
    what the machine does otherwise falls on all alike."""
    names, times = list(ways), np.zeros((turns, len(ways)))
    for turn in range(turns):
        for at in range(len(names)):
            column = (turn + at) % len(names)
            call = ways[names[column]]
            started = time.perf_counter()
            call()
            times[turn, column] = (time.perf_counter() - started) * 1e6
    return times


def in_a_row(way: Callable[[], object], calls: int, rounds: int) -> list[float]:
    """Microseconds a call, of each round, where nothing else has had the processor's caches in between."""
    took = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(calls):
            way()
        took.append((time.perf_counter() - started) / calls * 1e6)
    return took


def costs(calls: int, rounds: int) -> list[Figure]:
    """Of one call, by how many candidates it has."""
    context = multiprocessing.get_context("spawn")
    ports = context.Queue()
    process = context.Process(target=answer_at_once, args=(ports,), daemon=True)
    process.start()
    address = f"127.0.0.1:{ports.get(timeout=60)}"
    figures = []
    channel = grpc.insecure_channel(address, options=OPTIONS)
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    theirs = triton.InferenceServerClient(address)
    with RankClient(address, deadline_s=5) as ours, RankClient(address, deadline_s=5) as unsent:
        reply = ready_answer()
        for size in SIZES:
            request = a_request(size)
            message = service_pb2.ModelInferRequest.FromString(_codec.encode(request, c.ENSEMBLE)[0])
            ours.rank(request)
            unsent.rank(request)
            unsent._stub = lambda address: SimpleNamespace(ModelInfer=lambda message, timeout, metadata: reply)
            ways = {
                "raw": lambda message=message: stub.ModelInfer(message, timeout=5),
                "ours": lambda request=request: ours.rank(request),
                "triton": lambda request=request: with_tritonclient(theirs, request),
                "own": lambda request=request: unsent.rank(request),
            }
            times = in_turns(ways, calls * rounds).reshape(rounds, calls, len(ways))
            raw, own_client, theirs_client, own = np.moveaxis(times, -1, 0)
            note = f"{size} candidates, {rounds} rounds of {calls} calls, median of differences within one turn"
            above = f"{note}, above raw grpcio with a ready message"
            figures += [
                _spread(f"overhead_us_{size}", list(np.median(own_client - raw, 1)), above),
                _spread(f"tritonclient_overhead_us_{size}", list(np.median(theirs_client - raw, 1)), above),
                _spread(f"own_cost_us_{size}", list(np.median(own, 1)), f"{note}, nothing sent"),
                _spread(
                    f"own_cost_warm_us_{size}", in_a_row(ways["own"], calls, rounds), "the same, with nothing between"
                ),
                _spread(f"raw_grpcio_us_{size}", list(np.median(raw, 1)), note),
            ]
            del unsent._stub
    channel.close()
    process.terminate()
    return figures


def hedging(rounds: int) -> list[Figure]:
    """Latency with and without hedges."""
    release = build(ROOT / "work" / "demo")
    requests = make_requests(release)
    found: dict[str, list[list[float]]] = {"plain": [], "hedged": []}
    extra = []
    with TritonServer(release) as one, TritonServer(release) as other:
        for server in (one, other):
            server.wait_ready()
        addresses = [one.grpc, other.grpc]
        for _ in range(rounds):
            for name, hedge in (("plain", None), ("hedged", HedgePolicy())):
                counts = {"request": 0, "hedge": 0}

                def count(event, counts=counts):
                    counts[event.name] += 1

                hooks = {each: [count] for each in counts}
                fleet = [RankClient(addresses, deadline_s=5, hedge=hedge, event_hooks=hooks) for _ in range(CLIENTS)]
                for at in range(60):
                    for client in fleet:
                        client.rank(requests[at % len(requests)])
                found[name].append(under_stalls(fleet, requests, other.pid))
                for client in fleet:
                    client.close()
                if hedge is not None:
                    extra.append(counts["hedge"] / counts["request"])
    note = (
        f"{RATE} requests a second from {CLIENTS} clients, {rounds} rounds of {SECONDS:g} s each; one of two servers "
        f"is stopped for {STALL_S * 1e3:g} ms every {EVERY_S:g} s"
    )
    p99 = {name: [float(np.percentile(times, 99)) for times in each] for name, each in found.items()}
    p50 = {name: [float(np.percentile(times, 50)) for times in each] for name, each in found.items()}
    gains = [a / b for a, b in zip(p99["plain"], p99["hedged"], strict=True)]
    return [
        _spread("hedged_p99_gain", gains, note, unit=""),
        *(_spread(f"{name}_p99_ms", p99[name], note, unit="ms") for name in p99),
        *(_spread(f"{name}_p50_ms", p50[name], note, unit="ms") for name in p50),
        _spread("hedge_extra_load", extra, f"hedges a call of a round's clients since they were made; {note}", unit=""),
    ]


def under_stalls(fleet: list[RankClient], requests: list[RankRequest], pid: int) -> list[float]:
    """Milliseconds of each request at a fixed rate, from when it was due."""
    stop, times = threading.Event(), []

    def stall() -> None:
        while not stop.wait(EVERY_S - STALL_S):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(STALL_S)
            os.kill(pid, signal.SIGCONT)

    def ask(number: int, due: float) -> None:
        fleet[number % CLIENTS].rank(requests[number % len(requests)])
        times.append((time.perf_counter() - due) * 1e3)

    staller = threading.Thread(target=stall)
    staller.start()
    started = time.perf_counter()
    with ThreadPoolExecutor(CALLERS) as pool:
        for at in range(int(RATE * SECONDS)):
            due = started + at / RATE
            time.sleep(max(0.0, due - time.perf_counter()))
            pool.submit(ask, at, due)
    stop.set()
    staller.join()
    return times


def overruns(calls: int = 100, deadline_s: float = 0.05) -> list[Figure]:
    """How much longer than its deadline a call takes whose server never answers."""
    late: dict[str, list[float]] = {"sync": [], "async": []}
    request = a_request(200)

    async def asynchronous(address: str) -> None:
        async with AsyncRankClient(address, deadline_s=deadline_s) as client:
            for _ in range(calls):
                started = time.perf_counter()
                try:
                    await client.rank(request)
                except RankError:
                    late["async"].append((time.perf_counter() - started - deadline_s) * 1e3)

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with RankClient(address, deadline_s=deadline_s) as client:
            for _ in range(calls):
                started = time.perf_counter()
                try:
                    client.rank(request)
                except RankError:
                    late["sync"].append((time.perf_counter() - started - deadline_s) * 1e3)
        asyncio.run(asynchronous(address))
    note = f"after a deadline of {deadline_s * 1e3:g} ms, {calls} calls of a server that never answers"
    assert all(len(each) == calls for each in late.values())
    return [
        Figure(f"overrun_ms_{name}", float(np.percentile(each, 99)), min(each), max(each), "ms", f"p99, {note}")
        for name, each in late.items()
    ]


def shared(calls: int, rounds: int, size: int = 1000) -> list[Figure]:
    """What shared memory would save: the same message to a real server with its tensor inline, and in a region that is
    registered once and written before each call."""
    release = build(ROOT / "work" / "demo")
    ids = np.load(release / "features" / "catalogue" / "ids.npy")[:size]
    request = RankRequest(item_ids=ids, top_k=TOP_K, retrieval_scores=np.linspace(1, 0, len(ids)))
    inline = service_pb2.ModelInferRequest.FromString(_codec.encode(request, c.ENSEMBLE)[0])
    (tensor,), (content,) = inline.inputs, inline.raw_input_contents
    there = service_pb2.ModelInferRequest(model_name=c.ENSEMBLE)
    added = there.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    added.parameters["shared_memory_region"].string_param = "trirank"
    added.parameters["shared_memory_byte_size"].int64_param = size_in_region = len(content)
    region = shm.create_shared_memory_region("trirank", f"/trirank_bench_{os.getpid()}", size_in_region)
    arrays = [np.frombuffer(content, np.uint8)]
    with TritonServer(release) as server:
        server.wait_ready()
        client = triton.InferenceServerClient(server.grpc)
        client.register_system_shared_memory("trirank", f"/trirank_bench_{os.getpid()}", size_in_region)
        channel = grpc.insecure_channel(server.grpc, options=OPTIONS)
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        def through_region():
            shm.set_shared_memory_region(region, arrays)
            return stub.ModelInfer(there, timeout=5)

        ways = {"inline": lambda: stub.ModelInfer(inline, timeout=5), "region": through_region}
        assert through_region().raw_output_contents == ways["inline"]().raw_output_contents
        times = in_turns(ways, calls * rounds).reshape(rounds, calls, 2)
        client.unregister_system_shared_memory("trirank")
        channel.close()
    shm.destroy_shared_memory_region(region)
    saved = list(np.median(times[..., 0] - times[..., 1], 1))
    note = (
        f"{len(ids)} candidates, {size_in_region:,} bytes in the region, {rounds} rounds of {calls} calls of a real "
        "server"
    )
    return [_spread("shared_memory_saves_us_1000", saved, note)]


def leaks(calls: int) -> list[Figure]:
    """Memory before and after many calls that send nothing, and fewer that do."""
    context = multiprocessing.get_context("spawn")
    ports = context.Queue()
    process = context.Process(target=answer_at_once, args=(ports,), daemon=True)
    process.start()
    request, own = a_request(200), psutil.Process()
    with RankClient(f"127.0.0.1:{ports.get(timeout=60)}", deadline_s=5) as client:
        for _ in range(5_000):
            client.rank(request)
        before = own.memory_info().rss
        for _ in range(calls // 10):
            client.rank(request)
        sent = own.memory_info().rss - before
        reply = ready_answer()
        client._stub = lambda address: SimpleNamespace(ModelInfer=lambda message, timeout, metadata: reply)
        for _ in range(calls):
            client.rank(request)
        grown = own.memory_info().rss - before
    process.terminate()
    return [
        Figure("memory_growth_mb_sent", *[sent / 1e6] * 3, "MB", f"after {calls // 10:,} calls that were sent"),
        Figure("memory_growth_mb", *[grown / 1e6] * 3, "MB", f"after {calls:,} more with nothing sent"),
    ]


def _spread(name: str, values: list[float], note: str, unit: str = "µs") -> Figure:
    middle = statistics.median(values)
    return Figure(name, round(middle, 3), round(min(values), 3), round(max(values), 3), unit, note)


def main() -> None:
    """Measure and write ``results/client.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--leak", type=int, default=1_000_000, help="calls; 0: leave it out")
    parser.add_argument("--only", choices=["costs", "hedging", "overruns", "shared", "leaks"])
    arguments = parser.parse_args()
    figures = []
    if arguments.only in (None, "costs"):
        figures += costs(arguments.calls, arguments.rounds)
    if arguments.only in (None, "hedging"):
        figures += hedging(max(3, arguments.rounds // 2))
    if arguments.only in (None, "overruns"):
        figures += overruns()
    if arguments.only in (None, "shared"):
        figures += shared(arguments.calls // 5, arguments.rounds)
    if arguments.leak and arguments.only in (None, "leaks"):
        figures += leaks(arguments.leak)
    write(
        "client",
        [f._replace(**{n: round(getattr(f, n), 4) for n in ("value", "low", "high")}) for f in figures],
        keep=True,
    )
    for figure in figures:
        print(f"{figure.name:32} {figure.value:10.3f} {figure.unit:6} [{figure.low:.3f}, {figure.high:.3f}]")


if __name__ == "__main__":
    main()
