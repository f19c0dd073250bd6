"""Train, validation and test, by time; nothing of a later part is known in an earlier one."""

from __future__ import annotations

import polars as pl

VALID_FROM, TEST_FROM = 0.8, 0.9
"""Shares of the time-ordered events at which validation and test begin."""


def split_by_time(timestamps: pl.Series) -> tuple[int, int]:
    """Timestamps at which validation and test begin; equal times never fall on both sides."""
    ordered = timestamps.sort()
    last = len(ordered) - 1
    return int(ordered[int(VALID_FROM * last)]), int(ordered[int(TEST_FROM * last)])


def time_split(valid_from: int, test_from: int) -> pl.Expr:
    """The ``split`` column of a timed table."""
    when = pl.col("timestamp")
    return (
        pl.when(when < valid_from)
        .then(pl.lit("train"))
        .when(when < test_from)
        .then(pl.lit("valid"))
        .otherwise(pl.lit("test"))
        .alias("split")
    )


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
