"""LambdaMART (Burges, "From RankNet to LambdaRank to LambdaMART", 2010), by LightGBM."""

from __future__ import annotations

from typing import NamedTuple

import lightgbm
import numpy as np
from numpy.typing import NDArray

PARAMETERS = {
    "objective": "lambdarank", "metric": "ndcg", "eval_at": [10], "learning_rate": 0.05, "num_leaves": 31,
    "min_data_in_leaf": 50, "verbosity": -1, "deterministic": True, "seed": 0,
}  # fmt: skip
ROUNDS, PATIENCE = 600, 50


class Lists(NamedTuple):
    """Candidate lists one after the other: values [X, D], labels [X], sizes [R] of the lists, which sum to X."""

    values: NDArray[np.float32]
    labels: NDArray[np.float32]
    sizes: NDArray[np.int64]


class LambdaMart:
    """Trees fitted on lists; validation says how many."""

    def __init__(self, train: Lists, valid: Lists) -> None:
        self._levels = np.unique(train.labels)  # LambdaMART wants whole numbers, and is told what each is worth
        fitted = self._data(train, None)
        self._trees = lightgbm.train(
            PARAMETERS | {"label_gain": self._levels.tolist()}, fitted, ROUNDS, valid_sets=[self._data(valid, fitted)],
            callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)],
        )  # fmt: skip

    def scores(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """[X, D] → [X]"""
        return np.asarray(self._trees.predict(values), np.float32)

    def _data(self, lists: Lists, reference: lightgbm.Dataset | None) -> lightgbm.Dataset:
        grades = np.minimum(np.searchsorted(self._levels, lists.labels), len(self._levels) - 1)
        return lightgbm.Dataset(lists.values, grades, group=lists.sizes, reference=reference)
