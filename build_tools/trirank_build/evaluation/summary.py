"""What all protocols report: metrics with intervals, the ranker against every other order, slices, calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from trirank_build.baselines.popularity import popularity
from trirank_build.data.dataset import Dataset
from trirank_build.evaluation import metrics
from trirank_build.evaluation.bootstrap import Interval, mean_interval, mean_intervals
from trirank_build.features.fitting import Features

RANKER = "ranker"
FEW_EVENTS, CATEGORIES = 5, 8


class Difference(NamedTuple):
    """Of the ranker's NDCG@10 minus another order's, request by request: bootstrap interval and paired t-test, which
    agrees with the bootstrap and with randomisation (Smucker et al., CIKM 2007)."""

    value: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class Order:
    """What one order made of the requests: metric → [R], and the rows [R, K] of its best items, -1 padded."""

    metrics: dict[str, NDArray[np.float64]]
    top: NDArray[np.int32]


@dataclass(frozen=True)
class Asked:
    """What is known of the requests: row [R] of the item that was wanted most (-1: none), events [R] before."""

    targets: NDArray[np.int32]
    known: NDArray[np.int64]


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        protocol: in words.
        table: order → metric → estimate with interval.
        differences: order → the ranker above it.
        slices: name → (requests, order → NDCG@10).
        calibration: [bins, 3] candidates, predicted share, observed share; empty where nothing predicts shares.
        ndcg10: order → [R]; NaN where nothing is relevant.
    """

    protocol: str
    requests: int
    table: dict[str, dict[str, Interval]]
    differences: dict[str, Difference]
    slices: dict[str, tuple[int, dict[str, Interval]]]
    calibration: NDArray[np.float64]
    ndcg10: dict[str, NDArray[np.float64]]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "protocol": self.protocol,
            "requests": self.requests,
            "table": {name: {m: i._asdict() for m, i in row.items()} for name, row in self.table.items()},
            "ndcg10_above": {name: difference._asdict() for name, difference in self.differences.items()},
            "slices": {
                name: {"requests": count, "ndcg10": {order: i._asdict() for order, i in row.items()}}
                for name, (count, row) in self.slices.items()
            },
            "calibration_error": metrics.calibration_error(self.calibration) if len(self.calibration) else None,
        }


def summarise(
    protocol: str,
    orders: dict[str, Order],
    asked: Asked,
    dataset: Dataset,
    features: Features,
    calibration: NDArray[np.float64] | None = None,
) -> Evaluation:
    """Put everything together; ``orders`` holds RANKER, and OPTIMUM where it is known."""
    counts = popularity(dataset.training_choices(), features.catalogue.ids)
    fields = features.catalogue.fields[:, 1:]  # without the item's own id, which nothing shares
    columns: dict[tuple[str, str], NDArray[np.float64]] = {}
    for name, order in orders.items():
        columns |= {(name, metric): values for metric, values in order.metrics.items()}
        columns[name, "diversity@10"] = metrics.diversity(order.top, fields)
        columns[name, "novelty@10"] = metrics.novelty(order.top, counts)
    table: dict[str, dict[str, Interval]] = {name: {} for name in orders}
    for (name, metric), interval in zip(columns, mean_intervals(np.stack(list(columns.values()))), strict=True):
        table[name][metric] = interval
    for name, order in orders.items():
        share = metrics.coverage(order.top, len(features.catalogue))
        table[name]["coverage@10"] = Interval(share, share, share)
    ndcg = {name: order.metrics["NDCG@10"] for name, order in orders.items()}
    every = np.stack(list(ndcg.values()))
    return Evaluation(
        protocol=protocol,
        requests=len(asked.targets),
        table=table,
        differences={n: _difference(ndcg[RANKER] - ndcg[n]) for n in orders if n not in (RANKER, "optimum")},
        slices={
            name: (int(kept.sum()), dict(zip(ndcg, mean_intervals(every[:, kept]), strict=True)))
            for name, kept in _slices(asked, dataset, features, counts).items()
            if kept.any()
        },
        calibration=np.zeros((0, 3)) if calibration is None else calibration,
        ndcg10=ndcg,
    )


def _difference(values: NDArray[np.float64]) -> Difference:
    known = values[~np.isnan(values)]
    even = len(known) < 2 or not known.std()
    p = float(known.any()) if even else float(stats.ttest_1samp(known, 0).pvalue)
    return Difference(*mean_interval(values), 1 - p if even else p)


def _slices(
    asked: Asked, dataset: Dataset, features: Features, counts: NDArray[np.int64]
) -> dict[str, NDArray[np.bool_]]:
    wanted = asked.targets >= 0
    of_target = np.append(counts, 0)[asked.targets]
    falling = np.sort(counts)[::-1]
    # Head: the fewest items that together make half of all choices.
    head_from = falling[min(np.searchsorted(np.cumsum(falling), counts.sum() / 2), len(falling) - 1)]
    slices = {
        "new users": asked.known == 0,
        f"users with 1 to {FEW_EVENTS - 1} events": (asked.known > 0) & (asked.known < FEW_EVENTS),
        f"users with {FEW_EVENTS} events or more": asked.known >= FEW_EVENTS,
    }
    if counts.any():
        slices |= {
            "new items": wanted & (of_target == 0),
            "tail items": wanted & (of_target > 0) & (of_target < head_from),
            "head items": wanted & (of_target > 0) & (of_target >= head_from),
        }
    categories = np.append(dataset.items["category"].to_numpy().astype(str), "")[asked.targets]
    names, sizes = np.unique(categories[categories != ""], return_counts=True)
    for name in names[np.argsort(-sizes, kind="stable")[:CATEGORIES]]:
        slices[f"category {name}"] = categories == name
    return slices
