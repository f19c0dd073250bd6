"""What privacy costs: reading a user of a sealed store, ranking quality of an anonymised dataset and of training with
differential privacy, and what the latter keeps an attacker from.

    python benchmarks/privacy.py [--rounds N] [--only sealed|anonymised|differential|attack]

Sealed: the same users in a plain and in a sealed store, read in turns, so that whatever else goes on hits both.
Anonymised: the demo's shop, smaller, of three seeds; one recipe trained on the dataset and on the same without names,
rare items and rare queries. Both are judged by the same requests of the plain dataset's test split, from which nothing
was chosen.

Differential: the recipe `shop_private` at several epsilons, and `shop`, the same ranker in its usual training with as
many epochs as validation finds good, on the same shops; judged by the test split. Epochs, batch and rate of
`shop_private` were chosen on validation of the first shop; those of `shop` are as shipped. Retrieval's order is what no
training gives.

Attack: whether a user was in the training split, told from the ranker (membership inference). Users of a shop are
members, others, or the attacker's own; a ranker is trained on the members alone. Loss: that of a user's requests, which
is lower for members (Yeom et al. 2018). Calibrated: less that of a ranker which the attacker trained on their own users
(Watson et al. 2022), as usual or with noise, whichever tells more. The area under the curve is 0.5 where nothing can be
told; beside it how many members are found where one in a hundred others is taken for one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from results import ROOT, WORK, Figure, write

sys.path[:0] = [str(ROOT / "tests")]
from scipy.stats import mannwhitneyu  # noqa: E402
from stores import running_redis  # noqa: E402
from trirank.contract import ANONYMOUS_USER  # noqa: E402
from trirank_backend.histories import Events  # noqa: E402
from trirank_backend.master_keys import add_master_key  # noqa: E402
from trirank_backend.stores.store import open_store  # noqa: E402
from trirank_build.compression.step import packed  # noqa: E402
from trirank_build.data.dataset import Dataset  # noqa: E402
from trirank_build.evaluation.scoring import retrieval_ndcg, valid_ndcg  # noqa: E402
from trirank_build.features.examples import Examples  # noqa: E402
from trirank_build.preparation.sources.shop import ShopSize, make_shop  # noqa: E402
from trirank_build.privacy.anonymise import NOTE, Anonymiser  # noqa: E402
from trirank_build.recipe import load_recipe  # noqa: E402
from trirank_build.training.ranking import RankingStep  # noqa: E402
from trirank_build.training.run import TrainedRun  # noqa: E402
from trirank_build.training.trainer import train  # noqa: E402

SHOP = ShopSize(products=1_500, users=10_000, requests=40_000)
EPSILONS = (1.0, 8.0)
USUAL = {"training.epochs": 15, "training.patience": 2}
NOISY = {"training.batch_size": 256, "training.privacy.epsilon": 8.0}
USERS, READS, SIZES = 200, 400, (50, 1_000)
SHOPS = 3


def sealed(rounds: int) -> list[Figure]:
    """Milliseconds to read one user's past of 50 and of 1,000 events."""
    figures = []
    with tempfile.TemporaryDirectory() as scratch, running_redis(Path(scratch)) as address:
        keys = Path(scratch, "keys.toml")
        add_master_key(keys, "only")
        for kind, places in (
            ("sqlite", (f"sqlite:{scratch}/plain", f"sqlite:{scratch}/sealed")),
            ("redis", (address, address.replace("/0", "/1"))),
        ):
            stores = [open_store(place, keys=said) for place, said in zip(places, ("", str(keys)), strict=True)]
            for size in SIZES:
                rng = np.random.default_rng(size)
                pasts = [
                    (user, Events(rng.integers(1, 10**6, size), np.full(size, 2, np.int32), np.arange(size) + 10**9))
                    for user in range(size, size + USERS)
                ]
                times: list[list[float]] = [[], []]
                for store in stores:
                    store.put(pasts)
                for number in range(rounds * READS):
                    for at in (0, 1) if number % 2 else (1, 0):
                        began = time.perf_counter()
                        stores[at].get([pasts[number % USERS][0]])
                        times[at].append(1e3 * (time.perf_counter() - began))
                parts = [np.array(each).reshape(rounds, READS) for each in times]
                for name, part in zip(("plain", "sealed"), parts, strict=True):
                    medians = np.median(part, axis=1)
                    figures.append(
                        Figure(
                            f"{name}_read_{size}_ms_{kind}", float(np.median(medians)), float(medians.min()),
                            float(medians.max()), "ms", f"a past of {size} events, median of {READS} reads",
                        )
                    )  # fmt: skip
            for store in stores:
                store.close()
    for figure in figures:
        print(f"{figure.name}: {figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]", flush=True)
    return figures


def anonymised(rounds: int) -> list[Figure]:
    """NDCG@10 of a ranker trained on an anonymised dataset, over that of one trained on the dataset as it is."""
    shares, dropped = [], []
    recipe = load_recipe("shop")
    for seed in range(SHOPS):
        with tempfile.TemporaryDirectory(dir=WORK) as scratch:
            plain = make_shop(ShopSize(products=1_500, users=1_500, requests=20_000), seed)
            less = Anonymiser(bytes(32), k=5).apply(plain)
            found = []
            for name, dataset in (("plain", plain), ("less", less)):
                run = train(recipe.model_copy(update={"seed": seed}), dataset, Path(scratch, name))
                test = Examples.read(plain, "test", run.features)
                found.append(valid_ndcg(run.model(), test))
            shares.append(found[1] / found[0])
            done = less.description.notes[NOTE]
            dropped.append(1 - less.requests.collect().height / plain.requests.collect().height)
            print(f"shop {seed}: {found[0]:.4f} as it is, {found[1]:.4f} anonymised; {done}", flush=True)
    note = f"{SHOPS} shops, k = 5, days for times; {100 * statistics.mean(dropped):.0f} % of the requests left out"
    return [Figure("anonymised_ndcg_share", statistics.median(shares), min(shares), max(shares), "", note)]


def differential(rounds: int) -> list[Figure]:
    """NDCG@10 on the test split by epsilon, over that without privacy."""
    found: dict[str, list[float]] = {"retrieval": [], **{f"eps_{epsilon:g}": [] for epsilon in EPSILONS}}
    for seed in range(SHOPS):
        with tempfile.TemporaryDirectory(dir=WORK) as scratch:
            dataset = make_shop(SHOP, seed)
            run = train(load_recipe("shop").changed({"seed": seed, **USUAL}), dataset, Path(scratch, "plain"))
            test = Examples.read(dataset, "test", run.features)
            plain = valid_ndcg(run.model(), test)
            found["retrieval"].append(retrieval_ndcg(test) / plain)
            print(f"shop {seed}: {plain:.4f} as usual, {retrieval_ndcg(test):.4f} in retrieval's order", flush=True)
            for epsilon in EPSILONS:
                recipe = load_recipe("shop_private").changed({"seed": seed, "training.privacy.epsilon": epsilon})
                run = train(recipe, dataset, Path(scratch, f"{epsilon:g}"))
                score = valid_ndcg(run.model(), Examples.read(dataset, "test", run.features))
                found[f"eps_{epsilon:g}"].append(score / plain)
                print(f"shop {seed}: {score:.4f} at {run.facts['privacy']}", flush=True)
    note = f"NDCG@10 over that of the usual training; {SHOPS} shops of {SHOP.users:,} users, test split"
    return [
        Figure(f"ndcg_at_{name}_share", statistics.median(shares), min(shares), max(shares), "", note)
        for name, shares in found.items()
    ]


def attack(rounds: int) -> list[Figure]:
    """Area under the curve of telling members from others."""
    found: dict[str, list[float]] = {}
    for seed in range(SHOPS):
        with tempfile.TemporaryDirectory(dir=WORK) as scratch:
            whole = make_shop(SHOP, seed)
            users = whole.split("train").filter(pl.col("user_id") != ANONYMOUS_USER)["user_id"].unique().sort()
            third = np.random.default_rng(seed).integers(0, 3, len(users))
            parts = [of_users(whole, users.filter(pl.Series(third == at))) for at in range(3)]
            everybody = of_users(whole, users)
            runs = {
                name: train(load_recipe(recipe).changed({"seed": seed, **changes}), parts[part], Path(scratch, name))
                for name, recipe, part, changes in (
                    ("plain", "shop", 0, USUAL), ("eps_8", "shop_private", 0, NOISY),
                    ("own", "shop", 2, USUAL), ("own_noisy", "shop_private", 2, NOISY),
                )
            }  # fmt: skip
            losses = {name: losses_of(run, everybody, users.to_numpy()) for name, run in runs.items()}
            told = (third < 2) & np.isfinite(losses["plain"])
            for name in ("plain", "eps_8"):
                for how, scores in (
                    ("loss", -losses[name]),
                    ("calibrated", losses["own"] - losses[name]),
                    ("noisy", losses["own_noisy"] - losses[name]),
                ):
                    members, others = scores[told & (third == 0)], scores[told & (third == 1)]
                    area = float(mannwhitneyu(members, others).statistic / (len(members) * len(others)))
                    few = float((members > np.quantile(others, 0.99)).mean())
                    found.setdefault(f"attack_auc_{name}_{how}", []).append(area)
                    found.setdefault(f"attack_found_{name}_{how}", []).append(few)
                    print(f"shop {seed}: {name}, {how}: {area:.4f}, {few:.4f} of {told.sum()} users", flush=True)
    note = f"{SHOPS} shops, of {SHOP.users:,} users a third are members"
    figures = [
        Figure(name, statistics.median(areas), min(areas), max(areas), "", note) for name, areas in found.items()
    ]
    for what in ("auc", "found"):  # the best attack, by which a reader may be attacked
        for name in ("plain", "eps_8"):
            tried = [figure for figure in figures if figure.name.startswith(f"attack_{what}_{name}_")]
            best = max(tried, key=lambda figure: figure.value)
            how = f"{note}; the best of {len(tried)} attacks, {best.name.split('_')[-1]}"
            figures.append(best._replace(name=f"attack_{what}_{name}", note=how))
    return figures


def of_users(dataset: Dataset, users: pl.Series) -> Dataset:
    """A dataset whose training split is of these users alone; the other splits stay."""
    keep = (pl.col("split") != "train") | pl.col("user_id").is_in(users.implode())
    return replace(dataset, events=dataset.events.filter(keep), requests=dataset.requests.filter(keep))


def losses_of(run: TrainedRun, dataset: Dataset, users: NDArray[np.int64]) -> NDArray[np.float64]:
    """[U] the mean loss of each user's training requests, NaN without one."""
    examples = Examples.read(dataset, "train", run.features)
    tasks = {task: dataset.description.tasks[task] for task in examples.tasks}
    step = RankingStep(run.model(), run.recipe.training, tasks).eval()
    teaching = np.flatnonzero((examples.labels > 0).any(1))

    def of_one(request: dict[str, torch.Tensor]) -> torch.Tensor:
        return step(**{name: tensor[None] for name, tensor in request.items()})

    with torch.no_grad():
        parts = [teaching[at : at + 256] for at in range(0, len(teaching), 256)]
        found = torch.cat([torch.func.vmap(of_one)(packed(examples, part, run.recipe.training)) for part in parts])
    number = np.searchsorted(users, examples.users[teaching])
    count = np.bincount(number, minlength=len(users))
    with np.errstate(invalid="ignore"):
        return np.bincount(number, found.numpy(), len(users)) / np.where(count, count, np.nan)


PARTS = {part.__name__: part for part in (sealed, anonymised, differential, attack)}


def main() -> None:
    """Measure and write ``results/privacy.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=list(PARTS))
    given = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    for name in [given.only] if given.only else PARTS:
        write("privacy", PARTS[name](given.rounds), keep=True)


if __name__ == "__main__":
    main()
