"""How much smaller and faster, at what cost? Every kind of step alone, the best chain, and the honest control.

    python benchmarks/compression.py [--list] [--train PART ...]

The reference is a dense ranker of 128 numbers, three encoder blocks and 64 events, in FP32 on the engine that runs it
fastest, on Amazon Beauty. All latencies come from one process on one thread, in turns; all NDCG from the engine's
scores of the same candidates. Finished trainings in ``work/benchmarks/compression`` are used again; all of them take
about two hours on one core, so start some with ``--train`` where there are more, and measure alone.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality import dataset_of
from results import WORK, Figure, write
from trirank_backend.scoring import available_engines, exact_engines, load_ranker
from trirank_build.compression.chain import compress
from trirank_build.compression.recipe import CompressionRecipe, load_compression_recipe, parse_recipe
from trirank_build.engines.latency import fastest_engine, latencies, scoring_calls
from trirank_build.evaluation import metrics
from trirank_build.evaluation.bootstrap import Interval, mean_interval, ratio_interval
from trirank_build.export.onnx import export, write_graph
from trirank_build.features.examples import Examples
from trirank_build.recipe import load_recipe
from trirank_build.retrieval.cascade import retrieve
from trirank_build.retrieval.tasks import CatalogueTasks
from trirank_build.training.run import BEST, TrainedRun
from trirank_build.training.trainer import train

FOLDER = WORK / "compression"
SET = "beauty"
REFERENCE = {
    "features.history_length": 64, "model.dim": 128, "model.heads": 4, "model.encoder_blocks": 3, "model.ffn": 512,
    "pretraining.epochs": 8, "training.epochs": 3, "model.cross_blocks": 1, "features.attribute_slots": 6,
    "features.transitions": False, "training.start": "nothing", "training.refit": False, "training.freeze": "encoder",
    "training.learning_rate": 1e-3, "training.candidates": 64, "training.random_negatives": 100,
}  # fmt: skip
"""With cross-attention and a second step that learns to rank by it, which is what there is to compress; the shipped
recipe has neither any more."""
CONTROL = REFERENCE | {
    "features.history_length": 32, "model.dim": 40, "model.heads": 2, "model.encoder_blocks": 1, "model.ffn": 80,
}  # fmt: skip
"""A dense ranker of about the chain's latency, trained from scratch with the reference's recipe."""
ONE_EPOCH = {"epochs": 1, "learning_rate": 1e-3}
NONE = {"epochs": 0}
ENSEMBLE, DISTILLED = "fuse, ensemble of two", "distil the ensemble"
"""The second is a chain whose first step is the first."""
STEPS: dict[str, list[dict[str, Any]]] = {
    "prune heads, half": [{"kind": "prune", "heads": 0.5}],
    "prune feed-forward, three quarters": [{"kind": "prune", "ffn": 0.75}],
    "prune blocks, two of three": [{"kind": "prune", "blocks": 2}],
    "prune width, half": [{"kind": "prune", "width": 0.5}],
    "prune history, half": [{"kind": "prune", "history_length": 32}],
    "prune 2:4": [{"kind": "prune", "sparsity": "2:4"}],
    "quantise INT8": [{"kind": "quantise", "training": NONE}],
    "quantise INT8, aware": [{"kind": "quantise", "mode": "aware"}],
    "quantise FP16": [{"kind": "quantise", "precision": "float16", "training": NONE}],
    "quantise BF16": [{"kind": "quantise", "precision": "bfloat16", "training": NONE}],
    "factorise layers to half": [{"kind": "factorise", "budget": 0.5}],
    "factorise tables to half": [{"kind": "factorise", "matrices": "embeddings", "budget": 0.5}],
    "share blocks": [{"kind": "share", "blocks": True}],
    "share codebooks": [{"kind": "share", "codes": 256, "groups": 32}],
    "fold": [{"kind": "fold", "training": NONE}],
    "fuse, soup of two": [{"kind": "fuse", "members": 2}],
    DISTILLED: [
        {"kind": "fuse", "mode": "ensemble", "members": 2}, {"kind": "distil", "teacher": "previous"},
    ],
}  # fmt: skip
"""Each alone, with an epoch of training where that helps."""
CHAIN = "sequences"
"""The shipped recipe that is the best chain."""
HEADLINE = ("reference", "control", "chain")
"""Judged on all test requests, the others on SOME of them."""
SOME = 3_000
ROUNDS = 60
SIZES = (200, 1_000)


def parts() -> dict[str, CompressionRecipe]:
    """Name → recipe of everything that is compressed."""
    alone = {
        name: parse_recipe({"name": _slug(name), "training": ONE_EPOCH, "steps": steps})
        for name, steps in STEPS.items()
    }
    return alone | {ENSEMBLE: alone[DISTILLED], "chain": load_compression_recipe(CHAIN)}


def trained(name: str) -> TrainedRun:
    """A finished run of a part, trained now if it is not there yet."""
    if name in ("reference", "control"):
        recipe = load_recipe("sequences").changed(REFERENCE if name == "reference" else CONTROL)
        return train(recipe, dataset_of(SET), FOLDER / name)
    if name == ENSEMBLE:
        return TrainedRun.load(Path(trained(DISTILLED).directory).parent / "1-fuse")
    done = compress(parts()[name], trained("reference"), dataset_of(SET), FOLDER / _slug(name))
    return done.last


def graph_of(name: str, run: TrainedRun) -> Path:
    """The part's ONNX graph."""
    path, weights = FOLDER / f"{_slug(name)}.onnx", run.directory / BEST
    if not (path.is_file() and path.stat().st_mtime > weights.stat().st_mtime):
        if name in HEADLINE:
            export(run.model(), run.features.spec, path)
        else:
            write_graph(run.model(), run.features.spec, path)
    return path


def ndcg(run: TrainedRun, ranker: Any, examples: Examples) -> np.ndarray:
    """[R] NDCG@10 of the engine's scores."""
    own, found = examples.seen_by(run.features), []
    for start in range(0, len(own), 64):
        packed = own.whole(np.arange(start, min(start + 64, len(own)))).packed
        found.append(ranker(packed.tensors()).mean(-1))
    gains = metrics.order_gains(metrics.ties_broken(np.concatenate(found)), own.labels, own.rows >= 0)
    return metrics.ndcg(gains, metrics.ideal_gains(own.labels, own.missed))


def measure() -> list[Figure]:
    """All figures, in one process."""
    names = ["reference", "control", *parts()]
    runs = {name: trained(name) for name in names}
    graphs = {name: graph_of(name, run) for name, run in runs.items()}
    engines = {
        name: fastest_engine(
            graphs[name],
            run.features.spec,
            exact_engines() if name in ("reference", "control") else available_engines(),
        )[0]
        for name, run in runs.items()
    }
    rankers = {name: load_ranker(graphs[name], engines[name]) for name in names}
    pairs = {name: (rankers[name], runs[name].features.spec) for name in names}
    times = {size: latencies(scoring_calls(pairs, size), rounds=ROUNDS) for size in SIZES}

    dense = runs["reference"]
    tasks = CatalogueTasks.of(dataset_of(SET), "test", dense.features)
    some = np.sort(np.random.default_rng(0).choice(len(tasks), SOME, replace=False))
    asked = {True: tasks, False: tasks.take(some)}
    examples = {whole: retrieve(part, dataset_of(SET), dense.features, dense.model()) for whole, part in asked.items()}
    quality, base = {}, {}
    for name in names:
        whole = name in HEADLINE
        quality[name] = ndcg(runs[name], rankers[name], examples[whole])
        base[name] = quality["reference"] if whole else quality["reference"][some]
    megabytes = {name: graphs[name].stat().st_size / 1e6 for name in names}

    figures = []
    for name in names:
        label, note = _slug(name), f"{engines[name]}, one thread; spread: 5th to 95th percentile of {ROUNDS} rounds"
        for size in SIZES:
            figures.append(Figure(f"{label}_p50_ms_{size}", *_spread(times[size][name]), "ms", note))
            ratio = np.array(times[size]["reference"]) / np.array(times[size][name])
            figures.append(Figure(f"{label}_speedup_p50_{size}", *_spread(ratio), "ratio", note))
        figures.append(Figure(f"{label}_mb", *[megabytes[name]] * 3, "MB", "ONNX graph"))
        figures.append(Figure(f"{label}_size_ratio", *[megabytes["reference"] / megabytes[name]] * 3, "ratio"))
        count = len(quality[name])
        note = f"test split of {SET}, {count:,} requests, the same candidates for all; 95 % bootstrap interval"
        figures.append(Figure(f"{label}_ndcg10", *mean_interval(quality[name]), "NDCG@10", note))
        ratio = ratio_interval(quality[name], base[name])
        figures.append(Figure(f"{label}_ndcg_ratio", *ratio, "ratio", "paired; " + note))
    found = {figure.name: figure for figure in figures}
    headline = ("speedup_p50_200", "speedup_p50_1000", "size_ratio", "ndcg_ratio")
    figures += [found[f"chain_{name}"]._replace(name=name) for name in headline]
    low = found["chain_ndcg_ratio"].low
    figures.append(Figure("ndcg_ratio_low", low, low, low, "ratio", "low end of the 95 % interval of ndcg_ratio"))
    above = mean_interval(quality["chain"] - quality["control"])
    figures.append(
        Figure("chain_ndcg10_above_control", *above, "NDCG@10", "paired difference; 95 % bootstrap interval")
    )
    return figures


def _spread(values: Any) -> Interval:
    return Interval(statistics.median(values), *(float(v) for v in np.quantile(values, (0.05, 0.95))))


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower()).replace("__", "_")


def main() -> None:
    """Train what is missing; without ``--train`` measure, and write ``results/compression.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--train", nargs="+", help="parts to train, and nothing more")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments.list:
        print("\n".join(["reference", "control", *parts()]))
    elif arguments.train:
        for name in arguments.train:
            run = trained(name)
            print(name, run.facts["parameters"], flush=True)
    else:
        figures = measure()
        write("compression", figures)
        for figure in figures:
            print(f"{figure.name:55} {figure.value:9.4f}  [{figure.low:.4f}, {figure.high:.4f}]", flush=True)


if __name__ == "__main__":
    main()
