"""Intervals by resampling requests (Efron 1979)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
_AT_A_TIME = 100


class Interval(NamedTuple):
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


def mean_interval(values: NDArray[np.float64], seed: int = 0) -> Interval:
    """Mean over requests and its percentile interval; NaN requests take no part. Of the differences of two
    rankings over the same requests this is the paired test: they differ if the interval excludes zero."""
    return mean_intervals(values[None, ~np.isnan(values)], seed)[0]


def mean_intervals(values: NDArray[np.float64], seed: int = 0) -> list[Interval]:
    """[K, R] → the intervals of K numbers of the same requests, from the same resamples; of each, NaN takes no part."""
    there = ~np.isnan(values)
    known = there.any(1) if values.shape[1] else np.zeros(len(values), bool)
    found = [Interval(float("nan"), float("nan"), float("nan"))] * len(values)
    if known.any():
        means = _means(values[known], seed)
        for at, row, resampled in zip(np.flatnonzero(known), values[known], means, strict=True):
            low, high = np.nanquantile(resampled, [0.025, 0.975])
            found[at] = Interval(float(np.nanmean(row)), float(low), float(high))
    return found


def ratio_interval(above: NDArray[np.float64], below: NDArray[np.float64], seed: int = 0) -> Interval:
    """Ratio of the means of two rankings over the same requests; requests that are NaN in either take no part."""
    both = np.stack([above, below])[:, ~(np.isnan(above) | np.isnan(below))]
    if not both.shape[1]:
        return Interval(float("nan"), float("nan"), float("nan"))
    means = _means(both, seed)
    low, high = np.quantile(means[0] / means[1], [0.025, 0.975])
    return Interval(float(both[0].mean() / both[1].mean()), float(low), float(high))


def _means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """[K, R] → [K, RESAMPLES]. How often each request was drawn, times the values, is one matrix product for all K."""
    rng, requests = np.random.default_rng(seed), values.shape[1]
    there = (~np.isnan(values)).astype(np.float64)
    filled = np.where(np.isnan(values), 0, values)
    means = np.empty((len(values), RESAMPLES))
    for start in range(0, RESAMPLES, _AT_A_TIME):
        draws = rng.integers(requests, size=(_AT_A_TIME, requests))
        counts = np.stack([np.bincount(draw, minlength=requests) for draw in draws]).astype(np.float64)
        sums, sizes = counts @ filled.T, counts @ there.T
        means[:, start : start + _AT_A_TIME] = np.where(sizes > 0, sums / np.maximum(sizes, 1), np.nan).T
    return means
