"""Parts of scale.py that need no large shop of their own: libraries of search among vectors, and a day's events."""

from __future__ import annotations

import importlib
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from results import WORK, Figure
from trirank_build.data.dataset import Dataset
from trirank_build.evaluation.metrics import ideal_gains, ndcg, order_gains, ties_broken
from trirank_build.evaluation.scoring import score
from trirank_build.features.examples import Examples
from trirank_build.features.fitting import Features, refresh_features
from trirank_build.preparation.cleaning import Report, clean_events
from trirank_build.preparation.engines import engine_of
from trirank_build.preparation.options import PrepareOptions
from trirank_build.preparation.parts import parts_of
from trirank_build.preparation.sources.behaviour_log import LogReader
from trirank_build.preparation.sources.shop import ShopSize, make_shop
from trirank_build.preparation.splitting import split_by_time, with_split
from trirank_build.recipe import load_recipe
from trirank_build.retrieval.index import StateGraph, choose_probes, exact_top, fit, states_of
from trirank_build.retrieval.tasks import item_vectors
from trirank_build.training.run import TrainedRun
from trirank_build.training.trainer import train

VECTORS = 1_000_000
"""Of the large shop's, that every library has to search among; graphs of neighbours take an hour for all."""
SEEDS, DAY = (0, 1, 2), 86_400
SPAN = 7 * DAY
"""What is called a day: the shop's requests of a week."""


def rates(folder: Path, parts: int = 10) -> list[Figure]:
    """Seconds that a million events of the large log take to be read, and to be cleaned and split, in one process."""
    options = PrepareOptions(min_count=2)
    files = parts_of(str(folder / "shop" / "log"))[:parts]
    took: dict[str, list[float]] = {"read": [], "clean": []}
    for _ in range(3):
        with engine_of(None) as engine:
            begun = time.perf_counter()
            reader = LogReader(options, {"item": "numbers", "user": "numbers"}, True)
            frame, _, told = engine.read(files, reader)
            read = time.perf_counter()
            kept = clean_events(frame, engine, timed=True, report=Report(), min_count=options.min_count)
            split_by_time(kept, engine.collect)
            done = time.perf_counter()
        millions = sum(part.rows[0][1] for part in told) / 1e6
        took["read"].append((read - begun) / millions)
        took["clean"].append((done - read) / millions)
    note = (
        f"{millions:.0f} million events, polars on two cores; cleaning: duplicates, bots, a 2-core, the split's times"
    )
    return [Figure(f"rates_{name}_s", float(np.median(values)), min(values), max(values), "s", note)
            for name, values in took.items()]  # fmt: skip


def libraries(folder: Path) -> list[Figure]:
    """Building and searching at a recall of 0.95 of 100, one query at a time and one thread, by each that is here."""
    run, dataset = TrainedRun.load(folder / "run"), Dataset.load(folder / "data")
    model, features = run.model(), run.features
    vectors, prior = item_vectors(model, features)
    every = np.concatenate([vectors.numpy(), prior.numpy()[:, None]], 1)
    some = np.sort(np.random.default_rng(0).choice(len(every), min(VECTORS, len(every)), replace=False))
    items = np.ascontiguousarray(every[some])
    del every, vectors
    states = states_of(StateGraph(model), features, dataset)
    truth = exact_top(items, states, 100)
    figures = []
    for name, made in {"faiss_ivf_sq8": _faiss, "usearch": _usearch, "voyager": _voyager, "hnswlib": _hnswlib}.items():
        try:
            seconds, tries = made(items, states, truth)
        except ImportError as error:
            print(f"{name}: not measured ({error})")
            continue
        for setting, search in tries:  # noqa: B007  # the last one is told
            found, took = [], []
            for state in states[:200]:
                begun = time.perf_counter()
                found.append(search(state))
                took.append(time.perf_counter() - begun)
            recall = float(np.mean([len(np.intersect1d(a, b)) / 100 for a, b in zip(found, truth, strict=False)]))
            if recall >= 0.95:
                break
        note = f"{len(items):,} vectors of {items.shape[1]} numbers, {setting}"
        ms = [float(np.quantile(took, share) * 1e3) for share in (0.5, 0.05, 0.95)]
        figures += [Figure(f"{name}_ms", *ms, "ms", note), Figure(f"{name}_recall", recall, recall, recall, "", note),
                    Figure(f"{name}_build_seconds", seconds, seconds, seconds, "s", "two threads")]  # fmt: skip
        print(name, round(seconds, 1), "s", ms, recall, setting, flush=True)
    return figures


def _faiss(items: np.ndarray, states: np.ndarray, truth: np.ndarray) -> tuple[float, Any]:
    import faiss
    from trirank_backend.candidates import search_of

    begun = time.perf_counter()
    index, kind, cells = fit(items)
    seconds = time.perf_counter() - begun
    faiss.omp_set_num_threads(1)
    probes, _ = choose_probes(index, cells, states, truth)
    tries = [probes, 2 * probes, cells]
    return seconds, [
        (f"{kind}, {n} cells", lambda s, n=n: index.search(s[None], 100, params=search_of({"probes": n}))[1][0])
        for n in tries
    ]  # fmt: skip


def _usearch(items: np.ndarray, states: np.ndarray, truth: np.ndarray) -> tuple[float, Any]:
    library = importlib.import_module("usearch.index")
    index = library.Index(ndim=items.shape[1], metric="ip", dtype="f16", connectivity=16)
    begun = time.perf_counter()
    index.add(np.arange(len(items)), items, threads=2)
    seconds = time.perf_counter() - begun

    def search(state: np.ndarray, wide: int) -> np.ndarray:
        index.expansion_search = wide
        return index.search(state, 100, threads=1).keys

    return seconds, [
        (f"expansion {wide}", lambda s, wide=wide: search(s, wide)) for wide in (128, 256, 512, 1024, 2048)
    ]


def _voyager(items: np.ndarray, states: np.ndarray, truth: np.ndarray) -> tuple[float, Any]:
    library = importlib.import_module("voyager")
    index = library.Index(library.Space.InnerProduct, num_dimensions=items.shape[1], M=16)
    begun = time.perf_counter()
    index.add_items(items, num_threads=2)
    seconds = time.perf_counter() - begun
    return seconds, [(f"ef {wide}", lambda s, wide=wide: index.query(s, 100, query_ef=wide)[0])
                     for wide in (128, 256, 512, 1024, 2048)]  # fmt: skip


def _hnswlib(items: np.ndarray, states: np.ndarray, truth: np.ndarray) -> tuple[float, Any]:
    library = importlib.import_module("hnswlib")
    index = library.Index(space="ip", dim=items.shape[1])
    index.init_index(len(items), ef_construction=200, M=16)
    begun = time.perf_counter()
    index.add_items(items, num_threads=2)
    seconds = time.perf_counter() - begun

    def search(state: np.ndarray, wide: int) -> np.ndarray:
        index.set_ef(wide)
        return index.knn_query(state[None], 100, num_threads=1)[0][0]

    return seconds, [(f"ef {wide}", lambda s, wide=wide: search(s, wide)) for wide in (128, 256, 512, 1024, 2048)]


def increment() -> list[Figure]:
    """NDCG@10 on the next week: yesterday's run with the new week's events, trained anew, and left as it was. Three
    shops; the intervals are over shops and requests together."""
    values: dict[str, list[np.ndarray]] = {"updated": [], "anew": [], "stale": []}
    seconds: dict[str, list[float]] = {"updated": [], "anew": []}
    for seed in SEEDS:
        folder = WORK / "scale" / f"increment_{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        shop = make_shop(ShopSize(products=800, users=1_200, requests=16_000), seed)
        end = int(shop.requests.select(pl.col("timestamp").max()).collect().item())
        today, yesterday = (_until(shop, end - back * SPAN, folder / name)
                            for back, name in ((1, "today"), (2, "yesterday")))  # fmt: skip
        recipe = load_recipe("shop").changed({"seed": seed})
        old = train(recipe, yesterday, folder / "old")
        for name, options in (("anew", {}), ("updated", {"update": old.directory})):
            begun = time.perf_counter()
            run = train(recipe, today, folder / name, **options)
            seconds[name].append(time.perf_counter() - begun)
            values[name].append(_judge(run, run.features, today))
        (folder / "stale").mkdir()
        values["stale"].append(
            _judge(old, refresh_features(old.directory / "features", today, folder / "stale"), today)
        )
    figures = []
    anew = np.concatenate(values["anew"])
    draws = np.random.default_rng(0).integers(0, len(anew), (2_000, len(anew)))
    for name, share in (("updated", "incremental_ndcg_share"), ("stale", "stale_ndcg_share")):
        own = np.concatenate(values[name])
        ratios = own[draws].mean(1) / anew[draws].mean(1)
        figures.append(Figure(share, own.mean() / anew.mean(), *np.quantile(ratios, (0.025, 0.975)).tolist(), "",
                              f"of training anew, whose NDCG@10 is {anew.mean():.4f}; {len(anew):,} requests of the "
                              f"week after, {len(SEEDS)} shops"))  # fmt: skip
    speed = [one / two for one, two in zip(seconds["anew"], seconds["updated"], strict=True)]
    figures.append(Figure("incremental_speedup", float(np.median(speed)), min(speed), max(speed), "",
                          "time of training anew over that of the update"))  # fmt: skip
    return figures


def _until(shop: Dataset, moment: int, folder: Path) -> Dataset:
    """Training until a week before a moment, validation until it, and the week after it as the test."""
    parts = []
    for frame in (shop.events, shop.requests.collect()):
        there = frame.drop("split").filter(pl.col("timestamp") < moment + SPAN)
        parts.append(with_split(there, moment - SPAN, moment))
    counts = {"items": shop.items.height, "events": parts[0].height, "requests": parts[1].height}
    data = Dataset(shop.items, parts[0], parts[1].lazy(), replace(shop.description, counts=counts, source=folder.name))
    return Dataset.load(data.save(folder))


def _judge(run: TrainedRun, features: Features, today: Dataset) -> np.ndarray:
    """[R] NDCG@10 of the test requests."""
    examples = Examples.read(today, "test", features)
    scores = ties_broken(score(run.model(), examples))
    gains = order_gains(scores, examples.labels, examples.rows >= 0)
    return ndcg(gains, ideal_gains(examples.labels, examples.missed))
