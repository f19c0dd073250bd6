"""How long engines take, measured side by side: the machine's noise then falls on all of them alike."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from trirank import contract
from trirank_backend.features import FeatureSpec
from trirank_backend.scoring import rankers_of

from trirank_build.artefacts import atomic_file, file_digest
from trirank_build.export.beside import engine_path
from trirank_build.export.parity import sample_inputs

_CALLS = 3
_CLEARLY = 0.97
"""An engine is taken before an earlier one of the list from this share of its time on."""


def latencies(
    calls: Mapping[str, Callable[[], Any]], rounds: int = 30, warm_up: int = 3, calls_a_round: int = _CALLS
) -> dict[str, list[float]]:
    """Milliseconds a call of each, one number a round; in every round each has its turn."""
    for call in calls.values():
        for _ in range(warm_up):
            call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(calls_a_round):
                call()
            found[name].append((time.perf_counter() - started) * 1e3 / calls_a_round)
    return found


def scoring_calls(rankers: Mapping[str, tuple[Any, FeatureSpec]], candidates: int) -> dict[str, Callable[[], Any]]:
    """A call of each ranker on one lawful request, padded to its bucket as preprocess does."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, (ranker, spec) in rankers.items():
        tensors = sample_inputs(spec, 1, contract.bucket_for(candidates), np.random.default_rng(candidates))
        calls[name] = partial(ranker, tensors)
    return calls


def fastest_engine(
    onnx: Path, spec: FeatureSpec, engines: list[str], candidates: int = 200
) -> tuple[str, dict[str, float]]:
    """Of these engines the one that runs a graph fastest here, and the median milliseconds of each that can run it."""
    rankers = {name: (ranker, spec) for name, ranker in rankers_of(onnx, engines)}
    found = latencies(scoring_calls(rankers, candidates))
    medians = {name: round(statistics.median(times), 4) for name, times in found.items()}
    best = next(iter(medians))
    for name in medians:
        if medians[name] < _CLEARLY * medians[best]:
            best = name
    return best, medians


def chosen_engine(onnx: Path, spec: FeatureSpec, engines: list[str]) -> str:
    """The fastest of these engines, as it was measured when the graph was first asked about: noise may turn two that
    are close, and then the same graph would give two releases. The choice lies beside the graph."""
    path, digest, asked = engine_path(onnx), file_digest(onnx), ", ".join(engines)
    kept: dict[str, Any] = {"onnx": digest, "choices": {}}
    try:
        read = json.loads(path.read_text())
        if read["onnx"] == digest:
            kept = read
        if asked in kept["choices"]:
            return str(kept["choices"][asked]["engine"])
    except (OSError, ValueError, KeyError, TypeError):  # not measured yet, or not by this version
        pass
    engine, medians = fastest_engine(onnx, spec, engines)
    kept["choices"][asked] = {"engine": engine, "median_ms": medians}
    with suppress(OSError), atomic_file(path) as scratch:  # a graph may lie where nothing can be written
        scratch.write_text(json.dumps(kept, indent=1) + "\n")
    return engine
