"""What the ranker is compared with: orders that need no training of their own, and the simple baselines."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trirank_build.baselines.content import Content
from trirank_build.baselines.lambdamart import LambdaMart, Lists
from trirank_build.baselines.matrix_factorisation import MatrixFactorisation
from trirank_build.baselines.popularity import popularity
from trirank_build.data.dataset import Dataset
from trirank_build.features.examples import Examples
from trirank_build.features.fitting import Features
from trirank_build.retrieval.item_knn import choices_of, fit_item_knn
from trirank_build.retrieval.scores import Contender, scores_of
from trirank_build.retrieval.tasks import HISTORY

MAX_REQUESTS = 20_000
"""Requests that LambdaMART is fitted on; they are all in memory."""
_CHUNK = 256


class Popularity:
    """Every user alike."""

    def __init__(self, counts: NDArray[np.int64]) -> None:
        self._counts = counts.astype(np.float32)

    def scores(self, histories: NDArray[np.int32], queries: list[str] | None = None) -> NDArray[np.float32]:
        """[B, L] → [B, M]"""
        return np.broadcast_to(self._counts, (len(histories), len(self._counts)))


def contenders(dataset: Dataset, features: Features) -> dict[str, Contender]:
    """Those that fit the dataset, by name."""
    found: dict[str, Contender] = {}
    if len(dataset.training_choices()):
        found["popularity"] = Popularity(popularity(dataset.training_choices(), features.catalogue.ids))
        found["item_knn"] = fit_item_knn(dataset, features)
        found["matrix_factorisation"] = MatrixFactorisation(*choices_of(dataset, features))
    items = dataset.items
    if (items["title"] != "").any() or items["attributes"].list.len().max():
        found["content"] = Content(items)
    return found


def order_candidates(contender: Contender, examples: Examples) -> NDArray[np.float32]:
    """[R, N] the contender's scores of the candidates of requests."""
    scores = np.zeros(examples.rows.shape, np.float32)
    for start in range(0, len(examples), _CHUNK):
        which = np.arange(start, min(start + _CHUNK, len(examples)))
        histories = examples.histories(which, HISTORY)
        of_all = scores_of(contender, histories, examples.queries[start : start + _CHUNK])
        scores[which] = of_all.of(np.maximum(examples.rows[which], 0))
    return scores


def lambdamart(train: Examples, valid: Examples, examples: Examples, seed: int = 0) -> NDArray[np.float32]:
    """[R, N] scores of ``examples`` by trees over what the ranker's dense and context inputs say, fitted on at most
    MAX_REQUESTS training requests."""
    kept = np.sort(np.random.default_rng(seed).permutation(len(train))[:MAX_REQUESTS])
    trees = LambdaMart(_lists(train, kept), _lists(valid, np.arange(len(valid))))
    scores = np.zeros(examples.rows.shape, np.float32)
    for start in range(0, len(examples), _CHUNK):
        which = np.arange(start, min(start + _CHUNK, len(examples)))
        part = np.zeros((len(which), scores.shape[1]), np.float32)
        part[examples.rows[which] >= 0] = trees.scores(_lists(examples, which).values)
        scores[which] = part
    return scores


def _lists(examples: Examples, which: NDArray[np.int64]) -> Lists:
    parts = []
    for start in range(0, len(which), _CHUNK):
        batch = examples.whole(which[start : start + _CHUNK])
        packed, valid = batch.packed, batch.valid
        context = np.broadcast_to(packed.context[:, None], (*valid.shape, packed.context.shape[1]))
        values = np.concatenate([packed.dense, context], -1)[valid]
        parts.append(Lists(values, batch.labels[valid], valid.sum(1)))
    return Lists(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
