"""What is sent: recorded requests again, or drawn ones in their image.

Drawn: users and items by Zipf's law, as in a shop few are asked for often; candidate counts, queries and the share of
searches from what was recorded.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from trirank import FeedbackEvent, RankRequest

from trirank_loadtest.errors import BadLoad

_PAGES = 512
_MOST_USERS = 10_000_000
_NUMBERS = {"zipf": 1.1, "users": 100_000.0, "search": -1.0}


@dataclass(frozen=True)
class Mix:
    """What requests are made of.

    Attributes:
        kind: ``recorded`` or ``drawn``.
        zipf: exponent of the popularity of users and items; users: of how many; search: share of searches, below 0: as
            recorded. Of drawn ones alone.
        feedback: events told beside each request, on average.
    """

    kind: str = "recorded"
    zipf: float = 1.1
    users: int = 100_000
    search: float = -1.0
    feedback: float = 0.0

    @classmethod
    def read(cls, text: str, feedback: float = 0.0) -> Mix:
        """From ``recorded``, or ``drawn`` with ``:zipf=1.1,users=100000,search=0.5`` behind it, all of them optional.

        Raises:
            BadLoad: it is something else.
        """
        kind, _, said = text.partition(":")
        if kind not in ("recorded", "drawn") or (said and kind == "recorded"):
            raise BadLoad(f"mix {text!r} is none; say recorded, or drawn:zipf=1.1,users=100000,search=0.5")
        found = dict(_NUMBERS)
        for each in filter(None, said.split(",")):
            name, _, value = each.partition("=")
            try:
                found[name] = float(value) if name in found else float("nan")
            except ValueError:
                found[name] = float("nan")
            if not np.isfinite(found[name]):
                raise BadLoad(f"mix {text!r}: {each!r} is none of {', '.join(f'{key}=NUMBER' for key in _NUMBERS)}")
        if found["zipf"] < 0 or not 1 <= found["users"] <= _MOST_USERS or found["search"] > 1:
            raise BadLoad(f"mix {text!r}: zipf is 0 or more, users 1 to {_MOST_USERS:,}, search at most 1")
        if not 0 <= feedback <= 100:
            raise BadLoad(f"feedback is {feedback:g}; it is events a request, 0 to 100")
        return cls(kind, found["zipf"], int(found["users"]), found["search"], feedback)


def load_requests(path: Path) -> list[RankRequest]:
    """Recorded requests: a release's ``requests.json``, or what ``trirank serve --log-requests`` wrote.

    Raises:
        BadLoad: there are none.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] * path.is_file()
    if not files:
        raise BadLoad(f"{path} holds no recorded requests; name a release's requests.json, or a folder of logged ones")
    sealed = [file for file in files if file.with_name(file.name + ".key").exists()]
    if sealed:
        raise BadLoad(f"{sealed[0]} is sealed (TRIRANK_KEYS); name a release's requests.json, or a log in the clear")
    try:
        raw: list[Mapping[str, Any]] = []
        for file in files:
            if file.suffix == ".jsonl":
                raw += [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
            else:
                raw += json.loads(file.read_text())
        names = set(RankRequest.__dataclass_fields__)
        requests = [RankRequest.from_dict({key: one[key] for key in one if key in names - {"history"}}) for one in raw]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadLoad(f"{path} cannot be read as recorded requests ({error!r})") from None
    if not requests:
        raise BadLoad(f"{path} is empty; record requests with `trirank serve --log-requests FOLDER`")
    return requests


def requests_of(mix: Mix, recorded: list[RankRequest], rng: np.random.Generator) -> Iterator[RankRequest]:
    """Requests without end. What takes long is done before the first: a stream that draws is late."""
    if mix.kind == "recorded":
        return itertools.cycle([recorded[at] for at in rng.permutation(len(recorded))])
    return _drawn(mix, recorded, rng)


def _drawn(mix: Mix, recorded: list[RankRequest], rng: np.random.Generator) -> Iterator[RankRequest]:
    """Pages are drawn once, and users for each request: so many pages are asked for again, as in a shop."""
    searches = [one for one in recorded if one.query] or recorded
    homes = [one for one in recorded if not one.query] or recorded
    share = mix.search if mix.search >= 0 else sum(bool(one.query) for one in recorded) / len(recorded)
    items = rng.permutation(np.unique(np.concatenate([np.asarray(one.item_ids) for one in recorded])))
    chances = _zipf(len(items), mix.zipf)
    pages = []
    for _ in range(_PAGES):
        like = searches if rng.random() < share else homes
        pattern = like[rng.integers(len(like))]
        count = min(len(recorded[rng.integers(len(recorded))].item_ids), len(items))
        chosen = rng.choice(items, count, replace=False, p=chances)
        scores = np.sort(rng.normal(size=count))[::-1] if pattern.retrieval_scores is not None else None
        pages.append(replace(pattern, item_ids=chosen, retrieval_scores=scores, timestamp=None, history=None))
    # The most frequent ones are users that were recorded, so that there are histories.
    known = sorted({one.user_id for one in recorded if one.user_id is not None}, key=str)
    named = bool(known) and isinstance(known[0], str)
    below = np.cumsum(_zipf(mix.users, mix.zipf))

    def user(rank: int) -> int | str:
        return known[rank] if rank < len(known) else f"drawn-{rank}" if named else rank

    def endless() -> Iterator[RankRequest]:
        while True:
            page = pages[rng.integers(len(pages))]
            yield replace(page, user_id=user(int(np.searchsorted(below, rng.random()))))

    return endless()


def events_of(request: RankRequest, item: Any, position: int) -> list[FeedbackEvent]:
    """What a user does with a page: sees an item, and clicks on it."""
    said = {"item_id": item, "user_id": request.user_id, "position": position}
    return [FeedbackEvent(kind=kind, **said) for kind in ("impression", "click")]


def _zipf(count: int, exponent: float) -> NDArray[np.float64]:
    weights: NDArray[np.float64] = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()
