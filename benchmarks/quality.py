"""How well does it rank? Against published numbers and honest baselines; what each part is worth; what tables cost.

    python benchmarks/quality.py [--list] [PART ...]

Every part is a run of its own (all of them take about three hours on one core, so start several with different parts
where there are more). Finished preparations and trainings in ``work/benchmarks`` are used again. The real data is
looked for in ``../shared/data`` or in the folder that TRIRANK_DATA names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from results import ROOT, WORK, Figure, write
from trirank_build.data.dataset import Dataset
from trirank_build.evaluation import metrics
from trirank_build.evaluation.bootstrap import mean_interval, ratio_interval
from trirank_build.evaluation.catalogue import Found, rank_catalogue, rank_retrieved
from trirank_build.evaluation.contenders import lambdamart
from trirank_build.evaluation.evaluate import evaluate, evaluate_catalogue
from trirank_build.evaluation.scoring import score
from trirank_build.evaluation.summary import Evaluation
from trirank_build.features.examples import Examples
from trirank_build.models.embeddings import embedding_bytes, make_embedding
from trirank_build.preparation.options import PrepareOptions
from trirank_build.preparation.prepare import prepare
from trirank_build.preparation.sources.judged_search import place_of
from trirank_build.recipe import ModelRecipe, load_recipe
from trirank_build.retrieval.cascade import retrieve
from trirank_build.retrieval.tasks import CatalogueTasks, state_scorer
from trirank_build.training.ranking import held_out
from trirank_build.training.run import TrainedRun
from trirank_build.training.trainer import train

DATA = Path(os.environ.get("TRIRANK_DATA", ROOT.parent / "shared" / "data"))
SOURCES = {
    "shop": "shop",
    "beauty": DATA / "amazon" / "Beauty.txt",
    "sports": DATA / "amazon" / "Sports_and_Outdoors.txt",
    "games": DATA / "amazon" / "Video_Games.txt",
    "home_depot": DATA / "home_depot" / "search_relevance.csv.gz",
}
UNTOUCHED_FROM = 0.9
"""Of ``place_of``: no choice about Home Depot was ever made on queries from here on."""
CHANGES: dict[tuple[str, str], dict[str, Any]] = {
    # To reproduce SASRec it is trained out on Beauty alone; as a baseline it stops where the ranker does.
    ("sports", "sasrec"): {"pretraining.epochs": 12},
    ("games", "sasrec"): {"pretraining.epochs": 12},
}
"""Dataset and recipe → what differs from the shipped recipe."""
BEAUTY_SEEDS = (7, 8, 9)
SEVERAL_SEEDS = ("beauty_ndcg10", "beauty_recall10", "beauty_states_ndcg10", "beauty_states_recall10")
"""Figures that stand for all seeds; of the others on Beauty, the first seed's."""
NEGATIVES, SAMPLING_SEED = 100, 0


def dataset_of(name: str) -> Dataset:
    """The prepared dataset."""
    folder = WORK / "data" / name
    if not folder.is_dir():
        prepare(str(SOURCES[name]), PrepareOptions()).save(folder)
    return Dataset.load(folder)


def trained(
    dataset: str, recipe: str, changes: dict[str, Any] | None = None, label: str = "", **more: Any
) -> TrainedRun:
    """A run of a shipped recipe, used again where it has finished."""
    out = WORK / "quality" / f"{dataset}-{recipe}{label and '-' + label}"
    return train(
        load_recipe(recipe).changed(CHANGES.get((dataset, recipe), {}) | (changes or {})),
        dataset_of(dataset),
        out,
        **more,
    )


def figures_of(name: str, found: Evaluation, note: str = "") -> list[Figure]:
    """NDCG@10 and recall@10 of every order, and the ranker above it."""
    note = f"test split, {found.requests:,} requests{note}; 95 % bootstrap interval"
    out = []
    for order, row in found.table.items():
        label = name if order == "ranker" else f"{name}_{order.replace(' ', '_').replace(chr(39) + 's', '')}"
        out.append(Figure(f"{label}_ndcg10", *row["NDCG@10"], "NDCG@10", note))
        out.append(Figure(f"{label}_recall10", *row["recall@10"], "recall@10", note))
    for order, d in found.differences.items():
        label = f"{name}_ndcg10_above_{order.replace(' ', '_').replace(chr(39) + 's', '')}"
        out.append(Figure(label, d.value, d.low, d.high, "NDCG@10", f"paired difference, p = {d.p_value:.1e}; {note}"))
    return out


def seconds(name: str, run: TrainedRun) -> Figure:
    """How long a run trained."""
    took, threads = run.facts["seconds"], torch.get_num_threads()
    return Figure(name, took, took, took, "s", f"{threads} thread(s), with other work on the machine")


def sequences(name: str, baselines: tuple[str, ...]) -> list[Figure]:
    """Purchase sequences: leave-one-out, whole catalogue, what was bought before left out; neural baselines by name."""
    run = trained(name, "sequences")
    dataset = run.judged(dataset_of(name))
    model, features = run.model(), run.features
    tasks = CatalogueTasks.of(dataset, "test", features)
    others: dict[str, Found] = {}
    for recipe in set(baselines) - {"bst"}:
        other = trained(name, recipe)
        others[recipe] = rank_catalogue(tasks, state_scorer(other.model(), other.features))
    candidates = retrieve(tasks, dataset, features, model)
    learnt_from = held_out(dataset_of(name), features, model, run.recipe.training, run.recipe.seed)
    others["lambdamart"] = rank_retrieved(lambdamart(*learnt_from, candidates), tasks, candidates)
    if "bst" in baselines:  # has no states, so it orders what similarity finds
        bst = trained(name, "bst")
        by_similarity = retrieve(tasks, dataset, bst.features, bst.model())
        others["bst"] = rank_retrieved(score(bst.model(), by_similarity), tasks, by_similarity)
    found = evaluate_catalogue(model, dataset, features, "test", found=others)
    figures = [*figures_of(name, found, ", whole catalogue"), seconds(f"{name}_train_s", run)]
    return [figure for figure in figures if figure.name not in SEVERAL_SEEDS]


def beauty_seeds() -> list[Figure]:
    """The ranker on Beauty with three seeds: median, smallest and largest."""
    dataset, rows = dataset_of("beauty"), []
    for seed in BEAUTY_SEEDS:
        run = trained("beauty", "sequences") if seed == 7 else trained("beauty", "sequences", {"seed": seed}, str(seed))
        found = evaluate_catalogue(run.model(), run.judged(dataset), run.features, "test", others={})
        states = found.table["ranker's states alone"]
        both = [row[metric].value for row in (found.table["ranker"], states) for metric in ("NDCG@10", "recall@10")]
        rows.append(both)
    values, note = np.array(rows), f"test split, whole catalogue; median and spread of {len(BEAUTY_SEEDS)} seeds"
    return [
        Figure(n, float(np.median(v)), float(v.min()), float(v.max()), n.rsplit("_", 1)[1], note)
        for n, v in zip(SEVERAL_SEEDS, values.T, strict=True)
    ]


def games_sampled() -> list[Figure]:
    """The published protocol of SASRec: each choice among 100 sampled items."""
    run = trained("games", "sequences")
    dataset = run.judged(dataset_of("games"))
    sasrec = trained("games", "sasrec")
    tasks = CatalogueTasks.of(dataset, "test", run.features)
    draw = {"negatives": NEGATIVES, "seed": SAMPLING_SEED}
    other = {"sasrec": rank_catalogue(tasks, state_scorer(sasrec.model(), sasrec.features), **draw)}
    found = evaluate_catalogue(run.model(), dataset, run.features, "test", found=other, **draw)
    return figures_of("games_sampled", found, f", {NEGATIVES} sampled items, seed {SAMPLING_SEED}")


def home_depot_split(name: str, parts: Callable[[str], str]) -> Dataset:
    """Home Depot's requests with another split; ``parts`` gives a query's, or nothing to leave it out."""
    folder, dataset = WORK / "data" / f"home_depot-{name}", dataset_of("home_depot")
    if not folder.is_dir():
        requests = dataset.requests.collect()
        split = pl.Series("split", [parts(query) for query in requests["query"]])
        replace(dataset, requests=requests.with_columns(split).filter(split != "").lazy()).save(folder)
    return Dataset.load(folder)


FEATURE_CHOICES: dict[str, dict[str, Any]] = {
    "matches": {"features.words": ""},
    "words": {"features.words": "english"},
    "words_any_language": {"features.words": "any"},
}
"""Of the ranker and of LambdaMART in each fold; validation chooses, for each by itself."""


class Judged(NamedTuple):
    """NDCG@10 of each test request [R]."""

    bm25: NDArray[np.float64]
    ranker: NDArray[np.float64]
    trees: NDArray[np.float64]
    chosen: str
    chosen_by_trees: str


def judge_home_depot(name: str, dataset: Dataset, more: dict[str, Any] | None = None) -> Judged:
    """Train on one split with each choice of features, keep the ranker's and LambdaMART's best on validation, and judge
    both on test."""
    found = []
    choices = FEATURE_CHOICES if more is None else {"encoder": FEATURE_CHOICES["words"]}
    for label, changes in choices.items():
        out = WORK / "quality" / f"home_depot-{name}-{label}"
        run = train(load_recipe("judged_search").changed(changes | (more or {})), dataset, out)
        parts = {split: Examples.read(dataset, split, run.features) for split in ("train", "valid", "test")}
        model = run.model()
        scores = {split: score(model, parts[split]) for split in ("valid", "test")}
        trees = {split: lambdamart(parts["train"], parts["valid"], parts[split]) for split in ("valid", "test")}
        mean = [float(np.nanmean(of_scores(s["valid"], parts["valid"]))) for s in (scores, trees)]
        test = parts["test"]
        rows = [of_scores(s["test"], test) for s in (scores, trees)]
        found.append((label, *mean, *rows, of_scores(test.scores, test)))
    ranker, trees_of = max(found, key=lambda row: row[1]), max(found, key=lambda row: row[2])
    return Judged(ranker[5], ranker[3], trees_of[4], ranker[0], trees_of[0])


def of_scores(scores: NDArray[np.float32], examples: Examples) -> NDArray[np.float64]:
    """[R] NDCG@10; equal scores in an order by chance."""
    valid = examples.rows >= 0
    broken = metrics.ties_broken(np.where(valid, np.nan_to_num(scores), -np.inf).astype(np.float32))
    gains = metrics.order_gains(broken, examples.labels, valid)
    return metrics.ndcg(gains, metrics.ideal_gains(examples.labels, examples.missed))


FOLDS, VALID_SHARE = 5, 0.25
"""Of cross-validation, and of each fold's training queries those that choose: few of them choose by chance."""
ENCODER = WORK / "encoder"
"""A text encoder in the shape of sentence-transformers, where somebody put one (benchmarks/encoder.py makes it)."""


def _fold(query: str, fold: int) -> str:
    """Part of a query in a fold; those that no choice was made on are in none."""
    if place_of(query, PrepareOptions().seed) >= UNTOUCHED_FROM:
        return ""
    if int(place_of(query, 101) * FOLDS) == fold:
        return "test"
    return "valid" if place_of(query, 202) < VALID_SHARE else "train"


def _untouched(query: str) -> str:
    """All that choices were made on trains, the rest is judged, once."""
    if place_of(query, PrepareOptions().seed) >= UNTOUCHED_FROM:
        return "test"
    return "valid" if place_of(query, 202) < VALID_SHARE else "train"


def _gains(found: list[Judged], label: str, note: str) -> list[Figure]:
    bm25, ranker, trees = (np.concatenate([getattr(j, n) for j in found]) for n in ("bm25", "ranker", "trees"))
    chosen, by_trees = (sorted({getattr(judged, n) for judged in found}) for n in ("chosen", "chosen_by_trees"))
    note = (
        f"paired difference over {len(bm25):,} queries, {note}; chosen on validation by the ranker: "
        f"{', '.join(chosen)}, by LambdaMART: {', '.join(by_trees)}"
    )
    return [
        Figure(f"home_depot{label}_gain_over_bm25", *mean_interval(ranker - bm25), "NDCG@10", note),
        Figure(f"home_depot{label}_gain_over_lambdamart", *mean_interval(ranker - trees), "NDCG@10", note),
        Figure(f"home_depot{label}_lambdamart_gain_over_bm25", *mean_interval(trees - bm25), "NDCG@10", note),
    ]


def home_depot_folds() -> list[Figure]:
    """Judged search by cross-validation over queries, features chosen inside the folds; and once on queries that no
    choice was made on."""
    found = [judge_home_depot(f"fold{k}", home_depot_split(f"fold{k}", partial(_fold, fold=k))) for k in range(FOLDS)]
    out = _gains(found, "", "five-fold cross-validation over queries")
    once = judge_home_depot("untouched", home_depot_split("untouched", _untouched))
    out += _gains([once], "_untouched", "which no choice was made on")
    if (ENCODER / "model.onnx").is_file():
        changes = {"features.encoder": str(ENCODER)}
        told = judge_home_depot("untouched-encoder", home_depot_split("untouched", _untouched), changes)
        out += _gains([told], "_encoder_untouched", "the same ones, with a pre-trained encoder's cosine")
    return out


def home_depot() -> list[Figure]:
    """Judged search, split by query."""
    dataset, run = dataset_of("home_depot"), trained("home_depot", "judged_search")
    parts = {split: Examples.read(dataset, split, run.features) for split in ("train", "valid", "test")}
    trees = lambdamart(parts["train"], parts["valid"], parts["test"])
    found = evaluate(
        run.model(), parts["test"], dataset, run.features, others={},
        scored={"bm25": parts["test"].scores, "lambdamart": trees},
    )  # fmt: skip
    return [*figures_of("home_depot", found), seconds("home_depot_train_s", run)]


def shop() -> list[Figure]:
    """The synthetic shop, whose best possible order is known."""
    dataset, run = dataset_of("shop"), trained("shop", "shop")
    parts = {split: Examples.read(dataset, split, run.features) for split in ("train", "valid", "test")}
    scored = {"lambdamart": lambdamart(parts["train"], parts["valid"], parts["test"])}
    for kind in ("sasrec", "lstm", "bst"):
        changes: dict[str, Any] = {"model.architecture": kind}
        if kind == "bst":  # reads the history once for every candidate
            changes["training.candidates"] = 10
        other = trained("shop", "shop", changes, kind)
        scored[kind] = score(other.model(), parts["test"])
    found = evaluate(run.model(), parts["test"], dataset, run.features, scored=scored)
    ratio = ratio_interval(found.ndcg10["ranker"], found.ndcg10["optimum"])
    note = f"test split, {found.requests:,} requests; paired 95 % bootstrap interval"
    out = [*figures_of("shop", found), Figure("shop_ndcg10_of_optimum", *ratio, "ratio", note)]
    known = parts["test"].known(np.arange(found.requests))
    anonymous = parts["test"].users < 0
    for label, kept in {
        "anonymous": anonymous, "known_under_20_events": ~anonymous & (known < 20),
        "known_from_20_events": ~anonymous & (known >= 20),
    }.items():  # fmt: skip
        part = ratio_interval(found.ndcg10["ranker"][kept], found.ndcg10["optimum"][kept])
        out.append(
            Figure(f"shop_ndcg10_of_optimum_{label}", *part, "ratio", f"{kept.sum():,} requests of the test split")
        )
    return [*out, seconds("shop_train_s", run)]


SHORT: dict[str, Any] = {
    "pretraining.epochs": 3, "pretraining.validation_users": 2_000, "training.epochs": 1, "training.refit": False,
    "model.cross_blocks": 1, "training.freeze": "encoder", "training.start": "nothing",
}  # fmt: skip
PRETRAINED = SHORT | {"training.epochs": 0}
RANKED = SHORT | {"pretraining.objective": "none"}
BEAUTY_PRETRAINING: dict[str, dict[str, Any]] = {
    "without_item": {"features.without": ["item"]},
    "without_attributes": {"features.without": ["attributes"]},
    "masked_item": {"pretraining.objective": "masked_item", "model.attention": "full"},
    "dot_product": {"model.similarity": "dot"},
    "all_negatives": {"pretraining.negatives": "all"},
    "popular_negatives": {"pretraining.negatives": "popularity"},
    "popular_negatives_without_log_q": {"pretraining.negatives": "popularity", "pretraining.log_q": False},
    "in_batch_negatives": {"pretraining.negatives": "in_batch"},
    "in_batch_negatives_without_log_q": {"pretraining.negatives": "in_batch", "pretraining.log_q": False},
}
BEAUTY_RANKING: dict[str, dict[str, Any]] = {
    "whole": {},
    "pointwise": {"training.objective": "pointwise"},
    "lambda": {"training.objective": "lambda"},
    "nothing_frozen": {"training.freeze": "nothing"},
    "without_retrieval": {"features.without": ["retrieval"]},
    "without_dense": {"features.without": ["dense"]},
}
SHOP_CHANGES: dict[str, dict[str, Any]] = {
    "whole": {},
    **{f"without_{name}": {"features.without": [name]} for name in (
        "item", "brand", "category", "price", "text", "behaviour", "time_gap", "retrieval", "dense",
        "context")},
    "pointwise": {"training.objective": "pointwise"},
    "lambda": {"training.objective": "lambda"},
    "learned_task_weights": {"training.task_weights": "learned"},
    "next_item_first": {"pretraining.objective": "next_item", "pretraining.epochs": 3},
}  # fmt: skip


def ablation_beauty_pretraining(names: list[str]) -> list[Figure]:
    """States alone after short pre-trainings, each with one thing changed."""
    dataset, out = dataset_of("beauty"), []
    for name in names:
        changes = PRETRAINED | BEAUTY_PRETRAINING.get(name, {})
        run = trained("beauty", "sequences", changes, "ablation-" + name)
        tasks = CatalogueTasks.of(dataset, "test", run.features)
        found = rank_catalogue(tasks, state_scorer(run.model(), run.features), top_k=0)
        out.append(Figure(f"ablation_beauty_states_{name}", *mean_interval(found.ndcg()), "NDCG@10",
                          "whole catalogue, states alone, short run; 95 % bootstrap interval"))  # fmt: skip
    return out


def ablation_beauty_ranking() -> list[Figure]:
    """Both steps, the second one with one thing changed, after the same short pre-training."""
    first = trained("beauty", "sequences", PRETRAINED, "ablation-pretrained")
    runs = {}
    for name, changes in BEAUTY_RANKING.items():
        runs[name] = trained(
            "beauty", "sequences", RANKED | changes, "ablation-ranking-" + name, start_from=first.directory
        )
    dataset, out = dataset_of("beauty"), []
    for name, run in runs.items():
        model = run.model()
        tasks = CatalogueTasks.of(dataset, "test", run.features)
        examples = retrieve(tasks, dataset, run.features, model)
        found = rank_retrieved(score(model, examples), tasks, examples)
        out.append(Figure(f"ablation_beauty_{name}", *mean_interval(found.ndcg()), "NDCG@10",
                          "whole catalogue, short run; 95 % bootstrap interval"))  # fmt: skip
    return out


def ablation_shop(names: list[str]) -> list[Figure]:
    """The shop with one input or objective changed, in short runs."""
    dataset, out = dataset_of("shop"), []
    for name in names:
        changes = {"training.epochs": 1} | SHOP_CHANGES[name]
        run = trained("shop", "shop", changes, "ablation-" + name)
        examples = Examples.read(dataset, "test", run.features)
        found = evaluate(run.model(), examples, dataset, run.features, others={})
        out.append(Figure(f"ablation_shop_{name}", *found.table["ranker"]["NDCG@10"], "NDCG@10",
                          "test split, short run; 95 % bootstrap interval"))  # fmt: skip
    return out


EMBEDDINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "low_rank": {"model.embedding": "low_rank", "model.embedding_rank": 16},
    "quotient_remainder": {"model.embedding": "quotient_remainder", "model.embedding_rows": 2_048},
}
MANY_ITEMS, MANY_ROWS = 10_000_000, 65_536


def embeddings() -> list[Figure]:
    """Bytes of each kind of table for Beauty and for ten million items, and what it does to NDCG."""
    dataset, out = dataset_of("beauty"), []
    for name, changes in EMBEDDINGS.items():
        label = "pretrained" if name == "plain" else "embedding-" + name
        run = trained("beauty", "sequences", PRETRAINED | changes, "ablation-" + label)
        model = run.model()
        tasks = CatalogueTasks.of(dataset, "test", run.features)
        found = rank_catalogue(tasks, state_scorer(model, run.features), top_k=0)
        out.append(Figure(f"embedding_{name}_ndcg10", *mean_interval(found.ndcg()), "NDCG@10",
                          "Beauty, states alone, short run; 95 % bootstrap interval"))  # fmt: skip
        size = embedding_bytes(model.embedding)
        out.append(Figure(f"embedding_{name}_bytes", size, size, size, "bytes", "Beauty, all tables"))
        spec = run.features.spec
        shift = MANY_ITEMS - spec.tables["item"][1]
        tables = {n: (f, MANY_ITEMS) if n == "item" else (f + shift, s) for n, (f, s) in spec.tables.items()}
        large = run.recipe.model.model_copy(update={"embedding_rows": MANY_ROWS})
        many = _bytes_of(type(spec)(**{**vars(spec), "tables": tables}), large)
        out.append(Figure(f"embedding_{name}_10m_bytes", many, many, many, "bytes",
                          f"{MANY_ITEMS:,} items; quotient_remainder with {MANY_ROWS:,} remainders"))  # fmt: skip
    return out


def _bytes_of(spec: Any, recipe: ModelRecipe) -> int:
    with torch.device("meta"):  # sizes alone
        return embedding_bytes(make_embedding(spec, recipe))


_PRE, _SHOP = ["pretrained", *BEAUTY_PRETRAINING], list(SHOP_CHANGES)
PARTS: dict[str, Callable[[], list[Figure]]] = {
    "beauty": partial(sequences, "beauty", ("sasrec", "lstm", "bst")),
    "beauty_seeds": beauty_seeds,
    "sports": partial(sequences, "sports", ("sasrec",)),
    "games": partial(sequences, "games", ("sasrec",)),
    "games_sampled": games_sampled,
    "home_depot": home_depot,
    "home_depot_folds": home_depot_folds,
    "shop": shop,
    "ablation_beauty_pretraining": partial(ablation_beauty_pretraining, _PRE),
    "ablation_beauty_ranking": ablation_beauty_ranking,
    "ablation_shop": partial(ablation_shop, _SHOP),
    "embeddings": embeddings,
}

if __name__ == "__main__":
    wanted = sys.argv[1:] or list(PARTS)
    if "--list" in wanted:
        print("\n".join(PARTS))
        sys.exit()
    for part in wanted:
        figures = PARTS[part]()
        write("quality", figures, keep=True)
        for figure in figures:
            print(f"{figure.name:60} {figure.value:.4f}  [{figure.low:.4f}, {figure.high:.4f}]", flush=True)
