"""How many requests a second are to come, over the time of a run, and when each of them comes.

Arrivals are a Poisson process whose rate follows a shape: unit exponentials, added up, are mapped back through the
integral of the rate (time rescaling; Daley and Vere-Jones, "An introduction to the theory of point processes", 7.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from trirank_loadtest.errors import BadLoad

_STEPS = 5
_TROUGH = 0.2
_GRID = 2_000
"""Points of time at which the integral is known; between them the rate is taken for constant."""

SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda at: 1.0,
    "step": lambda at: (math.floor(min(at, 1 - 1e-9) * _STEPS) + 1) / _STEPS,
    "spike": lambda at: 1.0 if 0.45 <= at < 0.55 else 1 / 3,
    "diurnal": lambda at: _TROUGH + (1 - _TROUGH) * (0.5 - 0.5 * math.cos(2 * math.pi * at)),
}
"""Name → share of the highest rate, by the share of the run that has passed: ``step`` climbs in five steps, ``spike``
has three times the load in its middle tenth, ``diurnal`` is a day from night to night."""


def check(rate: float, seconds: float, shape: str) -> None:
    """Raises BadLoad if there is no such load."""
    if not (math.isfinite(rate) and rate > 0):
        raise BadLoad(f"rate is {rate:g}; it is requests a second, above 0")
    if not (math.isfinite(seconds) and seconds > 0):
        raise BadLoad(f"seconds is {seconds:g}; a run takes some, above 0")
    if shape not in SHAPES:
        raise BadLoad(f"shape {shape!r} is none of {', '.join(SHAPES)}")


def arrivals(rate: float, seconds: float, shape: str, rng: np.random.Generator) -> Iterator[float]:
    """Seconds since the start at which requests are due, one after the other.

    Args:
        rate: the highest of the shape, requests a second.
    """
    check(rate, seconds, shape)
    times = np.linspace(0, seconds, _GRID + 1)
    middles = (times[:-1] + times[1:]) / 2 / seconds
    grown = np.concatenate([[0.0], np.cumsum([rate * SHAPES[shape](at) for at in middles]) * seconds / _GRID])
    passed = 0.0
    while True:
        passed += rng.exponential()
        if passed >= grown[-1]:
            return
        yield float(np.interp(passed, grown, times))
