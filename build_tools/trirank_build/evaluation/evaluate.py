"""`trirank evaluate`: a ranker against the orders it has to beat, on the same requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from trirank_build.baselines.popularity import popularity
from trirank_build.data.dataset import OPTIMUM, Dataset
from trirank_build.evaluation import metrics
from trirank_build.evaluation.bootstrap import Interval, mean_interval
from trirank_build.features.examples import Examples

_BATCH = 256
THRESHOLD = 1.0
"""A candidate counts as predicted relevant from this multiple of an equal share of its request's softmax on."""


def score(model: nn.Module, examples: Examples) -> NDArray[np.float32]:
    """[R, N] the mean over tasks of the ranker's scores, as the default policy weighs them."""
    model.eval()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(examples), _BATCH):
            which = np.arange(start, min(start + _BATCH, len(examples)))
            packed = examples.whole(which).packed
            tensors = {name: torch.from_numpy(array) for name, array in packed.tensors().items()}
            parts.append(model(**tensors).mean(-1).numpy())
    return np.concatenate(parts)


def valid_ndcg(model: nn.Module, examples: Examples) -> float:
    """Mean NDCG@10 over requests with anything relevant."""
    valid = examples.rows >= 0
    gains = metrics.order_gains(score(model, examples), examples.labels, valid)
    return float(np.nanmean(metrics.ndcg(gains, metrics.ideal_gains(examples.labels, examples.missed))))


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        accuracy: of the ranker, candidate by candidate, at THRESHOLD; other orders have no scores to cut.
        table: ranking → metric → estimate with interval.
        differences: ranking → NDCG@10 of the ranker minus that of the ranking, paired.
        ndcg10: ranking → [R] of each request; NaN where nothing is relevant.
    """

    requests: int
    accuracy: Interval
    table: dict[str, dict[str, Interval]]
    differences: dict[str, Interval]
    ndcg10: dict[str, NDArray[np.float64]]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "requests": self.requests,
            "accuracy": self.accuracy._asdict(),
            "table": {name: {m: i._asdict() for m, i in row.items()} for name, row in self.table.items()},
            "ndcg10_above": {name: interval._asdict() for name, interval in self.differences.items()},
        }


def evaluate(model: nn.Module, examples: Examples, dataset: Dataset, seed: int = 0) -> Evaluation:
    """Rank the same requests by the ranker, retrieval order, popularity, chance, and, where known, the optimum."""
    valid = examples.rows >= 0
    rng = np.random.default_rng(seed)
    choices = dataset.training_choices()
    # Judged search has no choices; there it is how often an item was put before the judges.
    chosen = popularity(choices if len(choices) else dataset.training_showings(), dataset.items["item_id"].to_numpy())
    width = examples.rows.shape[1]
    rankings = {
        "ranker": score(model, examples),
        "retrieval": np.broadcast_to(-np.arange(width, dtype=np.float32), examples.rows.shape),
        "popularity": chosen[examples.rows] + 0.5 * rng.random(examples.rows.shape),
        "random": rng.random(examples.rows.shape),
    }
    if OPTIMUM in examples.requests.columns:
        best = np.full(examples.rows.shape, -np.inf, np.float32)
        best[valid] = examples.requests[OPTIMUM].explode().to_numpy()
        rankings["optimum"] = best
    ideal = metrics.ideal_gains(examples.labels, examples.missed)
    table, ndcg = {}, {}
    for name, scores in rankings.items():
        scores = scores.astype(np.float32)
        gains = metrics.order_gains(scores, examples.labels, valid)
        ndcg[name] = metrics.ndcg(gains, ideal)
        values = {
            "NDCG@10": ndcg[name],
            "MRR": metrics.mrr(gains, ideal),
            "Hit@10": metrics.hit(gains, ideal),
            "recall@10": metrics.recall(gains, ideal),
            "precision@10": metrics.precision(gains, ideal),
            "F1@10": metrics.f1(gains, ideal),
            "AUC": metrics.auc(scores, examples.labels, valid),
        }
        table[name] = {metric: mean_interval(per_request) for metric, per_request in values.items()}
    return Evaluation(
        requests=len(examples),
        accuracy=mean_interval(metrics.accuracy(_shares(rankings["ranker"], valid), examples.labels, valid, THRESHOLD)),
        table=table,
        differences={
            name: mean_interval(ndcg["ranker"] - ndcg[name]) for name in ("retrieval", "popularity", "random")
        },
        ndcg10=ndcg,
    )


def _shares(scores: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    """[R, N] each candidate's part of its request's softmax, in multiples of an equal share."""
    shifted = np.where(valid, scores, -np.inf)
    exponential = np.exp(shifted - shifted.max(1, keepdims=True))
    return np.asarray(exponential / exponential.sum(1, keepdims=True) * valid.sum(1, keepdims=True), np.float32)
