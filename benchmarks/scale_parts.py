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
from trirank_build.retrieval.index import RECALL, StateGraph, exact_top, fit, states_of
from trirank_build.retrieval.tasks import item_vectors
from trirank_build.training.run import TrainedRun
from trirank_build.training.trainer import train

VECTORS = 300_000
"""Of the large shop's, that every library has to search among; graphs of neighbours take an hour for all."""
SEEDS, DAY = (0, 1, 2), 86_400
SPAN = 7 * DAY
"""What is called a day: the shop's requests of a week."""


def rates(folder: Path, parts: int = 3) -> list[Figure]:
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
    every = item_vectors(model, features).numpy()
    some = np.sort(np.random.default_rng(0).choice(len(every), min(VECTORS, len(every)), replace=False))
    items = np.ascontiguousarray(every[some])
    del every
    states = states_of(StateGraph(model), features, dataset)
    truth = exact_top(items, states, 100)
    figures = []
    for name, made in {"faiss_ivf_sq8": _faiss, "usearch": _usearch, "voyager": _voyager, "hnswlib": _hnswlib}.items():
        try:
            seconds, kept, search = made(items)
        except ImportError as error:
            print(f"{name}: not measured ({error})")
            continue
        # The same grid for all, from 1 on; half of the states choose, the others are timed and tell the recall.
        half = len(states) // 2
        widths = [int(2 ** (step / 2)) for step in range(27)]
        enough = (w for w in widths if _recall([search(one, w) for one in states[:half]], truth[:half]) >= RECALL)
        chosen = next(enough, None)
        if chosen is None:
            print(f"{name}: no setting of {widths} finds {RECALL}")
            continue
        found, took = [], []
        for state in states[half:]:
            begun = time.perf_counter()
            found.append(search(state, chosen))
            took.append(time.perf_counter() - begun)
        recall = _recall(found, truth[half:])
        note = f"{len(items):,} vectors of {items.shape[1]} numbers, kept as {kept}; width {chosen}"
        ms = [float(np.quantile(took, share) * 1e3) for share in (0.5, 0.05, 0.95)]
        figures += [Figure(f"{name}_ms", *ms, "ms", note), Figure(f"{name}_recall", recall, recall, recall, "", note),
                    Figure(f"{name}_build_seconds", seconds, seconds, seconds, "s", "two threads")]  # fmt: skip
        print(name, round(seconds, 1), "s", ms, recall, chosen, flush=True)
    return figures


def _recall(found: list[np.ndarray], truth: np.ndarray) -> float:
    return float(np.mean([len(np.intersect1d(one, two)) / 100 for one, two in zip(found, truth, strict=True)]))


def _faiss(items: np.ndarray) -> tuple[float, str, Any]:
    import faiss
    from trirank_backend.candidates import search_of

    begun = time.perf_counter()
    index, kind, cells = fit(items)
    seconds = time.perf_counter() - begun
    faiss.omp_set_num_threads(1)
    return seconds, f"bytes ({kind})", lambda state, width: index.search(
        state[None], 100, params=search_of({"probes": min(width, cells)}))[1][0]  # fmt: skip


def _usearch(items: np.ndarray) -> tuple[float, str, Any]:
    library = importlib.import_module("usearch.index")
    index = library.Index(ndim=items.shape[1], metric="ip", dtype="f16", connectivity=16)
    begun = time.perf_counter()
    index.add(np.arange(len(items)), items, threads=2)
    seconds = time.perf_counter() - begun

    def search(state: np.ndarray, width: int) -> np.ndarray:
        index.expansion_search = max(width, 100)
        return index.search(state, 100, threads=1).keys

    return seconds, "half precision", search


def _voyager(items: np.ndarray) -> tuple[float, str, Any]:
    library = importlib.import_module("voyager")
    index = library.Index(library.Space.InnerProduct, num_dimensions=items.shape[1], M=16)
    begun = time.perf_counter()
    index.add_items(items, num_threads=2)
    seconds = time.perf_counter() - begun
    return seconds, "single precision", lambda state, width: index.query(state, 100, query_ef=max(width, 100))[0]


def _hnswlib(items: np.ndarray) -> tuple[float, str, Any]:
    library = importlib.import_module("hnswlib")
    index = library.Index(space="ip", dim=items.shape[1])
    index.init_index(len(items), ef_construction=200, M=16)
    begun = time.perf_counter()
    index.add_items(items, num_threads=2)
    seconds = time.perf_counter() - begun

    def search(state: np.ndarray, width: int) -> np.ndarray:
        index.set_ef(max(width, 100))
        return index.knn_query(state[None], 100, num_threads=1)[0][0]

    return seconds, "single precision", search


def increment() -> list[Figure]:
    """NDCG@10 on the next week: yesterday's run with the new week's events, trained anew, and left as it was. Three
    shops; the intervals are over shops and requests together."""
    values: dict[str, list[np.ndarray]] = {"updated": [], "anew": [], "stale": []}
    seconds: dict[str, list[float]] = {"updated": [], "anew": []}
    for seed in SEEDS:
        folder = WORK / "scale" / f"increment_{seed}"
        shutil.rmtree(folder / "stale", ignore_errors=True)  # finished runs are taken as they are
        shop = make_shop(ShopSize(products=600, users=900, requests=9_000), seed)
        end = int(shop.requests.select(pl.col("timestamp").max()).collect().item())
        today, yesterday = (_until(shop, end - back * SPAN, folder / name)
                            for back, name in ((1, "today"), (2, "yesterday")))  # fmt: skip
        recipe = load_recipe("shop").changed({"seed": seed})
        old = train(recipe, yesterday, folder / "old")
        for name, options in (("anew", {}), ("updated", {"update": old.directory})):
            run = train(recipe, today, folder / name, **options)
            seconds[name].append(run.facts["seconds"])
            values[name].append(_judge(run, run.features, today))
        (folder / "stale").mkdir()
        values["stale"].append(
            _judge(old, refresh_features(old.directory / "features", today, folder / "stale"), today)
        )
    figures = []
    anew = values["anew"]
    rng = np.random.default_rng(0)
    shops = rng.integers(0, len(SEEDS), (2_000, len(SEEDS)))
    for name, share in (("updated", "incremental_ndcg_share"), ("stale", "stale_ndcg_share")):
        own, ratios = values[name], []
        for drawn in shops:  # shops first, then requests of each
            at = [rng.integers(0, len(own[shop]), len(own[shop])) for shop in drawn]
            both = [sum(each[shop][which].sum() for shop, which in zip(drawn, at, strict=True)) for each in (own, anew)]
            ratios.append(both[0] / both[1])
        value = sum(map(np.sum, own)) / sum(map(np.sum, anew))
        single = ", ".join(f"{one.mean() / two.mean():.3f}" for one, two in zip(own, anew, strict=True))
        figures.append(Figure(share, float(value), *np.quantile(ratios, (0.025, 0.975)).tolist(), "",
                              f"NDCG@10 of training anew: {np.concatenate(anew).mean():.4f}; "
                              f"{sum(map(len, anew)):,} requests of the week after, shops {single}"))  # fmt: skip
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
    found = ndcg(gains, ideal_gains(examples.labels, examples.missed))
    return found[~np.isnan(found)]  # of requests with anything to find, which are the same for all
