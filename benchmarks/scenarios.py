"""What each shipped policy is for, measured: relevance, new items, categories.

    python benchmarks/scenarios.py

The demo's ranker scores requests of its test split, whose candidates were all shown in random order, so that every
click is known; policies then order the same scores. Values are means over requests, intervals from requests drawn
anew in pairs. How many categories a rule shows for a loss of 1 % of NDCG is read off its settings, tried from weak to
strong on the validation split and measured on the test split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from results import ROOT, Figure, write
from trirank.contract import Signal
from trirank_backend.handover import HEADER, Handover
from trirank_backend.policies import SHIPPED, Policy, load_policies
from trirank_backend.release import FEATURES
from trirank_backend.rerank import Rerank
from trirank_backend.rules import load_rules
from trirank_backend.scoring import load_ranker
from trirank_build.data.dataset import Dataset
from trirank_build.demo import build
from trirank_build.features.examples import Examples
from trirank_build.features.fitting import Features
from trirank_build.repository.release import graph_place, load_manifest

REQUESTS, TOP, YOUNG_S, SAMPLES = 3_000, 10, 14 * 86_400, 1_000
LOSS = 0.01
PLAIN: list[dict[str, Any]] = [{"rule": "deduplicate"}]
"""What all have in common: one of each product."""


class Asked(NamedTuple):
    """Requests with the ranker's scores.

    Attributes:
        labels: [R, N] gains, by place; new: [R, N] bool, younger than 14 days; codes: [R, N] of categories.
    """

    scores: NDArray[np.float32]
    rows: NDArray[np.int32]
    signals: NDArray[np.int32]
    retrieval: NDArray[np.float32]
    moments: NDArray[np.int64]
    searches: NDArray[np.bool_]
    labels: NDArray[np.float32]
    new: NDArray[np.bool_]
    codes: NDArray[np.int32]

    def only(self, which: NDArray[np.bool_]) -> Asked:
        """Some of the requests."""
        return Asked(*(column[which] for column in self))


class Bench:
    """Orders requests by policies."""

    def __init__(self) -> None:
        release = build(ROOT / "work" / "demo")
        manifest = load_manifest(release)
        self._rules, _ = load_rules(release / FEATURES)
        self._features = Features.load(release / FEATURES)
        self._dataset = Dataset.load(ROOT / "work" / "demo" / "data")
        self._ranker = load_ranker(release / graph_place(manifest["pipeline"]), manifest["engine"])

    def asked(self, split: str) -> Asked:
        """Requests of a split."""
        examples = Examples.read(self._dataset, split, self._features, REQUESTS)
        parts, signals = [], []
        for start in range(0, len(examples), 64):
            batch = examples.whole(np.arange(start, min(start + 64, len(examples))))
            parts.append(self._ranker(batch.packed.tensors()))
            signals.append(batch.packed.signals)
        rows, items = examples.rows, self._rules.items
        age = examples.times[:, None] - items.created_at[rows]
        return Asked(
            np.concatenate(parts), rows, np.concatenate(signals), examples.scores, examples.times,
            np.array([bool(query) for query in examples.queries]), examples.labels,
            (items.created_at[rows] > 0) & (age < YOUNG_S) & (rows >= 0), items.categories[rows],
        )  # fmt: skip

    def ordered(self, asked: Asked, rules: list[dict[str, Any]] | Policy) -> NDArray[np.int64]:
        """[R, TOP] places of what is shown; -1: nothing."""
        policy = rules if isinstance(rules, Policy) else Policy.model_validate({"rules": rules})
        rerank = Rerank(self._rules, {"one": policy})
        shown = np.full((len(asked.rows), TOP), -1)
        for at in range(len(asked.rows)):
            header = np.zeros(1, HEADER)
            header["top_k"], header["moment"], header["seed"] = TOP, asked.moments[at], at
            header["min_price"], header["max_price"], header["scored"] = -np.inf, np.inf, 1
            handover = Handover(
                header, asked.rows[at : at + 1], asked.signals[at : at + 1] & ~Signal.DISLIKED.value,
                asked.retrieval[at : at + 1], np.zeros((1, 0), np.int64),
            )  # fmt: skip
            ids = rerank(asked.scores[at : at + 1], handover)["RANKED_IDS"][0]
            rows = self._features.catalogue.rows(ids[ids >= 0])
            order = np.argsort(asked.rows[at], kind="stable")
            shown[at, : len(rows)] = order[np.searchsorted(asked.rows[at], rows, sorter=order)]
        return shown

    def by_retrieval(self, asked: Asked) -> NDArray[np.int64]:
        """The order in which candidates came."""
        return np.tile(np.arange(TOP), (len(asked.rows), 1))


def at(asked: Asked, column: NDArray[Any], shown: NDArray[np.int64]) -> NDArray[np.float64]:
    """[R, TOP] a column of what is shown; NaN: nothing."""
    found = np.take_along_axis(column, np.maximum(shown, 0), 1).astype(np.float64)
    return np.where(shown >= 0, found, np.nan)


def ndcg(asked: Asked, shown: NDArray[np.int64]) -> NDArray[np.float64]:
    """[R] NDCG@10 with the labels as gains, as evaluation has it; NaN: nothing was chosen."""
    discount = 1 / np.log2(np.arange(2, TOP + 2))
    gained = np.nansum(at(asked, asked.labels, shown) * discount, 1)
    best = -np.sort(-np.where(asked.rows >= 0, asked.labels, 0), 1)[:, :TOP]
    ideal = (best * discount).sum(1)
    return np.where(ideal > 0, gained / np.maximum(ideal, 1e-9), np.nan)


def share_of_new(asked: Asked, shown: NDArray[np.int64]) -> NDArray[np.float64]:
    """[R] of what is shown."""
    return np.nanmean(at(asked, asked.new, shown), 1)


def categories(asked: Asked, shown: NDArray[np.int64]) -> NDArray[np.float64]:
    """[R] different ones among what is shown."""
    codes = at(asked, asked.codes, shown)
    return np.array([len(np.unique(row[~np.isnan(row)])) for row in codes], np.float64)


def clicks_on_new(asked: Asked, shown: NDArray[np.int64]) -> tuple[float, int]:
    """Click rate of the new items that are shown, and how many there are."""
    new, labels = at(asked, asked.new, shown) == 1, at(asked, asked.labels, shown)
    return float((labels[new] > 0).mean()), int(new.sum())


def interval(values: Callable[[NDArray[np.int64]], float], count: int) -> tuple[float, float, float]:
    """A value of all requests, and its 95 % interval over requests drawn anew."""
    rng = np.random.default_rng(0)
    drawn = [values(rng.integers(count, size=count)) for _ in range(SAMPLES)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return values(np.arange(count)), float(low), float(high)


def mean(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Of a column."""
    return interval(lambda which: float(np.nanmean(values[which])), len(values))


def ratio(ours: NDArray[np.float64], others: NDArray[np.float64]) -> tuple[float, float, float]:
    """Of two means, in pairs."""
    return interval(lambda which: float(np.nanmean(ours[which]) / np.nanmean(others[which])), len(ours))


STRENGTHS: dict[str, list[list[dict[str, Any]]]] = {
    "quota": [[{"rule": "quota", "different": n, "at_most": 4}] for n in range(2, 10)],
    "mmr": [[{"rule": "mmr", "diversity": d}] for d in (0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2)],
    "dpp": [[{"rule": "dpp", "diversity": d}] for d in (0.05, 0.06, 0.07, 0.08, 0.1, 0.12, 0.15, 0.2)],
    "cap": [[{"rule": "cap", "field": "category", "at_most": n, "window": 10}] for n in range(1, 9)],
}
"""Eight strengths each, from weak to strong about where a hundredth is lost."""
SHARES = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2)


def most_categories(bench: Bench, valid: Asked, test: Asked) -> list[Figure]:
    """Of each rule, and of chance: any other candidate drawn into the page."""
    base = {name: bench.ordered(asked, PLAIN) for name, asked in (("valid", valid), ("test", test))}
    plain = {name: ndcg(asked, base[name]) for name, asked in (("valid", valid), ("test", test))}
    found: list[Figure] = []
    candidates: dict[str, tuple[float, list[Figure]]] = {}
    for name, settings in STRENGTHS.items():
        orders = [(str(rules[0]), lambda asked, rules=rules: bench.ordered(asked, PLAIN + rules)) for rules in settings]
        figures, on_valid = chosen_setting(name, orders, valid, test, plain)
        found += figures
        candidates[name] = (on_valid, figures)
    orders = [(f"share {share}", lambda asked, share=share: shuffled(share)(bench, asked)) for share in SHARES]
    found += chosen_setting("chance", orders, valid, test, plain)[0]
    # The method, too, is chosen on validation.
    name, (_, (categories_of, kept)) = max(candidates.items(), key=lambda each: each[1][0])
    found.append(categories_of._replace(name="categories_at_1pct_loss", note=f"{name}: {categories_of.note}"))
    found.append(kept._replace(name="ndcg_kept_at_1pct_loss"))
    found.append(Figure("categories_plain", *mean(categories(test, base["test"])), "categories", "without such a rule"))
    return found


def shuffled(share: float) -> Callable[[Bench, Asked], NDArray[np.int64]]:
    """A control: each position takes, with some probability, any other candidate instead."""

    def draw(bench: Bench, asked: Asked) -> NDArray[np.int64]:
        rng, shown = np.random.default_rng(0), bench.ordered(asked, PLAIN)
        for row, places in zip(asked.rows, shown, strict=True):
            others = np.setdiff1d(np.flatnonzero(row >= 0), places)
            swap = np.flatnonzero((rng.random(TOP) < share) & (places >= 0))[: len(others)]
            places[swap] = rng.choice(others, len(swap), replace=False)
        return shown

    return draw


def chosen_setting(
    name: str,
    orders: list[tuple[str, Callable[[Asked], NDArray[np.int64]]]],
    valid: Asked,
    test: Asked,
    plain: dict[str, NDArray[np.float64]],
) -> tuple[list[Figure], float]:
    """The setting with the most categories on validation whose loss there is at most LOSS, measured on test; and its
    categories on validation."""
    best: tuple[float, str, Callable[[Asked], NDArray[np.int64]]] | None = None
    ends = {0: ", the weakest tried", len(orders) - 1: ", the strongest tried"}
    for number, (words, order) in enumerate(orders):
        shown = order(valid)
        loss = 1 - np.nanmean(ndcg(valid, shown)) / np.nanmean(plain["valid"])
        many = float(categories(valid, shown).mean())
        if loss <= LOSS and (best is None or many > best[0]):
            best = (many, words + ends.get(number, ""), order)
    if best is None:
        return [], 0.0
    shown = best[2](test)
    kept = ratio(ndcg(test, shown), plain["test"])
    return [
        Figure(f"categories_at_1pct_loss_{name}", *mean(categories(test, shown)), "categories", best[1]),
        Figure(f"ndcg_kept_{name}", *kept, "of plain", best[1]),
    ], best[0]


def main() -> None:
    """Write results/scenarios.json."""
    bench = Bench()
    valid, test = bench.asked("valid"), bench.asked("test")
    shipped = load_policies(SHIPPED)
    found: list[Figure] = []
    for name, pages in (("search", test.only(test.searches)), ("home", test.only(~test.searches))):
        ours, retrieval = bench.ordered(pages, shipped[name]), bench.by_retrieval(pages)
        found.append(Figure(f"ndcg10_{name}", *mean(ndcg(pages, ours)), "", f"{len(pages.rows):,} test requests"))
        found.append(Figure(f"ndcg10_{name}_retrieval", *mean(ndcg(pages, retrieval)), "", "the order they came in"))
        found.append(
            Figure(f"ndcg10_{name}_plain", *mean(ndcg(pages, bench.ordered(pages, PLAIN))), "", "deduplicated")
        )
    orders = {
        "new_items": bench.ordered(test, shipped["new_items"]),
        "plain": bench.ordered(test, PLAIN),
        "retrieval": bench.by_retrieval(test),
        "boost_alone": bench.ordered(test, [{"rule": "boost", "signals": ["NEW_ITEM"], "by": 1.0}, *PLAIN]),
    }
    for name, shown in orders.items():
        rate, count = clicks_on_new(test, shown)
        found += [
            Figure(f"new_share_{name}", *mean(share_of_new(test, shown)), "of the top 10", "younger than 14 days"),
            Figure(f"new_click_rate_{name}", rate, rate, rate, "clicks a showing", f"{count:,} showings"),
            Figure(f"new_ndcg10_{name}", *mean(ndcg(test, shown)), "", ""),
        ]
    shares = {name: share_of_new(test, shown) for name, shown in orders.items()}
    gain = ratio(shares["new_items"], shares["plain"])
    found.append(
        Figure("new_items_share_gain", *gain, "times", "new_items over plain, share of new items in the top 10")
    )
    kept = ratio(ndcg(test, orders["new_items"]), ndcg(test, orders["plain"]))
    found.append(Figure("new_items_ndcg_kept", *kept, "of plain", ""))
    pages = test.only(~test.searches)
    crossed = bench.ordered(pages, shipped["cross_category"])
    found.append(Figure("categories_cross_category", *mean(categories(pages, crossed)), "categories", "as shipped"))
    found.append(
        Figure(
            "cross_category_ndcg_kept",
            *ratio(ndcg(pages, crossed), ndcg(pages, bench.ordered(pages, PLAIN))),
            "of plain",
            "",
        )
    )
    found += most_categories(bench, valid.only(~valid.searches), pages)
    for figure in found:
        print(
            f"{figure.name:36} {figure.value:8.4f} [{figure.low:.4f}, {figure.high:.4f}] {figure.unit}  {figure.note}"
        )
    write("scenarios", found)


if __name__ == "__main__":
    main()
