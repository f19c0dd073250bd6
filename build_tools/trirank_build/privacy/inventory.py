"""What personal data lies where: read off the code that writes it, so that no field is forgotten.

A field is classified by its name; one that is new has to be classified too, or a test fails.
"""

from __future__ import annotations

from typing import NamedTuple

from trirank import contract
from trirank_backend.request_log import FIELDS
from trirank_backend.stores.events import RECORD, Event

from trirank_build.data.dataset import EVENTS, OPTIMUM, POSITIONS, REQUEST_ID, REQUESTS

PERSONAL: dict[str, str] = {
    "user_id": "identifies",
    "event_id": "links",
    "request_id": "links",
    "query": "tells",
    "filters": "tells",
    "item_id": "tells",
    "item_ids": "tells",
    "retrieval_scores": "tells",
    "kind": "tells",
    "behaviour": "tells",
    "timestamp": "tells",
    "moment": "tells",
    "history": "tells",
    "history_ids": "tells",
    "history_behaviours": "tells",
    "history_timestamps": "tells",
    "labels": "tells",
    "missed": "tells",
    "position": "tells",
    "positions": "tells",
    "utility": "tells",
    "events": "tells",
    "remembered": "tells",
    "disliked": "tells",
    "tensors": "tells",
    "packed_request": "tells",
}
"""Field → what it is: ``identifies`` a person, ``links`` rows of one, or ``tells`` what somebody did."""
HARMLESS = frozenset({"scenario", "split", "top_k", "trace", "sent_history", "release"})
"""Fields that tell of nobody."""


class Place(NamedTuple):
    """Where data lies.

    Attributes:
        kept: for how long.
        gone_by: what takes a person out of it.
    """

    name: str
    fields: tuple[str, ...]
    kept: str
    gone_by: str


PLACES = (
    Place("a request to `rank` (in memory, and in no log unless asked for)",
          tuple(spec.name.lower() for spec in contract.INPUTS), "while it is answered", "nothing is kept"),
    Place("queries of a release that understands words (in memory)", ("query",),
          "the last 16,384 different ones", "end of the process"),
    Place("feedback (in memory)", Event._fields, "until it is in the store", "nothing is kept"),
    Place("the user store: a user's past (`RECORD`)", ("user_id", *(RECORD.names or ())),
          f"the newest {contract.MAX_HISTORY:,} of each kind; Redis has up to three times as many",
          "`trirank users erase`"),
    Place("the user store: ids of events that are there, so that none counts twice", ("event_id",),
          "Redis: a day; SQLite: with the event", "`trirank users erase`"),
    Place("the user store: the log of events (`Event`)", Event._fields, "until it is trimmed", "`trirank users erase`"),
    Place("files of `trirank users log`", Event._fields, "until they are deleted", "`trirank users erase --logs`"),
    Place("what `trirank users export` writes", ("user_id", "remembered", "disliked", "events"),
          "until it is deleted", "delete it"),
    Place("the log of requests (`serve --log-requests`)", FIELDS, "until it is deleted",
          "`trirank users erase --logs`"),
    Place("a dataset: `events.parquet`", tuple(EVENTS), "until it is deleted",
          "prepare it again without the user, or `--anonymise`"),
    Place("a dataset: `requests.parquet`", (*REQUESTS, OPTIMUM, POSITIONS, REQUEST_ID), "until it is deleted",
          "prepare it again without the user, or `--anonymise`"),
)  # fmt: skip
"""All places that rows of persons lie in. A release has none: its recorded requests are of no user, and of queries that
many have asked, and so are the vectors of queries in its lessons on words; its model is made of what all did."""


def unclassified() -> set[str]:
    """Fields of which nobody has said what they tell."""
    return {field for place in PLACES for field in place.fields} - PERSONAL.keys() - HARMLESS


def table() -> str:
    """As Markdown, for docs/privacy.md."""
    lines = ["| where | identifies or links | tells what somebody did | kept | gone by |", "|---|---|---|---|---|"]
    for place in PLACES:
        who = [field for field in place.fields if PERSONAL.get(field) in ("identifies", "links")]
        what = [field for field in place.fields if PERSONAL.get(field) == "tells"]
        cells = (place.name, *(", ".join(f"`{field}`" for field in each) or "–" for each in (who, what)))
        lines.append(f"| {' | '.join(cells)} | {place.kept} | {place.gone_by} |")
    return "\n".join(lines)
