"""What a run showed: latencies from when requests were due, failures by kind, the server's stages, and how busy the
machine and the load generator were."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trirank_loadtest.errors import LoadFailed

PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9)
WARM_SHARE = 0.1
"""Of a run that is not counted: connections open and caches fill."""
_BINS = 60


@dataclass(frozen=True)
class Stage:
    """One model of the server, between two readings of its statistics; times are means a request.

    Attributes:
        batch: mean requests of an execution.
    """

    model: str
    requests: int
    queue_ms: float
    compute_ms: float
    batch: float


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        rate: asked for, the highest of the shape; offered: requests a second that were due; answered: that were
            answered without an error before the run was over. All while the run was counted.
        latencies_ms: percentiles, as text → value; a failure counts as infinitely slow, which JSON has as null.
        errors: kind → count, of ``requests``.
        lag_p99_ms: how late the load generator itself sent. What it adds is in the latencies, too.
        histogram: edges in ms, and counts between them.
        timeline: a second each: start, due, failed, p50 and p99 in ms.
        kinds: what was asked → requests, failures, p50 and p99.
        cpu: busy shares of all cores of this machine: ``machine``, and ``load`` of the generator's processes.
    """

    rate: float
    seconds: float
    requests: int
    offered: float
    answered: float
    mean_ms: float
    latencies_ms: dict[str, float]
    errors: dict[str, int]
    lag_p99_ms: float
    histogram: dict[str, list[float]] = field(default_factory=dict)
    timeline: list[dict[str, float]] = field(default_factory=list)
    kinds: dict[str, dict[str, float]] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    cpu: dict[str, float] = field(default_factory=dict)

    @property
    def error_rate(self) -> float:
        """Share of requests that failed."""
        return sum(self.errors.values()) / self.requests

    def percentile(self, share: float) -> float:
        """Milliseconds below which ``share`` per cent of the requests were answered."""
        return self.latencies_ms[f"p{share:g}"]

    def to_json(self) -> dict[str, Any]:
        """Without infinities, which JSON has no word for."""
        return json.loads(json.dumps(_finite(asdict(self))))

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Measured:
        """As to_json wrote it."""
        raw = dict(raw)
        raw["latencies_ms"] = {name: math.inf if v is None else v for name, v in raw["latencies_ms"].items()}
        raw["mean_ms"] = math.inf if raw["mean_ms"] is None else raw["mean_ms"]
        raw["kinds"] = {
            kind: {name: math.inf if value is None else value for name, value in numbers.items()}
            for kind, numbers in raw["kinds"].items()
        }
        raw["stages"] = [Stage(**stage) for stage in raw["stages"]]
        return cls(**raw)


def read_samples(folder: Path) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """[requests, 4] due, lag and latency in seconds, kind; and how each ended, empty: well."""
    files = [np.load(file) for file in sorted(folder.glob("*.npz"))]
    if not files or not sum(len(file["rows"]) for file in files):
        raise LoadFailed("the load generator sent nothing; its own words are above")
    return np.concatenate([file["rows"] for file in files]), np.concatenate([file["outcomes"] for file in files])


def summarised(
    rows: NDArray[np.float64],
    outcomes: NDArray[np.str_],
    kinds: tuple[str, ...],
    rate: float,
    seconds: float,
    percentiles: tuple[float, ...],
    stages: list[Stage],
    cpu: dict[str, float],
) -> Measured:
    """Of samples; the first tenth of the run is not counted, and feedback in ``kinds`` alone.

    Args:
        kinds: names of kinds of requests, feedback last.
        percentiles: beside PERCENTILES, those that an SLO asks for.
    """
    rows = rows.copy()
    rows[:, 0] -= rows[:, 0].min()
    counted = rows[:, 0] >= WARM_SHARE * seconds
    ranked = rows[:, 3] < len(kinds) - 1
    timeline = _timeline(rows[ranked], outcomes[ranked])
    by_kind = _by_kind(rows[counted], outcomes[counted], kinds)
    rows, outcomes = rows[counted & ranked], outcomes[counted & ranked]
    if not len(rows):
        raise LoadFailed(f"no request was due after the first tenth of {seconds:g} s; run longer, or at a higher rate")
    good = outcomes == ""
    latency = np.where(good, rows[:, 2] * 1e3, np.inf)
    span = (1 - WARM_SHARE) * seconds
    wanted = sorted({*PERCENTILES, *percentiles})
    answered = latency[good]
    in_the_run = good & (rows[:, 0] + rows[:, 2] < seconds)
    edges = np.geomspace(max(answered.min(), 0.01), answered.max() + 1e-6, _BINS + 1) if len(answered) else np.zeros(0)
    return Measured(
        rate=rate, seconds=seconds, requests=len(rows), offered=len(rows) / span,
        answered=float(in_the_run.sum()) / span,
        mean_ms=float(latency.mean()), latencies_ms={f"p{share:g}": quantile(latency, share) for share in wanted},
        errors=dict(Counter(outcomes[~good].tolist())), lag_p99_ms=quantile(rows[:, 1] * 1e3, 99.0),
        histogram={
            "edges_ms": edges.tolist(), "counts": np.histogram(answered, edges)[0].tolist() if len(edges) else [],
        },
        timeline=timeline, kinds=by_kind, stages=stages, cpu=cpu,
    )  # fmt: skip


def _by_kind(
    rows: NDArray[np.float64], outcomes: NDArray[np.str_], kinds: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    found = {}
    for kind in np.unique(rows[:, 3]).astype(int).tolist():
        here = rows[:, 3] == kind
        latency = np.where(outcomes[here] == "", rows[here, 2] * 1e3, np.inf)
        found[kinds[kind]] = {
            "requests": float(here.sum()), "failed": float((outcomes[here] != "").sum()),
            "p50_ms": quantile(latency, 50.0), "p99_ms": quantile(latency, 99.0),
        }  # fmt: skip
    return found


def quantile(values: NDArray[np.float64], share: float) -> float:
    """The smallest value that ``share`` per cent do not exceed; infinite ones are values, too."""
    return float(np.quantile(values, share / 100, method="inverted_cdf"))


def _timeline(rows: NDArray[np.float64], outcomes: NDArray[np.str_]) -> list[dict[str, float]]:
    found = []
    seconds = rows[:, 0].astype(int)
    for second in range(seconds.max() + 1):
        here = seconds == second
        good = here & (outcomes == "")
        took = rows[good, 2] * 1e3
        found.append({
            "second": float(second), "due": float(here.sum()), "failed": float((here & ~good).sum()),
            "p50_ms": quantile(took, 50.0) if len(took) else math.nan,
            "p99_ms": quantile(took, 99.0) if len(took) else math.nan,
        })  # fmt: skip
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
