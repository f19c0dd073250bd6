"""`trirank evaluate`: a ranker against the orders it has to beat, on the same requests.

Three protocols. ``requests``: the dataset's own requests, with the candidates that were shown or retrieved.
``catalogue``: what users chose next, among all items; the ranker orders what two retrievers find (see cascade).
``sampled``: the same among sampled items, only to compare with papers that did so.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadData
from trirank_build.evaluation import metrics
from trirank_build.evaluation.catalogue import Found, rank_catalogue, rank_retrieved
from trirank_build.evaluation.contenders import contenders, order_candidates
from trirank_build.evaluation.scoring import score
from trirank_build.evaluation.summary import RANKER, Asked, Evaluation, Order, summarise
from trirank_build.features.examples import Examples
from trirank_build.features.fitting import Features
from trirank_build.models.sequence import SequenceRanker
from trirank_build.retrieval.cascade import retrieve, sample
from trirank_build.retrieval.scores import Contender
from trirank_build.retrieval.tasks import CatalogueTasks, contender_scorer, state_scorer

PROTOCOLS = ("requests", "catalogue", "sampled")
THRESHOLD = 1.0
"""A candidate counts as predicted relevant from this multiple of an equal share of its request's softmax on."""
TOP = 10


def evaluate(
    model: nn.Module,
    examples: Examples,
    dataset: Dataset,
    features: Features,
    others: dict[str, Contender] | None = None,
    scored: dict[str, NDArray[np.float32]] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Order the candidates of the same requests by the ranker, retrieval, chance, the contenders (by default all that
    fit), further scores [R, N] by name, and, where it is known, the optimum."""
    valid = examples.rows >= 0
    width = examples.rows.shape[1]
    own = score(model, examples)
    rankings: dict[str, NDArray[np.float32]] = {
        RANKER: own,
        "retrieval": np.broadcast_to(-np.arange(width, dtype=np.float32), examples.rows.shape),
    }
    for name, contender in (contenders(dataset, features) if others is None else others).items():
        rankings[name] = order_candidates(contender, examples)
    rankings |= scored or {}
    rankings["random"] = np.zeros(examples.rows.shape, np.float32)
    for number, name in enumerate(rankings):
        if name != "retrieval":
            rankings[name] = metrics.ties_broken(rankings[name], seed + number)
    if examples.optimum is not None:
        rankings["optimum"] = examples.optimum
    ideal = metrics.ideal_gains(examples.labels, examples.missed)
    orders = {}
    for name, scores in rankings.items():
        gains = metrics.order_gains(scores, examples.labels, valid)
        values = {
            "NDCG@10": metrics.ndcg(gains, ideal),
            "MRR": metrics.mrr(gains, ideal),
            "Hit@10": metrics.hit(gains, ideal),
            "recall@10": metrics.recall(gains, ideal),
            "precision@10": metrics.precision(gains, ideal),
            "F1@10": metrics.f1(gains, ideal),
            "AUC": metrics.auc(own if name == RANKER else scores, examples.labels, valid),
        }
        orders[name] = Order(values, metrics.order_rows(scores, examples.rows)[:, :TOP])
    shares = _shares(own, valid)
    equal = valid.sum(1, keepdims=True)
    orders[RANKER].metrics["accuracy"] = metrics.accuracy(shares * equal, examples.labels, valid, THRESHOLD)
    best = examples.labels.argmax(1)
    wanted = np.where(examples.labels.max(1) > 0, examples.rows[np.arange(len(examples)), best], -1)
    asked = Asked(wanted.astype(np.int32), examples.known(np.arange(len(examples))))
    total = examples.labels.sum(1, keepdims=True)
    bins = metrics.calibration(
        shares, (examples.labels / np.maximum(total, 1e-9)).astype(np.float32), valid & (total > 0)
    )
    return summarise("requests with their candidates", orders, asked, dataset, features, bins)


def evaluate_catalogue(
    model: SequenceRanker,
    dataset: Dataset,
    features: Features,
    split: str = "valid",
    others: dict[str, Contender] | None = None,
    found: dict[str, Found] | None = None,
    negatives: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Find what users chose next, among all items or among it and ``negatives`` others: by the ranker, by its states
    alone, by the contenders (by default all that fit), and what else was ``found`` on the same tasks.

    Raises:
        BadData: the split has no choice by a user of whom anything is known.
    """
    tasks = CatalogueTasks.of(dataset, split, features)
    if not len(tasks):
        raise BadData(f"no user with a history chose anything in the {split} split; evaluate its requests instead")
    draw = {} if negatives is None else {"negatives": negatives, "seed": seed}
    examples = (
        retrieve(tasks, dataset, features, model)
        if negatives is None
        else sample(tasks, dataset, features, negatives, seed)
    )
    orders = {RANKER: rank_retrieved(score(model, examples), tasks, examples)}
    if model.has_states:
        orders["ranker's states alone"] = rank_catalogue(tasks, state_scorer(model, features), **draw)
    for name, contender in (contenders(dataset, features) if others is None else others).items():
        orders[name] = rank_catalogue(tasks, contender_scorer(contender), **draw)
    orders |= found or {}
    protocol = "next choice among all items" if negatives is None else f"next choice among {negatives} sampled items"
    among = tasks.items if negatives is None else 1 + negatives
    asked = Asked(tasks.targets, tasks.known())
    return summarise(
        protocol, {n: Order(_of_ranks(f, among), f.top) for n, f in orders.items()}, asked, dataset, features
    )


def _of_ranks(found: Found, among: int) -> dict[str, NDArray[np.float64]]:
    """Metrics of tasks with one item to find."""
    hit = found.hit()
    return {
        "NDCG@10": found.ndcg(), "MRR": found.mrr(), "Hit@10": hit, "recall@10": hit, "precision@10": hit / TOP,
        "F1@10": hit * 2 / (TOP + 1), "AUC": 1 - np.minimum(found.ranks, among - 1) / max(among - 1, 1),
    }  # fmt: skip


def _shares(scores: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    """[R, N] each candidate's part of its request's softmax."""
    shifted = np.where(valid, scores, -np.inf)
    exponential = np.exp(shifted - shifted.max(1, keepdims=True))
    return np.asarray(exponential / exponential.sum(1, keepdims=True), np.float32)
