"""Does training on feedback sell more, and does correcting for positions help?

    python benchmarks/closed_loop.py [bias]

`trirank simulate` three times with other seeds (other shops, customers and luck): a young shop, whose first release
is trained on 1,000 logged requests, and an older one with 4,000. Gains are of the last round, after three trainings,
against the first release on the same customers with the same luck; intervals are Student's over the shops. Then
rankers are trained on clicks of pages in retrieval's order, or the dearest first, with both corrections for positions
and without, and judged on customers who look at everything.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from results import ROOT, WORK, Figure, write
from scipy.stats import t as student
from trirank.contract import EventKind
from trirank_backend.stores.events import Event
from trirank_build.data.dataset import GAINS, TASKS, Dataset, Description
from trirank_build.evaluation.scoring import valid_ndcg
from trirank_build.features.examples import Examples
from trirank_build.online.datasets import with_feedback
from trirank_build.online.simulate import ARMS, NEVER, RETRIEVAL, Outcome, Settings, simulate, write_outcome
from trirank_build.preparation.sources.shop import BUY, DAYS, Shop, ShopSize, Visits
from trirank_build.recipe import load_recipe
from trirank_build.training.trainer import train

SEEDS, SESSIONS, ROUNDS, BIAS = (0, 1, 2), 3_000, 3, 1.0
YOUNG, OLDER = 1_000, 4_000
JUDGES, BIASED, SHOWN = 3_000, 15_000, 20
BIAS_SEEDS = (0, 1, 2, 3, 4)
CORRECTIONS: dict[str, dict[str, object]] = {
    "plain": {"training.position_bias": 0.0},
    "offset": {"training.position_bias": BIAS, "training.position_correction": "offset"},
    "weights": {"training.position_bias": BIAS, "training.position_correction": "weights"},
}
FOLDER = WORK / "closed_loop"


def run(log: int, seed: int) -> tuple[Outcome, Settings, Path]:
    """One simulation, from nothing."""
    folder, settings = FOLDER / f"{log}-{seed}", Settings(ROUNDS, SESSIONS, BIAS, log, seed=seed)
    shutil.rmtree(folder, ignore_errors=True)
    return simulate(load_recipe("shop"), folder, settings), settings, folder


def gain(outcomes: list[Outcome], against: str) -> tuple[float, float, float]:
    """By how much the loop sells more in the last round, the mean of the shops, and the 95 % interval of other shops'
    mean (Student's t: a handful of shops says little of how they spread)."""
    each = np.array([one.gain(against)[0] for one in outcomes])
    low, high = student.interval(0.95, len(each) - 1, each.mean(), each.std(ddof=1) / np.sqrt(len(each)))
    return float(each.mean()), float(low), float(high)


def gains(name: str, outcomes: list[Outcome], log: int) -> list[Figure]:
    """Of the last round."""
    each = ", ".join(f"{one.gain(NEVER)[0]:+.3f}" for one in outcomes)
    note = f"first release trained on {log:,} requests; {len(outcomes)} shops ({each}), {SESSIONS:,} customers a round"
    rates = [
        Figure(f"{name}_rate_{arm.split()[0]}_{number}", rate, rate, rate, "purchases a customer", f"round {number}")
        for arm in ARMS
        for number, rate in enumerate(np.mean([one.rates()[arm] for one in outcomes], axis=0).tolist())
    ]
    return [
        Figure(f"{name}_gain", *gain(outcomes, NEVER), "of the first release's", note),
        Figure(f"{name}_gain_over_retrieval", *gain(outcomes, RETRIEVAL), "of retrieval's order", note),
        *rates,
    ]


def corrected(seed: int, by_price: bool) -> dict[str, float]:
    """NDCG@10 among customers who look at everything, by how training corrected for positions.

    Args:
        by_price: whether the shop shows the dearest first, rather than retrieval's order.

    The log is of a shop whose order has little to do with what customers like: what stands first is looked at most.
    """
    shop = Shop(ShopSize(users=1_000, requests=500), seed)
    folder = FOLDER / f"bias-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    biased, base = shop.visits(BIASED, 1, DAYS, 30), shop.dataset()
    if by_price:
        prices = base.items["price"].to_numpy()[biased.items - 1]  # ids count from 1
        prices[:, SHOWN:] = -1
        biased = biased.reordered(np.argsort(-prices, axis=1, kind="stable"))
    rng = np.random.default_rng([seed, 2])
    looked = rng.random((BIASED, SHOWN)) < np.arange(1, SHOWN + 1) ** -BIAS
    labels = choices(biased, rng) * looked
    lines, events = [], []
    kinds = {gain: EventKind[name] for name, gain in GAINS.items() if name in ("CLICK", "CART", "PURCHASE")}
    for at in range(BIASED):
        items, user, moment = biased.items[at, :SHOWN].tolist(), int(biased.user[at]), int(biased.when[at])
        lines.append({
            "request_id": str(at), "moment": moment, "user_id": user, "query": biased.query[at], "scenario": "home",
            "item_ids": items, "retrieval_scores": biased.scores[at, :SHOWN].tolist(),
        })  # fmt: skip
        for place, item in enumerate(items):
            events.append(Event(f"{at}-{place}", user, item, 0, moment, str(at), place + 1))
            if gain := float(labels[at, place]):
                events.append(Event(f"{at}-{place}-c", user, item, kinds[gain], moment + 9, str(at), place + 1))
    dataset = Dataset.load(with_feedback(base, events, lines).save(folder / "data"))
    judges = judges_of(shop, dataset, seed)
    found = {}
    for name, changes in CORRECTIONS.items():
        trained = train(load_recipe("shop").changed({**changes, "seed": seed}), dataset, folder / f"run-{name}")
        found[name] = valid_ndcg(trained.model(), Examples.read(judges, "test", trained.features))
    return found


def judges_of(shop: Shop, dataset: Dataset, seed: int) -> Dataset:
    """Later customers, who look at all that is shown."""
    visits = shop.visits(JUDGES, 99, DAYS + 40, 7)
    labels = choices(visits, np.random.default_rng([seed, 3]))
    items, scores = visits.items[:, :SHOWN], visits.scores[:, :SHOWN]
    frame = pl.DataFrame(
        {
            "user_id": visits.user, "timestamp": visits.when, "query": visits.query, "scenario": "home",
            "item_ids": pl.Series(items).arr.to_list(), "retrieval_scores": pl.Series(scores).arr.to_list(),
            "labels": pl.Series(labels).arr.to_list(), "missed": pl.Series([[]] * JUDGES, dtype=pl.List(pl.Float32)),
            "split": "test",
        }
    )  # fmt: skip
    description = Description("judges", timed=True, tasks=TASKS, counts={}, cleaning=[])
    return Dataset(dataset.items, dataset.events, frame.lazy(), description)


def choices(visits: Visits, rng: np.random.Generator) -> NDArray[np.float32]:
    """[B, SHOWN] gains of what is chosen of all that is looked at."""
    shape = (len(visits.when), SHOWN)
    click = rng.random(shape) < visits.click[:, :SHOWN]
    cart = click & (rng.random(shape) < visits.cart[:, :SHOWN])
    buys = cart & (rng.random(shape) < BUY)
    gains = [GAINS["PURCHASE"], GAINS["CART"], GAINS["CLICK"]]
    return np.select([buys, cart, click], gains, 0.0).astype(np.float32)


def bias_figures() -> list[Figure]:
    """With each correction for positions, and without."""
    figures = []
    for kind, order in (("", "retrieval's order"), ("_by_price", "the order of their prices")):
        found = [corrected(seed, bool(kind)) for seed in BIAS_SEEDS]
        note = f"{len(BIAS_SEEDS)} shops and seeds; {BIASED:,} pages of {SHOWN} in {order}, {JUDGES:,} judges"
        values = {name: [one[name] for one in found] for name in CORRECTIONS}
        for name in ("offset", "weights"):
            values[f"{name}_difference"] = [one[name] - one["plain"] for one in found]
        figures += [
            Figure(f"position_bias{kind}_ndcg10_{name}", float(np.mean(each)), min(each), max(each), "", note)
            for name, each in values.items()
        ]
    return figures


def main() -> None:
    """Write results/closed_loop.json and the plot of the first young shop."""
    young = [run(YOUNG, seed) for seed in SEEDS]
    _, plot = write_outcome(*young[0])
    shutil.copyfile(plot, ROOT / "docs" / "closed_loop.svg")
    figures = gains("purchase_rate", [outcome for outcome, _, _ in young], YOUNG)
    figures += bias_figures()
    figures += gains("older_shop", [run(OLDER, seed)[0] for seed in SEEDS], OLDER)
    report(figures)


def report(figures: list[Figure], keep: bool = False) -> None:
    """Print and write; ``keep``: beside figures of other names."""
    for one in figures:
        print(f"{one.name:40} {one.value:8.4f} [{one.low:.4f}, {one.high:.4f}] {one.unit}  {one.note}")
    write("closed_loop", figures, keep)


if __name__ == "__main__":
    if sys.argv[1:] == ["bias"]:
        report(bias_figures(), keep=True)
    else:
        main()
