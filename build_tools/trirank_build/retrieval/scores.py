"""What a source of candidates says of all M items, asked for in parts: an array of the scores of ten million items for
256 requests would be 10 GB.

A catalogue of at most BLOCK items is one block, which is then what an array of all of them was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

BLOCK = 65_536
"""Items whose scores are there at a time."""

Pairs = tuple[NDArray[np.int64], NDArray[np.int32]]
"""Numbers of requests in their batch and rows of items, parallel: what a user has met and is not to be offered."""


class Contender(Protocol):
    """Scores every item by what a user did, or asks for. One that has the attribute ``items``, how many there are, and
    ``listed``, from histories to Scores, is asked for these where items are many."""

    def scores(self, histories: NDArray[np.int32], queries: list[str] | None = None, /) -> NDArray[np.float32]:
        """[B, L] item rows, newest last, -1 padded in front, and [B] queries → [B, M]; most need no query."""
        ...


class Scores(Protocol):
    """Scores of a batch of B requests for M items, as yet to be calculated."""

    def of(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """[B, N] scores of the items ``rows`` [B, N] of each request."""
        ...

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The first row of a block, and [B, m] scores of its items, which the caller may change; all blocks of them."""
        ...

    def top(self, k: int, banned: Pairs | None = None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Rows and scores [B, k] of the best items without those that are banned, best first; -inf: there is no more,
        and the row means nothing."""
        ...


def scores_of(contender: Contender, histories: NDArray[np.int32], queries: list[str] | None = None) -> Scores:
    """What a contender makes of histories [B, L] and [B] queries."""
    listed: Callable[[NDArray[np.int32]], Scores] | None = getattr(contender, "listed", None)
    if listed is not None and getattr(contender, "items", 0) > BLOCK:
        return listed(histories)
    return Whole(contender.scores(histories, queries))


def without(scores: Scores, banned: Pairs | None) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The blocks with -inf for what is banned."""
    if banned is not None:
        order = np.argsort(banned[1], kind="stable")
        places, rows = banned[0][order], banned[1][order].astype(np.int64)
    for first, block in scores.blocks():
        if banned is not None:
            start, end = np.searchsorted(rows, (first, first + block.shape[1]))
            block[places[start:end], rows[start:end] - first] = -np.inf
        yield first, block


def own_scores(scores: Scores, targets: NDArray[np.int32]) -> NDArray[np.float32]:
    """[B] the score of one item of each request, as its block has it: what ``of`` gives may differ in the last bit, and
    is not to be compared with a block."""
    own = np.empty(len(targets), np.float32)
    for first, block in scores.blocks():
        here = np.flatnonzero((targets >= first) & (targets < first + block.shape[1]))
        own[here] = block[here, targets[here] - first]
    return own


def count_above(
    scores: Scores, own: NDArray[np.float32], banned: Pairs | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[B] items that score above ``own_scores`` [B], and items that score as much, what is banned left out."""
    above, equal = np.zeros(len(own), np.int64), np.zeros(len(own), np.int64)
    for _, block in without(scores, banned):
        above += (block > own[:, None]).sum(1)
        equal += (block == own[:, None]).sum(1)
    return above, equal


def _top_of_blocks(scores: Scores, k: int, banned: Pairs | None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    best: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None
    for first, block in without(scores, banned):
        count = min(k, block.shape[1])
        rows = np.argpartition(-block, count - 1, axis=1)[:, :count]
        values = np.take_along_axis(block, rows, 1)
        rows = rows + first
        if best is not None:
            rows, values = np.concatenate([best[0], rows], 1), np.concatenate([best[1], values], 1)
            kept = np.argpartition(-values, min(k, values.shape[1]) - 1, axis=1)[:, :k]
            rows, values = np.take_along_axis(rows, kept, 1), np.take_along_axis(values, kept, 1)
        best = rows, values
    assert best is not None, "a catalogue has an item"
    rows, values = best
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(rows, order, 1), np.take_along_axis(values, order, 1)


@dataclass(frozen=True)
class Whole:
    """Scores [B, M] that are there."""

    values: NDArray[np.float32]

    def of(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """See Scores."""
        return np.take_along_axis(self.values, rows, 1)

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """See Scores."""
        yield 0, self.values.astype(np.float32, copy=True)

    def top(self, k: int, banned: Pairs | None = None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See Scores."""
        return _top_of_blocks(self, k, banned)


@dataclass(frozen=True)
class Listed:
    """Scores of the few items that each request has something in common with, beside what is the same for all.

    Attributes:
        found: [B, M] with sorted columns.
        prior: [M] added to every item's score; None: items that were not found are no candidates.
        favourites: rows by falling prior, as many as anybody may ask for.
    """

    found: sparse.csr_matrix
    prior: NDArray[np.float32] | None = None
    favourites: NDArray[np.int64] | None = None

    def of(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """See Scores."""
        requests, items = self.found.shape
        line = np.repeat(np.arange(requests, dtype=np.int64), np.diff(self.found.indptr))
        known = line * items + self.found.indices
        wanted = np.arange(requests, dtype=np.int64)[:, None] * items + rows
        at = np.minimum(np.searchsorted(known, wanted), max(len(known) - 1, 0))
        values = np.zeros(rows.shape, np.float32)
        if len(known):
            values = np.where(known[at] == wanted, self.found.data[at], 0).astype(np.float32)
        return values if self.prior is None else values + self.prior[rows]

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """See Scores."""
        columns = self.found.tocsc()
        for first in range(0, self.found.shape[1], BLOCK):
            end = min(first + BLOCK, self.found.shape[1])
            block = np.asarray(columns[:, first:end].toarray(), np.float32)
            yield first, block if self.prior is None else block + self.prior[first:end]

    def top(self, k: int, banned: Pairs | None = None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See Scores. Nothing but what was found, and the favourites, is looked at."""
        requests = self.found.shape[0]
        tops, values = np.zeros((requests, k), np.int64), np.full((requests, k), -np.inf, np.float32)
        refused = _by_request(banned, requests)
        for at in range(requests):
            part = slice(self.found.indptr[at], self.found.indptr[at + 1])
            rows, scores = self.found.indices[part].astype(np.int64), self.found.data[part].astype(np.float32)
            if self.prior is not None:
                assert self.favourites is not None
                more = np.setdiff1d(self.favourites[: k + len(refused[at])], rows)
                scores = np.concatenate([scores, np.zeros(len(more), np.float32)]) + self.prior[np.append(rows, more)]
                rows = np.append(rows, more)
            free = ~np.isin(rows, refused[at])
            rows, scores = rows[free], scores[free]
            order = np.lexsort((rows, -scores))[:k]
            tops[at, : len(order)], values[at, : len(order)] = rows[order], scores[order]
        return tops, values


def _by_request(banned: Pairs | None, requests: int) -> list[NDArray[np.int32]]:
    if banned is None:
        return [np.zeros(0, np.int32)] * requests
    order = np.argsort(banned[0], kind="stable")
    return np.split(banned[1][order], np.cumsum(np.bincount(banned[0], minlength=requests))[:-1])


@dataclass(frozen=True)
class Factors:
    """Products of two sparse matrices: tastes [B, A] and items [M, A], in A attributes."""

    tastes: sparse.csr_matrix
    items: sparse.csr_matrix

    def of(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """See Scores."""
        tastes = self.tastes[np.repeat(np.arange(len(rows)), rows.shape[1])]
        return np.asarray(self.items[rows.ravel()].multiply(tastes).sum(1), np.float32).reshape(rows.shape)

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """See Scores."""
        for first in range(0, self.items.shape[0], BLOCK):
            yield first, np.asarray((self.tastes @ self.items[first : first + BLOCK].T).toarray(), np.float32)

    def top(self, k: int, banned: Pairs | None = None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See Scores."""
        return _top_of_blocks(self, k, banned)


@dataclass(frozen=True)
class Products:
    """Products of states [B, D] with vectors of items [M, D], and what is the same for all [M]."""

    states: Tensor
    items: Tensor
    prior: Tensor

    def of(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """See Scores."""
        at = torch.from_numpy(rows.astype(np.int64)).to(self.items.device)
        with torch.inference_mode():
            found = (self.items[at] @ self.states[:, :, None])[..., 0] + self.prior[at]
        return np.asarray(found.cpu().numpy(), np.float32)

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """See Scores."""
        for first in range(0, len(self.items), BLOCK):
            with torch.inference_mode():
                block = self.states @ self.items[first : first + BLOCK].T + self.prior[first : first + BLOCK]
            yield first, np.asarray(block.cpu().numpy(), np.float32)

    def top(self, k: int, banned: Pairs | None = None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See Scores."""
        return _top_of_blocks(self, k, banned)
