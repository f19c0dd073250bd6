"""A new day's log → a dataset: an earlier one, and what has happened since. Older logs are not read again."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from trirank_build.artefacts import file_digest
from trirank_build.data.dataset import OPTIMUM, SPLIT, Dataset
from trirank_build.errors import BadData
from trirank_build.preparation.candidates import requests_from_events
from trirank_build.preparation.options import PrepareOptions
from trirank_build.preparation.parts import local, parts_of
from trirank_build.preparation.sources.behaviour_log import (
    as_choices,
    clean_source,
    joined_items,
    with_gains,
    with_searches,
)
from trirank_build.preparation.splitting import times_of, with_split
from trirank_build.progress import warn

_EVENT = ["user_id", "item_id", "behaviour", "timestamp"]


def prepare_onto(base: Dataset, source: str, options: PrepareOptions) -> Dataset:
    """The base with the events of a newer log, split by time anew. Earlier requests keep their candidates; what came
    since has candidates by all that is known now. What was a test becomes training as time goes on.

    Args:
        source: as `prepare` takes it: a log with times.

    Raises:
        BadData: the base or the log has no times, ids of another kind, or the log is in the base already.
    """
    description = base.description
    if not description.timed:
        raise BadData(
            f"{description.source} has no timestamps, so nothing says what is new; prepare the whole log anew"
        )
    if options.min_count > 1:
        raise BadData(f"--min-count {options.min_count} does not go with --onto: what a day leaves out may be common "
                      "over all days; say it when the first dataset is prepared")  # fmt: skip
    options = replace(options, item_ids=description.ids["item"], user_ids=description.ids["user"])
    cleaned = clean_source(source, options)
    if not cleaned.timed:
        raise BadData(f"{source} has no timestamps, and {description.source} has; give a log of the same kind")
    report, events = cleaned.report, with_searches(cleaned.events, options, cleaned.kinds, cleaned.report)
    if base.events.filter(pl.col("behaviour") == 0).is_empty():
        events = as_choices(events)
    known = base.events.select(_EVENT)
    before = events.height
    events = events.join(known, on=_EVENT, how="anti", maintain_order="left")
    report.rows.append(("in the dataset already", before, events.height))
    report.lost("events that are in the dataset already", before, before - events.height,
                "to the second", "is it a day that was added before? Give the log of a newer one")  # fmt: skip
    last = int(base.events["timestamp"].max())  # type: ignore[arg-type]
    if late := events.filter(pl.col("timestamp") <= last).height:
        report.note(f"{late:,} of {events.height:,} new events are older than the newest of the dataset")
    items = joined_items(base.items, cleaned, events)
    events = events.with_columns(fresh=pl.lit(True))
    old = base.events.drop("split").with_columns(fresh=pl.lit(False))
    every = pl.concat([old, events.select(n for n in events.columns if n != "split")], how="diagonal")
    if "query" in every.columns:
        every = every.with_columns(pl.col("query").fill_null(""))
    every = every.sort("timestamp", maintain_order=True)
    valid_from, test_from = times_of(every)
    every = with_gains(with_split(every, valid_from, test_from).with_columns(pl.col("split").cast(SPLIT)))
    tasks = requests_from_events(
        every, items, exclude_history=False, max_train=options.max_train, max_eval=options.max_eval, seed=options.seed
    )
    before_it = base.requests.drop("split", *([OPTIMUM] if base.sizes("train").has_optimum else [])).collect()
    requests = pl.concat([before_it, tasks.drop("split")], how="diagonal_relaxed").sort(
        "timestamp", maintain_order=True
    )
    if tasks.is_empty():
        warn(f"{source} has no event with something before it, so there is no new task to rank; events were added")
    digests = {Path(part).name: _digest(part) for part in parts_of(source)}
    first: list[dict[str, Any]] = [{"source": description.source, "digest": description.digest}]
    since = {"source": Path(source).name, "digest": _together(digests), "events": events.height}
    return Dataset(
        items=items,
        events=every.select(*_EVENT, "split"),
        requests=with_split(requests, valid_from, test_from).lazy(),
        description=replace(
            description,
            source=f"{first[0]['source'].split(' and ')[0]} and {Path(source).name}",
            counts={
                "items": items.height,
                "users": every["user_id"].n_unique(),
                "events": every.height,
                "requests": requests.height,
            },
            cleaning=report.rows,
            digest="",
            notes={
                "read": report.notes,
                "from": [*description.notes.get("from", first), since],
                "known_until": last,
            },
        ),
    )


def _digest(part: str) -> str:
    with local(part) as path:
        return file_digest(path)


def _together(digests: dict[str, str]) -> str:
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(f"{name}\0{digest}\n" for name, digest in digests.items()).encode()).hexdigest()
