"""Train, validation and test, by time; nothing of a later part is known in an earlier one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import narwhals as nw
import polars as pl

from trirank_build.data.dataset import SPLITS

VALID_FROM, TEST_FROM = 0.8, 0.9
"""Shares of the time-ordered events at which validation and test begin."""
_ROUGHLY = 3_600


def split_by_time(events: nw.LazyFrame[Any], collect: Callable[[nw.LazyFrame[Any]], pl.DataFrame]) -> tuple[int, int]:
    """Timestamps at which validation and test begin; equal times never fall on both sides. They are found by counting:
    first by the hour, then within the hours in question.

    Args:
        collect: of the engine that holds the events.
    """
    hour = nw.col("timestamp") // _ROUGHLY
    by_hour = _counts(collect(_counted(events.select(place=hour))))
    last = int(by_hour["count"].sum()) - 1
    found = []
    for share in (VALID_FROM, TEST_FROM):
        wanted = int(share * last)
        within = by_hour.filter(pl.col("count").cum_sum() > wanted).row(0, named=True)
        before = int(by_hour.filter(pl.col("place") < within["place"])["count"].sum())
        inside = events.filter(hour == within["place"]).select(place=nw.col("timestamp"))
        seconds = _counts(collect(_counted(inside)))
        found.append(int(seconds.filter(pl.col("count").cum_sum() > wanted - before)["place"][0]))
    return found[0], found[1]


def _counted(places: nw.LazyFrame[Any]) -> nw.LazyFrame[Any]:
    return places.with_columns(one=nw.col("place")).group_by("place").agg(nw.col("one").count().alias("count"))


def _counts(counted: pl.DataFrame) -> pl.DataFrame:
    return counted.select(pl.col("place").cast(pl.Int64), pl.col("count").cast(pl.Int64)).sort("place")


def times_of(frame: pl.DataFrame) -> tuple[int, int]:
    """``split_by_time`` of the column ``timestamp`` of a table that is here."""
    return split_by_time(nw.from_native(frame.lazy()), lambda lazy: lazy.to_native().collect())


def time_split(valid_from: int, test_from: int, names: Sequence[str | int] = SPLITS) -> nw.Expr:
    """The ``split`` column of a timed table, under these names."""
    when, (train, valid, test) = nw.col("timestamp"), (nw.lit(name) for name in names)
    return (
        nw.when(when < valid_from)
        .then(train)
        .otherwise(nw.when(when < test_from).then(valid).otherwise(test))
        .alias("split")
    )


def with_split(frame: pl.DataFrame, valid_from: int, test_from: int) -> pl.DataFrame:
    """A table that is here, with the column ``split``."""
    return nw.from_native(frame).with_columns(time_split(valid_from, test_from)).to_native()


def leave_last_out(events: pl.DataFrame) -> pl.DataFrame:
    """The published protocol for sequences without times: a user's last event is the test, the one before it
    validation, the rest training. ``timestamp`` becomes the place in the user's sequence, from 1.

    Users with fewer than three events only train.
    """
    place = pl.int_range(1, pl.len() + 1).over("user_id")
    from_end = pl.len().over("user_id") - place
    long = pl.len().over("user_id") >= 3
    return events.with_columns(
        timestamp=place,
        split=pl.when(long & (from_end == 0))
        .then(pl.lit("test"))
        .when(long & (from_end == 1))
        .then(pl.lit("valid"))
        .otherwise(pl.lit("train")),
    )
