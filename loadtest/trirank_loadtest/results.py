"""A load test as JSON: what was asked for, every run, the verdict; and how a caller's exit status follows from it."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from trirank_loadtest.capacity import Capacity, kept
from trirank_loadtest.compare import Difference
from trirank_loadtest.errors import BadLoad
from trirank_loadtest.measured import Measured
from trirank_loadtest.run import Load
from trirank_loadtest.slo import Slo

VERSION = 1


def described(load: Load, slos: list[Slo], find_capacity: bool) -> dict[str, Any]:
    """What a load is, as results are compared by it; with ``find_capacity`` its rate is the first that is tried."""
    said = {name: value for name, value in asdict(load).items() if name not in ("addresses", "requests", "percentiles")}
    return said | {"find_capacity": find_capacity, "slo": [slo.words() for slo in slos]}


def result_of(load: Load, slos: list[Slo], runs: list[Measured], capacity: Capacity | None) -> dict[str, Any]:
    """All that was found; ``passed`` says whether what was promised was kept."""
    said = described(load, slos, capacity is not None)
    if capacity is not None:
        passed = capacity.rate > 0
        verdict = f"{capacity.rate:.0f} requests/s hold" if passed else "No rate that was tried holds"
        verdict += f" ({', '.join(slo.words() for slo in slos)}). {capacity.gave_way}"
        shown = next((point for point in capacity.points if point.rate == capacity.rate), capacity.points[0])
        judged = sorted(shown.runs, key=lambda run: run.percentile(99.0))[len(shown.runs) // 2]
        runs = [run for point in capacity.points for run in point.runs]
    else:
        judged = runs[0]
        passed = kept(judged, slos) if slos else not judged.errors
        verdict = f"{judged.answered:.0f} requests/s answered, {judged.error_rate:.2%} failed, p99 " + (
            f"{judged.percentile(99.0):.1f} ms." if math.isfinite(judged.percentile(99.0)) else "infinite: they failed."
        )
        if slos:
            verdict += " Everything that is promised was kept." if passed else " What is promised was not kept."
    checks = [
        {
            "promise": slo.words(), "measured": slo.words(slo.value(judged)), "kept": slo.kept(judged),
            "limit_ms": None if slo.name == "error_rate" else slo.limit,
        }
        for slo in slos
    ]  # fmt: skip
    return {
        "version": VERSION, "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {platform.system()} {platform.release()}", "load": said, "passed": passed,
        "verdict": verdict, "slo_checks": checks, "shown_rate": judged.rate,
        "runs": [run.to_json() for run in runs],
        "capacity": None if capacity is None else {
            "rate": capacity.rate, "gave_way": capacity.gave_way,
            "points": [{"rate": point.rate, "kept": point.kept, "runs": len(point.runs)} for point in capacity.points],
        },
        "differences": [],
    }  # fmt: skip


def with_differences(result: dict[str, Any], differences: list[Difference]) -> dict[str, Any]:
    """The result, compared; one that is worse has not passed."""
    worse = [one.name for one in differences if one.verdict == "worse"]
    words = f" Worse than before: {', '.join(worse)}." if worse else " No worse than before."
    return result | {
        "differences": [asdict(one) for one in differences],
        "passed": result["passed"] and not worse,
        "verdict": result["verdict"] + words,
    }


def read_result(path: Path) -> dict[str, Any]:
    """Of an earlier test.

    Raises:
        BadLoad: it is none.
    """
    try:
        found = json.loads(path.read_text())
        if found["version"] != VERSION:
            raise BadLoad(f"{path} is of version {found['version']}, this trirank reads {VERSION}; measure it again")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadLoad(f"{path} is no result of `trirank loadtest` ({error!r})") from None
    return dict(found)
