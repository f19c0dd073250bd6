"""Whether a run is worse than an earlier one beyond what chance does.

Each second of a run is one observation of its percentiles; the ratio of medians has a 95 % interval by bootstrap. A
capacity is known as narrowly as its search went. Worse is what lies beyond that, and beyond a change that nobody minds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trirank_loadtest.capacity import RESOLUTION
from trirank_loadtest.errors import BadLoad
from trirank_loadtest.measured import WARM_SHARE, Measured

MINDED = 0.03
_DRAWS = 2_000


@dataclass(frozen=True)
class Difference:
    """New over old; above 1 is more.

    Attributes:
        ratio: None where there is none to tell; low, high: of it, or of the change where there is none.
        verdict: ``worse``, ``better`` or ``no difference beyond noise``.
    """

    name: str
    old: float
    new: float
    ratio: float | None
    low: float
    high: float
    verdict: str


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Difference]:
    """Of two results of ``trirank loadtest``.

    Raises:
        BadLoad: they are not of the same load, or one of them is too short.
    """
    check_alike(old, new["load"])
    if new["capacity"] is not None:
        return [_capacities(float(old["capacity"]["rate"]), float(new["capacity"]["rate"]))]
    runs = Measured.from_json(old["runs"][0]), Measured.from_json(new["runs"][0])
    found = [_difference(name, *(_seconds(run, name) for run in runs)) for name in ("p50_ms", "p99_ms")]
    shares = [run.error_rate for run in runs]
    spread = 1.96 * math.sqrt(sum(share * (1 - share) / run.requests for share, run in zip(shares, runs, strict=True)))
    change = shares[1] - shares[0]
    verdict = "no difference beyond noise" if abs(change) <= max(spread, 1e-9) else "worse" if change > 0 else "better"
    found.append(Difference("error_rate", shares[0], shares[1], None, change - spread, change + spread, verdict))
    return found


def check_alike(old: dict[str, Any], load: dict[str, Any]) -> None:
    """Raises BadLoad if an earlier result is of another load than ``load``, see results.described."""
    for name in ("rate", "seconds", "shape", "mix", "feedback", "through", "deadline_s", "find_capacity", "slo"):
        if old["load"].get(name) != load.get(name):
            one, other = old["load"].get(name), load.get(name)
            raise BadLoad(f"the other result is of {name} {one}, this one of {other}; compare runs of the same load")


def _seconds(run: Measured, name: str) -> NDArray[np.float64]:
    values = [row[name] for row in run.timeline if row["second"] >= WARM_SHARE * run.seconds and row[name] is not None]
    return np.array(values, np.float64)


def _capacities(old: float, new: float) -> Difference:
    """Each is known as narrowly as the search halves its bracket."""
    if not old:
        return Difference("capacity", old, new, None, 0.0, 0.0, "better" if new else "no difference beyond noise")
    ratio = new / old
    low, high = ratio / RESOLUTION, ratio * RESOLUTION
    verdict = "worse" if high < 1 - MINDED else "better" if low > 1 + MINDED else "no difference beyond noise"
    return Difference("capacity", old, new, ratio, low, high, verdict)


def _difference(name: str, old: NDArray[np.float64], new: NDArray[np.float64]) -> Difference:
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
        verdict = "worse" if up else "better"
    return Difference(name, before, after, after / max(before, 1e-9), low, high, verdict)
