"""The same stages and graph behind other servers, each at the best settings found here, under the same open loop.

    python benchmarks/against_peers.py [--rounds N] [--seconds S] [--only PART …] [--peers NAME …]

The demo's release at 200 candidates. First each server's settings are chosen (closed loop of 32 callers, the most
requests a second). Then in every round each server is started, asked by one caller, and its capacity is sought: the
highest rate of a Poisson process at which p99, counted from when a request was due, stays within 50 ms and nothing
fails. All in one run, in turns; ratios are of one round. The load generator shares the cores, and what it takes is
told.

Limits beside them: the stages in process, one process a core, in batches of 32; a model of Triton's that does nothing.
Environments come from ``python benchmarks/peer_servers.py install``; a peer that has none is left out, and said so.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import load
import numpy as np
import psutil
import serving
from hops import bare_triton
from load import P99_MS, Running, capacity
from peer_servers import CORES, PEERS, Peer, answer_of, served
from results import ROOT, WORK, Figure, write
from serving import CANDIDATES, Rounds, engine_of, make_requests, stores_of
from trirank import RankRequest, packing
from trirank import contract as c
from trirank._codec import packed_request
from trirank_backend.pipeline import Pipeline
from trirank_build.repository.configs import config_text
from trirank_build.repository.release import graph_place, load_manifest
from trirank_build.serving.server import TritonServer
from tritonclient.grpc import model_config_pb2 as pb

releases = cache(serving.releases)
OURS = "trirank"
FULL = 128
"""Callers that fill every batch."""
NOTHING = """import numpy as np
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            [tensor.as_numpy() for tensor in request.inputs()]
        answer = np.zeros((1, 256), np.uint8)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("PACKED_RESPONSE", answer)]) for _ in requests]
"""


Start = Callable[[], "contextmanager[Running]"]


@contextmanager
def ours(release: Path, requests: list[RankRequest]) -> Iterator[Running]:
    """Triton with a release of ours."""
    with TritonServer(release, stores=stores_of(releases()["ensemble"]), log=WORK / "against.log") as server:
        server.wait_ready()
        target = load.triton(server.grpc, requests)
        assert np.array_equal(_ranked(answer_of(target, "")), expected(release, requests[0]))
        yield Running(target, server.pid)


@contextmanager
def theirs(peer: Peer, release: Path, settings: dict[str, str], requests: list[RankRequest]) -> Iterator[Running]:
    """A peer with the same release."""
    with served(peer, release, settings, requests[0]) as (address, pid):
        target = peer.target(address, requests)
        if not np.array_equal(_ranked(answer_of(target, peer.wire)), expected(release, requests[0])):
            raise RuntimeError(f"{peer.title} answers something else")
        yield Running(target, pid)


def _ranked(packed: bytes) -> np.ndarray:
    return np.frombuffer(packing.unpack(packed, c.RESPONSE)["RANKED_IDS"], np.int64)


@cache
def _pipeline(release: Path) -> Pipeline:
    return Pipeline.load(release, release / graph_place(load_manifest(release)["pipeline"]), engine_of(release))


def expected(release: Path, request: RankRequest) -> np.ndarray:
    """What the stages in this process answer."""
    packed = np.frombuffer(packed_request(request)[0], np.uint8)[None]
    (answer,) = _pipeline(release)([{c.PACKED_REQUEST.name: packed}])
    return _ranked(answer[c.PACKED_RESPONSE.name].tobytes())


@contextmanager
def nothing(requests: list[RankRequest]) -> Iterator[Running]:
    """Triton with a model that reads the request and answers zeros, an instance a core."""
    config = pb.ModelConfig(name=c.ENSEMBLE, backend="python", max_batch_size=c.MAX_BATCH)
    kind = pb.DataType.Value("TYPE_UINT8")
    config.input.add(name=c.PACKED_REQUEST.name, data_type=kind, dims=[-1], allow_ragged_batch=True)
    config.output.add(name=c.PACKED_RESPONSE.name, data_type=kind, dims=[-1])
    config.instance_group.add(count=CORES, kind=pb.ModelInstanceGroup.KIND_CPU)
    config.dynamic_batching.SetInParent()
    with tempfile.TemporaryDirectory() as folder:
        version = Path(folder, "models", c.ENSEMBLE, "1")
        version.mkdir(parents=True)
        (version / "model.py").write_text(NOTHING)
        (version.parent / "config.pbtxt").write_text(config_text(config))
        with bare_triton(Path(folder, "models"), Path(folder)) as address:
            (server,) = [child for child in psutil.Process().children() if "tritonserver" in child.name()]
            yield Running(load.triton(address, requests), server.pid)


def chosen(systems: dict[str, list[tuple[str, Start]]], seconds: float) -> tuple[dict[str, Start], dict[str, Start]]:
    """Of each system's settings those with the most requests a second of 32 callers, and those that answer one caller
    fastest."""
    best: dict[str, Start] = {}
    fastest: dict[str, Start] = {}
    for name, settings in systems.items():
        found = []
        for words, start in settings:
            with start() as running:
                load.closed_loop(running.target, 8, 1.0, [running.pid])
                many = load.closed_loop(running.target, 32, seconds, [running.pid]).rate
                one = load.closed_loop(running.target, 1, seconds / 2, [running.pid]).percentile(50)
            found.append((many, one, words, start))
            print(f"{name:14} {words:50} {many:7.0f} requests/s of 32 callers, {one:6.3f} ms of one", flush=True)
        best[name] = max(found, key=lambda each: each[0])[3]
        fastest[name] = min(found, key=lambda each: each[1])[3]
    return best, fastest


def all_systems(names: list[str], requests: list[RankRequest]) -> dict[str, list[tuple[str, Start]]]:
    """Name → settings to choose among, ours among them."""
    own = releases()
    plain = {name: release for name, release in own.items() if name != "ensemble"}
    systems: dict[str, list[tuple[str, Start]]] = {
        OURS: [(name, lambda release=release: ours(release, requests)) for name, release in plain.items()]
    }
    for name in names:
        peer = PEERS[name]
        if not peer.there():
            print(f"{name} is left out: no environment; python benchmarks/peer_servers.py install {peer.environment}")
            continue
        systems[name] = [
            (
                " ".join(f"{key.removeprefix('PEER_').lower()}={value}" for key, value in each.items()),
                lambda peer=peer, each=each: theirs(peer, own["single"], each, requests),
            )
            for each in peer.settings
        ]
    # BentoML's two ways are one contender.
    if "bentoml" in systems and "bentoml_asgi" in systems:
        systems["bentoml"] += systems.pop("bentoml_asgi")
    return systems


def servers(names: list[str], rounds: int, seconds: float) -> list[Figure]:
    """Every server's capacity, round by round."""
    requests = make_requests(releases()["ensemble"])
    systems = all_systems(names, requests)
    best, fastest = chosen(systems, seconds)
    best["nothing"] = fastest["nothing"] = lambda: nothing(requests)
    found, guesses = Rounds(), dict.fromkeys(best, 1500.0)
    for number in range(rounds):
        order = list(best)[number % len(best) :] + list(best)[: number % len(best)]
        for name in order:
            with best[name]() as running:
                load.closed_loop(running.target, 8, 1.0, [running.pid])
                # Not the same rates in every round, or a step of the search would look like agreement.
                jitter = float(np.random.default_rng([number, sum(name.encode())]).uniform(0.9, 1.1))
                at = capacity(running, guesses[name] * jitter, seconds, 100 * number)
            with fastest[name]() as running:
                load.closed_loop(running.target, 1, 1.0, [running.pid])
                one = load.closed_loop(running.target, 1, seconds / 2, [running.pid]).percentile(50)
            guesses[name] = at.rate or guesses[name] / 2
            found.note(f"{name}_capacity_rps", at.rate)
            found.note(f"{name}_p50_ms_c1", one)
            if at.run is not None:
                found.note(f"{name}_capacity_p50_ms", at.run.percentile(50))
                found.note(f"{name}_capacity_p99_ms", at.run.percentile(99))
                found.note(f"{name}_capacity_server_cpu_ms", at.run.server_cpu_ms)
                found.note(f"{name}_capacity_load_cpu_ms", at.run.load_cpu_ms)
            print(
                f"round {number}: {name:14} holds {at.rate:6.0f}, not {at.failing[0]:6.0f} "
                f"(p99 {at.failing[1]:.0f} ms); one caller {one:.3f} ms",
                flush=True,
            )
        rates = {name: found.last(f"{name}_capacity_rps") for name in best}
        peers = [name for name in best if name not in (OURS, "nothing", "grpc_aio")]
        if peers:
            found.note("throughput_vs_best_peer_ratio", rates[OURS] / max(rates[name] for name in peers))
        for name in best.keys() - {OURS}:
            found.note(f"throughput_vs_{name}_ratio", rates[OURS] / max(rates[name], 1.0))
            found.note(f"p50_vs_{name}_c1_ratio", found.last(f"{OURS}_p50_ms_c1") / found.last(f"{name}_p50_ms_c1"))
    note = f"{CANDIDATES} candidates, Poisson arrivals, p99 <= {P99_MS:g} ms, median of {rounds} rounds"
    return found.figures(note)


LIGHT = ("grpc_aio", "fastapi")
"""Peers that cost nothing while nobody asks them, so that all their settings can be up at once."""


def one_caller(names: list[str], rounds: int, seconds: float) -> list[Figure]:
    """How long one caller waits: all settings of all systems are up at once, they are asked in turns, a moment each;
    the setting with the best median over all rounds is its system's. A shared machine is now fast and now slow, for
    minutes at a time; servers that are measured minutes apart do not compare."""
    found, took = Rounds(), {}
    requests = make_requests(releases()["ensemble"])
    with ExitStack() as stack:
        systems = all_systems([name for name in names if name in LIGHT], requests)
        up = [
            (name, words, stack.enter_context(start()))
            for name, settings in systems.items()
            if name != "nothing"
            for words, start in settings
        ]
        for number in range(-1, rounds):
            for name, words, running in up:
                p50 = load.closed_loop(running.target, 1, seconds, [running.pid]).percentile(50)
                if number >= 0:  # the first is to warm up
                    took.setdefault((name, words), []).append(p50)
    best = {}
    for (name, words), each in took.items():
        print(f"{name:14} {words:50} {statistics.median(each):6.3f} ms of one", flush=True)
        if name not in best or statistics.median(each) < statistics.median(best[name]):
            best[name] = each
    for name, each in best.items():
        for own, other in zip(best[OURS], each, strict=True):
            found.note(f"one_caller_{name}_p50_ms", other)
            if name != OURS:
                found.note(f"p50_vs_{name}_c1_ratio", own / other)
    return found.figures(f"{CANDIDATES} candidates, h2load, all servers up, in turns, median of {rounds} rounds")


IN_PROCESS = """import os, sys, time
sys.path.insert(0, sys.argv[1])
from against_peers import batches_in_process
os.sched_setaffinity(0, {int(sys.argv[3])})  # as the server's instances are
print(batches_in_process(float(sys.argv[2])))
"""


def batches_in_process(seconds: float) -> float:
    """Processor ms a request of the stages in this process, in batches of 32 of the requests that callers send."""
    release = releases()["single"]
    pipeline = Pipeline.load(release, release / graph_place(load_manifest(release)["pipeline"]), engine_of(release))
    packed = [
        {c.PACKED_REQUEST.name: np.frombuffer(packed_request(request)[0], np.uint8)[None]}
        for request in make_requests(release)[: load.PROCESSES]
    ] * (32 // load.PROCESSES)
    for _ in range(10):
        pipeline(packed)
    end, done, started = time.perf_counter() + seconds, 0, time.process_time()
    while time.perf_counter() < end:
        pipeline(packed)
        done += 1
    spent = time.process_time() - started
    pipeline.close()
    return spent * 1e3 / (32 * done)


def limits(rounds: int, seconds: float) -> list[Figure]:
    """The stages in process, a process a core at once, and how much of that the server reaches."""
    found = Rounds()
    own = releases()
    requests = make_requests(own["ensemble"])
    folder = str(Path(__file__).parent)
    with ours(own["single"], requests) as running:
        load.closed_loop(running.target, 8, 1.0, [running.pid])
        for _ in range(rounds):
            command = [sys.executable, "-c", IN_PROCESS, folder, str(seconds)]
            processes = [
                subprocess.Popen([*command, str(core)], stdout=subprocess.PIPE, text=True)
                for core in sorted(os.sched_getaffinity(0))
            ]
            inside = statistics.mean(float(process.communicate()[0].split()[-1]) for process in processes)
            # So many that batches are large, as they are in process.
            full = load.closed_loop(running.target, FULL, seconds, [running.pid])
            found.note("in_process_batch_32_cpu_ms", inside)
            found.note("in_process_capacity_rps", 1e3 * CORES / inside)
            found.note("saturated_server_cpu_ms", full.server_cpu_ms)
            found.note("saturated_rps", full.rate)
            found.note("saturation_of_in_process_ratio", inside / full.server_cpu_ms)
            found.note("saturation_with_the_loads_share_ratio", full.rate * inside / 1e3 / CORES)
            print(f"{inside:.3f} ms in process, {full.server_cpu_ms:.3f} ms served at {full.rate:.0f}/s", flush=True)
    return found.figures(
        f"processor time a request, {CORES} processes at once, batches of 32; {FULL} callers of h2load"
    )


def sizes(rounds: int, seconds: float) -> list[Figure]:
    """What a request of 1,000 candidates takes over one of 200, for one caller."""
    found = Rounds()
    own = releases()["single"]
    few, many = make_requests(own), make_requests(own, candidates=1000)
    with ours(own, few) as running:
        wide = load.triton(running.target.address, many)
        for target in (running.target, wide):
            load.closed_loop(target, 1, 1.0, [running.pid])
        for _ in range(rounds):
            one = load.closed_loop(running.target, 1, seconds / 2, [running.pid]).percentile(50)
            five = load.closed_loop(wide, 1, seconds / 2, [running.pid]).percentile(50)
            found.note("p50_200_ms", one)
            found.note("p50_1000_ms", five)
            found.note("cost_1000_over_200_ratio", five / one)
    return found.figures("one caller, h2load")


OVERLOAD, DEADLINE_S, WIDE = 3.0, 0.1, 1000


def overload(rounds: int, seconds: float) -> list[Figure]:
    """Three times as many requests as one instance can answer, each with a deadline of 100 ms that goes along.

    One instance and 1,000 candidates, so that the load generator has a core to itself at that rate, too.
    """
    found = Rounds()
    own = releases()["single_1_instance"]
    requests = make_requests(own, candidates=WIDE)
    with ours(own, requests) as running:
        load.closed_loop(running.target, 8, 1.0, [running.pid])
        guess = 500.0
        for number in range(rounds):
            at = capacity(running, guess, seconds, 2000 + 100 * number)
            guess = at.rate
            run = load.open_loop(
                running.target, OVERLOAD * at.rate, seconds, [running.pid], 2500 + number, deadline_s=DEADLINE_S
            )
            in_time = run.latencies_ms <= DEADLINE_S * 1e3
            found.note("overload_capacity_rps", at.rate)
            found.note("goodput_at_3x_overload_ratio", run.offered * float(in_time.mean()) / at.rate)
            found.note("overload_refused_p99_ms", float(np.percentile(run.refused_ms, 99)))
            found.note("overload_never_answered_ratio", run.unanswered)
            # What stands in the way of all of the capacity: the cores are shared, and to say no costs, too.
            answered, held_ms = float(in_time.mean()), at.run.server_cpu_ms if at.run else float("nan")
            refusal_ms = (run.server_cpu_ms - answered * held_ms) / (1 - answered)
            found.note("overload_refusal_cpu_ms", refusal_ms)
            found.note("overload_answer_cpu_ms", held_ms)
            found.note("overload_refusals_cores", run.offered * (1 - answered) * refusal_ms / 1e3)
            found.note("overload_load_cores", run.offered * run.load_cpu_ms / 1e3)
            again = load.open_loop(
                running.target, 0.7 * at.rate, seconds, [running.pid], 2700 + number, deadline_s=DEADLINE_S
            )
            found.note("after_overload_p99_ms", again.percentile(99))
            found.note("after_overload_refused_ratio", float((~np.isfinite(again.latencies_ms)).mean()))
            print(
                f"overload: {at.rate:.0f}/s held, {found.last('goodput_at_3x_overload_ratio'):.3f} of it at thrice",
                flush=True,
            )
    return found.figures(f"one instance, {WIDE} candidates, deadline {DEADLINE_S * 1e3:g} ms")


def bst(rounds: int) -> list[Figure]:
    """Rankers that read the user once (the recipe `sequences`, and `shop`, which has cross-attention), against BST,
    which reads them for every candidate: all of the same width, depth and history, with weights of chance, each on its
    fastest exact engine, one thread, 500 candidates."""
    from dataclasses import replace

    from trirank_backend.scoring import exact_engines, load_ranker
    from trirank_build.compression.chain import LINK
    from trirank_build.engines.latency import fastest_engine, latencies, scoring_calls
    from trirank_build.export.onnx import write_graph
    from trirank_build.models.family import make_ranker
    from trirank_build.recipe import load_recipe
    from trirank_build.training.run import TrainedRun

    releases()
    spec = replace(TrainedRun.load(ROOT / "work" / "demo" / "compression" / LINK).features.spec, history_length=50)
    size = {"dim": 64, "heads": 2, "ffn": 128, "encoder_blocks": 1}
    rankers, engines = {}, {}
    for name in ("sequences", "shop", "bst"):
        recipe = load_recipe(name)
        graph = WORK / "bst" / f"{name}.onnx"
        graph.parent.mkdir(parents=True, exist_ok=True)
        module = make_ranker(spec, recipe.model.model_copy(update=size)).eval()
        write_graph(module, spec, graph)
        engines[name], _ = fastest_engine(graph, spec, exact_engines(), 500)
        rankers[name] = (load_ranker(graph, engines[name]), spec)
    found = Rounds()
    for _ in range(rounds):
        took = latencies(scoring_calls(rankers, 500), rounds=10, calls_a_round=1)
        ours_ms, cross_ms, bst_ms = (statistics.median(took[name]) for name in ("sequences", "shop", "bst"))
        found.note("shared_context_500_ms", ours_ms)
        found.note("cross_attention_500_ms", cross_ms)
        found.note("bst_500_ms", bst_ms)
        found.note("shared_context_vs_bst_500_ratio", bst_ms / ours_ms)
        found.note("cross_attention_vs_bst_500_ratio", bst_ms / cross_ms)
    told = ", ".join(f"{name} on {engine}" for name, engine in engines.items())
    return found.figures(f"d 64, one block, history of 50, FP32, one thread: {told}")


SOAK_S, WINDOW_S, SOAK_SHARE = 1200.0, 30.0, 0.7


def soak(seconds: float) -> list[Figure]:
    """Twenty minutes at seven tenths of capacity: does anything grow?"""
    own = releases()["single"]
    requests = make_requests(own)
    rows: list[list[float]] = []
    with ours(own, requests) as running:
        load.closed_loop(running.target, 8, 2.0, [running.pid])
        rate = SOAK_SHARE * capacity(running, 2000.0, 4.0, 3000).rate
        started = time.monotonic()
        while (now := time.monotonic() - started) < seconds:
            run = load.open_loop(running.target, rate, WINDOW_S, [running.pid], 4000 + len(rows))
            failed = float((~np.isfinite(run.latencies_ms)).sum())
            rows.append([now, *_held(running.pid), run.percentile(50), run.percentile(99), failed])
            print("soak: " + " ".join(f"{value:.1f}" for value in rows[-1]), flush=True)
    table = np.array(rows)
    minutes = table[:, 0] / 60
    note = f"{rate:.0f} requests/s, 0.7 of capacity, {seconds / 60:.0f} minutes, a value each {WINDOW_S:g} s"
    figures, worst = [], 0.0
    for at, (name, unit) in enumerate(SOAKED, 1):
        # The first two minutes settle.
        settled = minutes >= 2
        slope, intercept, spread = _theil_sen(minutes[settled], table[settled, at])
        grown = (slope * np.ptp(minutes[settled])) / max(intercept, 1e-9)
        figures.append(Figure(f"soak_{name}_per_minute", round(slope, 5), *(round(s, 5) for s in spread), unit, note))
        middle = float(np.median(table[settled, at]))
        figures.append(
            Figure(
                f"soak_{name}",
                round(middle, 3),
                round(table[settled, at].min(), 3),
                round(table[settled, at].max(), 3),
                unit,
                note,
            )
        )
        worst = max(worst, grown if spread[0] > 0 else 0.0)
    figures.append(Figure("soak_failed", *[float(table[:, -1].sum())] * 3, "requests", note))
    figures.append(
        Figure(
            "soak_slope",
            *[round(worst, 4)] * 3,
            "",
            f"the largest share by which anything grew whose slope's interval is above zero; {note}",
        )
    )
    return figures


SOAKED = (("memory", "MB"), ("handles", ""), ("shm", "MB"), ("p50", "ms"), ("p99", "ms"))


def _held(pid: int) -> tuple[float, float, float]:
    """Megabytes of memory, open handles, and megabytes of shared memory of a server and its children."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    memory = sum(process.memory_full_info().uss for process in family) / 1e6
    shared = sum(file.stat().st_blocks * 512 for file in Path("/dev/shm").iterdir() if file.is_file()) / 1e6
    return memory, float(sum(process.num_fds() for process in family)), shared


def _theil_sen(x: np.ndarray, y: np.ndarray) -> tuple[float, float, tuple[float, float]]:
    """Slope, intercept, and the slope's 95 % interval; outliers of a shared machine do not decide."""
    from scipy.stats import theilslopes

    found = theilslopes(y, x, 0.95)
    return float(found.slope), float(found.intercept), (float(found.low_slope), float(found.high_slope))


def main() -> None:
    """Measure and write ``results/peers.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--soak-seconds", type=float, default=SOAK_S)
    parts = ("servers", "one_caller", "limits", "sizes", "overload", "bst", "soak")
    parser.add_argument("--only", choices=parts, action="append")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    given = parser.parse_args()
    # So that servers are ended also where this process is: each of them has a session of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    # Servers, bare ones among them, and this process look up users in the same file.
    os.environ.update(stores_of(releases()["ensemble"]).environment())
    calls: dict[str, Callable[[], list[Figure]]] = {
        "servers": lambda: servers(given.peers, given.rounds, given.seconds),
        "one_caller": lambda: one_caller(given.peers, 4 * given.rounds, given.seconds / 5),
        "limits": lambda: limits(given.rounds, given.seconds),
        "sizes": lambda: sizes(given.rounds, given.seconds),
        "overload": lambda: overload(given.rounds, given.seconds),
        "bst": lambda: bst(given.rounds),
        "soak": lambda: soak(given.soak_seconds),
    }
    for name in given.only or parts:
        figures = [figure._replace(name=figure.name.removesuffix("_ratio")) for figure in calls[name]()]
        write("peers", figures, keep=True)
        for figure in figures:
            print(f"{figure.name:44} {figure.value:10.3f} {figure.unit:10} [{figure.low:.3f}, {figure.high:.3f}]")


if __name__ == "__main__":
    main()
