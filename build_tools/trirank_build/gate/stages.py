"""The ranker in each of its forms, and what each makes of the same requests.

PyTorch dense → each step → ONNX (ONNX Runtime) → the engine → the live ensemble.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from trirank import RankClient
from trirank_backend.policies import Policy
from trirank_backend.scoring import exact_engines, load_ranker, rankers_of

from trirank_build.data.dataset import Dataset
from trirank_build.engines.latency import latencies, scoring_calls
from trirank_build.errors import BadCheckpoint
from trirank_build.export.weights import graph_bytes
from trirank_build.features.examples import Examples
from trirank_build.progress import working
from trirank_build.repository.assemble import assemble
from trirank_build.serving.server import TritonServer
from trirank_build.training.run import BEST, TrainedRun

CANDIDATES = 200
"""At which latency is measured."""
_SCENARIO = "gate"
_BATCH = 64
_DEADLINE_S = 30.0


@dataclass(frozen=True)
class Stage:
    """One form of the ranker.

    Attributes:
        scores: [R, N]; -inf where the stage gave none (padding, or dropped by the ensemble).
        computes: what it computes; stages of equal ``computes`` must give equal scores but for rounding.
        latency_ms: median for CANDIDATES candidates on one thread; of the ensemble, of a whole call with the gate's own
            requests.
        size_mb: of its file.
        serves: whether this is the graph on the engine that will serve it.
    """

    name: str
    scores: NDArray[np.float32]
    computes: str
    latency_ms: float
    size_mb: float
    serves: bool = False


def runs_of(run: TrainedRun) -> dict[str, TrainedRun]:
    """Name of each stage in PyTorch → its run: the dense one, and one for each step up to this.

    Raises:
        BadCheckpoint: one of them is gone.
    """
    if not (steps := run.facts.get("compression")):
        return {"dense": run}
    own = run.directory.resolve()
    folder, runs = own.parent, {"dense": TrainedRun.load(own / run.facts["dense"])}
    for number, step in enumerate(steps, 1):
        name = f"{number}-{step['settings']['kind']}"
        if not (folder / name).is_dir():
            raise BadCheckpoint(
                f"{folder / name} is gone, which {run.directory} came from; run `trirank compress` again"
            )
        runs[name] = TrainedRun.load(folder / name)
    return runs


def measure_stages(
    run: TrainedRun, dataset: Dataset, onnx_path: Path, engine: str, examples: Examples, live: bool
) -> Iterator[Stage]:
    """The stages one after the other, each on the same requests, packed as its own features say."""
    last = ""
    threads = torch.get_num_threads()
    for name, each in runs_of(run).items():
        with working(f"gate: {name}"):
            model = each.model()
            scores = _scores(_in_torch(model), examples.seen_by(each.features))
            torch.set_num_threads(1)
            try:
                took = latencies(scoring_calls({name: (_in_torch(model), each.features.spec)}, CANDIDATES), rounds=10)
            finally:
                torch.set_num_threads(threads)
        size = (each.directory / BEST).stat().st_size / 1e6
        yield Stage(name, scores, name, float(np.median(took[name])), size)
        last = name
    own, spec, size = examples.seen_by(run.features), run.features.spec, graph_bytes(onnx_path) / 1e6
    exact, graph = next(rankers_of(onnx_path, exact_engines()))  # ONNX Runtime, where it can
    rankers = {"ONNX": graph}
    if engine != exact:
        rankers[f"engine {engine}"] = load_ranker(onnx_path, engine)
    took = latencies(scoring_calls({name: (ranker, spec) for name, ranker in rankers.items()}, CANDIDATES))
    for name, ranker in rankers.items():
        with working(f"gate: {name}"):
            yield Stage(name, _scores(ranker, own), last, float(np.median(took[name])), size, name == list(rankers)[-1])
    if live:
        with working("gate: live ensemble"):
            scores, latency = _live(run, dataset, onnx_path, engine, own)
        yield Stage("ensemble", scores, last, latency, size)


def _in_torch(model: torch.nn.Module) -> Callable[[dict[str, Any]], NDArray[np.float32]]:
    def call(tensors: dict[str, Any]) -> NDArray[np.float32]:
        with torch.inference_mode():
            scores: NDArray[np.float32] = model(**{n: torch.from_numpy(a) for n, a in tensors.items()}).numpy()
        return scores

    return call


def _scores(ranker: Callable[[dict[str, Any]], NDArray[np.float32]], examples: Examples) -> NDArray[np.float32]:
    """[R, N] means over tasks."""
    parts = []
    for start in range(0, len(examples), _BATCH):
        packed = examples.whole(np.arange(start, min(start + _BATCH, len(examples)))).packed
        parts.append(ranker(packed.tensors()).mean(-1))
    return np.where(examples.rows >= 0, np.concatenate(parts), -np.inf).astype(np.float32)


def _live(
    run: TrainedRun, dataset: Dataset, onnx_path: Path, engine: str, examples: Examples
) -> tuple[NDArray[np.float32], float]:
    """The scores that a real server answers, under a policy that changes nothing, and the median time of a call."""
    scores = np.full(examples.rows.shape, -np.inf, np.float32)
    took = []
    with tempfile.TemporaryDirectory(prefix="trirank-gate-") as folder:
        release = assemble(
            run, dataset, onnx_path, Path(folder), engine=engine, allow_failing_gate=True,
            policies={_SCENARIO: Policy(keep_unavailable=True)},
        )  # fmt: skip
        with TritonServer(release) as server, RankClient(server.grpc, deadline_s=_DEADLINE_S) as client:
            server.wait_ready()
            for at in range(len(examples)):
                request = examples.request(at, _SCENARIO)
                started = time.perf_counter()
                answer = client.rank(request)
                took.append((time.perf_counter() - started) * 1e3)
                given = examples.rows[at] >= 0
                ids = examples.ids[examples.rows[at, given]]
                order = np.argsort(ids)
                place = order[np.searchsorted(ids, answer.item_ids, sorter=order)]
                scores[at, np.flatnonzero(given)[place]] = answer.scores
    return scores, float(np.median(took))
