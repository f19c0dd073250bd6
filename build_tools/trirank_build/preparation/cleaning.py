"""Cleaning rules for behaviour logs, each counted: rows in, rows out.

What looks at one row is done where a part of a log is read. What looks at all rows is written in narwhals, and runs on
polars or on a cluster (preparation.engines).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import narwhals as nw
import polars as pl

from trirank_build.errors import BadData

Frame = nw.LazyFrame[Any]
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
    part: bool = False
    """Whether it is of a part of a log: what is of no use is then judged with that of the others, in ``add``."""
    odd: list[tuple[str, int, int, str]] = field(default_factory=list)
    """(item or user, ids, ids that are no plain numbers where the log's first part had none, an example)."""
    losses: list[tuple[str, int, int, str, str]] = field(default_factory=list)
    """(what, total, lost, examples, advice) of a part; ``rows`` and ``notes`` are as for the whole."""

    def of_a_part(self) -> Report:
        """An empty report for a part of what this one is about."""
        return Report(max_loss=self.max_loss, part=True)

    def add(self, parts: Sequence[Report]) -> None:
        """Take in what was told of all parts: rules and losses of one name are added up.

        Raises:
            BadData: more than ``max_loss`` of the values is of no use.
        """
        rows: dict[str, tuple[int, int]] = {}
        losses: dict[str, tuple[int, int, str, str]] = {}
        for part in parts:
            for line in part.notes:
                self.note(line)
            for rule, before, after in part.rows:
                old = rows.get(rule, (0, 0))
                rows[rule] = old[0] + before, old[1] + after
            for what, total, lost, examples, advice in part.losses:
                first = losses.get(what, (0, 0, "", ""))
                losses[what] = first[0] + total, first[1] + lost, first[2] or examples, first[3] or advice
        for what in ("user", "item"):
            found = [each for part in parts for each in part.odd if each[0] == what]
            if number := sum(each[2] for each in found):
                example = next(each[3] for each in found if each[2])
                total = sum(each[1] for each in found)
                raise BadData(
                    f"{number:,} of {total:,} {what} ids are no plain numbers, such as {example!r}, though the log "
                    f"begins with numbers; say --{what}-ids strings to take all of them as text (callers then send "
                    f"strings), or --{what}-ids numbers to leave those out"
                )
        self.rows += [(rule, before, after) for rule, (before, after) in rows.items()]
        for what, (total, lost, examples, advice) in losses.items():
            self.lost(what, total, lost, examples, advice)

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
        named = ", ".join(repr(example) for example in bad.unique(maintain_order=True).head(3))
        self.lost(f"unreadable {name}", text.len(), len(bad), f"such as {named}" if named else "", advice)

    def lost(self, what: str, total: int, lost: int, examples: str, advice: str) -> None:
        """Count what is of no use.

        Raises:
            BadData: it is more than ``max_loss`` of all.
        """
        if self.part:
            self.losses.append((what, total, lost, examples if lost else "", advice if lost else ""))
            return
        if not lost:
            return
        if lost > self.max_loss * total:
            raise BadData(
                f"{what}: {lost:,} of {total:,}, {examples}. That is more than {self.max_loss:.0%}: {advice}; to go on "
                "all the same, say --max-loss 1"
            )
        self.note(f"{what}: {lost:,} of {total:,}, {examples}")

    def apply(self, rule: str, frame: pl.DataFrame, clean: Callable[[pl.DataFrame], pl.DataFrame]) -> pl.DataFrame:
        """Run a rule that looks at one row, and count."""
        after = clean(frame)
        self.rows.append((rule, frame.height, after.height))
        return after

    def filled(self, what: str, rows: int, missing: int) -> None:
        """Note values that were filled in; no row is lost."""
        if missing:
            self.rows.append((f"missing {what} filled ({missing:,} values)", rows, rows))


def complete_events(events: pl.DataFrame, *, timed: bool, now: int, report: Report) -> pl.DataFrame:
    """The rules that look at one row: of user_id, item_id, behaviour, timestamp rows those where all is known.

    Args:
        events: behaviour is a Behaviour code, null where the source's word is unknown.
        now: seconds since 1970; later timestamps are impossible.

    Raises:
        BadData: too many are of no use.
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
    return events


class Keeps(Protocol):
    """What runs the rules (preparation.engines)."""

    def keep(self, frame: Frame) -> Frame:
        """The same, calculated now, so that what is made of it twice is calculated once."""
        ...

    def together(self, frame: Frame, column: str, rule: Callable[[Frame], Frame]) -> Frame:
        """What ``rule`` leaves of the rows; it may look at all rows of one value of the column together, and at no
        others."""
        ...

    def collect(self, frame: Frame) -> pl.DataFrame:
        """The rows, in this process."""
        ...


def clean_events(events: Frame, engine: Keeps, *, timed: bool, report: Report, min_count: int) -> Frame:
    """The rules that look at all rows, of complete events.

    Args:
        events: user_id, item_id, behaviour, timestamp, query, and place, which orders all events of a log.
        min_count: k of the k-core; every user and every item left has at least so many events. 1: off.

    Raises:
        BadData: nothing is left.
    """
    events = engine.keep(events)
    count = _count(events, engine)

    def apply(rule: str, clean: Callable[[Frame], Frame]) -> None:
        nonlocal events, count
        before, events = count, engine.keep(engine.together(events, "user_id", clean))
        count = _count(events, engine)
        report.rows.append((rule, before, count))

    # Without timestamps two equal rows are two events; with them they are one event logged twice.
    if timed:
        apply("exact duplicate", _without_duplicates)
        apply(f"bot (over {BOT_EVENTS_PER_MINUTE} events a minute)", _without_bots)
    if min_count > 1:
        begun = count
        while True:
            before = count
            for column in ("user_id", "item_id"):
                often = partial(_often, column=column, least=min_count)
                events = engine.keep(engine.together(events, column, often))
            count = _count(events, engine)
            if count == before:
                break
        report.rows.append((f"{min_count}-core", begun, count))
    if not count:
        steps = "; ".join(f"{rule}: {before:,} → {after:,}" for rule, before, after in report.rows)
        raise BadData(f"no item is left after cleaning ({steps}); check the columns' meaning, or lower --min-count")
    return events


def _count(events: Frame, engine: Keeps) -> int:
    return int(engine.collect(events.select(nw.col("place").count())).item())


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
        such = f"such as {bad[0]} ({_date(int(bad[0]))})" if len(bad) else ""
        report.lost(what, times.len(), len(bad), such, advice)


def _date(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return "no date at all"


def _without_duplicates(events: Frame) -> Frame:
    same = [name for name in events.collect_schema().names() if name != "place"]
    return events.group_by(*same).agg(nw.col("place").min())


def _without_bots(events: Frame) -> Frame:
    minutes = events.with_columns(minute=nw.col("timestamp") // 60).group_by("user_id", "minute")
    rate = minutes.agg(nw.col("place").count().alias("events"))
    bots = rate.filter(nw.col("events") > BOT_EVENTS_PER_MINUTE).select("user_id").unique(subset=["user_id"])
    return events.join(bots, on="user_id", how="anti")


def _often(events: Frame, column: str, least: int) -> Frame:
    counts = events.group_by(column).agg(nw.col("place").count().alias("events"))
    return events.join(counts.filter(nw.col("events") >= least).select(column), on=column, how="inner")
