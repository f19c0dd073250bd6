"""Whether a run is worse than an earlier one beyond what chance does.

Each second of a run is one observation of its percentiles (and each repeat one of a capacity). The ratio of medians has
a 95 % interval by bootstrap; worse is what lies beyond the noise and beyond a change that nobody would mind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from trirank_loadtest.errors import BadLoad
from trirank_loadtest.measured import WARM_SHARE, Measured

MINDED = 0.03
_DRAWS = 2_000


@dataclass(frozen=True)
class Difference:
    """New over old; above 1 is more.

    Attributes:
        verdict: ``worse``, ``better`` or ``no difference beyond noise``.
    """

    name: str
    old: float
    new: float
    ratio: float
    low: float
    high: float
    verdict: str


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Difference]:
    """Of two results of ``trirank loadtest``.

    Raises:
        BadLoad: they are not of the same load.
    """
    for name in ("rate", "seconds", "shape", "mix", "feedback", "through", "deadline_s", "find_capacity", "slo"):
        if old["load"].get(name) != new["load"].get(name):
            one, other = old["load"].get(name), new["load"].get(name)
            raise BadLoad(f"the other result is of {name} {one}, this one of {other}; compare runs of the same load")
    if new["capacity"] is not None:
        return [_difference("capacity", _capacities(old), _capacities(new), more_is_worse=False)]
    runs = Measured.from_json(old["runs"][0]), Measured.from_json(new["runs"][0])
    found = [
        _difference(name, *(_seconds(run, name) for run in runs), more_is_worse=True) for name in ("p50_ms", "p99_ms")
    ]
    shares = [run.error_rate for run in runs]
    spread = 1.96 * math.sqrt(sum(share * (1 - share) / run.requests for share, run in zip(shares, runs, strict=True)))
    change = shares[1] - shares[0]
    verdict = "no difference beyond noise" if abs(change) <= max(spread, 1e-9) else "worse" if change > 0 else "better"
    found.append(Difference("error_rate", *shares, math.nan, change - spread, change + spread, verdict))
    return found


def _seconds(run: Measured, name: str) -> np.ndarray:
    values = [row[name] for row in run.timeline if row["second"] >= WARM_SHARE * run.seconds and row[name] is not None]
    return np.array([math.inf if value is None else value for value in values], np.float64)


def _capacities(result: dict[str, Any]) -> np.ndarray:
    """Of each repeat: the highest rate that held in it."""
    return np.array(result["capacity"]["repeats"], np.float64)


def _difference(name: str, old: np.ndarray, new: np.ndarray, more_is_worse: bool) -> Difference:
    if not len(old) or not len(new):
        raise BadLoad(f"{name} was not measured in both; run longer")
    rng = np.random.default_rng(0)
    before, after = float(np.median(old)), float(np.median(new))
    drawn = [
        np.median(rng.choice(new, len(new))) / max(np.median(rng.choice(old, len(old))), 1e-9) for _ in range(_DRAWS)
    ]
    low, high = (float(each) for each in np.quantile(drawn, [0.025, 0.975]))
    up, down = low > 1 + MINDED, high < 1 - MINDED
    verdict = "no difference beyond noise"
    if up or down:
        verdict = "worse" if up == more_is_worse else "better"
    return Difference(name, before, after, after / max(before, 1e-9), low, high, verdict)
