"""A request as Triton hands it over, checked. What the contract does not allow is refused here and costs nobody
else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from trirank import contract

from trirank_backend.errors import InvalidInput, shortened
from trirank_backend.histories import UNKNOWN_TIME, Events
from trirank_backend.packed import unpacked_request

Tensors = dict[str, NDArray[Any]]


class NamedTensors(Tensors):
    """Tensors of a request that its caller has given an id."""

    request_id: str = ""


_BEHAVIOURS = [code.value for code in contract.Behaviour]


class Filters(NamedTuple):
    """What one page shall leave out; see contract.FILTERS. An empty region: any."""

    region: str
    min_stock: int
    min_price: float
    max_price: float


class Request:
    """One request of R lines: mostly one, but a KServe client may send several rows at once.

    Attributes:
        item_ids: [R, n] int64 as they were sent, and ``bucket`` for how many there shall be places.
        users, queries, top_k, policies: of each line; policies are places among the release's.
        timestamps: seconds since 1970 of each line; None: now.
        retrieval_scores: [R, n] float32, if there are any.
        histories: of each line; None: the stored one.
        request_id: the caller's; empty: it has given none.
        packed: whether it came as one tensor, and is to be answered with one.
        filters: of each line, None: there are none; see contract.FILTERS.
        trace: of each line, whether TRACE is asked for.
    """

    def __init__(self, tensors: Tensors, policies: Mapping[str, int]) -> None:
        """Raises InvalidInput for what the contract does not allow."""
        self.request_id: str = getattr(tensors, "request_id", "")
        self.packed = contract.PACKED_REQUEST.name in tensors
        if self.packed:
            tensors = unpacked_request(tensors)
        for name in contract.REQUIRED:
            if name not in tensors:
                raise InvalidInput(f"{name} is missing; every request has {', '.join(contract.REQUIRED)}")
        self.item_ids: NDArray[np.int64] = tensors["ITEM_IDS"]
        size, sent = self.item_ids.shape
        try:
            self.bucket = contract.bucket_for(sent)
        except ValueError as error:
            raise InvalidInput(f"ITEM_IDS has {error}") from None
        if not 1 <= size <= contract.MAX_BATCH:
            raise InvalidInput(f"the request has {size} rows; it has 1 to {contract.MAX_BATCH}: send several requests")
        for name, tensor in tensors.items():
            if len(tensor) != size:
                raise InvalidInput(f"{name} has {len(tensor)} rows, ITEM_IDS {size}; send the same number of each")
        if (self.item_ids[:, 0] == contract.PAD_ITEM_ID).any() and (self.item_ids == contract.PAD_ITEM_ID).all(1).any():
            raise InvalidInput(
                f"ITEM_IDS has 0 candidates (only {contract.PAD_ITEM_ID}, which is padding); send at least one"
            )
        self.users: list[int] = tensors["USER_ID"][:, 0].tolist()
        self.top_k = _top_k(tensors["TOP_K"][:, 0].tolist())
        self.policies = [_policy(name, policies) for name in tensors["SCENARIO"][:, 0].tolist()]
        self.queries = _queries(tensors.get("QUERY"), size)
        self.timestamps = _timestamps(tensors.get("TIMESTAMP"))
        self.retrieval_scores = _scores(tensors.get("RETRIEVAL_SCORES"), self.item_ids)
        self.histories = _histories(tensors, size)
        self.filters = _filters(tensors.get("FILTERS"), size)
        self.trace = _trace(tensors.get("TRACE"), size)

    def __len__(self) -> int:
        return len(self.item_ids)


def _top_k(values: list[int]) -> list[int]:
    for value in values:
        if not 1 <= value <= contract.MAX_TOP_K:
            raise InvalidInput(f"TOP_K is {value}; it goes from 1 to {contract.MAX_TOP_K}")
    return values


def _policy(scenario: bytes, policies: Mapping[str, int]) -> int:
    name = scenario.decode("utf-8", "replace")
    if name not in policies:
        raise InvalidInput(f"SCENARIO is {name[:64]!r}; this release has {', '.join(sorted(policies))}")
    return policies[name]


def _queries(values: NDArray[Any] | None, size: int) -> list[str]:
    if values is None:
        return [""] * size
    texts = []
    for value in values[:, 0].tolist():
        if len(value) > contract.MAX_QUERY_BYTES:
            raise InvalidInput(f"QUERY has {len(value)} bytes; the limit is {contract.MAX_QUERY_BYTES}")
        try:
            texts.append(value.decode())
        except UnicodeDecodeError as error:
            raise InvalidInput(
                f"QUERY is not UTF-8: byte {value[error.start]:#04x} at {error.start}; encode it as UTF-8"
            ) from None
    return texts


def _filters(values: NDArray[Any] | None, size: int) -> list[Filters | None]:
    return [None] * size if values is None else [_filter(value) for value in values[:, 0].tolist()]


def _filter(text: bytes) -> Filters | None:
    if not text:
        return None
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"FILTERS is no JSON ({error})") from None
    if not isinstance(said, dict) or (unknown := sorted(said.keys() - set(contract.FILTERS))):
        what = f"has the unknown key {shortened(unknown[0])}" if isinstance(said, dict) else f"is {shortened(said)}"
        raise InvalidInput(f"FILTERS {what}; it is a JSON object with any of {', '.join(contract.FILTERS)}")
    region = said.get("region", "")
    if not isinstance(region, str):
        raise InvalidInput(f"FILTERS: region is {shortened(region)}; it is text")
    least, most = (_amount(said, key, other) for key, other in (("min_price", -math.inf), ("max_price", math.inf)))
    if least > most:
        raise InvalidInput(f"FILTERS: min_price is {least:g}, above max_price {most:g}; nothing would be left")
    stock = said.get("min_stock", 0)
    if not isinstance(stock, int) or isinstance(stock, bool) or not 0 <= stock < 2**31:
        raise InvalidInput(f"FILTERS: min_stock is {shortened(stock)}; it is a whole number of pieces, 0 or more")
    return Filters(region, stock, least, most)


def _amount(said: Mapping[str, Any], key: str, other: float) -> float:
    value = said.get(key, other)
    if isinstance(value, bool) or not isinstance(value, int | float) or (not abs(value) < 1e30 and value != other):
        raise InvalidInput(f"FILTERS: {key} is {shortened(value)}; it is a number")
    return float(value)


def _trace(values: NDArray[np.int32] | None, size: int) -> list[int]:
    asked: list[int] = [0] * size if values is None else values[:, 0].tolist()
    if wrong := [value for value in asked if value not in (0, 1)]:
        raise InvalidInput(f"TRACE is {wrong[0]}; it is 0 or 1")
    return asked


def _timestamps(values: NDArray[np.int64] | None) -> list[int] | None:
    if values is None:
        return None
    moments: list[int] = values[:, 0].tolist()
    if min(moments) < 0:
        raise InvalidInput(f"TIMESTAMP is {min(moments)}; it is seconds since 1970, 0 or more")
    return moments


def _scores(scores: NDArray[np.float32] | None, item_ids: NDArray[np.int64]) -> NDArray[np.float32] | None:
    if scores is None:
        return None
    if scores.shape != item_ids.shape:
        raise InvalidInput(
            f"RETRIEVAL_SCORES has shape {list(scores.shape)}, ITEM_IDS {list(item_ids.shape)}; "
            "send one score a candidate, padded alike"
        )
    finite = np.isfinite(scores)
    if not finite.all():
        row, at = np.argwhere(~finite)[0]
        raise InvalidInput(
            f"RETRIEVAL_SCORES[{row}, {at}] is {scores[row, at]}; send finite numbers, or leave them out"
        )
    return scores


def _histories(tensors: Tensors, size: int) -> list[Events | None]:
    ids = tensors.get("HISTORY_IDS")
    behaviours, timestamps = tensors.get("HISTORY_BEHAVIOURS"), tensors.get("HISTORY_TIMESTAMPS")
    if ids is None:
        if behaviours is not None or timestamps is not None:
            raise InvalidInput("HISTORY_BEHAVIOURS and HISTORY_TIMESTAMPS need HISTORY_IDS beside them")
        return [None] * size
    if ids.shape[1] > contract.MAX_HISTORY:
        raise InvalidInput(f"HISTORY_IDS has {ids.shape[1]} events; the limit is {contract.MAX_HISTORY}")
    for name, array in (("HISTORY_BEHAVIOURS", behaviours), ("HISTORY_TIMESTAMPS", timestamps)):
        if array is not None and array.shape != ids.shape:
            raise InvalidInput(f"{name} has shape {list(array.shape)}, HISTORY_IDS {list(ids.shape)}")
    real = ids != contract.PAD_ITEM_ID
    if behaviours is None:
        behaviours = np.full(ids.shape, contract.Behaviour.CLICK, np.int32)
    elif (wrong := real & ~np.isin(behaviours, _BEHAVIOURS)).any():
        raise InvalidInput(f"HISTORY_BEHAVIOURS holds {behaviours[wrong][0]}; codes are {_BEHAVIOURS}")
    if timestamps is None:  # they are in order all the same, and lie before any moment
        timestamps = np.full(ids.shape, UNKNOWN_TIME, np.int64)
    elif (timestamps < 0).any():
        raise InvalidInput(f"HISTORY_TIMESTAMPS holds {timestamps.min()}; seconds since 1970, 0 or more")
    histories: list[Events | None] = []
    for row, keep in enumerate(real):
        order = np.flatnonzero(keep)[np.argsort(timestamps[row, keep], kind="stable")]
        histories.append(Events(ids[row, order], behaviours[row, order], timestamps[row, order]))
    return histories
