"""Does the ranker beat retrieval order, popularity and chance? On every data set, on requests it never saw.

    python benchmarks/ranking.py [shop beauty sports games home_depot]

Finished preparations and trainings in ``work/benchmarks`` are used again. The real data is looked for in
``../shared/data`` or in the folder that TRIRANK_DATA names.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from results import ROOT, WORK, Figure, write
from trirank_build.data.dataset import Dataset
from trirank_build.data.options import PrepareOptions
from trirank_build.data.prepare import prepare
from trirank_build.data.sources.judged_search import place_of
from trirank_build.evaluation.bootstrap import mean_interval
from trirank_build.evaluation.evaluate import evaluate
from trirank_build.features.examples import Examples
from trirank_build.recipe import load_recipe
from trirank_build.training.trainer import train

DATA = Path(os.environ.get("TRIRANK_DATA", ROOT.parent / "shared" / "data"))
UNTOUCHED_FROM = 0.9
SETS = {
    "shop": ("shop", "shop"),
    "beauty": (DATA / "amazon" / "Beauty.txt", "sequences"),
    "sports": (DATA / "amazon" / "Sports_and_Outdoors.txt", "sequences"),
    "games": (DATA / "amazon" / "Video_Games.txt", "sequences"),
    "home_depot": (DATA / "home_depot" / "search_relevance.csv.gz", "judged_search"),
}


def measure(name: str) -> list[Figure]:
    """Prepare, train, evaluate on the test split."""
    source, recipe = SETS[name]
    folder = WORK / "data" / name
    if not folder.is_dir():
        prepare(str(source), PrepareOptions()).save(folder)
    dataset = Dataset.load(folder)
    run = train(load_recipe(recipe), dataset, WORK / "runs" / name)
    examples = Examples.read(dataset, "test", run.features)
    found = evaluate(run.model(), examples, dataset)
    note = f"test split, {found.requests:,} requests; 95 % bootstrap interval"
    figures = [
        Figure(f"{name}_{ranking}_ndcg10", *row["NDCG@10"], "NDCG@10", note) for ranking, row in found.table.items()
    ]
    if name == "home_depot":
        # The text features were chosen when these queries alone were the test, the others of today's test were not.
        queries = examples.requests["query"].to_list()
        held_out = np.array([place_of(query, PrepareOptions().seed) >= UNTOUCHED_FROM for query in queries])
        above = mean_interval((found.ndcg10["ranker"] - found.ndcg10["retrieval"])[held_out])
        note = f"paired difference; the {held_out.sum()} test queries that no choice was made on"
        figures.append(Figure("home_depot_untouched_ndcg10_above_retrieval", *above, "NDCG@10", note))
    return figures + [
        Figure(f"{name}_ndcg10_above_{other}", *difference, "NDCG@10", "paired difference; " + note)
        for other, difference in found.differences.items()
    ]


if __name__ == "__main__":
    for name in sys.argv[1:] or SETS:
        figures = measure(name)
        write("ranking", figures, keep=True)
        for figure in figures:
            print(f"{figure.name:40} {figure.value:.4f}  [{figure.low:.4f}, {figure.high:.4f}]")
