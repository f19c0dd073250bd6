"""The linear model of n-grams: a softmax regression on TF-IDF, fitted whole.

It is strong on short texts (Wang and Manning, ACL 2012), so the classifier contains it: how much it counts beside the
encoder is chosen on validation, none included.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import minimize

PENALTIES = (3e-6, 1e-6, 3e-7)
"""Of the squared weights, for each text; validation chooses."""
STEPS = 100


class Linear(NamedTuple):
    """weights [V, C] of each number's rarity, and the rarity [V]."""

    weights: NDArray[np.float32]
    rarity: NDArray[np.float32]

    def table(self, share: float) -> NDArray[np.float32]:
        """[V, C+1] as TextClassifier.linear holds it."""
        return np.concatenate([share * self.weights * self.rarity[:, None], self.rarity[:, None] ** 2], 1)

    def logits(self, fields: NDArray[np.int32]) -> NDArray[np.float32]:
        """[B, C] of numbers [B, …]."""
        return np.asarray(_weighted(fields, self.rarity) @ self.weights)


def fit_linear(
    train: NDArray[np.int32], labels: NDArray[np.int64], valid: NDArray[np.int32], truth: NDArray[np.int64], size: int,
    classes: int,
) -> Linear:  # fmt: skip
    """Args:
    train, valid: numbers of units and n-grams [B, …], 0: none.
    size: V.
    """
    counts = np.bincount(np.unique(_keys(train, size)) % size, minlength=size)
    rarity = np.log1p(len(train) / (1.0 + counts)).astype(np.float32)
    rarity[counts < 2] = 0  # what one text has says nothing of another
    rarity[0] = 0
    told, judged = _weighted(train, rarity), _weighted(valid, rarity)
    found = []
    for penalty in PENALTIES:
        weights = _fit(told, labels, classes, penalty)
        found.append((float(((judged @ weights).argmax(1) == truth).mean()), Linear(weights, rarity)))
    return max(found, key=lambda pair: pair[0])[1]


def _keys(fields: NDArray[np.int32], size: int) -> NDArray[np.int64]:
    flat = fields.reshape(len(fields), -1).astype(np.int64)
    return (flat + np.arange(len(fields))[:, None] * size)[flat > 0]


def _weighted(fields: NDArray[np.int32], rarity: NDArray[np.float32]) -> sparse.csr_matrix:
    """[B, V] counts times rarity, of length one."""
    flat = fields.reshape(len(fields), -1)
    there = rarity[flat] > 0
    columns, rows = flat[there], np.repeat(np.arange(len(fields)), there.sum(1))
    # As the classifier adds: each place counts by itself, in the sum and in the length.
    length = np.sqrt(np.maximum((rarity[flat] ** 2 * there).sum(1), 1e-6))
    values = (rarity[columns] / length[rows]).astype(np.float32)
    return sparse.csr_matrix((values, (rows, columns)), shape=(len(fields), len(rarity)))


def _fit(told: sparse.csr_matrix, labels: NDArray[np.int64], classes: int, penalty: float) -> NDArray[np.float32]:
    truth = np.eye(classes, dtype=np.float32)[labels]
    back = told.T.tocsr()

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights = flat.reshape(-1, classes).astype(np.float32)
        logits = told @ weights
        logits -= logits.max(1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        gradient = back @ ((np.exp(logs) - truth) / len(labels)) + 2 * penalty * weights
        value = -(logs * truth).sum() / len(labels) + penalty * float((weights.astype(np.float64) ** 2).sum())
        return float(value), gradient.astype(np.float64).ravel()

    start = np.zeros(told.shape[1] * classes)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": STEPS})
    return np.asarray(found.x.reshape(-1, classes), np.float32)
