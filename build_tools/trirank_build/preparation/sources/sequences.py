"""Interactions without times, in order: a user's sequence a line (``user item item …``), or a pair a line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import polars as pl
from trirank.contract import Behaviour

from trirank_build.data.dataset import Dataset
from trirank_build.errors import BadData
from trirank_build.preparation.cleaning import complete_events
from trirank_build.preparation.engines import clean_here
from trirank_build.preparation.options import PrepareOptions
from trirank_build.preparation.sources.behaviour_log import dataset_from_events
from trirank_build.preparation.sources.catalogue_table import open_items
from trirank_build.preparation.sources.tables import read_text
from trirank_build.preparation.values import to_ids

_LINE = re.compile(r"\d+(\s+\d+)+\s*$")


def looks_like_sequences(head: str) -> bool:
    """Whether the first line is numbers and spaces alone."""
    return bool(_LINE.match(head))


def prepare_sequences(path: Path, options: PrepareOptions) -> Dataset:
    """Read, clean, split by leaving the last one out, and retrieve candidates.

    An attribute file of the same name (``X_item2attributes.json`` beside ``X.txt``) is used unless another is given.

    Raises:
        BadData: a line is something else, or nothing is left after cleaning.
    """
    report = options.report()
    lines = pl.Series("line", read_text(path, report, options.encoding).splitlines()).str.strip_chars()
    lines = lines.filter(lines != "")
    good = lines.str.contains(_LINE.pattern)
    if not good.all():
        at = int(str((~good).arg_max()))
        raise BadData(
            f"{path}, row {at + 1} is {lines[at][:60]!r}; each is `user item` or `user item item …` in numbers"
        )
    parts = lines.str.replace_all(r"\s+", " ").str.split(" ")
    table = pl.DataFrame({"user_id": parts.list.first(), "item_id": parts.list.slice(1)}).explode("item_id")
    events = table.select(
        to_ids(table["user_id"], "numbers"),
        to_ids(table["item_id"], "numbers"),
        pl.lit(Behaviour.PURCHASE.value, pl.Int8).alias("behaviour"),
        pl.lit(0, pl.Int64).alias("timestamp"),
        pl.lit("").alias("query"),
    )
    events = complete_events(events, timed=False, now=0, report=report)
    events = clean_here(events, timed=False, report=report, min_count=options.min_count)
    sibling = path.with_name(f"{path.stem}_item2attributes.json")
    if options.items is None and sibling.is_file():
        options = replace(options, items=sibling)
    given = None if options.items is None else open_items(options.items, options, report)
    return dataset_from_events(
        events, options, source=path.name, timed=False, report=report, given=given,
        kinds={"item": "numbers", "user": "numbers"},
    )  # fmt: skip
