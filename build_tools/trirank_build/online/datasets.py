"""Feedback and logged requests → a dataset to train on: an earlier dataset, and what has happened since."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import polars as pl
from trirank.contract import ANONYMOUS_USER, Behaviour, EventKind
from trirank_backend.stores.events import HISTORY_KINDS, Event

from trirank_build.data.dataset import GAINS, OPTIMUM, POSITIONS, REQUESTS, Dataset
from trirank_build.errors import BadData
from trirank_build.preparation.splitting import split_by_time, time_split
from trirank_build.progress import warn

_GAIN_OF = {EventKind[name].value: gain for name, gain in GAINS.items()}


def with_feedback(base: Dataset, events: Iterable[Event], requests: Iterable[dict[str, Any]]) -> Dataset:
    """An earlier dataset with what users did since, split by time anew.

    Events become events. A logged request becomes a ranking task among what was shown of it: each item with an
    impression, or with any event, that names the request; its gain is that of the most that was done with it, and its
    position is kept. Requests of which nothing is known to have been shown teach nothing, and are left out.

    Args:
        requests: as servers wrote them down (trirank_backend.request_log); those of an id that is there already come
            from a retry, and the first one counts.

    Raises:
        BadData: the base has no timestamps, or there is nothing new.
    """
    if not base.description.timed:
        raise BadData(f"{base.description.source} has no timestamps, and feedback does; prepare a log that has them")
    done, lines = list(events), list(requests)
    known = set(base.items["item_id"].to_list())
    kept = [event for event in done if event.item_id in known]
    new_events = _events(kept, {line["request_id"]: line["moment"] for line in lines if line["request_id"]})
    tasks = _tasks(kept, lines, known)
    if not new_events.height and not tasks.height:
        raise BadData("the store's log has no event of an item of this dataset; is it the same shop's?")
    old = base.requests.collect().drop([name for name in (OPTIMUM, "split") if name in base.requests.collect_schema()])
    if POSITIONS not in old.columns:
        old = old.with_columns(pl.col("item_ids").list.eval(pl.lit(0, pl.Int32)).alias(POSITIONS))
    # What an earlier dataset of feedback had already is no second task.
    joined = pl.col("item_ids").list.eval(pl.element().cast(pl.String)).list.join(" ").alias("items")
    same = ["user_id", "timestamp", "query", "items"]
    tasks = tasks.with_columns(joined).join(old.with_columns(joined).select(same), on=same, how="anti")
    every = pl.concat([old, tasks.select(old.columns)]).sort("timestamp", maintain_order=True)
    valid_from, test_from = split_by_time(every["timestamp"])
    split = time_split(valid_from, test_from)
    before = base.events.drop("split")
    fresh = new_events.join(before, on=new_events.columns, how="anti")
    happened = pl.concat([before, fresh]).sort("timestamp", "user_id", maintain_order=True)
    found = Dataset(
        base.items,
        happened.with_columns(split),
        every.with_columns(split).lazy(),
        replace(
            base.description,
            source=f"{base.description.source}, and feedback",
            counts={"items": base.items.height, "events": happened.height, "requests": every.height},
            cleaning=[("events of items that are not in the item table", len(done), len(kept))],
            notes={"valid_from": valid_from, "test_from": test_from, "feedback_requests": tasks.height},
        ),
    )
    found.check_ids()
    if tasks.height and not (tasks["timestamp"] < valid_from).any():
        warn(
            f"all {tasks.height:,} new tasks are among the newest fifth of the requests, which validation and "
            "test take: there is nothing new to train on yet. Give an earlier dataset of fewer requests, or wait for "
            "more feedback"
        )
    return found


def _events(events: list[Event], moments: dict[str, int]) -> pl.DataFrame:
    """What users did, as a dataset's events.

    Args:
        moments: of the logged requests, by their id. What came of one came after it, whatever a caller's clock says:
            else an answer would be part of the history that it is to be told from.
    """
    rows = [
        (event.user_id, event.item_id, event.kind, max(event.timestamp, moments.get(event.request_id, 0)))
        for event in events
        if event.kind in HISTORY_KINDS and event.user_id != ANONYMOUS_USER
    ]
    names = ("user_id", "item_id", "behaviour", "timestamp")
    types = (pl.Int64, pl.Int64, pl.Int8, pl.Int64)
    assert {behaviour.value for behaviour in Behaviour} == set(HISTORY_KINDS)
    return pl.DataFrame(rows, schema=dict(zip(names, types, strict=True)), orient="row")


def _tasks(events: list[Event], requests: Iterable[dict[str, Any]], known: set[int]) -> pl.DataFrame:
    """Logged requests with what came of them."""
    by_request: dict[str, dict[int, tuple[int, float]]] = {}
    for event in events:
        if event.request_id and event.kind != EventKind.DISLIKE:
            shown = by_request.setdefault(event.request_id, {})
            position, gain = shown.get(event.item_id, (0, 0.0))
            shown[event.item_id] = (position or event.position, max(gain, _GAIN_OF.get(event.kind, 0.0)))
    rows, seen = [], set()
    for line in requests:
        shown = by_request.get(line["request_id"], {})
        if not shown or line["request_id"] in seen:
            continue
        seen.add(line["request_id"])
        scores = line["retrieval_scores"] or [float("nan")] * len(line["item_ids"])
        first = {
            item: at for at, item in reversed(list(enumerate(line["item_ids"]))) if item in shown and item in known
        }
        items = sorted(first, key=lambda item: first[item])
        if not items:
            continue
        rows.append(
            {
                "user_id": line["user_id"], "timestamp": line["moment"], "query": line["query"],
                "scenario": line["scenario"], "item_ids": items,
                "retrieval_scores": [scores[first[item]] for item in items],
                "labels": [shown[item][1] for item in items], "missed": [],
                POSITIONS: [shown[item][0] for item in items],
            }
        )  # fmt: skip
    types = {name: kind for name, kind in REQUESTS.items() if name != "split"} | {POSITIONS: pl.List(pl.Int32)}
    return pl.DataFrame(rows, schema=types)
