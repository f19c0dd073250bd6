"""LambdaMART (Burges, "From RankNet to LambdaRank to LambdaMART", 2010), by LightGBM, over the ranker's own numbers."""

from __future__ import annotations

import lightgbm
import numpy as np
from numpy.typing import NDArray

from trirank_build.features.examples import Examples

_BATCH = 256
MAX_REQUESTS = 20_000
PARAMETERS = {
    "objective": "lambdarank", "metric": "ndcg", "eval_at": [10], "learning_rate": 0.05, "num_leaves": 31,
    "min_data_in_leaf": 50, "verbosity": -1, "deterministic": True, "seed": 0,
}  # fmt: skip
ROUNDS, PATIENCE = 600, 50


class LambdaMart:
    """Trees over the dense features of each candidate [N, D] and the context of its request [C]."""

    def __init__(self, train: Examples, valid: Examples, seed: int = 0) -> None:
        """Fit on requests; validation says how many trees."""
        kept = np.sort(np.random.default_rng(seed).permutation(len(train))[:MAX_REQUESTS])
        self._levels = np.unique(train.labels[kept])  # LambdaMART wants whole numbers, and is told what each is worth
        fitted = self._data(train, kept, None)
        self._trees = lightgbm.train(
            PARAMETERS | {"label_gain": self._levels.tolist()}, fitted, ROUNDS,
            valid_sets=[self._data(valid, np.arange(len(valid)), fitted)],
            callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)],
        )  # fmt: skip

    def score(self, examples: Examples) -> NDArray[np.float32]:
        """[R, N]; padding scores 0."""
        scores = np.zeros(examples.rows.shape, np.float32)
        for start in range(0, len(examples), _BATCH):
            which = np.arange(start, min(start + _BATCH, len(examples)))
            values, valid, _ = _table(examples, which)
            scores[which[:, None], np.arange(valid.shape[1])] = _spread(np.asarray(self._trees.predict(values)), valid)
        return scores

    def _data(
        self, examples: Examples, which: NDArray[np.int64], reference: lightgbm.Dataset | None
    ) -> lightgbm.Dataset:
        parts = [_table(examples, which[at : at + _BATCH]) for at in range(0, len(which), _BATCH)]
        labels = np.concatenate([labels[valid] for _, valid, labels in parts])
        grades = np.minimum(np.searchsorted(self._levels, labels), len(self._levels) - 1)
        return lightgbm.Dataset(
            np.concatenate([values for values, _, _ in parts]), grades,
            group=np.concatenate([valid.sum(1) for _, valid, _ in parts]), reference=reference,
        )  # fmt: skip


def _table(
    examples: Examples, which: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.float32]]:
    """Rows of the valid candidates, valid [B, N], labels [B, N]."""
    batch = examples.whole(which)
    packed = batch.packed
    context = np.broadcast_to(packed.context[:, None], (*batch.valid.shape, packed.context.shape[1]))
    return np.concatenate([packed.dense, context], -1)[batch.valid], batch.valid, batch.labels


def _spread(values: NDArray[np.float64], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    scores = np.zeros(valid.shape, np.float32)
    scores[valid] = values
    return scores
