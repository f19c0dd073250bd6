"""Intervals by resampling requests (Efron 1979)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000


class Interval(NamedTuple):
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


def mean_interval(values: NDArray[np.float64], seed: int = 0) -> Interval:
    """Mean over requests and its percentile interval; NaN requests take no part. Of the differences of two
    rankings over the same requests this is the paired test: they differ if the interval excludes zero."""
    values = values[~np.isnan(values)]
    if not len(values):
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(_means(values[None], seed), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def ratio_interval(above: NDArray[np.float64], below: NDArray[np.float64], seed: int = 0) -> Interval:
    """Ratio of the means of two rankings over the same requests; requests that are NaN in either take no part."""
    both = np.stack([above, below])[:, ~(np.isnan(above) | np.isnan(below))]
    if not both.shape[1]:
        return Interval(float("nan"), float("nan"), float("nan"))
    means = _means(both, seed)
    low, high = np.quantile(means[0] / means[1], [0.025, 0.975])
    return Interval(float(both[0].mean() / both[1].mean()), float(low), float(high))


def _means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """[K, R] → [K, RESAMPLES] means of the same resampled requests."""
    rng = np.random.default_rng(seed)
    means = np.empty((len(values), RESAMPLES))
    for start in range(0, RESAMPLES, 100):
        draws = rng.integers(values.shape[1], size=(100, values.shape[1]))
        means[:, start : start + 100] = values[:, draws].mean(2)
    return means
