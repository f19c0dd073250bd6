"""Candidates and scores by what followed what the user did, and by the attributes of it: the two columns that serving
fills for candidates (trirank_backend.features.past_kernels), here for the whole catalogue at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from trirank_backend.features.past_kernels import ATTRIBUTE_DECAY, TRANSITION_DECAY

from trirank_build.features.fitting import Features
from trirank_build.retrieval.counting import falling, weigh
from trirank_build.retrieval.scores import Factors, Listed


class Followers:
    """Items that came after those of the history, as the features count them."""

    def __init__(self, features: Features) -> None:
        table, self.items = features.packer.transitions, len(features.catalogue)
        self._table = sparse.csr_matrix((table.weights, table.rows, table.starts[:-1]), (self.items, self.items))

    def scores(self, histories: NDArray[np.int32], queries: list[str] | None = None) -> NDArray[np.float32]:
        """[B, L] item rows, newest last, -1 padded → [B, M]."""
        return np.asarray(self._found(histories).toarray(), np.float32)

    def listed(self, histories: NDArray[np.int32]) -> Listed:
        """The same of what came after the history."""
        found = self._found(histories).tocsr()
        found.sort_indices()
        return Listed(found)

    def _found(self, histories: NDArray[np.int32]) -> sparse.csr_matrix:
        return weigh(histories, _fading(TRANSITION_DECAY), self.items) @ self._table


class Alike:
    """Items whose attributes are those of the history."""

    def __init__(self, features: Features) -> None:
        items = features.packer.kernel_items
        row, slot = np.nonzero(items.attributes[:-1])
        attribute = items.attributes[row, slot]
        values = items.attribute_idf[attribute] * items.attribute_scale[row]
        self.items = len(features.catalogue)
        self._items = sparse.csr_matrix((values, (row, attribute)), (self.items, len(items.attribute_idf)))

    def scores(self, histories: NDArray[np.int32], queries: list[str] | None = None) -> NDArray[np.float32]:
        """[B, L] item rows, newest last, -1 padded → [B, M]."""
        return np.asarray((self._tastes(histories) @ self._items.T).toarray(), np.float32)

    def listed(self, histories: NDArray[np.int32]) -> Factors:
        """The same, a block of items at a time: a category may be that of a million of them."""
        return Factors(self._tastes(histories), self._items)

    def _tastes(self, histories: NDArray[np.int32]) -> sparse.csr_matrix:
        return weigh(histories, _fading(ATTRIBUTE_DECAY), self.items) @ self._items


def _fading(decay: float) -> Callable[[int], NDArray[np.float32]]:
    """Weights that sum to 1, each ``decay`` times that of the event after it."""

    def weights(length: int) -> NDArray[np.float32]:
        found = falling("exponential", length, decay)
        return found / found.sum()

    return weights
