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

from trirank_build.text.reading import Reader

PENALTIES = (3e-6, 1e-6, 3e-7)
"""Of the squared weights, for each text; validation chooses."""
STEPS = 100
_TEXTS = 2_048


class Linear(NamedTuple):
    """weights [V, C] of each number's rarity, and the rarity [V]."""

    weights: NDArray[np.float32]
    rarity: NDArray[np.float32]

    def table(self, share: float) -> NDArray[np.float32]:
        """[V, C+1] as TextClassifier.linear holds it."""
        return np.concatenate([share * self.weights * self.rarity[:, None], self.rarity[:, None] ** 2], 1)

    def logits(self, told: sparse.csr_matrix) -> NDArray[np.float32]:
        """[B, C] of what ``presence`` says of texts."""
        return np.asarray(_weighted(told, self.rarity) @ self.weights)


def presence(reader: Reader, units: NDArray[np.int32]) -> sparse.csr_matrix:
    """[B, V]: 1 for every unit and n-gram that a text of units [B, L] has."""
    order = np.argsort((units > 0).sum(1), kind="stable")
    parts = []
    for start in range(0, len(order), _TEXTS):
        own = units[order[start : start + _TEXTS]]
        grams = reader.grams(reader.hashes(own[:, : max(1, int((own > 0).sum(1).max(initial=0)))]))
        there = grams > 0
        ends = np.concatenate([[0], np.cumsum(there.sum(1))])
        parts.append(sparse.csr_matrix((np.ones(ends[-1], np.float32), grams[there], ends), (len(own), reader.size)))
    return sparse.vstack(parts, format="csr")[np.argsort(order)]


def fit_linear(
    train: sparse.csr_matrix, labels: NDArray[np.int64], valid: sparse.csr_matrix, truth: NDArray[np.int64],
    classes: int,
) -> Linear:  # fmt: skip
    """Args:
    train, valid: what ``presence`` says of texts.
    """
    counts = np.asarray(train.getnnz(axis=0))
    rarity = np.log1p(train.shape[0] / (1.0 + counts)).astype(np.float32)
    rarity[counts < 2] = 0  # what one text has says nothing of another
    told, judged = _weighted(train, rarity), _weighted(valid, rarity)
    found = []
    for penalty in PENALTIES:
        weights = _fit(told, labels, classes, penalty)
        found.append((float(((judged @ weights).argmax(1) == truth).mean()), Linear(weights, rarity)))
    return max(found, key=lambda pair: pair[0])[1]


def _weighted(told: sparse.csr_matrix, rarity: NDArray[np.float32]) -> sparse.csr_matrix:
    """[B, V] rarities of what is there, of length one."""
    scaled = told @ sparse.diags(rarity, format="csr")
    length = np.sqrt(np.maximum(np.asarray(scaled.multiply(scaled).sum(1)).ravel(), 1e-6))
    return (sparse.diags(1 / length, format="csr") @ scaled).tocsr().astype(np.float32)


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
