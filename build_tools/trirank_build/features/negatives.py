"""Where negatives come from that no candidate list offers: drawn items, and how likely each was to be drawn.

Hard negatives need no sampler: they are the candidates that retrieval put beside the choice (features.examples).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["all", "uniform", "popularity", "in_batch"]
POWER = 0.75
"""Popularity is flattened by this exponent (Mikolov et al. 2013)."""


@dataclass(frozen=True)
class Negatives:
    """K items, the same for the whole batch.

    Attributes:
        rows: [K] catalogue rows.
        log_q: [K] see NegativeSampler.log_q.
    """

    rows: NDArray[np.int32]
    log_q: NDArray[np.float32]


class NegativeSampler:
    """Draws for one catalogue.

    Args:
        kind: ``all`` (every item), ``uniform``, ``popularity`` (count to the power 0.75), ``in_batch`` (the other
            choices of the batch, Yi et al. 2019).
        counts: [M] how often training chose each item.
        count: draws, with replacement; ``all`` and ``in_batch`` have as many as there are.
    """

    def __init__(self, kind: Kind, counts: NDArray[np.int64], count: int) -> None:
        self.kind, self.count, self.items = kind, count, len(counts)
        weights = np.maximum(counts, 0.5) ** (POWER if kind == "popularity" else 1.0)
        self._log_share = np.log(weights / weights.sum()).astype(np.float32)
        self._cumulative = np.cumsum(weights / weights.sum())

    def draw(self, rng: np.random.Generator, chosen: NDArray[np.int32]) -> Negatives:
        """Negatives for a batch with these choices [P] (-1: none)."""
        if self.kind == "all":
            rows = np.arange(self.items, dtype=np.int32)
        elif self.kind == "in_batch":
            rows = np.unique(chosen[chosen >= 0]).astype(np.int32)
        else:
            rows = self._independent(rng, (self.count,))
        return Negatives(rows, self.log_q(rows, int((chosen >= 0).sum())))

    def draw_each(self, rng: np.random.Generator, requests: int, chosen: NDArray[np.int32]) -> NDArray[np.int32]:
        """[B, K] rows, other ones for each request; ``chosen`` [B, …] as for draw."""
        if self.kind == "in_batch":
            pool = np.unique(chosen[chosen >= 0]).astype(np.int32)
            return rng.choice(pool, (requests, self.count)) if len(pool) else np.zeros((requests, 0), np.int32)
        return self._independent(rng, (requests, self.count))

    def _independent(self, rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.int32]:
        if self.kind == "uniform":
            return rng.integers(self.items, size=shape, dtype=np.int32)
        at = np.searchsorted(self._cumulative, rng.random(shape))
        return np.minimum(at, self.items - 1).astype(np.int32)

    def log_q(self, rows: NDArray[np.int32], choices: int) -> NDArray[np.float32]:
        """[...] log of the chance that a draw gives each row, up to a number that is the same for all; of no matter
        where all are alike. An item that a batch of ``choices`` chose is drawn once, however often it was chosen: what
        counts of the in-batch draw is the chance to be chosen at all, which of popular items is far less than their
        share times the choices."""
        if self.kind in ("all", "uniform"):
            return np.full(rows.shape, -np.log(self.items), np.float32)
        if self.kind == "in_batch":
            share = np.exp(self._log_share[rows].astype(np.float64))
            return np.log(-np.expm1(choices * np.log1p(-np.minimum(share, 1 - 1e-12)))).astype(np.float32)
        return self._log_share[rows]
