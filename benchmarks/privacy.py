"""What privacy costs: reading a user of a sealed store, and ranking quality of an anonymised dataset.

    python benchmarks/privacy.py [--rounds N] [--only sealed|anonymised]

Sealed: the same users in a plain and in a sealed store, read in turns, so that whatever else goes on hits both.
Anonymised: the demo's shop, smaller, of three seeds; one recipe trained on the dataset and on the same without names,
rare items and rare queries. Both are judged by the same requests of the plain dataset's test split, from which nothing
was chosen.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from results import ROOT, WORK, Figure, write

sys.path[:0] = [str(ROOT / "tests")]
from stores import running_redis  # noqa: E402
from trirank_backend.histories import Events  # noqa: E402
from trirank_backend.stores.sealing import add_master_key  # noqa: E402
from trirank_backend.stores.store import open_store  # noqa: E402
from trirank_build.evaluation.scoring import valid_ndcg  # noqa: E402
from trirank_build.features.examples import Examples  # noqa: E402
from trirank_build.preparation.sources.shop import ShopSize, make_shop  # noqa: E402
from trirank_build.privacy.anonymise import NOTE, Anonymiser  # noqa: E402
from trirank_build.recipe import load_recipe  # noqa: E402
from trirank_build.training.trainer import train  # noqa: E402

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


PARTS = {part.__name__: part for part in (sealed, anonymised)}


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
