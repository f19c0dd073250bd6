"""What does the server cost? The same requests through the stages in process and through the ensemble over gRPC.

    python benchmarks/serving.py [--release DIR] [--rounds N]

One machine, one run: client and server share its cores, rounds of all kinds take turns, figures are medians over
the rounds with their smallest and largest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from results import ROOT, Figure, write
from trirank import RankClient, RankRequest
from trirank import contract as c
from trirank_backend.scoring import load_ranker
from trirank_backend.stages import Preprocess, Rerank, Tensors
from trirank_build.demo import build
from trirank_build.repository.release import REQUESTS, load_manifest
from trirank_build.serving.server import TritonServer

CANDIDATES = 200
CONCURRENCIES = (1, 8, 32)
CALLS = {1: 400, 8: 1200, 32: 2400}
PAUSE_S = 0.004
STAGES = c.STAGES


def make_requests(release: Path, count: int = 64) -> list[RankRequest]:
    """The release's recorded users and queries, each with CANDIDATES items of the catalogue."""
    ids = np.load(release / "features" / "catalogue" / "ids.npy")
    rng = np.random.default_rng(7)
    recorded = itertools.cycle(json.loads((release / REQUESTS).read_text()))
    requests = []
    for raw in itertools.islice(recorded, count):
        candidates = rng.choice(ids, CANDIDATES, replace=False)
        scores = np.sort(rng.normal(size=CANDIDATES))[::-1]
        requests.append(RankRequest.from_dict(raw | {"item_ids": candidates, "retrieval_scores": scores}))
    return requests


def as_tensors(request: RankRequest) -> Tensors:
    """What Triton would hand to the first stage."""
    bucket = c.bucket_for(CANDIDATES)
    ids = np.full((1, bucket), c.PAD_ITEM_ID, np.int64)
    ids[0, :CANDIDATES] = request.item_ids
    scores = np.zeros((1, bucket), np.float32)
    scores[0, :CANDIDATES] = request.retrieval_scores
    user = c.ANONYMOUS_USER if request.user_id is None else int(request.user_id)
    return {
        "USER_ID": np.array([[user]], np.int64),
        "ITEM_IDS": ids,
        "TOP_K": np.array([[request.top_k]], np.int32),
        "SCENARIO": np.array([[str(request.scenario).encode()]], object),
        "QUERY": np.array([[request.query.encode()]], object),
        "RETRIEVAL_SCORES": scores,
        "TIMESTAMP": np.array([[request.timestamp]], np.int64),
    }


class InProcess:
    """The three stages, called one after the other."""

    def __init__(self, release: Path) -> None:
        self.preprocess = Preprocess.load(release)
        graph = release / "models" / c.RANKER / "1" / "model.onnx"
        self.ranker = load_ranker(graph, load_manifest(release)["engine"])
        self.rerank = Rerank.load(release)

    def __call__(self, tensors: Tensors) -> Tensors:
        packed = self.preprocess([tensors])[0]
        assert isinstance(packed, dict), packed
        packed["scores"] = self.ranker(packed)
        return self.rerank([{**packed, "TOP_K": tensors["TOP_K"], "SCENARIO": tensors["SCENARIO"]}])[0]


def timed(call, requests, calls: int, workers: int) -> tuple[list[float], float]:
    """Latencies in ms and requests a second of ``calls`` calls by ``workers`` threads."""
    turns = itertools.cycle(requests)
    todo = [next(turns) for _ in range(calls)]

    def one(request) -> float:
        started = time.perf_counter()
        call(request)
        return (time.perf_counter() - started) * 1e3

    started = time.perf_counter()
    if workers == 1:
        latencies = [one(request) for request in todo]
    else:
        with ThreadPoolExecutor(workers) as pool:
            latencies = list(pool.map(one, todo))
    return latencies, calls / (time.perf_counter() - started)


def paced(call, requests) -> float:
    """Median ms of calls with a pause before each, as long as a stub waits for its next turn: what the same code takes
    on a core that has been idle, on caches that have gone cold."""
    times = []
    for request in requests * 2:
        time.sleep(PAUSE_S)
        started = time.perf_counter()
        call(request)
        times.append((time.perf_counter() - started) * 1e3)
    return float(np.median(times))


def stage_times(before: dict, after: dict) -> dict[str, float]:
    """``STAGE_PART`` → ms a request, and ``STAGE_batch``, between two readings of the statistics."""
    found = {}
    for stage in STAGES:
        old, new = before[stage], after[stage]

        def grown(path: tuple[str, ...], old=old, new=new) -> float:
            for key in path:
                old, new = old.get(key, {}), new.get(key, {})
            return float(new or 0) - float(old or 0)

        requests = grown(("inference_stats", "success", "count"))
        executions = grown(("execution_count",))
        for part in ("queue", "compute_input", "compute_infer", "compute_output"):
            found[f"{stage}_{part}"] = grown(("inference_stats", part, "ns")) / requests / 1e6
        found[f"{stage}_batch"] = grown(("inference_count",)) / executions
    return found


def pin(pid: int, cores: set[int]) -> None:
    """Keep a process, its children and all their threads on these cores."""
    process = psutil.Process(pid)
    for member in (process, *process.children(recursive=True)):
        for thread in member.threads():
            os.sched_setaffinity(thread.id, cores)


def spread(name: str, values: list[float], unit: str, note: str = "") -> Figure:
    """Median, smallest and largest."""
    return Figure(name, *(round(v, 4) for v in (statistics.median(values), min(values), max(values))), unit, note)


def main() -> None:
    """Measure and write ``results/serving.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--release", type=Path, help="the demo's by default")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    release = arguments.release or build(ROOT / "work" / "demo")
    requests = make_requests(release)
    tensors = [as_tensors(request) for request in requests]
    local = InProcess(release)
    rounds: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        rounds.setdefault(name, []).append(value)

    with TritonServer(release) as server, RankClient(server.grpc, deadline_s=10) as client:
        server.wait_ready()
        expected = local(tensors[0])
        answer = client.rank(requests[0])
        assert np.array_equal(answer.item_ids, expected["RANKED_IDS"][0]), "the server answers something else"
        timed(client.rank, requests, 200, 8)
        for _ in range(arguments.rounds):
            latencies, _rate = timed(local, tensors, CALLS[1], 1)
            note("in_process_p50_ms", float(np.percentile(latencies, 50)))
            note("in_process_p99_ms", float(np.percentile(latencies, 99)))
            note("in_process_paced_p50_ms", paced(local, tensors))
            for concurrency in CONCURRENCIES:
                before = server.statistics()
                latencies, rate = timed(client.rank, requests, CALLS[concurrency], concurrency)
                for name, value in stage_times(before, server.statistics()).items():
                    note(f"{name}_c{concurrency}", value)
                note(f"ensemble_p50_ms_c{concurrency}", float(np.percentile(latencies, 50)))
                note(f"ensemble_p99_ms_c{concurrency}", float(np.percentile(latencies, 99)))
                note(f"ensemble_rps_c{concurrency}", rate)
            note("ensemble_extra_ms_c1", rounds["ensemble_p50_ms_c1"][-1] - rounds["in_process_p50_ms"][-1])
            # The other way that was tried: all stages on one core, so that a hop wakes no other one.
            cores = os.sched_getaffinity(0)
            if len(cores) > 1:
                pin(server.pid, {max(cores)})
                latencies, _rate = timed(client.rank, requests, CALLS[1], 1)
                note("pinned_ensemble_p50_ms_c1", float(np.percentile(latencies, 50)))
                note("pinned_extra_ms_c1", rounds["pinned_ensemble_p50_ms_c1"][-1] - rounds["in_process_p50_ms"][-1])
                note("pinned_rps_c32", timed(client.rank, requests, CALLS[32], 32)[1])
                pin(server.pid, cores)
    figures = []
    for name, values in rounds.items():
        unit = "ms" if "_ms" in name else "requests/s" if "_rps" in name else "requests" if "_batch" in name else "ms"
        name = name.replace("_batch_c", "_batch_mean_c")
        figures.append(spread(name, values, unit, f"{CANDIDATES} candidates, median of {arguments.rounds} rounds"))
    write("serving", figures)
    for figure in figures:
        print(f"{figure.name:36} {figure.value:10.3f} {figure.unit:10} [{figure.low:.3f}, {figure.high:.3f}]")


if __name__ == "__main__":
    main()
