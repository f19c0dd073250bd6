"""Item-to-item collaborative filtering: cosine similarity of the users who chose two items.

Sarwar et al., "Item-based collaborative filtering recommendation algorithms", WWW 2001.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from trirank_build.data.dataset import Dataset
from trirank_build.features.fitting import Features
from trirank_build.features.transitions import largest

NEIGHBOURS = 200
DECAY = 0.8
"""Weight of an event relative to the one after it in the user's history."""
_CHUNK = 512


class ItemKnn:
    """Similarities fitted on (user, item) pairs."""

    def __init__(self, users: NDArray[np.int64], rows: NDArray[np.int64], n_users: int, n_items: int) -> None:
        """Fit. ``users`` and ``rows`` are parallel, numbered from 0."""
        chosen = sparse.csr_matrix((np.ones(len(rows), np.float32), (users, rows)), (n_users, n_items))
        chosen.data[:] = 1  # a pair counts once
        counts = np.asarray(chosen.sum(0)).ravel()
        scaled = chosen @ sparse.diags(1 / np.sqrt(np.maximum(counts, 1)))
        similarity = (scaled.T @ scaled).tocsr()
        similarity.setdiag(0)
        similarity.eliminate_zeros()
        self._similarity = largest(similarity, NEIGHBOURS)
        # Fills lists that similarity alone leaves short; too small to change an order.
        self._prior = (1e-6 * counts / max(counts.max(), 1)).astype(np.float32)
        self._n_items = n_items

    def scores(self, histories: NDArray[np.int32], queries: list[str] | None = None) -> NDArray[np.float32]:
        """[B, M] how alike each item is to the history.

        Args:
            histories: [B, L] item rows, newest last, -1 padded in front.
        """
        recency = DECAY ** np.arange(histories.shape[1])[::-1]
        request, place = np.nonzero(histories >= 0)
        taste = sparse.csr_matrix(
            (recency[place].astype(np.float32), (request, histories[request, place])),
            (len(histories), self._n_items),
        )
        return np.asarray((taste @ self._similarity).toarray() + self._prior, np.float32)

    def retrieve(
        self, histories: NDArray[np.int32], k: int, exclude_history: bool
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Top ``k`` rows and scores, best first, in chunks of requests; histories as for ``scores``."""
        for start in range(0, len(histories), _CHUNK):
            part = histories[start : start + _CHUNK]
            scores = self.scores(part)
            if exclude_history:
                request, place = np.nonzero(part >= 0)
                scores[request, part[request, place]] = -np.inf
            top = np.argpartition(-scores, min(k, self._n_items) - 1, axis=1)[:, :k]
            values = np.take_along_axis(scores, top, 1)
            order = np.argsort(-values, axis=1, kind="stable")
            yield np.take_along_axis(top, order, 1), np.take_along_axis(values, order, 1)


def fit_item_knn(dataset: Dataset, features: Features) -> ItemKnn:
    """Item-to-item similarity, fitted on the training events."""
    return ItemKnn(*choices_of(dataset, features))


def choices_of(dataset: Dataset, features: Features) -> tuple[NDArray[np.int64], NDArray[np.int64], int, int]:
    """Parallel users and rows of the training events, and how many of either there are."""
    events = dataset.training_events()
    users = np.unique(events["user_id"].to_numpy(), return_inverse=True)[1]
    rows = features.catalogue.rows(events["item_id"].to_numpy()).astype(np.int64)
    return users, rows, int(users.max(initial=-1)) + 1, len(features.catalogue)
