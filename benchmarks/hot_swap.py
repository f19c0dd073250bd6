"""Does a swap under load lose a request, mix two releases, or keep callers waiting?

    python benchmarks/hot_swap.py [--swaps N] [--bad N] [--rate R] [--way in_place|without_draining]

Two releases of the demo's shop whose shapes agree while vocabulary and weights do not, so that a mixture would answer,
and nothing but the scores would tell. Every answer is held to what each release's stages give in process. Requests come
at a fixed rate, whether or not the ones before have been answered; each swap is followed by a rest of the same length,
and p99 is compared between requests that came in while a swap was under way and those that came in during a rest.
Client and server share the machine's cores, so what starting three Python stubs takes is taken from the requests too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
from results import ROOT, WORK, Figure, write
from serving import CANDIDATES, as_tensors, engine_of, make_requests
from trirank import RankClient, RankError, RankRequest, RankResponse
from trirank_backend.pipeline import Pipeline
from trirank_build.data.dataset import Dataset
from trirank_build.demo import build
from trirank_build.errors import ServeError
from trirank_build.recipe import load_recipe
from trirank_build.repository.assemble import assemble
from trirank_build.repository.release import MANIFEST, graph_place
from trirank_build.repository.reports import export_run
from trirank_build.serving import swapping
from trirank_build.serving.live import Served
from trirank_build.serving.server import TritonServer
from trirank_build.training.trainer import train

CALLERS = 16
TOLERANCE = 1e-3
"""Of a score: a batch's company changes its last digits; another release changes it by far more."""


@dataclass
class Answer:
    """One request: when it was due, how long it took from then on, and what came of it."""

    due: float
    took: float
    outcome: str


def two_releases() -> list[Path]:
    """Trained on the demo's data with another seed and another vocabulary."""
    build(ROOT / "work" / "demo")
    dataset, folder = Dataset.load(ROOT / "work" / "demo" / "data"), WORK / "hot_swap"
    made = []
    for number, vocabulary in enumerate((1_000, 300)):
        recipe = load_recipe("shop")
        features = recipe.features.model_copy(update={"vocabulary": vocabulary})
        training = recipe.training.model_copy(update={"epochs": 1})
        recipe = recipe.model_copy(update={"features": features, "training": training, "seed": number})
        run, onnx = train(recipe, dataset, folder / f"run{number}", fresh=True), folder / f"ranker{number}.onnx"
        export_run(run, onnx)
        made.append(assemble(run, dataset, onnx, folder / "releases", engine="openvino"))
    return made


def as_scores(ids: np.ndarray, scores: np.ndarray) -> dict[int, float]:
    """Item → score of an answer, padding left out."""
    return {int(item): float(score) for item, score in zip(ids, scores, strict=True) if item >= 0}


def in_place(server: TritonServer, release: Path) -> None:
    """What was tried first: the same names, whose contents change one after the other."""
    served = replace(Served.of(release), name=server.served.name)
    server._live.add(served)
    for model in served.stages:
        server._control.load(model)
    server.served = served


def without_draining(server: TritonServer, release: Path) -> None:
    """The way that serves, but the old models go at once."""
    swapping.DRAIN_S = 0.0
    server.swap(release)


WAYS = {"swap": TritonServer.swap, "in_place": in_place, "without_draining": without_draining}


class Health(threading.Thread):
    """Asks what a load balancer asks, a hundred times a second."""

    def __init__(self, address: str, stop: threading.Event) -> None:
        super().__init__()
        self._address, self._stop_it = address, stop
        self.polls = self.not_ready = 0

    def run(self) -> None:
        """Until ``stop`` is set."""
        connection = HTTPConnection(self._address, timeout=10)
        while not self._stop_it.wait(0.01):
            connection.request("GET", "/v2/health/ready")
            answer = connection.getresponse()
            answer.read()
            self.polls += 1
            self.not_ready += answer.status != 200
        connection.close()


def bad_release(release: Path, number: int) -> Path:
    """A copy of a release with a graph that is none."""
    copy = WORK / "hot_swap" / f"bad{number}"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(release, copy)
    (copy / graph_place("ensemble")).write_bytes(b"no graph")
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(manifest | {"release": f"bad{number:09}"}))
    return copy


class Judge:
    """Tells which release an answer is of, by the scores of its stages in process."""

    def __init__(self, releases: list[Path], requests: list[RankRequest]) -> None:
        self.expected = []
        for release in releases:
            stages = Pipeline.load(release, release / graph_place("ensemble"), engine_of(release))
            answers = [stages([as_tensors(request)])[0] for request in requests]
            self.expected.append([as_scores(a["RANKED_IDS"][0], a["SCORES"][0]) for a in answers])

    def outcome(self, number: int, answer: RankResponse) -> str:
        """ "0" or "1", or "mixed"."""
        given = as_scores(answer.item_ids, answer.scores)
        for at, of in enumerate(self.expected):
            wanted = of[number]
            if all(key in wanted and abs(wanted[key] - score) < TOLERANCE for key, score in given.items()):
                return str(at)
        return "mixed"


def main() -> None:
    """Measure and write ``results/hot_swap.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--bad", type=int, default=5, help="promotions of a release that cannot be loaded")
    parser.add_argument("--rate", type=float, default=50.0, help="requests a second")
    parser.add_argument(
        "--way", choices=sorted(WAYS), default="swap", help="the one that serves, or one that was tried"
    )
    arguments = parser.parse_args()
    releases = two_releases()
    # All candidates come back, so that every score can be judged.
    requests = [replace(request, top_k=CANDIDATES) for request in make_requests(releases[0], 32)]
    judge = Judge(releases, requests)
    answers: list[Answer] = []
    windows: list[tuple[float, float]] = []
    stop = threading.Event()

    with TritonServer(releases[0], swappable=True) as server, RankClient(server.grpc, deadline_s=10) as client:
        server.wait_ready()

        def ask(number: int, due: float) -> None:
            try:
                answer = client.rank(requests[number])
                took = time.perf_counter() - due
                outcome = judge.outcome(number, answer)
            except RankError as error:
                took, outcome = time.perf_counter() - due, f"failed: {error}"
            answers.append(Answer(due, took, outcome))

        def load() -> None:
            started = time.perf_counter()
            with ThreadPoolExecutor(CALLERS) as pool:
                at = 0
                while not stop.is_set():
                    due = started + at / arguments.rate
                    time.sleep(max(0.0, due - time.perf_counter()))
                    pool.submit(ask, at % len(requests), due)
                    at += 1

        thread = threading.Thread(target=load)
        thread.start()
        health = Health(server.http, stop)
        health.start()
        time.sleep(3)
        for number in range(arguments.swaps):
            started = time.perf_counter()
            WAYS[arguments.way](server, releases[(number + 1) % 2])
            ended = time.perf_counter()
            windows.append((started, ended))
            print(f"swap {number + 1}: {ended - started:.2f} s", flush=True)
            time.sleep(ended - started)
        before = health.polls, health.not_ready
        for number in range(arguments.bad):
            try:
                server.swap(bad_release(releases[0], number))
                raise SystemExit("a release that cannot be loaded was served")
            except ServeError as error:
                print(f"bad promotion {number + 1}: {str(error)[:100]}", flush=True)
            time.sleep(1)
        polls, not_ready = health.polls - before[0], health.not_ready - before[1]
        stop.set()
        thread.join()
        health.join()

    due, took = (np.array([getattr(a, name) for a in answers]) for name in ("due", "took"))
    during = np.zeros(len(due), bool)
    for started, ended in windows:
        during |= (due >= started) & (due < ended)
    failed = [a.outcome for a in answers if a.outcome.startswith("failed")]
    mixed = sum(a.outcome == "mixed" for a in answers)
    seen = {of: sum(a.outcome == of for a in answers) for of in ("0", "1")}
    note = (
        f"{len(answers)} requests at {arguments.rate:g} a second, {arguments.swaps} swaps, {seen['0']} answered by the "
        f"one release and {seen['1']} by the other"
    )
    rng = np.random.default_rng(0)
    p99 = {name: np.percentile(took[mask], 99) * 1e3 for name, mask in (("swap", during), ("rest", ~during))}
    ratios = []
    for _ in range(1000):
        swap, rest = (rng.choice(took[mask], mask.sum()) for mask in (during, ~during))
        ratios.append(np.percentile(swap, 99) / np.percentile(rest, 99))
    lengths = np.array([ended - started for started, ended in windows])
    figures = [
        Figure("failed_requests", len(failed), len(failed), len(failed), "requests", note),
        Figure("mixed_answers", mixed, mixed, mixed, "answers", note),
        Figure("p99_ratio_during_swap", p99["swap"] / p99["rest"], *np.percentile(ratios, [2.5, 97.5]), "", note),
        *(
            Figure(f"{name}_p{q}_ms", *([float(np.percentile(took[mask], q) * 1e3)] * 3), "ms", note)
            for name, mask in (("swap", during), ("rest", ~during))
            for q in (50, 99, 100)
        ),
        Figure(
            "swap_s", float(np.median(lengths)), lengths.min(), lengths.max(), "s", "from the call to the old one gone"
        ),
        Figure(
            "not_ready_after_bad_promotion",
            not_ready,
            not_ready,
            not_ready,
            "answers",
            f"of {polls} of /v2/health/ready, asked beside {arguments.bad} promotions of what cannot be loaded",
        ),
        Figure("swaps", len(windows), len(windows), len(windows), "swaps", note),
    ]
    if arguments.way != "swap":
        figures = [f._replace(name=f"{arguments.way}_{f.name}") for f in figures]
    figures = [Figure(f.name, *(round(float(v), 4) for v in f[1:4]), f.unit, f.note) for f in figures]
    write("hot_swap", figures, keep=True)
    for figure in figures:
        print(f"{figure.name:28} {figure.value:10.3f} {figure.unit:8} [{figure.low:.3f}, {figure.high:.3f}]")
    for words in sorted(set(failed))[:3]:
        print(words)


if __name__ == "__main__":
    main()
