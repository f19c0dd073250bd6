"""The highest rate that keeps a promise, and what gives way above it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from trirank_loadtest.measured import Measured
from trirank_loadtest.slo import Slo

STEP = 1.5
RESOLUTION = 1.06
"""A bracket this narrow is not halved any more."""
KEPT_UP = 0.95
"""Share of what was due that must be answered within the run, or a queue grows that only a longer run would show."""
_LATE_MS = 5.0
_MOST = 1e6
_BUSY = 0.9


@dataclass(frozen=True)
class Point:
    """One rate: its repeats, and whether most of them kept the promise."""

    rate: float
    runs: list[Measured]
    kept: bool


@dataclass(frozen=True)
class Capacity:
    """What the search found.

    Attributes:
        rate: the highest that was tried and held, requests a second; 0: none did.
        points: all that were tried, by rate.
        gave_way: what gives way first, a sentence.
    """

    rate: float
    points: list[Point]
    gave_way: str


def find_capacity(
    measure: Callable[[float, int], Measured], slos: list[Slo], start: float, repeats: int, least: float = 1.0
) -> Capacity:
    """Step up until a rate fails, or down until one holds, then bisect (geometrically). A rate is judged by the
    majority of its repeats, of which there are no more than it takes.

    Args:
        measure: makes a run of a rate; told the number of the run as a seed.
        start: the first rate that is tried; least: the lowest.
    """
    points: dict[float, Point] = {}
    made = 0

    def holds(rate: float) -> bool:
        nonlocal made
        runs: list[Measured] = []
        wins = 0
        while len(runs) < repeats and max(wins, len(runs) - wins) <= repeats // 2:
            runs.append(measure(rate, made))
            made += 1
            wins += kept(runs[-1], slos)
        points[rate] = Point(rate, runs, wins * 2 > len(runs))
        return points[rate].kept

    low, high, rate = 0.0, math.inf, start
    while True:
        if holds(rate):
            low = rate
        else:
            high = rate
        if low and math.isfinite(high):
            if high / low <= RESOLUTION:
                break
            rate = math.sqrt(low * high)
        elif low:
            if rate * STEP > _MOST:
                break
            rate *= STEP
        else:
            if rate / STEP < least:
                break
            rate /= STEP
    ordered = [points[rate] for rate in sorted(points)]
    return Capacity(low, ordered, gave_way(ordered, slos))


def kept(run: Measured, slos: list[Slo]) -> bool:
    """Whether a run kept every promise, and up with its load."""
    kept_up = run.answered >= KEPT_UP * (1 - run.error_rate) * run.offered
    return kept_up and all(slo.kept(run) for slo in slos)


def gave_way(points: list[Point], slos: list[Slo]) -> str:
    """What is behind the lowest rate that failed, from the highest one below it that held."""
    failed = next((point for point in points if not point.kept), None)
    held = [point for point in points if point.kept and (failed is None or point.rate < failed.rate)]
    if failed is None:
        return "Nothing gave way at any rate that was tried."
    after = _middle(failed.runs, slos)
    broken = [slo.words(slo.value(after)) for slo in slos if not slo.kept(after)] or ["it did not keep up"]
    words = f"At {failed.rate:.0f} requests/s {', '.join(broken)}: "
    promised_ms = min((slo.limit for slo in slos if slo.name != "error_rate"), default=math.inf)
    if after.lag_p99_ms > max(_LATE_MS, 0.2 * min(after.percentile(99.0), promised_ms)):
        return words + (
            f"the load generator itself gave way, one request in a hundred was sent {after.lag_p99_ms:.0f} ms late or "
            "later; give it more --workers, or a machine of its own."
        )
    grown = []
    before = {stage.model: stage for stage in _middle(held[-1].runs, slos).stages} if held else {}
    for stage in after.stages:
        old = before.get(stage.model)
        grown.append((stage.queue_ms - (old.queue_ms if old else 0.0), "queue", stage))
        grown.append((stage.compute_ms - (old.compute_ms if old else 0.0), "compute", stage))
    machine = after.cpu.get("machine", 0.0)
    busy = f"; all cores of this machine were {machine:.0%} busy" if machine > _BUSY else ""
    if not grown or max(grown, key=lambda each: each[0])[0] <= 0:
        return words + f"the server's own times did not grow, so the network or this machine did{busy}."
    amount, what, stage = max(grown, key=lambda each: each[0])
    if what == "queue":
        return words + f"requests wait for {stage.model} ({amount:+.1f} ms in its queue){busy}."
    return words + f"{stage.model} takes longer for a batch ({amount:+.1f} ms, of {stage.batch:.1f} requests){busy}."


def _middle(runs: list[Measured], slos: list[Slo]) -> Measured:
    """The run that stands in the middle by its p99."""
    return sorted(runs, key=lambda run: run.percentile(99.0))[len(runs) // 2]
