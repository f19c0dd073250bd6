"""Text that is understood: classifiers against a strong linear model, what queries ask for, what reviews are worth, and
what words cost in serving.

    python benchmarks/text.py [PART ...]

Parts: sentiment, category, units, intent, reviews, words, preprocess. The reviews are looked for in
``../shared/data`` or in the folder that TRIRANK_DATA names. Finished trainings in ``work/benchmarks`` are used again.
Both classifiers take about half an hour each on two cores.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from quality import DATA, dataset_of, of_scores
from results import WORK, Figure, write
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from trirank_backend.features.packer import Packer
from trirank_backend.words.analysis import Analyser
from trirank_build.data.dataset import Dataset
from trirank_build.evaluation.bootstrap import mean_interval, ratio_interval
from trirank_build.evaluation.scoring import score
from trirank_build.features.examples import Examples
from trirank_build.preparation.sources.shop import Shop, ShopSize
from trirank_build.recipe import load_recipe
from trirank_build.text.corpus import Corpus, read_corpus
from trirank_build.text.evaluation import evaluate_text
from trirank_build.text.linear import Linear, presence
from trirank_build.text.model import TextModel, compress_text
from trirank_build.text.recipe import load_text_recipe
from trirank_build.text.reviews import with_reviews
from trirank_build.text.training import TextRun, logits_of, train_text
from trirank_build.training.trainer import train

REVIEWS = DATA / "reviews" / "reviews.csv.gz"
SEEDS = (7, 8, 9)
LINEAR: list[dict[str, Any]] = [{"ngrams": (1, top), "c": c} for top, c in ((3, 3.0), (3, 10.0), (4, 10.0), (4, 30.0))]
"""Of the linear model; validation chooses."""


def classifier(task: str, seed: int, changes: dict[str, Any] | None = None, label: str = "") -> tuple[Corpus, TextRun]:
    """A run of the shipped recipe, used again where it has finished; the split is always the same."""
    corpus = read_corpus(REVIEWS, task)
    raw = load_text_recipe("text").model_dump()
    raw["seed"] = seed
    for key, value in (changes or {}).items():
        section, name = key.split(".")
        raw[section][name] = value
    recipe = type(load_text_recipe("text")).model_validate(raw)
    out = WORK / "text" / f"{task}-{seed}{label and '-' + label}"
    return corpus, train_text(corpus, recipe, out, task=task, source=REVIEWS.name)


def linear(corpus: Corpus) -> NDArray[np.int64]:
    """Classes of the test part, by TF-IDF of character n-grams and logistic regression, chosen on validation."""
    (texts, labels), (judged, truth), (asked, _) = (corpus.part(name) for name in ("train", "valid", "test"))
    found = []
    for settings in LINEAR:
        vectors = TfidfVectorizer(
            analyzer="char", ngram_range=settings["ngrams"], min_df=2, sublinear_tf=True, max_features=400_000
        )
        told = vectors.fit_transform(texts)
        model = LogisticRegression(C=settings["c"], max_iter=300)
        model.fit(told, labels)
        right = float((model.predict(vectors.transform(judged)) == truth).mean())
        found.append((right, model.predict(vectors.transform(asked))))
        print(settings, round(right, 4), flush=True)
    return np.asarray(max(found, key=lambda pair: pair[0])[1])


def task(name: str) -> list[Figure]:
    """The classifier (three seeds, and the mean of their accuracies) and the linear model on the test part."""
    rights, small, sizes, inners = [], [], [], []
    for seed in SEEDS:
        corpus, run = classifier(name, seed)
        asked, truth = corpus.part("test")
        logits = logits_of(run.model(), run.reader, run.reader.read(asked))
        rights.append(logits.argmax(1) == truth)
        told = presence(run.reader, run.reader.read(asked))
        weights = run.model().linear.weight.detach().numpy()
        inners.append(float((Linear(weights[:, :-1], weights[:, -1]).logits(told).argmax(1) == truth).mean()))
        facts = compress_text(run, corpus, WORK / "text" / f"{name}-{seed}-int8", allow_failing=True)
        model = TextModel.load(WORK / "text" / f"{name}-{seed}-int8")
        small.append(model.probabilities(asked).argmax(1) == truth)
        sizes.append(facts)
        if seed == SEEDS[0]:
            found = evaluate_text(asked, truth, logits, run.classes)
            found.write(WORK / "text" / f"{name}.html", f"reviews: {name}", "test")
    inner = float(np.mean(inners))
    theirs = linear(corpus) == truth
    own, compressed = (np.mean(rows, 0) for rows in (rights, small))
    values = sorted(float(row.mean()) for row in rights)
    note = f"{len(truth):,} texts of the test part, looked at once; mean of {len(SEEDS)} seeds"
    ms = {key: [facts["p50_ms"][key] for facts in sizes] for key in ("float32", "int8")}
    mb = {key: [facts["mb"][key] for facts in sizes] for key in ("float32", "int8")}
    return [
        Figure(f"{name}_accuracy", *mean_interval(own), "accuracy", note),
        Figure(f"{name}_accuracy_of_seeds", values[1], values[0], values[-1], "accuracy", "median and spread of seeds"),
        Figure(f"{name}_linear_accuracy", *mean_interval(theirs.astype(float)), "accuracy",
               "TF-IDF of character n-grams and logistic regression; n-grams and penalty chosen on validation"),
        Figure(f"{name}_gain_over_linear", *mean_interval(own - theirs), "accuracy", f"paired difference; {note}"),
        Figure(f"{name}_inner_linear_accuracy", inner, min(inners), max(inners), "accuracy",
               "of the linear model inside the classifier, alone, where it counts at all"),
        Figure(f"{name}_macro_f1", found.macro_f1, found.macro_f1, found.macro_f1, "F1", f"seed {SEEDS[0]}"),
        Figure(f"{name}_compressed_ratio", *ratio_interval(compressed, own), "ratio", "accuracy of INT8 over dense"),
        Figure(f"{name}_compressed_p50_ms", *_spread(ms["int8"]), "ms", "a text, ONNX Runtime on one core"),
        Figure(f"{name}_dense_p50_ms", *_spread(ms["float32"]), "ms", "the same, FP32"),
        Figure(f"{name}_compressed_mb", *_spread(mb["int8"]), "MB"),
        Figure(f"{name}_dense_mb", *_spread(mb["float32"]), "MB"),
    ]  # fmt: skip


def _spread(values: list[float]) -> tuple[float, float, float]:
    return float(np.median(values)), min(values), max(values)


UNITS: dict[str, dict[str, Any]] = {
    "characters": {}, "subwords": {"reading.units": "subwords", "reading.orders": 2},
    "characters_without_masking": {"pretraining.epochs": 0}, "characters_alone": {"reading.orders": 1},
}  # fmt: skip


def units() -> list[Figure]:
    """What texts are cut into, and masked training, by validation accuracy of one seed."""
    out = []
    for name, changes in UNITS.items():
        _, run = classifier("sentiment", SEEDS[0], changes, "" if name == "characters" else name)
        for part in ("encoder", "linear", "both"):
            value = run.facts["valid_accuracy"][part]
            out.append(
                Figure(f"sentiment_valid_{name}_{part}", value, value, value, "accuracy", "validation, one seed")
            )
    return out


def shop_with_words() -> Dataset:
    """The shop of benchmarks/quality.py."""
    return dataset_of("shop")


def intent() -> list[Figure]:
    """What a query asks for: how often the likeliest category is that of what was chosen, and how long it takes."""
    dataset = shop_with_words()
    run = train(load_recipe("shop").changed({"features.words": "english", "training.epochs": 1}), dataset,
                WORK / "text" / "shop-words-short")  # fmt: skip
    reader = run.features.text.reader
    assert reader is not None
    test = dataset.split("test").filter(pl.col("query") != "")
    names = test["query"].unique(maintain_order=True).to_list()
    category = dict(zip(dataset.items["item_id"].to_list(), dataset.items["category"].to_list(), strict=True))
    catalogue = run.features.catalogue
    field = run.features.spec.item_fields.index("category")
    code = {int(catalogue.fields[row, field]): category[int(catalogue.ids[row])] for row in range(len(catalogue))}
    right = []
    for query, items, labels in test.select("query", "item_ids", "labels").head(4_000).iter_rows():
        chosen = [category[item] for item, label in zip(items, labels, strict=True) if label > 0]
        if chosen:
            likeliest = int(reader.read([query]).intents[0, 0])
            right.append(float(np.mean([code.get(likeliest) == each for each in chosen])))
    alone = []
    for _ in range(7):  # the intent's own part of reading a query, without what is remembered
        known = [reader.read([query]).ids[0] for query in names]
        words = [ids[ids > 0] for ids in known]
        started = time.perf_counter()
        for each in words:
            reader.intents(each)
        alone.append((time.perf_counter() - started) / len(words) * 1e6)
    whole = []
    for _ in range(7):
        reader._read.cache_clear()
        reader.analyser = Analyser(reader.analyser.language)  # which remembers stems
        started = time.perf_counter()
        for query in names:
            reader.read([query])
        whole.append((time.perf_counter() - started) / len(names) * 1e6)
    again = []
    for _ in range(7):
        started = time.perf_counter()
        for query in names:
            reader.read([query])
        again.append((time.perf_counter() - started) / len(names) * 1e6)
    note = f"{len(names):,} different queries of the shop"
    return [
        Figure("intent_us", *_spread(alone), "µs", f"the sums of P(category | query), of words that were read; {note}"),
        Figure("query_us", *_spread(whole), "µs", f"all that is read of a new query; {note}"),
        Figure("query_again_us", *_spread(again), "µs", f"of one that is remembered; {note}"),
        Figure("intent_accuracy", *mean_interval(np.array(right)), "share",
               "of what was chosen in the test split that is of the likeliest category"),
    ]  # fmt: skip


def reviews() -> list[Figure]:
    """What reviews are worth in a shop that was made for it: every product gets texts of real reviews, positive ones
    the more likely the better it is; none of them was among the classifier's training texts."""
    corpus, run = classifier("sentiment", SEEDS[0], {"pretraining.epochs": 0, "training.epochs": 1}, "short")
    compress_text(run, corpus, WORK / "text" / "reviews-int8", allow_failing=True)
    model = TextModel.load(WORK / "text" / "reviews-int8")
    texts, labels = corpus.part("test")
    gains, rows = [], {"without": [], "with": [], "known": []}
    for seed in SEEDS:
        shop = Shop(ShopSize(), seed)
        dataset = shop.dataset()
        quality, rng = shop._world.quality, np.random.default_rng(seed)
        count = rng.poisson(6, len(quality))
        item = np.repeat(np.arange(len(quality)), count)
        positive = rng.random(len(item)) < 1 / (1 + np.exp(-3 * quality[item]))
        pools = [np.flatnonzero(labels == side) for side in (0, 1)]
        drawn = [texts[rng.choice(pools[int(side)])] for side in positive]
        path = WORK / "text" / f"reviews-{seed}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        pl.DataFrame({"item_id": item + 1, "review": drawn, "positive": positive.astype(int)}).write_csv(path)
        without = path.with_name(f"reviews-{seed}-texts.csv")
        pl.read_csv(path).drop("positive").write_csv(without)
        told = {"without": dataset, "with": with_reviews(dataset, without, model), "known": with_reviews(dataset, path)}
        found = {}
        for name, each in told.items():
            short = load_recipe("shop").changed({"seed": seed, "training.epochs": 1})
            own = train(short, each, WORK / "text" / f"reviews-{seed}-{name}")
            examples = Examples.read(each, "test", own.features)
            found[name] = of_scores(score(own.model(), examples), examples)
            rows[name].append(float(np.nanmean(found[name])))
        gains.append(found["with"] - found["without"])
    note = f"test split of {len(SEEDS)} shops whose choices depend on quality, which reviews tell of; short runs"
    gain = np.concatenate(gains)
    return [
        Figure("reviews_ndcg_gain", *mean_interval(gain), "NDCG@10", f"paired difference; {note}"),
        *(Figure(f"reviews_{name}_ndcg10", *_spread(values), "NDCG@10", note) for name, values in rows.items()),
    ]


SHOP_WORDS: dict[str, dict[str, Any]] = {
    "whole": {"features.words": "english"}, "without_words": {},
    "without_text": {"features.without": ["text"], "features.words": "english"},
}  # fmt: skip


def words() -> list[Figure]:
    """The shop with words, without them, and without any text, in short runs of three seeds."""
    dataset, rows = shop_with_words(), {}
    for name, changes in SHOP_WORDS.items():
        rows[name] = []
        for seed in SEEDS:
            run = train(
                load_recipe("shop").changed({"training.epochs": 1, "seed": seed} | changes), dataset,
                WORK / "text" / f"shop-{name}-{seed}",
            )  # fmt: skip
            examples = Examples.read(dataset, "test", run.features)
            rows[name].append(of_scores(score(run.model(), examples), examples))
    out = [
        Figure(f"shop_{name}_ndcg10", *_spread([float(np.nanmean(r)) for r in each]), "NDCG@10",
               "test split, short runs of three seeds")
        for name, each in rows.items()
    ]  # fmt: skip
    for other in ("without_words", "without_text"):
        difference = np.mean(rows["whole"], 0) - np.mean(rows[other], 0)
        out.append(Figure(f"shop_words_gain_over_{other}", *mean_interval(difference), "NDCG@10", "paired difference"))
    return out


def preprocess() -> list[Figure]:
    """What packing 200 candidates of a search costs with words and without, in turns."""
    dataset = shop_with_words()
    packers: dict[str, tuple[Packer, list[Any]]] = {}
    for name, changes in (("plain", {}), ("words", {"features.words": "english"})):
        run = train(load_recipe("shop").changed({"training.epochs": 1} | changes), dataset,
                    WORK / "text" / f"shop-preprocess-{name}")  # fmt: skip
        examples = Examples.read(dataset, "test", run.features)
        searching = np.flatnonzero([bool(query) for query in examples.queries])[:64]
        lines = []
        rng = np.random.default_rng(0)
        for at in searching:
            rows = rng.permutation(len(run.features.catalogue))[None, :200].astype(np.int32)
            scores = np.sort(rng.normal(size=(1, 200)).astype(np.float32))[:, ::-1]
            lines.append(_lines_of(examples, np.array([at]), rows, scores))
        packers[name] = run.features.packer, lines
    took: dict[str, list[float]] = {name: [] for name in packers}
    ratios = []
    for _ in range(15):
        for name, (packer, lines) in packers.items():
            for each in lines[:8]:
                packer.pack(each)
            started = time.perf_counter()
            for _ in range(10):
                for each in lines:
                    packer.pack(each)
            took[name].append((time.perf_counter() - started) / (10 * len(lines)) * 1e6)
        ratios.append(took["words"][-1] / took["plain"][-1])
    note = "packing of one search with 200 candidates, in process; queries that are remembered"
    return [
        *(Figure(f"pack_us_200_{name}", *_spread(values), "µs", note) for name, values in took.items()),
        Figure("pack_us_200_words_ratio", *_spread(ratios), "ratio", "of the same round"),
    ]


def _lines_of(examples: Examples, which: NDArray[np.int64], rows: NDArray[Any], scores: NDArray[Any]) -> Any:
    """What ``Examples.batch`` would hand to the packer."""
    found: list[Any] = []
    pack: Callable[..., Any] = examples._pack

    def keep(at: Any, lines: Any, width: int) -> Any:
        found.append(lines)
        return pack(at, lines, width)

    examples._pack = keep  # type: ignore[method-assign]
    labels = np.zeros(rows.shape, np.float32)
    examples.batch(which, rows, scores, labels, rows.shape[1], labels.astype(np.int32))
    examples._pack = pack  # type: ignore[method-assign]
    return found[0]


PARTS: dict[str, Callable[[], list[Figure]]] = {
    "sentiment": lambda: task("sentiment"), "category": lambda: task("category"), "units": units, "intent": intent,
    "reviews": reviews, "words": words, "preprocess": preprocess,
}  # fmt: skip


def main() -> None:
    for name in sys.argv[1:] or PARTS:
        figures = PARTS[name]()
        for figure in figures:
            print(f"{figure.name} {figure.value:.4f} [{figure.low:.4f}, {figure.high:.4f}] {figure.unit}", flush=True)
        print(write("text", figures, keep=True))


if __name__ == "__main__":
    main()
