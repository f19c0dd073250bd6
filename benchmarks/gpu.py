"""The ensemble with its ranker on a GPU: batches of 1 to 32, FP32 against FP16, latency and requests a second.

    python benchmarks/gpu.py prepare FOLDER     where training runs are: releases whose ranker runs on a GPU
    python benchmarks/gpu.py run FOLDER OUT [alone|served]    on a machine with an NVIDIA GPU and PyTorch
    python benchmarks/gpu.py keep GPU.json …    writes results/gpu.json from what runs have found

Two rankers: the demo's dense one (trained; FP16's order is compared with FP32's), and one of d 128 with three encoder
blocks and weights of chance (as fast as trained ones). ``run`` needs Triton (PATH or wheel) for the served part;
without a GPU it says so and ends. In the rounds all kinds have their turn.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {
    "small_fp32": (False, False), "small_fp16": (False, True), "large_fp32": (True, False), "large_fp16": (True, True),
}  # fmt: skip
"""Name → whether it is the large ranker, and whether FP16."""
SIZES = (200, 1000)
ROUNDS, CALLS = 5, 30
SECONDS = 3.0
P99_MS = 50.0


def prepare(folder: Path) -> None:
    """Releases, requests, and the run that the ranker's weights come from."""
    from results import ROOT
    from serving import make_requests
    from trirank_backend.release import FEATURES
    from trirank_build.data.dataset import Dataset
    from trirank_build.demo import build
    from trirank_build.repository.assemble import assemble
    from trirank_build.repository.configs import Instances
    from trirank_build.training.run import TrainedRun

    build(ROOT / "work" / "demo")
    work = ROOT / "work" / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copytree(work / "run", folder / "run")
    run, dataset = TrainedRun.load(work / "run"), Dataset.load(work / "data")
    from trirank_build.repository.reports import export_run

    export_run(run, folder / "dense.onnx")
    made = assemble(
        run, dataset, folder / "dense.onnx", folder / "releases", engine="onnxruntime",
        instances=Instances(preprocess=4, rerank=4),
    )  # fmt: skip
    for size in SIZES:
        requests = [
            {
                "item_ids": np.asarray(one.item_ids).tolist(), "user_id": None, "query": one.query, "top_k": one.top_k,
                "scenario": one.scenario, "timestamp": one.timestamp,
                "retrieval_scores": np.asarray(one.retrieval_scores).tolist(),
            }
            for one in make_requests(made, 64, size)
        ]  # fmt: skip
        (folder / f"requests_{size}.json").write_text(json.dumps(requests))
    print(f"{folder}: {sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) / 1e6:.1f} MB, {FEATURES}")


def packed_tensors(folder: Path, size: int) -> list[dict[str, Any]]:
    """The ranker's tensors of each request, as preprocess makes them."""
    from trirank import RankRequest, contract
    from trirank._codec import packed_request
    from trirank_backend.preprocess import Preprocess

    (release,) = [path for path in (folder / "releases").iterdir() if (path / "manifest.json").is_file()]
    preprocess = Preprocess.load(release)
    requests = [RankRequest.from_dict(raw) for raw in json.loads((folder / f"requests_{size}.json").read_text())]
    packed = [np.frombuffer(packed_request(one)[0], np.uint8)[None] for one in requests]
    return [one.ranker for one in preprocess([{contract.PACKED_REQUEST.name: each} for each in packed])]


def alone(folder: Path) -> dict[str, list[float]]:
    """The ranker in this process: ms a batch, host to host, of every size, batch and precision."""
    from gpu_ranker import BATCHES, TorchRanker

    rankers = {name: TorchRanker(folder / "run", *kind) for name, kind in KINDS.items()}
    found: dict[str, list[float]] = {}
    tensors = {size: packed_tensors(folder, size) for size in SIZES}
    batches = {
        (size, batch): {name: np.concatenate([one[name] for one in tensors[size][:batch]]) for name in tensors[size][0]}
        for size in SIZES
        for batch in BATCHES
    }
    for _ in range(ROUNDS):
        for (size, batch), given in batches.items():
            for name, ranker in rankers.items():
                times = []
                for _ in range(CALLS):
                    started = time.perf_counter()
                    ranker(given)
                    times.append((time.perf_counter() - started) * 1e3)
                found.setdefault(f"ranker_{name}_{size}_b{batch}_ms", []).append(statistics.median(times))
    overlaps, differences = [], []
    for given in (batches[200, 1], batches[1000, 1], batches[200, 32]):
        full, half = (rankers[f"small_{precision}"](given)[..., 0] for precision in ("fp32", "fp16"))
        assert np.isfinite(half).all()
        tops = [np.argsort(-scores, 1)[:, :10] for scores in (full, half)]
        overlaps += [len(set(a) & set(b)) / 10 for a, b in zip(*tops, strict=True)]
        differences.append(float(np.abs(full - half).max() / full.std()))
    found["fp16_overlap_at_10"] = [float(np.mean(overlaps)), min(overlaps), max(overlaps)]
    found["fp16_largest_difference_of_std"] = differences
    return found


def served(folder: Path) -> dict[str, list[float]]:
    """The ensemble: p50 of requests one at a time, and the rate that holds p99 within 50 ms, with its mean batch."""
    import load
    from gpu_ranker import MODEL
    from trirank import RankRequest
    from trirank_build.serving.server import TritonServer

    (release,) = [path for path in (folder / "releases").iterdir() if (path / "manifest.json").is_file()]
    requests = {
        size: [RankRequest.from_dict(raw) for raw in json.loads((folder / f"requests_{size}.json").read_text())]
        for size in SIZES
    }
    places: dict[str, Path] = {"cpu": release}
    for name in ("large_fp32", "large_fp16"):
        large, half = KINDS[name]
        places[name] = folder / "served" / name
        shutil.rmtree(places[name], ignore_errors=True)
        shutil.copytree(release, places[name])
        version = places[name] / "models" / "ranker" / "1"
        (version / "model.py").write_text(MODEL)
        told = {"run": str((folder / "run").resolve()), "large": large, "half": half}
        (version / "gpu.json").write_text(json.dumps(told))
    found: dict[str, list[float]] = {}
    for name, place in places.items():
        with TritonServer(place, log=folder / f"{name}.log") as server:
            server.wait_ready()
            for size in SIZES:
                running = load.Running(load.triton(server.grpc, requests[size]), server.pid)
                load.open_loop(running.target, 200, 1.5, [server.pid])
                slow = load.open_loop(running.target, 50, SECONDS, [server.pid], 1)
                before = server.statistics()["ranker"]
                at = load.capacity(running, 1500.0 if size == 200 else 800.0, SECONDS, 10)
                after = server.statistics()["ranker"]
                batch = (int(after["inference_count"]) - int(before["inference_count"])) / max(
                    1, int(after["execution_count"]) - int(before["execution_count"])
                )
                print(
                    f"{name} {size}: p50 {slow.percentile(50):.2f} ms, {at.rate:.0f}/s, batch {batch:.1f}", flush=True
                )
                found[f"served_{name}_{size}_p50_ms"] = [slow.percentile(50)]
                found[f"served_{name}_{size}_capacity_rps"] = [at.rate]
                found[f"served_{name}_{size}_mean_batch"] = [batch]
    return found


def run(folder: Path, out: Path, only: Path | None = None) -> None:
    """Everything that this machine can show, or one part of it: writes OUT/gpu.json."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("there is no GPU that PyTorch sees here; nothing was measured")
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cores": os.cpu_count()}
    parts: dict[str, Callable[[Path], dict[str, list[float]]]] = {"alone": alone, "served": served}
    for name, part in parts.items():
        if only is not None and str(only) != name:
            continue
        try:
            found[name] = part(folder)
        except Exception as error:  # the other part's figures are of use all the same
            found[f"{name}_failed"] = repr(error)
            print(f"{name} failed: {error!r}", flush=True)
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=0)[:9000])


def keep(*paths: Path) -> None:
    """Write ``results/gpu.json`` from what ``run`` found, the later file first where both have it, with ratios."""
    from results import Figure, write

    raw: dict[str, Any] = {}
    for path in paths:
        found = json.loads(path.read_text())
        assert raw.get("gpu", found["gpu"]) == found["gpu"], "figures of two kinds of GPU do not go together"
        raw |= found
    note = f"{raw['gpu']}, PyTorch {raw['torch']} with CUDA graphs in the Python backend, {raw['cores']} cores"
    figures = []
    for part in ("alone", "served"):
        for name, values in raw.get(part, {}).items():
            unit = "ms" if name.endswith("_ms") else "requests/s" if name.endswith("_rps") else ""
            seen = (statistics.median(values), min(values), max(values))
            figures.append(Figure(name, *(round(value, 4) for value in seen), unit, note))
    times = raw["alone"]

    def ratio(name: str, above: str, below: str, factor: float = 1.0) -> None:
        found = [factor * one / other for one, other in zip(times[above], times[below], strict=True)]
        seen = (statistics.median(found), min(found), max(found))
        figures.append(Figure(name, *(round(value, 3) for value in seen), "", note))

    for size in SIZES:
        for batch in (1, 8, 32):
            full, half = (f"ranker_large_{precision}_{size}_b{batch}_ms" for precision in ("fp32", "fp16"))
            ratio(f"fp16_speedup_{size}_b{batch}", full, half)
        one, many = (f"ranker_large_fp16_{size}_b{batch}_ms" for batch in (1, 32))
        ratio(f"batch_32_gain_{size}", one, many, 32.0)
    write("gpu", figures, machine={"cpu": "not told", "cores": raw["cores"], "gpu": raw["gpu"]})


if __name__ == "__main__":
    verb, *paths = sys.argv[1:] or [""]
    calls: dict[str, Callable[..., None]] = {"prepare": prepare, "run": run, "keep": keep}
    if verb not in calls:
        sys.exit(__doc__)
    calls[verb](*map(Path, paths))
