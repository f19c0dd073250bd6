"""Feedback and logged requests → a dataset to train on: an earlier dataset, and what has happened since."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import polars as pl
from trirank.contract import ANONYMOUS_USER, Behaviour, EventKind
from trirank_backend.stores.events import HISTORY_KINDS, Event

from trirank_build.data.dataset import GAINS, OPTIMUM, POSITIONS, REQUEST_ID, REQUESTS, Dataset
from trirank_build.errors import BadData
from trirank_build.online.requests import NEEDED
from trirank_build.preparation.splitting import times_of, with_split
from trirank_build.privacy.anonymise import refuse_anonymised
from trirank_build.progress import warn

_FEEDBACK = ", and feedback"
_GAIN_OF = {EventKind[name].value: gain for name, gain in GAINS.items()}


def with_feedback(base: Dataset, events: Iterable[Event], requests: Iterable[dict[str, Any]]) -> Dataset:
    """An earlier dataset with what users did since, split by time anew.

    Events become events. A logged request becomes a ranking task among what was shown of it: each item with an
    impression, or with any event, that names the request; its gain is that of the most that was done with it, and its
    position is kept. Requests of which nothing is known to have been shown teach nothing, and are left out. What was
    done after an earlier dataset of feedback was made is added to the tasks that it has.

    Args:
        requests: as servers wrote them down (trirank_backend.request_log); of those of one id, as a retry leaves, the
            first one counts.

    Raises:
        BadData: the base has no timestamps, or there is nothing new.
    """
    refuse_anonymised(base, "add to the dataset that it was made of, and anonymise the whole")
    if not base.description.timed:
        raise BadData(f"{base.description.source} has no timestamps, and feedback does; prepare a log that has them")
    done, lines = list(events), [{name: line[name] for name in NEEDED} for line in requests]
    known = set(base.items["item_id"].to_list())
    kept = [event for event in done if event.item_id in known]
    shown = _shown(kept)
    old = _with_feedback_columns(base.requests.collect())
    touched = old.filter(pl.col(REQUEST_ID).is_in(list(shown)) & (pl.col(REQUEST_ID) != ""))
    for row in touched.iter_rows(named=True):
        now = shown[row[REQUEST_ID]]
        for item, gain, position in zip(row["item_ids"], row["labels"], row[POSITIONS], strict=True):
            newer, more = now.get(item, (0, 0.0))
            now[item] = (newer or position, max(more, gain))
    tasks = _tasks(shown, [*lines, *map(_as_line, touched.iter_rows(named=True))], known)
    new_events = _events(kept, {line["request_id"]: line["moment"] for line in lines if line["request_id"]})
    _check_something_is_new(done, kept, lines, new_events, tasks)
    old = old.filter(~pl.col(REQUEST_ID).is_in(tasks[REQUEST_ID].to_list()))
    every = pl.concat([old, tasks.select(old.columns)]).sort("timestamp", maintain_order=True)
    valid_from, test_from = times_of(every)
    before = base.events.drop("split")
    fresh = new_events.join(before, on=new_events.columns, how="anti")
    happened = pl.concat([before, fresh]).sort("timestamp", "user_id", maintain_order=True)
    found = Dataset(
        base.items,
        with_split(happened, valid_from, test_from),
        with_split(every, valid_from, test_from).lazy(),
        replace(
            base.description,
            source=f"{base.description.source.removesuffix(_FEEDBACK)}{_FEEDBACK}",
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


def _check_something_is_new(
    done: list[Event], kept: list[Event], lines: list[dict[str, Any]], new_events: pl.DataFrame, tasks: pl.DataFrame
) -> None:
    """Raises BadData where there is nothing, and warns where requests were given and no event is about one."""
    named = sum(bool(line["request_id"]) for line in lines)
    told = (
        f"none of the {len(lines):,} logged requests ({named:,} with a request_id) is named by an event; callers set "
        "request_id in requests and in events"
    )
    if tasks.height:
        return
    if new_events.height:
        if lines:
            warn(f"{told}. There are new events, and no new task to rank")
        return
    if kept:
        raise BadData(told if lines else "all that is told is what was shown; give the requests too, with --requests")
    raise BadData(f"the store's log has no event of an item of this dataset ({len(done):,} of others); is it the same "
                  "shop's?")  # fmt: skip


def _with_feedback_columns(requests: pl.DataFrame) -> pl.DataFrame:
    """Requests of a base, with the columns of those that came with feedback."""
    found = requests.drop([name for name in (OPTIMUM, "split") if name in requests.columns])
    if POSITIONS not in found.columns:
        found = found.with_columns(pl.col("item_ids").list.eval(pl.lit(0, pl.Int32)).alias(POSITIONS))
    return found if REQUEST_ID in found.columns else found.with_columns(pl.lit("").alias(REQUEST_ID))


def _as_line(row: dict[str, Any]) -> dict[str, Any]:
    """A task as the server wrote its request down, or what of it is known to have been shown."""
    return {**row, "moment": row["timestamp"]}


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


def _shown(events: list[Event]) -> dict[str, dict[int, tuple[int, float]]]:
    """Request id → item → position and gain."""
    found: dict[str, dict[int, tuple[int, float]]] = {}
    for event in events:
        if event.request_id and event.kind != EventKind.DISLIKE:
            items = found.setdefault(event.request_id, {})
            position, gain = items.get(event.item_id, (0, 0.0))
            items[event.item_id] = (position or event.position, max(gain, _GAIN_OF.get(event.kind, 0.0)))
    return found


def _tasks(
    by_request: dict[str, dict[int, tuple[int, float]]], requests: Iterable[dict[str, Any]], known: set[int]
) -> pl.DataFrame:
    """Logged requests with what came of them."""
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
                POSITIONS: [shown[item][0] for item in items], REQUEST_ID: line["request_id"],
            }
        )  # fmt: skip
    types = {name: kind for name, kind in REQUESTS.items() if name != "split"}
    types |= {POSITIONS: pl.List(pl.Int32), REQUEST_ID: pl.String}
    return pl.DataFrame(rows, schema=types)
