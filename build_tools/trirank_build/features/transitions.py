"""Counts what follows what in the training events; trirank_backend.features.transitions says what for."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from trirank_backend.catalogue import Catalogue
from trirank_backend.features import Transitions

from trirank_build.data.dataset import Dataset
from trirank_build.features.runs import run_begins

WINDOW = 10
"""Steps from an event to the last one that counts as its follower; a pair k steps apart counts 1 / sqrt(k)."""
FOLLOWERS = 200
"""Kept of an item, the most frequent ones."""
_EVENTS = 10_000_000
"""Whose followers are counted at a time, ten numbers each."""


def training_sequences(dataset: Dataset, catalogue: Catalogue) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Users, numbered from 0, and rows [E] of the training events, one user after the other, oldest first."""
    events = dataset.training_events()
    users = np.cumsum(run_begins(events["user_id"].to_numpy())) - 1
    return users, catalogue.rows(events["item_id"].to_numpy())


def steps_apart(
    users: NDArray[np.int64], rows: NDArray[np.int32], steps: int, items: int, first: int = 0, end: int | None = None
) -> sparse.csr_matrix:
    """[M, M] how often each item came exactly so many steps after each other one, in the events of one user; with
    ``first`` and ``end`` those rows of it."""
    end = items if end is None else end
    pairs = (users[steps:] == users[:-steps]) & (rows[steps:] != rows[:-steps])
    if end - first < items:
        pairs &= (rows[:-steps] >= first) & (rows[:-steps] < end)
    earlier, later = rows[:-steps][pairs] - first, rows[steps:][pairs]
    return sparse.csr_matrix((np.ones(len(earlier), np.float32), (earlier, later)), (end - first, items))


def largest(matrix: sparse.csr_matrix, count: int) -> sparse.csr_matrix:
    """The ``count`` largest entries of each row, columns ascending."""
    matrix = matrix.tocsr()
    matrix.sort_indices()
    lengths = np.diff(matrix.indptr)
    kept = np.ones(matrix.nnz, bool)
    for row in np.flatnonzero(lengths > count):  # few have so many
        part = slice(matrix.indptr[row], matrix.indptr[row + 1])
        order = np.argsort(-matrix.data[part], kind="stable")
        kept[part][order[count:]] = False
    ends = np.append(0, np.cumsum(np.minimum(lengths, count)))
    return sparse.csr_matrix((matrix.data[kept], matrix.indices[kept], ends), matrix.shape)


def count_transitions(users: NDArray[np.int64], rows: NDArray[np.int32], items: int) -> Transitions:
    """The table of ``items`` items, from users and rows as ``training_sequences`` gives them."""
    # Earlier items in ranges of about as many events each, so that the counts of one range are there at a time.
    met = np.cumsum(np.bincount(rows, minlength=items))
    edges = [0, *np.searchsorted(met, np.arange(_EVENTS, int(met[-1]) if items else 0, _EVENTS)), items]
    parts = []
    for first, end in pairwise(edges):
        counts = sparse.csr_matrix((end - first, items), dtype=np.float32)
        for steps in range(1, WINDOW + 1):
            counts = counts + steps_apart(users, rows, steps, items, first, end) / np.float32(np.sqrt(steps))
        parts.append(largest(counts, FOLLOWERS))
    table = sparse.vstack(parts, format="csr")
    table.sort_indices()
    return Transitions(
        starts=np.append(table.indptr, table.indptr[-1]).astype(np.int64),
        rows=table.indices.astype(np.int32),
        weights=np.log1p(table.data).astype(np.float32),
    )
