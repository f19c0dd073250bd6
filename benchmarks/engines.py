"""How long does a plan take to build, and to be found again, and is a wrong one refused?

    python benchmarks/engines.py [--rounds N]

The demo's ranker, dense, in FP16 and in QDQ INT8, for SM 86 and 89, through TensorRT-RTX, which needs no GPU to build.
Cold builds and look-ups in the lock take turns over the rounds; figures are medians with smallest and largest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

from results import ROOT, WORK, Figure, write
from trirank_build.compression.chain import compress
from trirank_build.compression.recipe import parse_recipe
from trirank_build.data.dataset import Dataset
from trirank_build.demo import build
from trirank_build.engines.builder import build_plans
from trirank_build.engines.plan import manifest_path
from trirank_build.engines.verify import verify
from trirank_build.export.onnx import export
from trirank_build.training.run import TrainedRun

TARGETS = ["86", "89"]
PRECISIONS = {"dense": None, "fp16": "float16", "qdq-int8": "int8"}


def graphs(work: Path) -> dict[str, tuple[Path, TrainedRun]]:
    """Name → the demo's ranker in that precision, exported, and its run."""
    build(ROOT / "work" / "demo")
    dense, dataset = TrainedRun.load(ROOT / "work" / "demo" / "run"), Dataset.load(ROOT / "work" / "demo" / "data")
    found = {}
    for name, precision in PRECISIONS.items():
        run, onnx = dense, work / f"{name}.onnx"
        if precision:
            step = {"kind": "quantise", "precision": precision}
            recipe = parse_recipe({"name": name, "training": {"epochs": 0}, "steps": [step]})
            run = compress(recipe, dense, dataset, work / name).last
        export(run.model(), run.features.spec, onnx)
        found[name] = (onnx, run)
    return found


def refusals(plan: Path, onnx: Path, work: Path) -> dict[str, list[str]]:
    """What was done to a plan → what `verify` says of it."""

    def fresh() -> Path:
        folder = work / "wrong"
        shutil.rmtree(folder, ignore_errors=True)
        return shutil.copytree(plan.parent, folder) / plan.name

    said = {"nothing": verify(fresh(), onnx)}
    flipped = fresh()
    damaged = bytearray(flipped.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    flipped.write_bytes(damaged)
    said["a flipped bit"] = verify(flipped, onnx)
    renamed = fresh()
    for suffix in (".plan", ".plan.json"):
        renamed.with_suffix(suffix).rename(renamed.with_name(f"sm120{suffix}"))
    said["renamed to another SM"] = verify(renamed.with_name("sm120.plan"), onnx)
    older = fresh()
    manifest = json.loads(manifest_path(older).read_text())
    manifest_path(older).write_text(json.dumps(manifest | {"version": "1.2.0"}))
    said["an older version"] = verify(older, onnx)
    return said


def main() -> None:
    """Measure and write ``results/engines.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    work = WORK / "engines"
    work.mkdir(parents=True, exist_ok=True)
    times: dict[tuple[str, str], list[float]] = {}
    figures, rankers = [], graphs(work)
    for _ in range(arguments.rounds):
        for name, (onnx, run) in rankers.items():
            plans = work / f"plans of {name}"
            shutil.rmtree(plans, ignore_errors=True)
            for kind in ("cold_build_s", "cached_build_s"):
                started = time.perf_counter()
                build_plans(onnx, run.features.spec, TARGETS, plans)
                times.setdefault((kind, name), []).append((time.perf_counter() - started) / len(TARGETS))
    note = f"a plan, mean of SM {' and '.join(TARGETS)}, median of {arguments.rounds} rounds"
    for kind in ("cold_build_s", "cached_build_s"):
        every = [value for (of, _), values in times.items() if of == kind for value in values]
        figures.append(_spread(kind, every, "s", f"{note}, all three graphs"))
        figures += [_spread(f"{kind} {name}", times[kind, name], "s", note) for name in rankers]
    for name, (onnx, _) in rankers.items():
        graph_mb = onnx.stat().st_size / 1e6
        for plan in sorted((work / f"plans of {name}").glob("*.plan")):
            mb = plan.stat().st_size / 1e6
            figures.append(
                Figure(f"plan_mb {name} {plan.stem}", mb, mb, mb, "MB", f"from an ONNX of {graph_mb:.3f} MB")
            )
    onnx, _ = rankers["qdq-int8"]
    said = refusals(work / "plans of qdq-int8" / "sm86.plan", onnx, work)
    assert said.pop("nothing") == [], said
    for what, words in said.items():
        print(f"{what}: {'; '.join(words)}")
    refused = sum(1 for words in said.values() if words)
    figures.append(Figure("wrong_plans_refused", refused, refused, len(said), "plans", "; ".join(said)))
    write("engines", figures)
    for figure in figures:
        print(f"{figure.name:36} {figure.value:10.3f} {figure.unit:8} [{figure.low:.3f}, {figure.high:.3f}]")


def _spread(name: str, values: list[float], unit: str, note: str) -> Figure:
    return Figure(name, round(statistics.median(values), 4), round(min(values), 4), round(max(values), 4), unit, note)


if __name__ == "__main__":
    main()
