"""Matrix factorisation for implicit feedback (Hu et al., ICDM 2008), by the library `implicit`."""

from __future__ import annotations

import numpy as np
from implicit.cpu.als import AlternatingLeastSquares
from numpy.typing import NDArray
from scipy import sparse
from threadpoolctl import threadpool_limits

FACTORS, REGULARISATION, CONFIDENCE, ITERATIONS = 128, 0.05, 10.0, 15


class MatrixFactorisation:
    """Item factors fitted on (user, item) pairs; a user is folded in from the history."""

    def __init__(self, users: NDArray[np.int64], rows: NDArray[np.int32], n_users: int, n_items: int) -> None:
        """Fit. ``users`` and ``rows`` are parallel, numbered from 0."""
        chosen = sparse.csr_matrix((np.ones(len(rows), np.float32), (users, rows)), (n_users, n_items))
        chosen.data[:] = 1  # a pair counts once
        self._items = n_items
        with threadpool_limits(1, "blas"):  # the library's own threads and those of BLAS get in each other's way
            self._model = AlternatingLeastSquares(
                factors=min(FACTORS, n_items), regularization=REGULARISATION, alpha=CONFIDENCE,
                iterations=ITERATIONS, random_state=0,
            )  # fmt: skip
            self._model.fit(chosen, show_progress=False)

    def scores(self, histories: NDArray[np.int32], queries: list[str] | None = None) -> NDArray[np.float32]:
        """[B, L] item rows, -1 padded → [B, M]."""
        request, place = np.nonzero(histories >= 0)
        ones = np.ones(len(request), np.float32)
        known = sparse.csr_matrix((ones, (request, histories[request, place])), (len(histories), self._items))
        known.data[:] = 1
        with threadpool_limits(1, "blas"):
            factors = self._model.recalculate_user(np.arange(len(histories)), known)
        return np.asarray(factors @ self._model.item_factors.T, np.float32)
