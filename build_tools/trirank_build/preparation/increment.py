"""A new day's log → a dataset: an earlier one, and what has happened since. Older logs are not read again."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from trirank_build.artefacts import file_digest
from trirank_build.data.dataset import OPTIMUM, POSITIONS, REQUEST_ID, SPLIT, Dataset
from trirank_build.errors import BadData
from trirank_build.preparation.candidates import requests_from_events
from trirank_build.preparation.options import PrepareOptions
from trirank_build.preparation.parts import local, parts_of
from trirank_build.preparation.sources.behaviour_log import (
    VIEWS_ARE_CLICKS,
    as_clicks,
    clean_source,
    joined_items,
    tasks_of,
    with_gains,
    with_searches,
)
from trirank_build.preparation.splitting import times_of, with_split
from trirank_build.privacy.anonymise import refuse_anonymised
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
    refuse_anonymised(base, "add to the dataset that it was made of, and anonymise the whole")
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
    if description.notes.get(VIEWS_ARE_CLICKS):
        events = as_clicks(events)
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
    for name, now in (("valid", valid_from), ("test", test_from)):
        begun = int(base.events.filter(pl.col("split") == name)["timestamp"].min())  # type: ignore[arg-type]
        if now < begun:
            raise BadData(
                f"{source} is older than what {description.source} is judged by: {name} would begin at {now}, and "
                f"begins at {begun}, so what was trained on would be judged. Prepare all logs anew, in one"
            )
    every = with_gains(with_split(every, valid_from, test_from).with_columns(pl.col("split").cast(SPLIT)))
    tasks = requests_from_events(
        every, items, exclude_history=False, max_train=options.max_train, max_eval=options.max_eval, seed=options.seed
    )
    before_it = base.requests.drop("split", *([OPTIMUM] if base.sizes("train").has_optimum else [])).collect()
    tasks = tasks.drop("split")
    if POSITIONS in before_it.columns:  # of feedback, which a log has none of
        nowhere = pl.col("item_ids").list.eval(pl.lit(0, pl.Int32))
        tasks = tasks.with_columns(nowhere.alias(POSITIONS), pl.lit("").alias(REQUEST_ID))
    requests = pl.concat([before_it, tasks], how="diagonal_relaxed").sort("timestamp", maintain_order=True)
    requests = _with_choices(with_split(requests, valid_from, test_from), every)
    if tasks.is_empty():
        warn(f"{source} has no event with something before it, so there is no new task to rank; events were added")
    digests = [_digest(part) for part in parts_of(source)]
    first: list[dict[str, Any]] = [{"source": description.source, "digest": description.digest}]
    since = {"source": Path(source).name, "digest": _together(digests), "events": events.height}
    return Dataset(
        items=items,
        events=every.select(*_EVENT, "split"),
        requests=requests.lazy(),
        description=replace(
            description,
            source=f"{first[0]['source'].split(' and ')[0]} and {Path(source).name}",
            counts={
                "items": items.height,
                "users": every["user_id"].n_unique(),
                "events": every.height,
                "requests": requests.height,
            },
            tasks={**description.tasks, **tasks_of(every)},
            cleaning=report.rows,
            digest="",
            notes={
                "read": report.notes,
                **({VIEWS_ARE_CLICKS: True} if description.notes.get(VIEWS_ARE_CLICKS) else {}),
                "from": [*description.notes.get("from", first), since],
            },
        ),
    )


def _digest(part: str) -> str:
    with local(part) as path:
        return file_digest(path)


def _together(digests: list[str]) -> str:
    """One digest of all files, in their order."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _with_choices(requests: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """Requests with the choice among the candidates of all that training has, as `prepare` puts it there: what was
    judged before and is learned from now had it left out where retrieval missed it. Its score stays unknown."""
    late = (pl.col("split") == "train") & (pl.col("missed").list.len() > 0)
    if not requests.select(late.any()).item():
        return requests
    chosen = events.filter(pl.col("gain") > 0).select("user_id", "timestamp", "gain", chosen="item_id")
    numbered = requests.with_row_index("place")
    found = (
        numbered.filter(late)
        .join(chosen, on=["user_id", "timestamp"])
        .filter(pl.col("missed").list.first() == pl.col("gain"))
        .unique("place", keep="first", maintain_order=True)
    )
    last = pl.col("item_ids").list.len() - 1
    unknown = pl.lit(float("nan"), pl.Float32)
    put = {"item_ids": pl.col("chosen"), "retrieval_scores": unknown, "labels": pl.col("gain")}
    found = found.with_columns(
        pl.concat_list(pl.col(name).list.head(last), value).alias(name) for name, value in put.items()
    ).with_columns(missed=pl.col("missed").list.head(0))
    kept = numbered.join(found.select("place"), on="place", how="anti")
    return pl.concat([kept, found.select(kept.columns)]).sort("place").drop("place")
