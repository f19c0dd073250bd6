"""What does the server cost, and what would one get without it?

    python benchmarks/serving.py [--rounds N] [--seconds S] [--only in_process|servers|poison]

The demo's release at 200 candidates: the stages in process, the ensemble, all stages in one Triton model, and a bare
``grpc.aio`` server that calls the very same stages. One machine, one run, processes of their own, rounds of all kinds
in turns; figures are medians over the rounds with their smallest and largest. Load comes from h2load (see
``load.py``), which shares the cores with the servers. All of them read users' histories from the demo's store. The
last part calls every model with a thousand hostile requests
while sane ones go on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import load
import numpy as np
from peer_servers import PEERS, answer_of
from peer_servers import served as peer_server
from results import ROOT, WORK, Figure, write
from trirank import RankClient, RankError, RankRequest
from trirank import contract as c
from trirank_backend.pipeline import Pipeline
from trirank_backend.requests import Tensors
from trirank_build.compression.chain import LINK
from trirank_build.data.dataset import Dataset
from trirank_build.demo import build
from trirank_build.repository.assemble import assemble
from trirank_build.repository.configs import Instances
from trirank_build.repository.release import REQUESTS, graph_place, load_manifest
from trirank_build.serving.server import TritonServer
from trirank_build.serving.stores import Stores, usual_stores
from trirank_build.training.run import TrainedRun
from trirank_loadtest.hostile import hostile_calls

CANDIDATES = 200
CONCURRENCIES = (1, 8, 32)
BATCH = (31, 64, 1, 1000)
"""A mixed batch: so many requests of so few candidates, and one of many with a query."""
HOSTILE = 1000
PLAIN = {
    "grpc_aio": (1, 0), "grpc_aio_batching": (1, c.MAX_BATCH),
    "grpc_aio_batching_process_a_core": (os.cpu_count() or 1, c.MAX_BATCH),
}  # fmt: skip
"""Bare gRPC servers: processes, and the largest batch, 0: a request at a time (see peers/grpc_aio.py). The first is
what one writes first, the others what one comes to."""


def make_requests(release: Path, count: int = 64, candidates: int = CANDIDATES) -> list[RankRequest]:
    """The release's recorded users and queries, scenarios in turns, each with so many items of the catalogue."""
    ids = np.load(release / "features" / "catalogue" / "ids.npy")
    rng = np.random.default_rng(7)
    by_scenario: dict[str, list[Any]] = {}
    for raw in json.loads((release / REQUESTS).read_text()):
        by_scenario.setdefault(raw["scenario"], []).append(raw)
    recorded = itertools.cycle(itertools.chain.from_iterable(zip(*by_scenario.values(), strict=True)))
    requests = []
    for raw in itertools.islice(recorded, count):
        chosen = rng.choice(ids, candidates, replace=False)
        scores = np.sort(rng.normal(size=candidates))[::-1]
        requests.append(RankRequest.from_dict(raw | {"item_ids": chosen, "retrieval_scores": scores}))
    return requests


def as_tensors(request: RankRequest) -> Tensors:
    """What Triton would hand to the first stage."""
    count = len(request.item_ids)
    bucket = c.bucket_for(count)
    ids = np.full((1, bucket), c.PAD_ITEM_ID, np.int64)
    ids[0, :count] = request.item_ids
    scores = np.zeros((1, bucket), np.float32)
    scores[0, :count] = request.retrieval_scores
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


class Rounds:
    """Values of figures, round by round."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def note(self, name: str, value: float) -> None:
        """One round's value."""
        self._values.setdefault(name, []).append(value)

    def last(self, name: str) -> float:
        """Of the round that is under way."""
        return self._values[name][-1]

    def copy(self, name: str, other: str) -> None:
        """Give a figure another name beside its own."""
        self._values[other] = self._values[name]

    def figures(self, note: str) -> list[Figure]:
        """Median, smallest and largest of each."""
        return [
            Figure(name, *(round(f(values), 4) for f in (statistics.median, min, max)), _unit(name), note)
            for name, values in self._values.items()
        ]


def _unit(name: str) -> str:
    units = {
        "_cores": "cores",
        "_rps_vs_": "",
        "_over_": "",
        "_ratio": "",
        "_rps": "requests/s",
        "_us": "µs",
        "_batch_mean": "requests",
    }
    return next((unit for part, unit in units.items() if part in name), "ms")


def medians(calls: dict[str, Callable[[int], Any]], turns: int) -> dict[str, float]:
    """Median seconds of each call, all in turns; a call is told the number of its turn."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 20):
        for name, call in calls.items():
            started = time.perf_counter()
            call(turn)
            took[name].append(time.perf_counter() - started)
    return {name: float(np.median(times[20:])) for name, times in took.items()}


def in_process(release: Path, rounds: int) -> list[Figure]:
    """The stages without a server: each alone, called again and again, and all in a row."""
    found = Rounds()
    pipeline = Pipeline.load(release, release / graph_place(load_manifest(release)["pipeline"]), engine_of(release))
    preprocess, ranker, rerank = pipeline._preprocess, pipeline._ranker, pipeline._rerank
    tensors = {size: [as_tensors(r) for r in make_requests(release, 64, size)] for size in (64, 200, 1000)}
    prepared = {size: [preprocess([one])[0] for one in tensors[size]] for size in tensors}
    scores = {size: [ranker(one.ranker) for one in prepared[size]] for size in tensors}
    many, few, once, wide = BATCH
    asking = next(one for one in tensors[wide] if one["QUERY"][0, 0])
    parts = {"few": tensors[few][:many], "wide": [asking] * once}
    for _ in range(rounds):
        alone: dict[str, Callable[[int], Any]] = {}
        for size in (200, 1000):
            alone[f"preprocess_us_{size}"] = lambda turn, size=size: preprocess([tensors[size][turn % 64]])
            alone[f"ranker_us_{size}"] = lambda turn, size=size: ranker(prepared[size][turn % 64].ranker)
            alone[f"rerank_us_{size}"] = lambda turn, size=size: rerank(
                scores[size][turn % 64], prepared[size][turn % 64].handover
            )
        for name, call in alone.items():  # each by itself, as the stage of an ensemble runs
            found.note(name, medians({name: call}, 200)[name] * 1e6)
        row = medians({"all": lambda turn: pipeline([tensors[200][turn % 64]])}, 400)
        found.note("in_process_p50_ms", row["all"] * 1e3)
        one = medians({"all": lambda turn: pipeline([tensors[200][0]])}, 400)
        found.note("in_process_one_request_p50_ms", one["all"] * 1e3)
        batches = {
            "few": lambda turn: preprocess(parts["few"]), "wide": lambda turn: preprocess(parts["wide"]),
            "mixed": lambda turn: preprocess([*parts["few"], *parts["wide"]]),
        }  # fmt: skip
        took = medians(batches, 100)
        for name, seconds in took.items():
            found.note(f"preprocess_batch_{name}_us", seconds * 1e6)
        found.note("mixed_batch_ratio", took["mixed"] / (took["few"] + took["wide"]))
        eight = medians({"all": lambda turn: pipeline(tensors[200][8 * (turn % 8) : 8 * (turn % 8) + 8])}, 50)
        found.note("in_process_batch_8_ms_per_request", eight["all"] * 1e3 / 8)
    pipeline.close()
    return found.figures(f"in process, median of {rounds} rounds")


def engine_of(release: Path) -> str:
    """What scores."""
    return str(load_manifest(release)["engine"])


def stores_of(ensemble: Path) -> Stores:
    """The demo's."""
    return usual_stores(ensemble, None, None)


def releases() -> dict[str, Path]:
    """The demo's, and the same with all stages in one process, of which there is one or one a core."""
    ensemble = build(ROOT / "work" / "demo")
    work = ROOT / "work" / "demo"
    run, dataset = TrainedRun.load(work / "compression" / LINK), Dataset.load(work / "data")
    # Servers, the bare ones among them, and this process look up users in the same file.
    os.environ.update(stores_of(ensemble).environment())
    found = {"ensemble": ensemble}
    for name, count in (("single", os.cpu_count() or 1), ("single_1_instance", 1)):
        found[name] = assemble(
            run, dataset, work / "ranker.onnx", WORK / "single", pipeline="single", engine=engine_of(ensemble),
            instances=Instances(single=count),
        )  # fmt: skip
    return found


def stage_times(before: dict, after: dict, callers: int) -> dict[str, float]:
    """``MODEL_PART`` → ms a request, and ``MODEL_batch``, between two readings of Triton's statistics."""
    found = {}
    for model in before.keys() - {c.ENSEMBLE}:
        old, new = before[model], after[model]

        def grown(path: tuple[str, ...], old=old, new=new) -> float:
            for key in path:
                old, new = old.get(key, {}), new.get(key, {})
            return float(new or 0) - float(old or 0)

        requests, executions = grown(("inference_stats", "success", "count")), grown(("execution_count",))
        failed = grown(("inference_stats", "fail", "count"))
        assert failed <= callers, (
            f"{model} failed {failed} requests"
        )  # each caller leaves in the middle of its last one
        for part in ("queue", "compute_input", "compute_infer", "compute_output"):
            found[f"{model}_{part}"] = grown(("inference_stats", part, "ns")) / requests / 1e6
        found[f"{model}_batch_mean"] = grown(("inference_count",)) / executions
    return found


def servers(served: dict[str, Path], rounds: int, seconds: float) -> list[Figure]:
    """Every server under the same load, in turns."""
    found = Rounds()
    requests = make_requests(served["ensemble"])
    with ExitStack() as running:
        started = {
            name: running.enter_context(
                TritonServer(release, stores=stores_of(served["ensemble"]), log=WORK / f"{name}.log")
            )
            for name, release in served.items()
        }
        for server in started.values():
            server.wait_ready()
        places = {name: (load.triton(server.grpc, requests), server.pid) for name, server in started.items()}
        bare = PEERS["grpc_aio"]
        for name, (workers, most) in PLAIN.items():
            settings = {"PEER_WORKERS": str(workers), "PEER_MAX_BATCH": str(most)}
            address, pid = running.enter_context(peer_server(bare, served["ensemble"], settings, requests[0]))
            places[name] = (bare.target(address, requests), pid)
        # h2load sees that it is answered, not what: each request that it will send is answered alike by all first.
        for at in range(load.PROCESSES):
            answers = [
                answer_of(replace(target, bodies=target.bodies[at:]), "grpc" if name in PLAIN else "")
                for name, (target, _) in places.items()
            ]
            assert all(one == answers[0] for one in answers), "the servers answer different things"
        for target, pid in places.values():
            load.closed_loop(target, 8, seconds, [pid])
        for number in range(rounds):
            order = list(places)[number % len(places) :] + list(places)[: number % len(places)]
            for callers in CONCURRENCIES:
                for name in order:
                    target, pid = places[name]
                    before = started[name].statistics() if name in started else {}
                    run = load.closed_loop(target, callers, seconds, [pid])
                    if name in started:
                        for stage, value in stage_times(before, started[name].statistics(), callers).items():
                            found.note(f"{name}_{stage.replace('single_', '')}_c{callers}", value)
                    p50, p99 = run.percentile(50), run.percentile(99)
                    found.note(f"{name}_p50_ms_c{callers}", p50)
                    found.note(f"{name}_p99_ms_c{callers}", p99)
                    found.note(f"{name}_p99_over_p50_c{callers}", p99 / p50)
                    found.note(f"{name}_rps_c{callers}", run.rate)
                    found.note(f"{name}_server_cpu_ms_c{callers}", run.server_cpu_ms)
                rate = found.last(f"single_rps_c{callers}")
                for other in places.keys() - {"single"}:
                    found.note(f"single_rps_vs_{other}_c{callers}", rate / found.last(f"{other}_rps_c{callers}"))
                one = found.last(f"single_1_instance_rps_c{callers}")
                same = found.last(f"grpc_aio_batching_rps_c{callers}")
                found.note(f"single_1_instance_rps_vs_grpc_aio_batching_c{callers}", one / same)
        for callers in (8,):
            for pipeline in ("ensemble", "single"):
                found.copy(f"{pipeline}_server_cpu_ms_c{callers}", f"{pipeline}_server_cpu_ms_per_request")
    return found.figures(f"{CANDIDATES} candidates, h2load, median of {rounds} rounds of {seconds:g} s")


def poison(release: Path, name: str) -> Figure:
    """Hostile calls of every model, while sane requests go on: how many of those fail, or are answered otherwise."""
    requests = make_requests(release, 16)
    failed, answered, stop = [], 0, threading.Event()
    with (
        tempfile.TemporaryDirectory() as folder,
        TritonServer(release, stores=Stores(f"sqlite:{folder}/users.sqlite")) as server,
    ):
        server.wait_ready()
        with RankClient(server.grpc, deadline_s=10) as client:
            expected = [client.rank(request).item_ids.tolist() for request in requests]

        def sane(seed: int) -> None:
            nonlocal answered
            with RankClient(server.grpc, deadline_s=10, retry=None) as client:
                for at in itertools.count(seed):
                    if stop.is_set():
                        return
                    try:
                        if client.rank(requests[at % 16]).item_ids.tolist() != expected[at % 16]:
                            failed.append("another answer")
                    except RankError as error:
                        failed.append(str(error))
                    answered += 1

        threads = [threading.Thread(target=sane, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        codes = {}
        for model in dict.fromkeys([c.ENSEMBLE, *server.served.stages, c.FEEDBACK]):
            codes[model] = hostile_calls(server.grpc, model, HOSTILE).statuses
        stop.set()
        for thread in threads:
            thread.join()
    for words in dict.fromkeys(failed):
        print(f"  {words}")
    told = "; ".join(f"{model}: {dict(sorted(found.items()))}" for model, found in codes.items())
    note = f"of {answered} sane requests beside {HOSTILE} hostile calls of each model ({told})"
    print(f"{name}: {note}")
    return Figure(f"poisoned_failures_{name}", *[float(len(failed))] * 3, "requests", note)


def main() -> None:
    """Measure and write ``results/serving.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--only", choices=["in_process", "servers", "poison"])
    given = parser.parse_args()
    served = releases()
    figures = []
    if given.only in (None, "in_process"):
        figures += in_process(served["ensemble"], given.rounds)
    if given.only in (None, "servers"):
        figures += servers(served, given.rounds, given.seconds)
    if given.only in (None, "poison"):
        parts = [poison(served[name], name) for name in ("ensemble", "single")]
        worst = max(parts, key=lambda figure: figure.value)
        figures += [*parts, worst._replace(name="poisoned_failures", note="the larger of both pipelines")]
    by_name = {figure.name: figure for figure in figures}
    if "in_process_one_request_p50_ms" in by_name and "single_p50_ms_c1" in by_name:
        inside = by_name["in_process_one_request_p50_ms"]  # the one that the only caller sends
        for name in ("single", "ensemble", *PLAIN):
            seen = by_name[f"{name}_p50_ms_c1"]
            values = (seen.value - inside.value, seen.low - inside.high, seen.high - inside.low)
            note = "p50 of one caller above the same request in process"
            figures.append(Figure(f"{name}_extra_ms_c1", *(round(value, 4) for value in values), "ms", note))
    write("serving", figures, keep=given.only is not None)
    for figure in figures:
        print(f"{figure.name:44} {figure.value:10.3f} {figure.unit:10} [{figure.low:.3f}, {figure.high:.3f}]")


if __name__ == "__main__":
    main()
