"""The gate: what every stage has to keep of the dense ranker's ranking, and the report that says so.

Numbers of each stage are over the same held-out requests: NDCG@10 and its ratio to the dense ranker's with 95 %
bootstrap intervals (paired), Kendall's tau and the overlap of the best ten against the dense ranker's order, and,
between stages that compute the same, the largest difference of a score. None may rank worse than retrieval did, whose
order is that in which candidates come.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

from trirank_build.artefacts import file_digest
from trirank_build.compression.recipe import CHAIN, Thresholds, load_compression_recipe
from trirank_build.data.dataset import Dataset
from trirank_build.evaluation import metrics
from trirank_build.evaluation.bootstrap import Interval, mean_interval, ratio_interval
from trirank_build.evaluation.scoring import retrieval_ndcg
from trirank_build.features.examples import Examples
from trirank_build.gate.stages import CANDIDATES, Stage, measure_stages, runs_of
from trirank_build.training.run import TrainedRun

TOP = 10


@dataclass(frozen=True)
class Check:
    """What was measured of a stage, and what it had to be: at least ``limit``, or at most."""

    what: str
    value: float
    limit: float
    at_least: bool

    @property
    def passed(self) -> bool:
        """NaN does not."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        return f"{self.what} is {self.value:.4g}, the limit {'at least' if self.at_least else 'at most'} {self.limit:g}"


@dataclass(frozen=True)
class Row:
    """What the gate says of one stage. ``difference`` is None where the stage computes something else than the one
    before it; otherwise a share of the scores' standard deviation."""

    stage: str
    ndcg10: Interval
    ndcg_ratio: Interval
    kendall_tau: float
    overlap: float
    difference: float | None
    latency_ms: float
    size_mb: float
    checks: list[Check]

    @property
    def failures(self) -> list[str]:
        """Those checks that it did not pass, in words."""
        return [str(check) for check in self.checks if not check.passed]


@dataclass(frozen=True)
class Report:
    """The gate's verdict on one graph."""

    rows: list[Row]
    thresholds: Thresholds
    facts: dict[str, Any]

    @property
    def failures(self) -> list[str]:
        """Each as "STAGE: what"."""
        return [f"{row.stage}: {failure}" for row in self.rows for failure in row.failures]

    @property
    def passed(self) -> bool:
        """Whether no stage failed."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = [
            asdict(row)
            | {"ndcg10": row.ndcg10._asdict(), "ndcg_ratio": row.ndcg_ratio._asdict(), "failures": row.failures}
            for row in self.rows
        ]
        verdict = {"passed": self.passed, "failures": self.failures}
        return verdict | self.facts | {"thresholds": self.thresholds.model_dump(), "stages": rows}


def run_gate(
    run: TrainedRun,
    dataset: Dataset,
    onnx_path: Path,
    engine: str,
    *,
    split: str = "valid",
    requests: int = 1_000,
    live: bool = True,
    seed: int = 0,
) -> Report:
    """Hold every stage to the thresholds of the chain's recipe.

    Raises:
        BadData: the dataset is another one than the run was trained on, or its split has no requests.
        BadCheckpoint: a step's directory is gone.
    """
    dataset = run.judged(dataset)
    dense = runs_of(run)["dense"]
    examples = Examples.read(dataset, split, dense.features, requests, seed)
    thresholds = thresholds_of(run)
    rows: list[Row] = []
    first = before = None
    for stage in measure_stages(run, dataset, onnx_path, engine, examples, live):
        first = first or stage
        rows.append(_row(stage, first, before, examples, thresholds))
        before = stage
    facts = {
        "onnx": file_digest(onnx_path), "engine": engine, "split": split, "requests": len(examples),
        "candidates_of_latency": CANDIDATES, "dataset": dataset.description.digest,
        "ranker": f"{run.recipe.name}, {run.facts['parameters']:,} parameters", "source": dataset.description.source,
        "date": datetime.now(timezone.utc).date().isoformat(), "machine": _machine(),
        "example": _example(dataset, examples, first, before),
    }  # fmt: skip
    return Report(rows, thresholds, facts)


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or not x86
        name = platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _example(dataset: Dataset, examples: Examples, dense: Stage | None, last: Stage | None) -> dict[str, list[str]]:
    """The best ten of the first request, by title or id, before compression and as it is served."""
    titles = [title or key for title, key in dataset.items.select("title", "key").iter_rows()]
    found = {}
    for name, stage in (("dense", dense), (last.name if last else "", last)):
        if stage is not None:
            best = np.argsort(-np.where(np.isfinite(stage.scores[0]), stage.scores[0], -np.inf), kind="stable")[:TOP]
            shown = [int(row) for row in examples.rows[0][best] if row >= 0]
            found[name] = [titles[row] for row in shown]
    return found


def thresholds_of(run: TrainedRun) -> Thresholds:
    """Those of the chain that the run came from; the defaults for a dense run."""
    chain = run.directory.resolve().parent / CHAIN
    return load_compression_recipe(str(chain)).gate if run.facts.get("compression") else Thresholds()


def _row(stage: Stage, dense: Stage, before: Stage | None, examples: Examples, limits: Thresholds) -> Row:
    ndcg, own = (_ndcg(s.scores, examples) for s in (dense, stage))
    given = np.isfinite(stage.scores) & np.isfinite(dense.scores)
    taus, overlaps = [], []
    for at, there in enumerate(given):
        ours, theirs = stage.scores[at, there], dense.scores[at, there]
        if there.sum() > 1:
            taus.append(kendalltau(ours, theirs).statistic)
        best = [set(np.argsort(-scores, kind="stable")[:TOP].tolist()) for scores in (ours, theirs)]
        overlaps.append(len(best[0] & best[1]) / max(len(best[1]), 1))
    difference = None
    if before is not None and before.computes == stage.computes:
        both = np.isfinite(stage.scores) & np.isfinite(before.scores)
        spread = float(before.scores[both].std())
        difference = float(np.abs(stage.scores[both] - before.scores[both]).max()) / max(spread, 1e-12)
    tau, overlap, ratio = float(np.nanmean(taus)), float(np.mean(overlaps)), ratio_interval(own, ndcg)
    latency, size = round(stage.latency_ms, 4), round(stage.size_mb, 4)
    above = float(np.nanmean(own)) / max(retrieval_ndcg(examples), 1e-12)
    is_graph = stage.name.startswith(("ONNX", "engine"))
    checks = [
        ("NDCG@10 over the dense ranker's", ratio.value, limits.min_ndcg_ratio, True),
        ("low end of that ratio's interval", ratio.low, limits.min_ndcg_ratio_low, True),
        ("NDCG@10 over retrieval's order's", above, limits.min_retrieval_ratio, True),
        ("Kendall's tau", tau, limits.min_kendall_tau, True),
        ("overlap of the best ten", overlap, limits.min_overlap, True),
        ("largest score difference from the stage before", difference, limits.max_difference, False),
        ("latency in ms", latency if stage.serves else None, limits.max_latency_ms, False),
        ("size in MB", size if is_graph else None, limits.max_size_mb, False),
    ]
    asked = [
        Check(what, value, limit, least)
        for what, value, limit, least in checks
        if value is not None and limit is not None
    ]
    return Row(stage.name, mean_interval(own), ratio, tau, overlap, difference, latency, size, asked)


def _ndcg(scores: NDArray[np.float32], examples: Examples) -> NDArray[np.float64]:
    gains = metrics.order_gains(metrics.ties_broken(scores), examples.labels, np.isfinite(scores))
    return metrics.ndcg(gains, metrics.ideal_gains(examples.labels, examples.missed))
