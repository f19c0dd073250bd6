"""Next items by counting what followed what: PCTM and sequential rules.

Both as in "Do sequential recommendation benchmarks really require higher-order sequence modelling?" (Petrov et al.,
RecSys 2026), where they rank above trained Transformers on several of the data sets that these are judged by;
sequential rules are of Ludewig and Jannach ("Evaluation of session-based recommendation algorithms", UMUAI 2018).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from trirank_build.features.transitions import largest, steps_apart

Falling = Literal["uniform", "exponential", "inverse", "quadratic", "linear", "logarithmic"]


def falling(kind: Falling, count: int, rate: float = 0.5) -> NDArray[np.float32]:
    """[count] weights of distances d = 1, 2, …: 1, ``rate``^(d-1), d^-``rate``, 1/d², 1 - d/10, 1/log10(d + 1.7)."""
    d = np.arange(1, count + 1, dtype=np.float64)
    weights = {
        "uniform": np.ones(count), "exponential": rate ** (d - 1), "inverse": d**-rate, "quadratic": d**-2,
        "linear": np.maximum(1 - d / 10, 0), "logarithmic": 1 / np.log10(d + 1.7),
    }[kind]  # fmt: skip
    return weights.astype(np.float32)


class Steps:
    """How often which item came so many steps after which, counted once for all settings that are tried."""

    def __init__(self, users: NDArray[np.int64], rows: NDArray[np.int32], items: int) -> None:
        """``users`` and ``rows`` as features.transitions.training_sequences gives them."""
        self._users, self._rows, self.items = users, rows, items
        self._apart: list[sparse.csr_matrix] = []
        self.counts = np.bincount(rows, minlength=items)

    def weighted(self, weights: NDArray[np.float32]) -> sparse.csr_matrix:
        """[M, M] counts of pairs, by distance from 1 on."""
        while len(self._apart) < len(weights):
            self._apart.append(steps_apart(self._users, self._rows, len(self._apart) + 1, self.items))
        total = sparse.csr_matrix((self.items, self.items), dtype=np.float32)
        for weight, apart in zip(weights, self._apart, strict=False):
            if weight > 0:
                total = total + apart * weight
        return total.tocsr()


@dataclass(frozen=True)
class PctmSettings:
    """Attributes:
    window, counted, count_rate: of the counts.
    tau: of the smoothing log(1 + count · items / tau).
    head, recent, decay: of the history's weights: ``recent`` of the mass falls by ``decay`` over the newest ``head``
        events, the rest lies evenly on the older ones; head 0: all of it falls.
    popularity: times the log popularity.
    """

    window: int = 10
    counted: Falling = "inverse"
    count_rate: float = 0.5
    tau: float = 10_000.0
    head: int = 0
    recent: float = 1.0
    decay: float = 0.6
    popularity: float = 0.0


class Pctm:
    """Sums of smoothed log transition counts over the history."""

    def __init__(self, steps: Steps, settings: PctmSettings) -> None:
        counts = steps.weighted(falling(settings.counted, settings.window, settings.count_rate))
        counts.data = np.log1p(counts.data * np.float32(steps.items / settings.tau))
        self._evidence, self._settings = counts, settings
        share = (steps.counts + 1) / (steps.counts.sum() + steps.items)
        self._background = (settings.popularity * np.log(share)).astype(np.float32)

    def scores(self, histories: NDArray[np.int32], queries: list[str] | None = None) -> NDArray[np.float32]:
        """[B, L] item rows, newest last, -1 padded → [B, M]."""
        found = weigh(histories, self._weights, self._evidence.shape[0]) @ self._evidence
        return np.asarray(found.toarray() + self._background, np.float32)

    def _weights(self, length: int) -> NDArray[np.float32]:
        settings = self._settings
        head = min(settings.head or length, length)
        weights = np.zeros(length, np.float32)
        recent = falling("exponential", head, settings.decay)
        weights[:head] = recent / recent.sum()
        if head < length:
            weights[:head] *= settings.recent
            weights[head:] = (1 - settings.recent) / (length - head)
        return weights


@dataclass(frozen=True)
class SeqRulesSettings:
    """Attributes:
    window, counted: of the rules; an inverse count is 1/d.
    kept: rules of an item, the strongest; 0: all.
    events, aged: newest events of the history, and their weights.
    """

    window: int = 10
    counted: Falling = "logarithmic"
    kept: int = 100
    events: int = 10
    aged: Falling = "inverse"


class SeqRules:
    """Sums over the history of the rules that start in its events."""

    def __init__(self, steps: Steps, settings: SeqRulesSettings) -> None:
        rules = steps.weighted(falling(settings.counted, settings.window, 1.0))
        self._rules = largest(rules, settings.kept) if settings.kept else rules
        self._settings = settings

    def scores(self, histories: NDArray[np.int32], queries: list[str] | None = None) -> NDArray[np.float32]:
        """[B, L] item rows, newest last, -1 padded → [B, M]."""
        return np.asarray((weigh(histories, self._weights, self._rules.shape[0]) @ self._rules).toarray(), np.float32)

    def _weights(self, length: int) -> NDArray[np.float32]:
        weights = falling(self._settings.aged, length, 1.0)
        weights[0] = 1  # as published: only older events are weighted
        weights[self._settings.events :] = 0
        return weights


def weigh(histories: NDArray[np.int32], weights: Callable[[int], NDArray[np.float32]], items: int) -> sparse.csr_matrix:
    """[B, M] histories [B, L] with ``weights(length)`` on their events, the newest first."""
    there = histories >= 0
    lengths = there.sum(1)
    values = np.zeros(histories.shape, np.float32)
    for length in np.unique(lengths[lengths > 0]):
        known = histories[lengths == length] >= 0
        part = np.zeros(known.shape, np.float32)
        part[known] = np.tile(weights(int(length))[::-1], len(known))
        values[lengths == length] = part
    request, place = np.nonzero(there)
    return sparse.csr_matrix((values[request, place], (request, histories[request, place])), (len(histories), items))
