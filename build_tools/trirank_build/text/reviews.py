"""Reviews → what an item's customers think of it: two columns of the catalogue."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from trirank_build.data.dataset import REVIEWS, SENTIMENT, Dataset
from trirank_build.errors import BadData, BadUsage
from trirank_build.preparation.cleaning import MAX_LOSS, Report
from trirank_build.preparation.sources.catalogue_table import NAMES_OF_ID
from trirank_build.preparation.sources.tables import read_table, require
from trirank_build.preparation.values import seconds, to_ids
from trirank_build.text.corpus import SENTIMENT as WORDS
from trirank_build.text.corpus import text_column
from trirank_build.text.model import TextModel

PRIOR = 5.0
"""Reviews of the usual kind that every item is taken to have besides: a single review says little."""
JUDGED = ("positive", "sentiment")
TIMES = ("timestamp", "time", "date", "written_at", "created_at")


def with_reviews(
    dataset: Dataset,
    path: Path,
    model: TextModel | None = None,
    *,
    text: str | None = None,
    encoding: str | None = None,
    max_loss: float = MAX_LOSS,
) -> Dataset:
    """The dataset, whose items know the share of their reviews that are positive, and how many there are.

    Args:
        path: a table with ``item_id`` and a review a row; with one of TIMES, those after training's end are left out,
            since they would tell of the future.
        model: a classifier of sentiments; None: the table says itself, in ``positive``.
        text: its column of texts.
        max_loss: largest share of reviews that may be of no use.

    Raises:
        BadData: a column is missing, or no review is of an item of the dataset.
        BadUsage: the classifier is of something else.
    """
    report = Report(max_loss=max_loss)
    table = read_table(path, report, encoding)
    if "item_id" not in table.columns:
        other = next((name for name in NAMES_OF_ID if name in table.columns), None)
        table = table if other is None else table.rename({other: "item_id"})
    require(table, path, ("item_id",))
    if dataset.description.timed:
        table = _of_training(table, dataset, report)
    if model is None:
        column = next((name for name in JUDGED if name in table.columns), None)
        if column is None:
            raise BadData(
                f"{path} has the columns {', '.join(table.columns)}; none says whether a review is positive. Train a "
                "classifier with `trirank text train sentiment`, and name it with --text-model"
            )
        said = table[column].cast(pl.String).str.strip_chars().str.to_lowercase()
        positive = said.replace_strict(WORDS, default=None).replace_strict(
            {"positive": 1.0, "negative": 0.0}, default=None, return_dtype=pl.Float64
        )
    else:
        if "positive" not in model.classes:
            raise BadUsage(f"--text-model tells {', '.join(model.classes[:8])}; reviews want one of sentiments")
        there, found = model.of_column(table[text_column(table, path, text)])
        shares: list[float | None] = [None] * table.height
        for at, share in zip(there.tolist(), found[:, model.classes.index("positive")].tolist(), strict=True):
            shares[at] = share
        positive = pl.Series(shares, dtype=pl.Float64)
    ids = to_ids(table["item_id"], dataset.description.ids["item"])  # type: ignore[arg-type]
    judged = pl.DataFrame({"item_id": ids, "positive": positive})
    whole = judged.drop_nulls()
    report.lost(
        "reviews without item or judgement", judged.height, judged.height - whole.height, "or with one that is none",
        "look at the column item_id, and at the texts",
    )  # fmt: skip
    known = whole.filter(pl.col("item_id").is_in(dataset.items["item_id"].implode()))
    if known.is_empty():
        raise BadData(
            f"none of the {judged.height:,} reviews of {path} is of one of the {dataset.items.height:,} items; look at "
            "its column item_id"
        )
    usual = float(np.mean(known["positive"].to_numpy()))
    found_of = known.group_by("item_id").agg(
        ((pl.col("positive").sum() + PRIOR * usual) / (pl.len() + PRIOR)).alias(SENTIMENT),
        pl.len().cast(pl.Int64).alias(REVIEWS),
    )
    items = dataset.items.drop(SENTIMENT, REVIEWS, strict=False).join(found_of, on="item_id", how="left")
    items = items.with_columns(pl.col(SENTIMENT).fill_null(0.0), pl.col(REVIEWS).fill_null(0)).sort("item_id")
    description = dataset.description
    told = f"{path.name}: {known.height:,} reviews of {found_of.height:,} items, {usual:.0%} of them positive"
    if known.height < whole.height:
        told += f"; {whole.height - known.height:,} are of other items"
    notes = description.notes | {"read": [*description.notes.get("read", []), *report.notes, told]}
    counts = description.counts | {"reviews": known.height}
    return replace(dataset, items=items, description=replace(description, notes=notes, counts=counts))


def _of_training(table: pl.DataFrame, dataset: Dataset, report: Report) -> pl.DataFrame:
    """Without what was written when validation had begun, where the table says when."""
    column = next((name for name in TIMES if name in table.columns), None)
    judged = dataset.requests.filter(pl.col("split") != "train").select(pl.col("timestamp").min()).collect().item()
    if column is None:
        report.note(f"no column says when reviews were written ({', '.join(TIMES)}): all of them are taken for known")
        return table
    if judged is None:
        return table
    written = seconds(table[column], report)
    unknown, late = int(written.is_null().sum()), int((written >= judged).sum())
    if unknown:
        report.note(f"{unknown:,} reviews do not say when they were written, and are left out")
    if late:
        report.note(f"{late:,} reviews were written after training's end, and are left out")
    return table.filter((written < judged).fill_null(False))
