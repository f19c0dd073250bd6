"""The linear model of n-grams: a softmax regression on which are there, each scaled by how much it tells classes apart.

That scale is the log of how often a class's texts have it over how often others do (naive Bayes), as in Wang and
Manning, "Baselines and bigrams" (ACL 2012), where it is the strongest linear model of short texts. So the classifier
contains it; how much it counts beside the encoder is chosen on validation, none included.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import minimize

from trirank_build.text.reading import Reader

PENALTIES = (1e-5, 3e-6, 1e-6)
"""Of the squared weights, for each text; validation chooses."""
STEPS = 60
LARGEST = 6.0
"""Of a logarithm."""
_TEXTS = 2_048


class Linear(NamedTuple):
    """weights [V, C], and which numbers are told at all [V]: 1 or 0."""

    weights: NDArray[np.float32]
    told: NDArray[np.float32]

    def table(self, share: float) -> NDArray[np.float32]:
        """[V, C+1] as TextClassifier.linear holds it."""
        return np.concatenate([share * self.weights, self.told[:, None]], 1)

    def logits(self, found: sparse.csr_matrix) -> NDArray[np.float32]:
        """[B, C] of what ``presence`` says of texts."""
        return np.asarray(_scaled(found, self.told) @ self.weights)


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
    told = (np.asarray(train.getnnz(axis=0)) > 1).astype(np.float32)  # what one text has says nothing of another
    given, judged = _scaled(train, told), _scaled(valid, told)
    scale = _log_ratios(train, labels, classes) * told[:, None]
    found = []
    for penalty in PENALTIES:
        weights = scale * _fit(given, labels, scale, penalty)
        found.append((float(((judged @ weights).argmax(1) == truth).mean()), Linear(weights, told)))
    return max(found, key=lambda pair: pair[0])[1]


def _log_ratios(train: sparse.csr_matrix, labels: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    """[V, C] log of the share of a class's texts that have a number over the share of the others' that do."""
    have = np.stack([np.asarray(train[labels == own].sum(0)).ravel() + 1.0 for own in range(classes)], 1)
    sizes = np.bincount(labels, minlength=classes) + 2.0
    others = (have.sum(1, keepdims=True) - have) / (sizes.sum() - sizes)
    return np.log(have / sizes / others).clip(-LARGEST, LARGEST).astype(np.float32)


def _scaled(found: sparse.csr_matrix, told: NDArray[np.float32]) -> sparse.csr_matrix:
    """[B, V] what is there and told, of length one."""
    kept = found @ sparse.diags(told, format="csr")
    length = np.sqrt(np.maximum(np.asarray(kept.sum(1)).ravel(), 1e-6))
    return (sparse.diags(1 / length, format="csr") @ kept).tocsr().astype(np.float32)


def _fit(
    given: sparse.csr_matrix, labels: NDArray[np.int64], scale: NDArray[np.float32], penalty: float
) -> NDArray[np.float32]:
    """[V, C] weights of scaled numbers."""
    classes = scale.shape[1]
    truth = np.eye(classes, dtype=np.float32)[labels]
    back = given.T.tocsr()

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights = flat.reshape(-1, classes).astype(np.float32)
        logits = given @ (scale * weights)
        logits -= logits.max(1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        gradient = scale * (back @ ((np.exp(logs) - truth) / len(labels))) + 2 * penalty * weights
        value = -(logs * truth).sum() / len(labels) + penalty * float((weights.astype(np.float64) ** 2).sum())
        return float(value), gradient.astype(np.float64).ravel()

    start = np.zeros(scale.size)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": STEPS})
    return np.asarray(found.x.reshape(-1, classes), np.float32)
