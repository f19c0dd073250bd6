"""Cleaning rules for behaviour logs, each counted: rows in, rows out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import polars as pl

from trirank_build.errors import BadData

EARLIEST = 631_152_000  # 1990-01-01: what lies before is no time of an online shop
BOT_EVENTS_PER_MINUTE = 60
MAX_LOSS = 0.1


@dataclass
class Report:
    """What was made of the files, and what each rule did, in order.

    Attributes:
        rows: (rule, rows in, rows out).
        notes: how values were read, a line each.
        max_loss: largest share of values or rows that may be of no use before that is an error.
    """

    rows: list[tuple[str, int, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    max_loss: float = MAX_LOSS

    def note(self, line: str) -> None:
        """Say how something was read; once."""
        if line not in self.notes:
            self.notes.append(line)

    def unused(self, path: Path, columns: Sequence[str], used: Sequence[str]) -> None:
        """Say which columns of a file nobody looks at."""
        if ignored := [name for name in columns if name not in used]:
            self.note(f"{path.name}: columns that are not used: {', '.join(ignored)}")

    def read(self, name: str, text: pl.Series, found: pl.Series, advice: str) -> None:
        """Hold what was read of a column against what stands there: null in ``found`` alone is unreadable.

        Raises:
            BadData: more than ``max_loss`` of the values are.
        """
        bad = text.filter(found.is_null() & text.is_not_null())
        if len(bad):
            named = ", ".join(repr(example) for example in bad.unique(maintain_order=True).head(3))
            self.lost(f"unreadable {name}", text.len(), len(bad), f"such as {named}", advice)

    def lost(self, what: str, total: int, lost: int, examples: str, advice: str) -> None:
        """Count what is of no use.

        Raises:
            BadData: it is more than ``max_loss`` of all.
        """
        if not lost:
            return
        if lost > self.max_loss * total:
            raise BadData(
                f"{what}: {lost:,} of {total:,}, {examples}. That is more than {self.max_loss:.0%}: {advice}; to go on "
                "all the same, say --max-loss 1"
            )
        self.note(f"{what}: {lost:,} of {total:,}, {examples}")

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
    events = _complete(
        events, ["user_id", "item_id"], "user or item missing", "rows without user or item",
        "or with an id that is none", "look at the columns user_id and item_id of the log", report,
    )  # fmt: skip
    events = _complete(
        events, ["behaviour"], "unknown behaviour", "rows without a behaviour",
        "or with a word that was left out or is unknown", "look at the column behavior of the log", report,
    )  # fmt: skip
    if timed:
        events = _complete(
            events, ["timestamp"], "no timestamp", "rows without a timestamp", "or with one that cannot be read",
            "look at the column timestamp of the log, or leave it out of all rows", report,
        )  # fmt: skip
        _told_of_times(events["timestamp"], now, report)
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


def _complete(
    events: pl.DataFrame, columns: list[str], rule: str, what: str, which: str, advice: str, report: Report
) -> pl.DataFrame:
    """Drop rows that lack a value, counted as a rule and held against the largest loss."""
    kept = report.apply(rule, events, lambda frame: frame.drop_nulls(columns))
    report.lost(what, events.height, events.height - kept.height, which, advice)
    return kept


def _told_of_times(times: pl.Series, now: int, report: Report) -> None:
    known = times.drop_nulls()
    for what, bad, advice in (
        ("timestamps in the future", known.filter(known > now),
         f"it is {_date(now)} UTC now: look at the clock, the time zone and the unit of the log's times"),
        ("timestamps before 1990", known.filter(known < EARLIEST),
         "look at the unit of the log's times: seconds, milliseconds and microseconds are told apart by most of them"),
    ):  # fmt: skip
        if len(bad):
            report.lost(what, times.len(), len(bad), f"such as {bad[0]} ({_date(int(bad[0]))})", advice)


def _date(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return "no date at all"


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
