"""Does training on feedback sell more, and does correcting for positions help?

    python benchmarks/closed_loop.py

`trirank simulate` three times with other seeds (other shops, customers and luck): a young shop, whose first release
is trained on 1,000 logged requests, and an older one with 4,000. Gains are of the last round, after three trainings,
against the first release on the same customers with the same luck; intervals from shops drawn anew, and customers
within each, in pairs. Then the young shop's last dataset is trained on again with and without weights for positions,
and both rankers are judged on customers who looked at everything.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
from results import ROOT, WORK, Figure, write
from trirank_build.data.dataset import GAINS, TASKS, Dataset, Description
from trirank_build.evaluation.scoring import valid_ndcg
from trirank_build.features.examples import Examples
from trirank_build.online.simulate import ARMS, LOOP, NEVER, RETRIEVAL, Outcome, Settings, simulate, write_outcome
from trirank_build.preparation.sources.shop import BUY, DAYS, Shop, ShopSize
from trirank_build.recipe import load_recipe
from trirank_build.training.trainer import train

SEEDS, SESSIONS, ROUNDS, BIAS = (0, 1, 2), 3_000, 3, 1.0
YOUNG, OLDER = 1_000, 4_000
JUDGES = 3_000
FOLDER = WORK / "closed_loop"


def run(log: int, seed: int) -> tuple[Outcome, Settings, Path]:
    """One simulation, from nothing."""
    folder, settings = FOLDER / f"{log}-{seed}", Settings(ROUNDS, SESSIONS, BIAS, log, seed=seed)
    shutil.rmtree(folder, ignore_errors=True)
    return simulate(load_recipe("shop"), folder, settings), settings, folder


def gain(outcomes: list[Outcome], against: str) -> tuple[float, float, float]:
    """By how much the loop sells more in the last round, all shops together, and the 95 % interval: shops drawn anew,
    and customers within each, in pairs."""
    rng = np.random.default_rng(0)
    ours, others = (np.stack([each.purchases[arm][-1] for each in outcomes]) for arm in (LOOP, against))
    drawn = []
    for _ in range(2_000):
        shops = rng.integers(len(outcomes), size=len(outcomes))[:, None]
        customers = rng.integers(SESSIONS, size=(len(outcomes), SESSIONS))
        drawn.append(ours[shops, customers].mean() / others[shops, customers].mean() - 1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(ours.mean() / others.mean() - 1), float(low), float(high)


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


def judged(folder: Path, settings: Settings, seed: int) -> dict[float, float]:
    """NDCG@10 among customers who look at everything, by the exponent that training corrected with."""
    shop = Shop(ShopSize(settings.products, settings.users, settings.log, 50), settings.seed)
    visits = shop.visits(JUDGES, 99, DAYS + (ROUNDS + 1) * 7, 7)
    rng = np.random.default_rng(seed)
    click = rng.random(visits.items.shape) < visits.click
    cart = click & (rng.random(visits.items.shape) < visits.cart)
    buys = cart & (rng.random(visits.items.shape) < BUY)
    labels = np.select([buys, cart, click], [GAINS["PURCHASE"], GAINS["CART"], GAINS["CLICK"]], 0.0).astype(np.float32)
    dataset = Dataset.load(folder / f"data-{ROUNDS}")
    frame = pl.DataFrame(
        {
            "user_id": visits.user, "timestamp": visits.when, "query": visits.query, "scenario": "home",
            "item_ids": pl.Series(visits.items).arr.to_list(),
            "retrieval_scores": pl.Series(visits.scores).arr.to_list(),
            "labels": pl.Series(labels).arr.to_list(), "missed": pl.Series([[]] * JUDGES, dtype=pl.List(pl.Float32)),
            "split": "test",
        }
    )  # fmt: skip
    description = Description("judges", timed=True, tasks=TASKS, counts={}, cleaning=[])
    judges = Dataset(dataset.items, dataset.events, frame.lazy(), description)
    found = {}
    for bias in (0.0, settings.bias):
        target = folder / f"judged-{seed}-{bias}"
        recipe = load_recipe("shop").changed({"training.position_bias": bias, "seed": seed})
        trained = train(recipe, dataset, target, fresh=True)
        found[bias] = valid_ndcg(trained.model(), Examples.read(judges, "test", trained.features))
    return found


def main() -> None:
    """Write results/closed_loop.json and the plot of the first young shop."""
    young = [run(YOUNG, seed) for seed in SEEDS]
    _, plot = write_outcome(*young[0])
    shutil.copyfile(plot, ROOT / "docs" / "closed_loop.svg")
    figures = gains("purchase_rate", [outcome for outcome, _, _ in young], YOUNG)
    corrected, plain = [], []
    for (_, settings, folder), seed in zip(young, SEEDS, strict=True):
        found = judged(folder, settings, seed)
        plain.append(found[0.0])
        corrected.append(found[BIAS])
    differences = [one - other for one, other in zip(corrected, plain, strict=True)]
    for name, values in (("plain", plain), ("corrected", corrected), ("difference", differences)):
        note = f"{len(SEEDS)} shops and seeds, {JUDGES:,} customers who look at everything"
        figures.append(
            Figure(f"position_bias_ndcg10_{name}", float(np.mean(values)), min(values), max(values), "", note)
        )
    figures += gains("older_shop", [run(OLDER, seed)[0] for seed in SEEDS], OLDER)
    for figure in figures:
        print(
            f"{figure.name:40} {figure.value:8.4f} [{figure.low:.4f}, {figure.high:.4f}] {figure.unit}  {figure.note}"
        )
    write("closed_loop", figures)


if __name__ == "__main__":
    main()
