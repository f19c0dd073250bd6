"""`trirank skew`: did serving give the ranker what training would have given it?

Requests that a server wrote down with their tensors go through the very path that training takes (a dataset, its
history index, ``Examples``), with the release's features, and the tensors are compared bit by bit. With the histories
that were logged, a difference is one of code; with those of a dataset, one of data: what training believes that the
user had done by then is not what serving knew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from trirank.contract import ANONYMOUS_USER, PAD_ITEM_ID
from trirank_backend.histories import UNKNOWN_TIME
from trirank_backend.release import FEATURES
from trirank_backend.request_log import TENSORS, packed_array

from trirank_build.data.dataset import REQUESTS, TASKS, Dataset, Description
from trirank_build.errors import BadData
from trirank_build.features.examples import Examples
from trirank_build.features.fitting import Features
from trirank_build.online.requests import logged_requests
from trirank_build.repository.release import load_manifest

_BY_CANDIDATE = ("candidates", "dense")


@dataclass
class Skew:
    """What was found.

    Attributes:
        compared: requests; differing: tensor → how many of them differ in it.
        worst: tensor → the largest difference of two numbers in it.
        first: request id or number of a request that differs, by tensor.
        left_out: reason → requests that training has no form for.
    """

    compared: int = 0
    differing: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TENSORS, 0))
    worst: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TENSORS, 0.0))
    first: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def differs(self) -> bool:
        """Whether any request does."""
        return any(self.differing.values())


def measure_skew(release: Path, folder: Path, dataset: Dataset | None = None, limit: int = 10_000) -> Skew:
    """Replay logged requests of a release.

    Args:
        folder: of the log.
        dataset: whose events are the histories; None: those that were logged.

    Raises:
        BadData: nothing was logged of this release, or without tensors.
    """
    name, features, found = load_manifest(release)["release"], Features.load(release / FEATURES), Skew()
    lines: list[dict[str, Any]] = []
    others = without = 0
    for line in logged_requests(folder):
        if line["release"] != name:
            others += 1
        elif "tensors" not in line:
            without += 1
        elif reason := _not_of_training(line, dataset is not None):
            found.left_out[reason] = found.left_out.get(reason, 0) + 1
        elif len(lines) < limit:
            lines.append(line)
    if not lines:
        raise BadData(
            f"{folder} holds no request of {name} that could be compared ({others} of other releases, {without} "
            f"without tensors, {sum(found.left_out.values())} of a form that training does not have); serve with "
            f"--log-requests '{folder}?tensors=1'"
        )
    examples = _examples(lines, features, dataset)
    for at, line in enumerate(lines):
        packed = examples.whole(np.array([at])).packed
        found.compared += 1
        kept = _kept(line["item_ids"])
        for tensor in TENSORS:
            served = packed_array(line["tensors"][tensor])
            trained: NDArray[Any] = getattr(packed, tensor)[0]
            if tensor in _BY_CANDIDATE:
                others_of = np.setdiff1d(np.arange(len(served)), kept)
                served, trained = np.concatenate([served[kept], served[others_of]]), trained[: len(kept)]
                trained = np.concatenate([trained, np.zeros((len(others_of), *trained.shape[1:]), trained.dtype)])
            if served.dtype != trained.dtype or served.shape != trained.shape or served.tobytes() != trained.tobytes():
                found.differing[tensor] += 1
                found.first.setdefault(tensor, line["request_id"] or f"number {at}")
                if served.shape == trained.shape:
                    gap = float(np.abs(served.astype(np.float64) - trained.astype(np.float64)).max())
                    found.worst[tensor] = max(found.worst[tensor], gap)
    return found


def _kept(item_ids: list[int]) -> NDArray[np.int64]:
    """Places of the candidates without padding and repeats, which serving leaves out."""
    ids = np.array(item_ids, np.int64)
    first = np.sort(np.unique(ids, return_index=True)[1])
    return first[ids[first] != PAD_ITEM_ID]


def _not_of_training(line: dict[str, Any], own_events: bool) -> str:
    """Why training has no such request; empty: it has."""
    if own_events:
        return "a history of the caller's own" if line["sent_history"] else ""
    times = line["history"]["timestamps"]
    if UNKNOWN_TIME in times:
        return "a history without times"
    if times and line["user_id"] == ANONYMOUS_USER:
        return "an anonymous caller with a history"
    return ""


def _examples(lines: list[dict[str, Any]], features: Features, dataset: Dataset | None) -> Examples:
    """The logged requests as training reads a dataset's."""
    rows: list[dict[str, Any]] = []
    histories: dict[str, list[int]] = {"user_id": [], "item_id": [], "behaviour": [], "timestamp": []}
    for number, line in enumerate(lines, 1):
        kept, known = _kept(line["item_ids"]), line["user_id"] != ANONYMOUS_USER
        scores = line["retrieval_scores"]
        # Each request has a user of its own: two of one user may have known different things, a minute apart.
        user = line["user_id"] if dataset is not None else number if known else ANONYMOUS_USER
        rows.append(
            {
                "user_id": user, "timestamp": line["moment"], "query": line["query"], "scenario": line["scenario"],
                "item_ids": [line["item_ids"][at] for at in kept],
                "retrieval_scores": [float("nan") if scores is None else scores[at] for at in kept],
                "labels": [0.0] * len(kept), "missed": [], "split": "test",
            }
        )  # fmt: skip
        past = line["history"]
        if dataset is None:
            histories["user_id"] += [number] * len(past["item_ids"])
            histories["item_id"] += past["item_ids"]
            histories["behaviour"] += past["behaviours"]
            histories["timestamp"] += past["timestamps"]
    types = {name: REQUESTS[name] for name in rows[0]}
    events = pl.DataFrame(histories, schema=dict.fromkeys(histories, pl.Int64)) if dataset is None else dataset.events
    description = Description(source="logged requests", timed=True, tasks=TASKS, counts={}, cleaning=[])
    replayed = Dataset(pl.DataFrame(), events, pl.DataFrame(rows, schema=types).lazy(), description)
    return Examples.read(replayed, "test", features)
