"""The gate: what every stage has to keep of the dense ranker's ranking, and the report that says so.

Numbers of each stage are over the same held-out requests: NDCG@10 and its ratio to the dense ranker's with 95 %
bootstrap intervals (paired), Kendall's tau and the overlap of the best ten against the dense ranker's order, and,
between stages that compute the same, the largest difference of a score.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
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
from trirank_build.features.examples import Examples
from trirank_build.gate.stages import CANDIDATES, Stage, measure_stages, runs_of
from trirank_build.training.run import TrainedRun

TOP = 10


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
    failures: list[str]


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
            asdict(row) | {"ndcg10": row.ndcg10._asdict(), "ndcg_ratio": row.ndcg_ratio._asdict()} for row in self.rows
        ]
        verdict = {"passed": self.passed, "failures": self.failures}
        return verdict | self.facts | {"thresholds": self.thresholds.model_dump(), "stages": rows}


def run_gate(
    run: TrainedRun,
    dataset: Dataset,
    onnx_path: Path,
    engine: str,
    *,
    split: str = "test",
    requests: int = 1_000,
    live: bool = True,
    seed: int = 0,
) -> Report:
    """Hold every stage to the thresholds of the chain's recipe.

    Raises:
        BadData: the dataset is another one than the run was trained on, or its split has no requests.
        BadCheckpoint: a step's directory is gone.
    """
    run.check_data(dataset)
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
    }  # fmt: skip
    return Report(rows, thresholds, facts)


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
    row = Row(
        stage.name, mean_interval(own), ratio_interval(own, ndcg), float(np.nanmean(taus)), float(np.mean(overlaps)),
        difference, round(stage.latency_ms, 4), round(stage.size_mb, 4), [],
    )  # fmt: skip
    is_graph = stage.name.startswith(("ONNX", "engine"))
    checks = [
        ("NDCG@10 over the dense ranker's", row.ndcg_ratio.value, limits.min_ndcg_ratio, True),
        ("low end of that ratio's interval", row.ndcg_ratio.low, limits.min_ndcg_ratio_low, True),
        ("Kendall's tau", row.kendall_tau, limits.min_kendall_tau, True),
        ("overlap of the best ten", row.overlap, limits.min_overlap, True),
        ("largest score difference from the stage before", difference, limits.max_difference, False),
        ("latency in ms", row.latency_ms if stage.serves else None, limits.max_latency_ms, False),
        ("size in MB", row.size_mb if is_graph else None, limits.max_size_mb, False),
    ]
    for what, value, limit, at_least in checks:
        if value is None or limit is None:
            continue
        if not (value >= limit if at_least else value <= limit):  # NaN fails
            row.failures.append(f"{what} is {value:.4g}, the limit {'at least' if at_least else 'at most'} {limit:g}")
    return row


def _ndcg(scores: NDArray[np.float32], examples: Examples) -> NDArray[np.float64]:
    gains = metrics.order_gains(scores, examples.labels, np.isfinite(scores))
    return metrics.ndcg(gains, metrics.ideal_gains(examples.labels, examples.missed))
