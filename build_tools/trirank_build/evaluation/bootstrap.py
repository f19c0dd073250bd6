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
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 100):
        draws = rng.integers(len(values), size=(100, len(values)))
        means[start : start + 100] = values[draws].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))
