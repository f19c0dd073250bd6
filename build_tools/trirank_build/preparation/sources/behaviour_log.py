"""Logs of the shape of ``user_behavior.csv``: user_id, item_id, behavior[, timestamp, query, …], one event a row."""

from __future__ import annotations

import time
from pathlib import Path

import polars as pl
from trirank.contract import Behaviour

from trirank_build.data.dataset import GAINS, TASKS, Dataset, Description
from trirank_build.errors import BadData
from trirank_build.preparation.candidates import requests_from_events
from trirank_build.preparation.cleaning import Report, clean_events
from trirank_build.preparation.options import PrepareOptions
from trirank_build.preparation.sources.catalogue_table import complete, read_items
from trirank_build.preparation.sources.tables import read_table, require, to_ids
from trirank_build.preparation.splitting import leave_last_out, split_by_time, time_split

COLUMNS = ("user_id", "item_id", "behavior")
SYNONYMS = {
    "behaviour": "behavior", "behavior_type": "behavior", "behaviour_type": "behavior", "event_type": "behavior",
    "event": "behavior", "visitorid": "user_id", "user": "user_id", "itemid": "item_id", "item": "item_id",
    "product_id": "item_id", "ts": "timestamp", "time": "timestamp", "event_time": "timestamp",
}  # fmt: skip
BEHAVIOURS = {
    "view": Behaviour.VIEW, "impression": Behaviour.VIEW, "pv": Behaviour.CLICK, "click": Behaviour.CLICK,
    "1": Behaviour.CLICK, "fav": Behaviour.FAVOURITE, "favourite": Behaviour.FAVOURITE,
    "favorite": Behaviour.FAVOURITE, "like": Behaviour.FAVOURITE, "2": Behaviour.FAVOURITE, "cart": Behaviour.CART,
    "addtocart": Behaviour.CART, "add_to_cart": Behaviour.CART, "3": Behaviour.CART, "buy": Behaviour.PURCHASE,
    "purchase": Behaviour.PURCHASE, "transaction": Behaviour.PURCHASE, "order": Behaviour.PURCHASE,
    "4": Behaviour.PURCHASE,
}  # fmt: skip
"""Words (and Alibaba's numbers) for what a user did. Where nothing but views is logged, a view counts as a click."""
QUERY_REACH_S = 1800
"""An event belongs to the user's last query if it came within half an hour."""


def prepare_behaviour_log(path: Path, options: PrepareOptions) -> Dataset:
    """Read, clean, split, and retrieve candidates.

    Raises:
        BadData: columns are missing, or nothing is left after cleaning.
    """
    table = read_table(path)
    table = table.rename({c: c.strip().lower() for c in table.columns})
    renames = {old: new for old, new in SYNONYMS.items() if old in table.columns and new not in table.columns}
    table = table.rename(renames)
    require(table, path, COLUMNS)
    timed = "timestamp" in table.columns
    report = Report()
    words = table["behavior"].cast(pl.String).str.strip_chars().str.to_lowercase()
    events = table.select(
        to_ids(table["user_id"]),
        to_ids(table["item_id"]),
        words.replace_strict(
            list(BEHAVIOURS), [b.value for b in BEHAVIOURS.values()], default=None, return_dtype=pl.Int8
        ).alias("behaviour"),
        _seconds(table["timestamp"]) if timed else pl.lit(0, pl.Int64).alias("timestamp"),
        pl.col("query").fill_null("").cast(pl.String) if "query" in table.columns else pl.lit("").alias("query"),
    )
    if "query" in table.columns:
        report.filled("queries", events.height, table["query"].null_count())
    events = clean_events(events, timed=timed, now=int(time.time()), report=report, min_count=options.min_count)
    return dataset_from_events(events, options, source=str(path.name), timed=timed, report=report)


def dataset_from_events(
    events: pl.DataFrame, options: PrepareOptions, *, source: str, timed: bool, report: Report
) -> Dataset:
    """Split clean events, complete the catalogue, retrieve candidates. Shared by all kinds of logs."""
    if options.queries is not None:
        if not timed:
            raise BadData("a query file needs timestamps in the log, to know which events a query led to")
        events = _with_queries(events, options.queries)
    events = events.sort("timestamp", maintain_order=True)
    boundaries = split_by_time(events["timestamp"])
    events = events.with_columns(time_split(*boundaries)) if timed else leave_last_out(events)
    if events["split"].n_unique() < 3:
        raise BadData(
            f"{source} cannot be split: {events.height:,} events give only "
            f"{', '.join(sorted(events['split'].unique()))}; it needs more events over time, or users with 3 or more"
        )
    if events["behaviour"].max() == Behaviour.VIEW.value:
        events = events.with_columns(behaviour=pl.lit(Behaviour.CLICK.value, pl.Int8))
    items = _items(events, options, report)
    gains = {Behaviour[name].value: gain for name, gain in GAINS.items()}
    events = events.with_columns(
        gain=pl.col("behaviour").replace_strict(list(gains), list(gains.values()), return_dtype=pl.Float32)
    )
    requests = requests_from_events(
        events,
        items,
        exclude_history=not timed,
        max_train=options.max_train,
        max_eval=options.max_eval,
        seed=options.seed,
    )
    if set(requests["split"].unique()) != {"train", "valid", "test"}:
        raise BadData(f"{source} leaves no ranking task in some split; it needs users with several events each")
    tops = set(events["gain"].unique().to_list())
    tasks = {task: least for task, least in TASKS.items() if any(gain == least for gain in tops)}
    if not tasks:
        raise BadData(f"{source} has no click, cart or purchase to learn from")
    return Dataset(
        items=items,
        events=events,
        requests=requests.lazy(),
        description=Description(
            source=source,
            timed=timed,
            tasks=tasks,
            counts={
                "items": items.height,
                "users": events["user_id"].n_unique(),
                "events": events.height,
                "requests": requests.height,
            },
            cleaning=report.rows,
        ),
    )


def _seconds(column: pl.Series) -> pl.Series:
    """Seconds since 1970 from seconds, milliseconds, or dates; null where it is none of them."""
    if column.dtype.is_temporal():
        return column.cast(pl.Datetime("ms")).dt.epoch("s").alias("timestamp")
    text = column.cast(pl.String).str.strip_chars()
    numbers = text.cast(pl.Float64, strict=False)
    if numbers.null_count() == numbers.len():
        return text.str.to_datetime(strict=False).dt.epoch("s").alias("timestamp")
    milliseconds = float(str(numbers.median())) > 1e11
    return (numbers / 1000 if milliseconds else numbers).cast(pl.Int64, strict=False).alias("timestamp")


def _with_queries(events: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Give each event the user's last query of the half hour before it."""
    table = read_table(path)
    require(table, path, ("user_id", "query", "timestamp"))
    queries = table.select(
        to_ids(table["user_id"]), _seconds(table["timestamp"]), pl.col("query").alias("searched")
    ).drop_nulls()
    joined = events.sort("timestamp", maintain_order=True).join_asof(
        queries.sort("timestamp"),
        on="timestamp",
        by="user_id",
        tolerance=QUERY_REACH_S,
        check_sortedness=False,
    )
    return joined.with_columns(query=pl.coalesce("searched", "query")).drop("searched")


def _items(events: pl.DataFrame, options: PrepareOptions, report: Report) -> pl.DataFrame:
    seen = events.select("item_id").unique()
    if options.items is None:
        return complete(seen)
    given = read_items(options.items)
    items = complete(seen.join(given, on="item_id", how="left"))
    report.rows.append(("items of the log found in the item file", items.height, seen.join(given, on="item_id").height))
    for name in ("title", "brand", "category"):
        if name in given.columns:
            report.filled(name, items.height, int((items[name] == "").sum()))
    if "price" in given.columns:
        report.filled("price", items.height, int(items["price"].is_nan().sum()))
    return items
