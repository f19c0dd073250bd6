"""LambdaMART (Burges, "From RankNet to LambdaRank to LambdaMART", 2010), by LightGBM."""

from __future__ import annotations

from typing import NamedTuple

import lightgbm
import numpy as np
from numpy.typing import NDArray

PARAMETERS = {
    "objective": "lambdarank", "metric": "ndcg", "eval_at": [10], "verbosity": -1, "deterministic": True, "seed": 0,
}  # fmt: skip
TRIED: tuple[dict[str, float], ...] = (
    {"learning_rate": 0.05, "num_leaves": 31, "min_data_in_leaf": 50},
    # For few or noisy lists: small trees of few columns each.
    {"learning_rate": 0.02, "num_leaves": 15, "min_data_in_leaf": 150, "feature_fraction": 0.3,
     "bagging_fraction": 0.7, "bagging_freq": 1},
)  # fmt: skip
"""Settings of which validation chooses."""
ROUNDS, PATIENCE = 1_200, 50


class Lists(NamedTuple):
    """Candidate lists one after the other: values [X, D], labels [X], sizes [R] of the lists, which sum to X."""

    values: NDArray[np.float32]
    labels: NDArray[np.float32]
    sizes: NDArray[np.int64]


class LambdaMart:
    """Trees fitted on lists; validation says how many, and of which settings."""

    def __init__(self, train: Lists, valid: Lists) -> None:
        self._levels = np.unique(train.labels)  # LambdaMART wants whole numbers, and is told what each is worth
        found = []
        for tried in TRIED:
            fitted = self._data(train, None)
            trees = lightgbm.train(
                PARAMETERS | {"label_gain": self._levels.tolist()} | tried, fitted, ROUNDS,
                valid_sets=[self._data(valid, fitted)],
                callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)],
            )  # fmt: skip
            found.append((trees.best_score["valid_0"]["ndcg@10"], trees))
        self._trees = max(found, key=lambda pair: pair[0])[1]

    def scores(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """[X, D] → [X]"""
        return np.asarray(self._trees.predict(values), np.float32)

    def _data(self, lists: Lists, reference: lightgbm.Dataset | None) -> lightgbm.Dataset:
        grades = np.minimum(np.searchsorted(self._levels, lists.labels), len(self._levels) - 1)
        return lightgbm.Dataset(lists.values, grades, group=lists.sizes, reference=reference)
