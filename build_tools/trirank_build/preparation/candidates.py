"""Ranking tasks for logs that record choices but not what was shown: candidates come from retrieval.

Retrieval is fitted on training events only. For a training task it is fitted without that user (one of FOLDS
parts), because a similarity that has seen the very pair it is asked to find would teach the ranker to trust it
more than it deserves at serving time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from trirank_build.data.dataset import REQUESTS
from trirank_build.features.runs import run_begins
from trirank_build.progress import progress
from trirank_build.retrieval.item_knn import ItemKnn

CANDIDATES = 100
FOLDS = 4
_HISTORY = 50


def requests_from_events(
    events: pl.DataFrame,
    items: pl.DataFrame,
    *,
    exclude_history: bool,
    max_train: int,
    max_eval: int,
    seed: int,
) -> pl.DataFrame:
    """One task an event that has something before it: rank what the user chose next.

    Args:
        events: user_id, item_id, gain, timestamp, split, and query where there are any; in each user's order. With a
            column ``fresh`` those alone become tasks of which it is true.
        exclude_history: leave out what the user has had (where nothing is chosen twice).
        max_train, max_eval: tasks to keep of each split, drawn at random; the newest of a user have no priority.
    """
    # Columns one by one in the order of users: a sorted table would be all of it once more.
    order = events.select(pl.arg_sort_by("user_id", "timestamp", maintain_order=True)).to_series()
    ids = items["item_id"].to_numpy()
    row = np.searchsorted(ids, events["item_id"].to_numpy()).astype(np.int32)[order.to_numpy()]
    of, times = (events[name].gather(order).to_numpy() for name in ("user_id", "timestamp"))
    begins = run_begins(of)
    user = (np.cumsum(begins) - 1).astype(np.int32)
    first = np.flatnonzero(begins)
    # Events of one moment do not know of each other: known is what lies before the first event of the same moment.
    begins |= run_begins(times)
    before = np.maximum.accumulate(np.where(begins, np.arange(len(of)), 0))
    del of, times, begins

    rng = np.random.default_rng(seed)
    able = (before > first[user]) & (events["gain"].gather(order) > 0).to_numpy()
    if "fresh" in events.columns:
        able &= events["fresh"].gather(order).to_numpy()
    chosen = []
    for name, limit in (("train", max_train), ("valid", max_eval), ("test", max_eval)):
        eligible = np.flatnonzero((events["split"] == name).gather(order).to_numpy() & able)
        chosen.append(np.sort(rng.permutation(eligible)[:limit]))

    train = (events["split"] == "train").gather(order).to_numpy()
    fold_of_user = rng.integers(FOLDS, size=len(first))
    at, learning = np.concatenate(chosen), len(chosen[0])
    of, begin, end, place = user[at], first[user[at]], before[at], order.gather(at)
    del before, able, order  # as long as the log, and fitting needs the room
    parts: list[pl.DataFrame] = []
    with progress() as bar:
        task = bar.add_task("retrieving candidates", total=len(at))
        for fold in range(FOLDS + 1):
            if fold < FOLDS:
                wanted = np.flatnonzero(fold_of_user[of[:learning]] == fold)
                fitted_on = train & (fold_of_user[user] != fold)
            else:
                wanted, fitted_on = np.arange(learning, len(at)), train
            if not len(wanted):
                continue
            knn = ItemKnn(user[fitted_on], row[fitted_on], len(first), len(ids))
            histories = _histories(row, begin[wanted], end[wanted])
            start = 0
            for top, scores in knn.retrieve(histories, min(CANDIDATES, len(ids)), exclude_history):
                these = wanted[start : start + len(top)]
                picked = events[place.gather(these)]
                parts.append(_tasks(picked, ids, row[at[these]], top, scores, force_positive=fold < FOLDS))
                start += len(top)
                bar.advance(task, len(top))
    if not parts:
        return pl.DataFrame(schema=REQUESTS)
    return pl.concat(parts).sort("timestamp", "user_id", maintain_order=True)


def _histories(row: NDArray[np.int32], first: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int32]:
    """[B, L] item rows of the events in [first, end), newest last, -1 in front."""
    at = end[:, None] - np.arange(_HISTORY, 0, -1)[None, :]
    return np.where(at >= first[:, None], row[np.maximum(at, 0)], -1).astype(np.int32)


def _tasks(
    picked: pl.DataFrame,
    ids: NDArray[np.int64],
    chosen: NDArray[np.int32],
    top: NDArray[np.int64],
    scores: NDArray[np.float32],
    force_positive: bool,
) -> pl.DataFrame:
    gain = picked["gain"].to_numpy()
    hit = top == chosen[:, None]  # [B, K]
    missed = ~hit.any(1)
    if force_positive:
        # Training needs the choice among the candidates; its score stays unknown rather than invented.
        top[missed, -1] = chosen[missed]
        scores[missed, -1] = np.nan
        hit[missed, -1] = True
        missed[:] = False
    labels = np.where(hit, gain[:, None], 0).astype(np.float32)
    lists: dict[str, NDArray[Any]] = {"item_ids": ids[top], "retrieval_scores": scores, "labels": labels}
    # -inf marks what the history excludes; a catalogue barely larger than the list may not offer enough else.
    kept = ~np.isneginf(scores)
    if "query" not in picked.columns:
        picked = picked.with_columns(query=pl.lit(""))
    return picked.select("user_id", "timestamp", "query", "split").with_columns(
        *(_list_column(name, values, kept) for name, values in lists.items()),
        scenario=pl.when(pl.col("query") == "").then(pl.lit("home")).otherwise(pl.lit("search")),
        missed=pl.Series([[g] if m else [] for g, m in zip(gain, missed, strict=True)], dtype=pl.List(pl.Float32)),
    )


def _list_column(name: str, values: NDArray[Any], kept: NDArray[np.bool_]) -> pl.Series:
    if kept.all():
        return pl.Series(name, values).arr.to_list()
    return pl.Series(name, [row[keep].tolist() for row, keep in zip(values, kept, strict=True)])
