"""Item-to-item collaborative filtering: cosine similarity of the users who chose two items.

Sarwar et al., "Item-based collaborative filtering recommendation algorithms", WWW 2001.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from implicit.nearest_neighbours import all_pairs_knn
from numpy.typing import NDArray
from scipy import sparse

from trirank_build.data.dataset import Dataset
from trirank_build.features.fitting import Features
from trirank_build.features.transitions import training_sequences
from trirank_build.retrieval.scores import Listed, scores_of

NEIGHBOURS = 200
"""Of an item, the most similar ones; fewer where all items' would be more than ENTRIES."""
ENTRIES = 100_000_000
"""Most numbers of the table of similarities: 8 bytes each, and 28 while it is made."""
LONGEST = (1_000, 500, 200, 100, 50, 20, 10, 5)
"""Newest events of a user that are looked at: as many of these as leave MOST_PAIRS. Pairs grow with the square, and
those of a robot say nothing."""
MOST_PAIRS = 1_000_000_000
DECAY = 0.8
"""Weight of an event relative to the one after it in the user's history."""
_CHUNK = 512
_FAVOURITES = 10_000
"""Items that may fill a list: as many as are asked for, and what a user has met, are fewer."""


class ItemKnn:
    """Similarities fitted on (user, item) pairs."""

    def __init__(self, users: NDArray[Any], rows: NDArray[Any], n_users: int, n_items: int) -> None:
        """Fit. ``users`` and ``rows`` are parallel, numbered from 0, a user's newest last."""
        users, rows = _newest(users, rows)
        starts = np.append(0, np.cumsum(np.bincount(users, minlength=n_users)))
        chosen = sparse.csr_matrix((np.ones(len(rows)), rows.astype(np.int32), starts), (n_users, n_items))
        chosen.sum_duplicates()  # a pair counts once
        counts = np.bincount(chosen.indices, minlength=n_items)
        chosen.data = (1 / np.sqrt(np.maximum(counts, 1)))[chosen.indices]
        self._similarity = _nearest(chosen, max(1, min(NEIGHBOURS, ENTRIES // max(n_items, 1))))
        # Fills lists that similarity alone leaves short; too small to change an order.
        self._prior = (1e-6 * counts / max(counts.max(), 1)).astype(np.float32)
        self._favourites = np.argsort(-self._prior, kind="stable")[:_FAVOURITES]
        self.items = n_items

    def scores(self, histories: NDArray[np.int32], queries: list[str] | None = None) -> NDArray[np.float32]:
        """[B, M] how alike each item is to the history.

        Args:
            histories: [B, L] item rows, newest last, -1 padded in front.
        """
        return np.asarray(self._found(histories).toarray() + self._prior, np.float32)

    def listed(self, histories: NDArray[np.int32]) -> Listed:
        """The same of few items that a history is alike to, and of favourites."""
        found = self._found(histories)
        found.sort_indices()
        return Listed(found, self._prior, self._favourites)

    def _found(self, histories: NDArray[np.int32]) -> sparse.csr_matrix:
        recency = DECAY ** np.arange(histories.shape[1])[::-1]
        request, place = np.nonzero(histories >= 0)
        taste = sparse.csr_matrix(
            (recency[place].astype(np.float32), (request, histories[request, place])),
            (len(histories), self.items),
        )
        return (taste @ self._similarity).tocsr()

    def retrieve(
        self, histories: NDArray[np.int32], k: int, exclude_history: bool
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Top ``k`` rows and scores, best first, in chunks of requests; histories as for ``scores``."""
        for start in range(0, len(histories), _CHUNK):
            part = histories[start : start + _CHUNK]
            banned = None
            if exclude_history:
                request, place = np.nonzero(part >= 0)
                banned = request, part[request, place]
            yield scores_of(self, part).top(min(k, self.items), banned)


def _newest(users: NDArray[Any], rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The newest events of each user, see LONGEST, one user after the other."""
    counts = np.bincount(users) if len(users) else np.zeros(0, np.int64)
    few = (length for length in LONGEST if (np.minimum(counts, length).astype(float) ** 2).sum() <= MOST_PAIRS)
    longest = next(few, LONGEST[-1])
    if (users[1:] < users[:-1]).any():
        order = np.argsort(users, kind="stable")
        users, rows = users[order], rows[order]
    if not (counts > longest).any():
        return users, rows
    kept = np.cumsum(counts)[users] - np.arange(len(users)) <= longest
    return users[kept], rows[kept]


def _nearest(scaled: sparse.csr_matrix, count: int) -> sparse.csr_matrix:
    """The ``count`` largest similarities [M, M] of each item, from users' choices [U, M] of length 1 an item, in double
    precision."""
    items = scaled.shape[1]
    pairs = all_pairs_knn(scaled, count + 1, show_progress=False)  # an item is nearest to itself
    others = (pairs.row != pairs.col) & (pairs.data > 0)
    # Rows come in their order; SciPy's own way to a CSR matrix would sort each of them besides.
    starts = np.append(0, np.cumsum(np.bincount(pairs.row[others], minlength=items)))
    columns = pairs.col[others]
    values = pairs.data.astype(np.float32)[others]
    return sparse.csr_matrix((values, columns, starts), (items, items))


def fit_item_knn(dataset: Dataset, features: Features) -> ItemKnn:
    """Item-to-item similarity, fitted on the training events."""
    return ItemKnn(*choices_of(dataset, features))


def choices_of(dataset: Dataset, features: Features) -> tuple[NDArray[np.int64], NDArray[np.int32], int, int]:
    """Parallel users and rows of the training events, and how many of either there are."""
    users, rows = training_sequences(dataset, features.catalogue)
    return users, rows, int(users.max(initial=-1)) + 1, len(features.catalogue)
