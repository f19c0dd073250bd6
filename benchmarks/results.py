"""How every benchmark writes what it found; see docs/architecture.md, "Figures"."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "work" / "benchmarks"


class Figure(NamedTuple):
    """``value`` is a median or an estimate; ``low`` and ``high`` its 95 % interval or the spread of repeats."""

    name: str
    value: float
    low: float
    high: float
    unit: str
    note: str = ""


def write(benchmark: str, figures: list[Figure], keep: bool = False, machine: dict | None = None) -> Path:
    """Write ``results/BENCHMARK.json``; with ``keep``, figures of other names stay as they were. ``machine``:
    another one than this, on which they were measured."""
    path = RESULTS / f"{benchmark}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    with (WORK / "results.lock").open("w") as lock:  # parts of a benchmark may run at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        _write(path, benchmark, figures, keep, machine)
    return path


def _write(path: Path, benchmark: str, figures: list[Figure], keep: bool, machine: dict | None) -> None:
    new = {figure.name: figure._asdict() for figure in figures}
    if keep and path.is_file():
        new = {figure["name"]: figure for figure in json.loads(path.read_text())["figures"]} | new
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    path.write_text(
        json.dumps(
            {
                "benchmark": benchmark,
                "commit": commit.stdout.strip(),
                "date": datetime.now(timezone.utc).date().isoformat(),
                "machine": machine or {"cpu": _cpu(), "cores": os.cpu_count(), "gpu": None},
                "figures": list(new.values()),
            },
            indent=1,
        )
        + "\n"
    )


def read(benchmark: str) -> dict[str, Figure]:
    """Figures by name."""
    raw = json.loads((RESULTS / f"{benchmark}.json").read_text())
    return {figure["name"]: Figure(**figure) for figure in raw["figures"]}


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
