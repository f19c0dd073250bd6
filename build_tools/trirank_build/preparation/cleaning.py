"""Cleaning rules for behaviour logs, each counted: rows in, rows out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import polars as pl

from trirank_build.errors import BadData

EARLIEST = 631_152_000  # 1990-01-01: what lies before is no time of an online shop
BOT_EVENTS_PER_MINUTE = 60


@dataclass
class Report:
    """What each rule did, in order."""

    rows: list[tuple[str, int, int]] = field(default_factory=list)

    def apply(self, rule: str, frame: pl.DataFrame, clean: Callable[[pl.DataFrame], pl.DataFrame]) -> pl.DataFrame:
        """Run one rule and count."""
        after = clean(frame)
        self.rows.append((rule, frame.height, after.height))
        return after

    def filled(self, what: str, rows: int, missing: int) -> None:
        """Note values that were filled in; no row is lost."""
        if missing:
            self.rows.append((f"missing {what} filled ({missing:,} values)", rows, rows))


def clean_events(events: pl.DataFrame, *, timed: bool, now: int, report: Report, min_count: int) -> pl.DataFrame:
    """Clean user_id, item_id, behaviour, timestamp rows.

    Args:
        events: behaviour is a Behaviour code, null where the source's word is unknown.
        now: seconds since 1970; later timestamps are impossible.
        min_count: k of the k-core; every user and every item left has at least so many events. 1: off.

    Raises:
        BadData: nothing is left.
    """
    events = report.apply("user or item missing", events, lambda frame: frame.drop_nulls(["user_id", "item_id"]))
    events = report.apply("unknown behaviour", events, lambda frame: frame.drop_nulls("behaviour"))
    if timed:
        events = report.apply(
            "impossible timestamp", events, lambda f: f.filter(pl.col("timestamp").is_between(EARLIEST, now))
        )
    # Without timestamps two equal rows are two events; with them they are one event logged twice.
    if timed:
        events = report.apply("exact duplicate", events, lambda f: f.unique(maintain_order=True))
        events = report.apply(f"bot (over {BOT_EVENTS_PER_MINUTE} events a minute)", events, _without_bots)
    if min_count > 1:
        events = report.apply(f"{min_count}-core", events, lambda frame: _k_core(frame, min_count))
    if events.is_empty():
        steps = "; ".join(f"{rule}: {before:,} → {after:,}" for rule, before, after in report.rows)
        raise BadData(f"no item is left after cleaning ({steps}); check the columns' meaning, or lower --min-count")
    return events


def _without_bots(events: pl.DataFrame) -> pl.DataFrame:
    rate = events.group_by("user_id", pl.col("timestamp") // 60).len()
    bots = rate.filter(pl.col("len") > BOT_EVENTS_PER_MINUTE).select("user_id").unique()
    return events.join(bots, on="user_id", how="anti", maintain_order="left")


def _k_core(events: pl.DataFrame, k: int) -> pl.DataFrame:
    """The largest part in which every user and every item has at least ``k`` events."""
    while True:
        enough = (pl.len().over("user_id") >= k) & (pl.len().over("item_id") >= k)
        kept = events.filter(enough)
        if kept.height == events.height:
            return kept
        events = kept
