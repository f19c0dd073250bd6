"""Logs of the shape of ``user_behavior.csv``: user_id, item_id, behavior[, timestamp, query, …], one event a row."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import narwhals as nw
import polars as pl
from trirank.contract import Behaviour

from trirank_build.data.dataset import GAINS, SPLIT, SPLITS, TASKS, Dataset, Description
from trirank_build.errors import BadData
from trirank_build.preparation.candidates import requests_from_events
from trirank_build.preparation.cleaning import Report, clean_events, complete_events
from trirank_build.preparation.engines import PolarsEngine, Table, clean_here, engine_of
from trirank_build.preparation.options import PrepareOptions
from trirank_build.preparation.parts import local, parts_of
from trirank_build.preparation.sources.catalogue_table import complete, open_items, read_items
from trirank_build.preparation.sources.tables import read_table, read_tables, require
from trirank_build.preparation.splitting import leave_last_out, split_by_time, time_split
from trirank_build.preparation.values import IdKind, behaviours, id_text, kind_of_ids, seconds, to_ids

COLUMNS = ("user_id", "item_id", "behavior")
SYNONYMS = {
    "behaviour": "behavior", "behavior_type": "behavior", "behaviour_type": "behavior", "event_type": "behavior",
    "event": "behavior", "visitorid": "user_id", "user": "user_id", "itemid": "item_id", "item": "item_id",
    "product_id": "item_id", "ts": "timestamp", "time": "timestamp", "event_time": "timestamp",
}  # fmt: skip
HEAD = 1_000_000
"""Rows of a log's first file by which it is told what its ids are."""
_PLACES = 40
"""Bits of an event's place within its file."""
VIEWS_ARE_CLICKS = "views_are_clicks"
"""In a dataset's notes: nothing but views was logged, and they count as clicks."""
_WANTED = frozenset({*COLUMNS, *SYNONYMS, "timestamp", "query"})
QUERY_REACH_S = 1800
"""An event belongs to the user's last query if it came within half an hour."""


def prepare_behaviour_log(source: str, options: PrepareOptions) -> Dataset:
    """Read, clean, split, and retrieve candidates.

    Args:
        source: a file, a folder of files, a pattern, or an address of these (preparation.parts).

    Raises:
        BadData: columns are missing, or nothing is left after cleaning.
    """
    cleaned = clean_source(source, options)
    return dataset_from_events(
        cleaned.events, options, source=Path(source).name, timed=cleaned.timed, report=cleaned.report,
        kinds=cleaned.kinds, given=cleaned.given, names=cleaned.names,
    )  # fmt: skip


@dataclass(frozen=True)
class Cleaned:
    """A log that was read and cleaned.

    Attributes:
        events: user_id, item_id, behaviour, timestamp, query where the log has any, split where it has times; in the
            log's order.
        kinds: what the ids of items and users are.
        given: an opened item file.
        names: item_id and key of items whose ids are text.
    """

    events: pl.DataFrame
    timed: bool
    kinds: dict[str, IdKind]
    given: pl.DataFrame | None
    names: pl.DataFrame
    report: Report


def clean_source(source: str, options: PrepareOptions) -> Cleaned:
    """Read and clean a log by the engine of the options.

    Raises:
        BadData: see prepare_behaviour_log.
    """
    report, parts = options.report(), parts_of(source)
    head = _head(parts, options)
    given = None if options.items is None else open_items(options.items, options, report)
    timed = "timestamp" in head.columns
    with engine_of(options.engine) as engine:
        if not timed and not isinstance(engine, PolarsEngine):
            raise BadData(f"{source} has no timestamps, so its order is that of its rows, which a cluster does not "
                          "keep; prepare it without --engine")  # fmt: skip
        reader = LogReader(options, kinds_of(head, given, options, report), timed)
        read, names, told = engine.read(parts, reader)
        report.add(told)
        kept = clean_events(read, engine, timed=timed, report=report, min_count=options.min_count)
        if timed:
            # As numbers on the way: a word is 16 bytes an event.
            numbered = time_split(*split_by_time(kept, engine.collect), range(len(SPLITS))).cast(nw.Int8)
            kept = kept.with_columns(numbered)
        if "query" not in head.columns:
            kept = kept.drop("query")
        events = engine.collect(kept).sort("place").drop("place")
        if timed:
            events = events.with_columns(pl.col("split").replace_strict(dict(enumerate(SPLITS)), return_dtype=SPLIT))
    return Cleaned(events, timed, reader.kinds, given, names, report)


def _head(parts: list[str], options: PrepareOptions) -> pl.DataFrame:
    """The first rows of the first part that has any."""
    for number, part in enumerate(parts):
        with local(part) as path:
            head = open_log(path, options, Report(), rows=HEAD)
            if not head.is_empty() or number == len(parts) - 1:
                require(head, path, COLUMNS, some=True)
                return head
    raise BadData("a log has a file")


@dataclass(frozen=True)
class LogReader:
    """Reads the parts of a log, wherever the engine runs it; see engines.Reader.

    Attributes:
        kinds: what the ids of items and users are, as the log's first part tells.
        timed: whether it has timestamps.
    """

    options: PrepareOptions
    kinds: dict[str, IdKind]
    timed: bool

    def __call__(self, address: str, number: int) -> Iterator[Table]:
        """The tables of a part, number ``number`` of the log."""
        place = number << _PLACES
        with local(address) as path:
            for table in tables(path, self.options, report := self.options.report().of_a_part()):
                if ("timestamp" in table.columns) != self.timed:
                    has = "no" if self.timed else "a"
                    raise BadData(f"{address} has {has} column timestamp, unlike the first file of the log; give files "
                                  "of one kind")  # fmt: skip
                if table.is_empty():  # as engines write parts to which nothing fell
                    continue
                events = read_events(table, self.kinds, self.options, report)
                events = events.with_columns(place=pl.int_range(place, place + events.height, dtype=pl.Int64))
                place += events.height
                kind = self.kinds["item"]
                named = table["item_id"] if kind == "strings" else table["item_id"].clear()  # a number is its own name
                yield Table(events, names_of(named, kind), report)
                report = self.options.report().of_a_part()


def open_log(path: Path, options: PrepareOptions, report: Report, rows: int | None = None) -> pl.DataFrame:
    """A log as it stands there, or the first ``rows`` of it, its columns under the names that are used here.

    Raises:
        BadData: it cannot be read, or a column is missing.
    """
    return _named(read_table(path, report, options.encoding, rows), path, report)


def tables(path: Path, options: PrepareOptions, report: Report) -> Iterator[pl.DataFrame]:
    """The same, of a large file a piece at a time."""
    for table in read_tables(path, report, options.encoding, _WANTED):
        yield _named(table, path, report)


def _named(table: pl.DataFrame, path: Path, report: Report) -> pl.DataFrame:
    for other, name in SYNONYMS.items():
        if other in table.columns and name not in table.columns:
            table = table.rename({other: name})
    require(table, path, COLUMNS, some=False)
    report.unused(path, table.columns, (*COLUMNS, "timestamp", "query"))
    return table.select(name for name in (*COLUMNS, "timestamp", "query") if name in table.columns)


def kinds_of(
    table: pl.DataFrame, given: pl.DataFrame | None, options: PrepareOptions, report: Report
) -> dict[str, IdKind]:
    """What the ids of items and users are, in the log and in the item file alike."""
    items = [table["item_id"], *([] if given is None else [given["item_id"]])]
    return {
        "item": kind_of_ids("item", items, options.item_ids, report),
        "user": kind_of_ids("user", [table["user_id"]], options.user_ids, report),
    }


def read_events(table: pl.DataFrame, kinds: dict[str, IdKind], options: PrepareOptions, report: Report) -> pl.DataFrame:
    """The events of an opened log that are complete: user_id, item_id, behaviour, timestamp, query.

    Raises:
        BadData: too many values cannot be read.
    """
    timed = "timestamp" in table.columns
    found = [to_ids(table["user_id"], kinds["user"]), to_ids(table["item_id"], kinds["item"])]
    for what, asked, ids in zip(("user", "item"), (options.user_ids, options.item_ids), found, strict=True):
        if report.part and asked is None and kinds[what] == "numbers":
            report.odd.append((what, *_odd(table[f"{what}_id"], ids)))
    left_out = [word for word, meaning in options.behaviours.items() if meaning is None]
    columns = pl.DataFrame([*found, behaviours(table["behavior"], options.behaviours, report)]).with_columns(
        seconds(table["timestamp"], report) if timed else pl.lit(0, pl.Int64).alias("timestamp"),
        table["query"].fill_null("").cast(pl.String).alias("query") if "query" in table.columns
        else pl.lit("").alias("query"),
    )  # fmt: skip
    if left_out:
        words = table["behavior"].cast(pl.String).str.strip_chars().str.to_lowercase().fill_null("")
        columns = report.apply("behaviours to be left out", columns, lambda f: f.filter(~words.is_in(left_out)))
    if "query" in table.columns:
        report.filled("queries", columns.height, table["query"].null_count())
    return complete_events(columns, timed=timed, now=int(time.time()), report=report)


def _odd(column: pl.Series, ids: pl.Series) -> tuple[int, int, str]:
    """How many ids there are, how many of them are no numbers, and one of these."""
    if column.dtype.is_integer() and ids.null_count() == column.null_count():
        return len(column) - column.null_count(), 0, ""
    text = id_text(column)
    odd = text.filter(ids.is_null() & text.is_not_null())
    return len(text) - text.null_count(), len(odd), str(odd[0]) if len(odd) else ""


def clean_log(table: pl.DataFrame, kinds: dict[str, IdKind], options: PrepareOptions, report: Report) -> pl.DataFrame:
    """The events of an opened log that can be used.

    Raises:
        BadData: too many values cannot be read, or nothing is left.
    """
    events = read_events(table, kinds, options, report)
    return clean_here(events, timed="timestamp" in table.columns, report=report, min_count=options.min_count)


def dataset_from_events(
    events: pl.DataFrame,
    options: PrepareOptions,
    *,
    source: str,
    timed: bool,
    report: Report,
    kinds: dict[str, IdKind],
    given: pl.DataFrame | None,
    names: pl.DataFrame | None = None,
) -> Dataset:
    """Complete the catalogue of clean events, retrieve candidates. Shared by all kinds of logs.

    Args:
        events: in the log's order; with ``split`` where they are timed.
        kinds: what the ids of items and users are.
        given: an opened item file.
        names: item_id and key, what the log calls its items; None: as their numbers.
    """
    if options.queries is not None and not timed:
        raise BadData("a query file needs timestamps in the log, to know which events a query led to")
    events = with_searches(events, options, kinds, report)
    if not events["timestamp"].is_sorted():
        events = events.sort("timestamp", maintain_order=True)
    if not timed:
        events = leave_last_out(events)
    if events["split"].n_unique() < 3:
        raise BadData(
            f"{source} cannot be split: {events.height:,} events give only "
            f"{', '.join(sorted(events['split'].unique()))}; it needs more events over time, or users with 3 or more"
        )
    only_views = bool(events["behaviour"].max() == Behaviour.VIEW.value)
    if only_views:
        events = as_clicks(events)
    items = _items(events, given, kinds, report, names)
    events = with_gains(events)
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
    tasks = tasks_of(events)
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
            ids=dict(kinds),
            notes={"read": report.notes, **({VIEWS_ARE_CLICKS: True} if only_views else {})},
        ),
    )


def as_clicks(events: pl.DataFrame) -> pl.DataFrame:
    """Views as clicks, where nothing but views is logged."""
    click = pl.lit(Behaviour.CLICK.value, pl.Int8)
    view = pl.col("behaviour") == Behaviour.VIEW.value
    return events.with_columns(behaviour=pl.when(view).then(click).otherwise("behaviour"))


def tasks_of(events: pl.DataFrame) -> dict[str, float]:
    """Tasks that events with gains have successes of: the least gain of each."""
    there = set(events["gain"].unique().to_list())
    return {task: least for task, least in TASKS.items() if any(gain == least for gain in there)}


def with_gains(events: pl.DataFrame) -> pl.DataFrame:
    """Events with the column ``gain``: what each was worth."""
    gains = {Behaviour[name].value: gain for name, gain in GAINS.items()}
    return events.with_columns(
        gain=pl.col("behaviour").replace_strict(list(gains), list(gains.values()), return_dtype=pl.Float32)
    )


def with_searches(
    events: pl.DataFrame, options: PrepareOptions, kinds: dict[str, IdKind], report: Report
) -> pl.DataFrame:
    """Give each event the user's last query of the half hour before it, where there is a query file."""
    if options.queries is None:
        return events
    queries = read_queries(open_queries(options.queries, options, report), kinds, report)
    joined = events.sort("timestamp", maintain_order=True).join_asof(
        queries.sort("timestamp"),
        on="timestamp",
        by="user_id",
        tolerance=QUERY_REACH_S,
        check_sortedness=False,
    )
    led = int(joined["searched"].is_not_null().sum())
    if not led:
        raise BadData(
            f"no event of the log comes within {QUERY_REACH_S // 60} minutes after a query of its user in "
            f"{options.queries}; do users and times of the two files belong together?"
        )
    report.note(f"{options.queries.name}: {led:,} of {joined.height:,} events follow a query")
    own = pl.col("query") if "query" in joined.columns else pl.lit("")
    return joined.with_columns(query=pl.coalesce("searched", own)).drop("searched")


def open_queries(path: Path, options: PrepareOptions, report: Report) -> pl.DataFrame:
    """A query file as it stands there."""
    table = read_table(path, report, options.encoding)
    require(table, path, ("user_id", "query", "timestamp"))
    return table


def read_queries(table: pl.DataFrame, kinds: dict[str, IdKind], report: Report) -> pl.DataFrame:
    """user_id, timestamp and searched of an opened query file."""
    found = pl.DataFrame(
        [
            to_ids(table["user_id"], kinds["user"]),
            seconds(table["timestamp"], report),
            table["query"].cast(pl.String).alias("searched"),
        ]
    )
    known = found.drop_nulls()
    report.lost("queries without user, time or words", found.height, found.height - known.height,
                f"where user ids are {kinds['user']}, as in the log", "look at the query file")  # fmt: skip
    return known


def names_of(column: pl.Series, kind: IdKind) -> pl.DataFrame:
    """item_id and key of the items of a log."""
    return pl.DataFrame([to_ids(column, kind), id_text(column).alias("key")]).drop_nulls().unique("item_id")


def _items(
    events: pl.DataFrame, given: pl.DataFrame | None, kinds: dict[str, IdKind], report: Report,
    names: pl.DataFrame | None,
) -> pl.DataFrame:  # fmt: skip
    """All items of the log and of the item file: what nobody has met yet can be shown, and be met."""
    seen = events.select("item_id").unique()
    if given is None:
        return complete(seen if names is None else seen.join(names, on="item_id", how="left"))
    known = read_items(given, kinds["item"], report)
    compare_items(events, known, report)
    items = seen.join(known, on="item_id", how="full", coalesce=True)
    if names is not None:
        items = items.join(names, on="item_id", how="left", suffix="_log")
        items = items.with_columns(key=pl.coalesce("key", "key_log")).drop("key_log")
    items = complete(items)
    for name in ("title", "brand", "category"):
        if name in known.columns:
            report.filled(name, items.height, int((items[name] == "").sum()))
    if "price" in known.columns:
        report.filled("price", items.height, int(items["price"].is_nan().sum()))
    return items


def joined_items(base: pl.DataFrame, cleaned: Cleaned, events: pl.DataFrame) -> pl.DataFrame:
    """The items of a dataset and those of newer events: what a newer item file says of an item takes the place of what
    was known."""
    base = base.with_columns(pl.col("price", "margin").fill_nan(None))  # what is not known is no answer to a question
    new = events.select("item_id").unique().join(cleaned.names, on="item_id", how="left")
    if cleaned.given is not None:
        known = read_items(cleaned.given, cleaned.kinds["item"], cleaned.report)
        compare_items(events, known, cleaned.report)
        known = known.with_columns(pl.col(n).fill_nan(None) for n in ("price", "margin") if n in known.columns)
        new = known.join(new, on="item_id", how="full", coalesce=True, suffix="_log")
        new = new.with_columns(key=pl.coalesce("key", "key_log")).drop("key_log")
    both = new.join(base, on="item_id", how="full", coalesce=True, suffix="_base")
    twice = [name for name in new.columns if name != "item_id" and f"{name}_base" in both.columns]
    both = both.with_columns(pl.coalesce(name, f"{name}_base").alias(name) for name in twice)
    items = complete(both.drop(f"{name}_base" for name in twice))
    cleaned.report.note(f"items that are new: {items.height - base.height:,}")
    return items.select(base.columns)


def compare_items(events: pl.DataFrame, known: pl.DataFrame, report: Report) -> None:
    """Hold the items of an item file against those of the log.

    Raises:
        BadData: they have none in common.
    """
    seen = events.select("item_id").unique()
    met = seen.join(known, on="item_id").height
    if not met:
        first = f"whose first id is {known['key'][0]!r}" if known.height else "which has none that can be read"
        raise BadData(
            f"none of the {seen.height:,} items of the log is in the item file, {first}; give the item file of this log"
        )
    report.rows.append(("items of the log found in the item file", seen.height, met))
    if new := known.height - met:
        report.note(f"items without an event, known by their content alone: {new:,}")
