"""How often an item was chosen in training."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from trirank_build.data.dataset import Dataset


def choices(dataset: Dataset) -> NDArray[np.int64]:
    """[M] interactions of each item in the training split; all 0 for judged search, which has none."""
    return _count(dataset, dataset.events.filter(pl.col("split") == "train"))


def popularity(dataset: Dataset) -> NDArray[np.int64]:
    """[M] as ``choices``; for judged search how often an item was put before the judges of the training queries."""
    if dataset.events.is_empty():
        return _count(dataset, dataset.split("train").select(pl.col("item_ids").explode().alias("item_id")))
    return choices(dataset)


def _count(dataset: Dataset, events: pl.DataFrame) -> NDArray[np.int64]:
    counted = events.group_by("item_id").len()
    joined = dataset.items.select("item_id").join(counted, on="item_id", how="left", maintain_order="left")
    return joined["len"].fill_null(0).to_numpy().astype(np.int64)
