"""RankRequest → protobuf and protobuf → RankResponse; no side effects, shared by every kind of client.

A request is one packed tensor (trirank.packing). Its message is written as bytes: what most requests have in common is
kept, the rest is appended. protobuf reads messages that were joined as one (the encoding guide's "last one wins" and
"repeated fields are appended").
"""

from __future__ import annotations

import json
import math
import operator
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from trirank import contract, packing
from trirank._errors import IncompatibleServer, InvalidRequest, ServerError
from trirank._types import History, ItemIds, RankRequest, RankResponse

_PLACES = packing.places(contract.REQUEST)
_ARRAYS = tuple(spec for spec in contract.RESPONSE if not spec.optional)
_NUMPY = {"INT64": np.int64, "INT32": np.int32, "FP32": np.float32}
_INT64, _INT32 = struct.Struct("<q"), struct.Struct("<i")
_WIDTH = {"INT64": 8, "INT32": 4, "FP32": 4}
_PAD = _INT64.pack(contract.PAD_ITEM_ID)
_INSTALL = f"this client speaks contract {contract.CONTRACT_VERSION}: install the client that fits the server"
_FIELDS = service_pb2.ModelInferRequest.DESCRIPTOR.fields_by_name
_CONTENT = bytes([_FIELDS["raw_input_contents"].number << 3 | 2])
"""Tag of one tensor's bytes; 2: they come with their length."""


def encode(request: RankRequest, model: str) -> tuple[bytes, dict[int, str]]:
    """The ModelInferRequest of a request, as bytes, and the id → string map of string ids.

    Raises:
        InvalidRequest: a value that no server would accept; nothing was sent.
    """
    packed, names = packed_request(request)
    parts = [_header(model, len(packed))]
    if request.request_id:
        parts.append(_with_id(request.request_id))
    parts += (_CONTENT, _varint(len(packed)), packed)
    return b"".join(parts), names


def packed_request(request: RankRequest) -> tuple[bytes, dict[int, str]]:
    """The content of PACKED_REQUEST, and the id → string map of string ids.

    Raises:
        InvalidRequest: a value that no server would accept.
    """
    ids, names = candidate_ids(request)
    raw_ids = ids.tobytes()
    if _PAD in raw_ids and (ids == contract.PAD_ITEM_ID).any():
        raise InvalidRequest(f"item_ids holds {contract.PAD_ITEM_ID}, which stands for padding; leave it out")
    try:
        contract.bucket_for(len(ids))
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    top_k = _whole(request.top_k, "top_k")
    if not 1 <= top_k <= contract.MAX_TOP_K:
        raise InvalidRequest(f"top_k is {top_k}; it goes from 1 to {contract.MAX_TOP_K}")
    query = _text(request.query, "query")
    if len(query) > contract.MAX_QUERY_BYTES:
        raise InvalidRequest(f"query has {len(query)} bytes; the limit is {contract.MAX_QUERY_BYTES}")
    scenario = request.scenario or ("search" if request.query else "home")

    contents = {
        "USER_ID": _INT64.pack(_user(request.user_id)),
        "ITEM_IDS": raw_ids,
        "TOP_K": _INT32.pack(top_k),
        "SCENARIO": _text(scenario, "scenario"),
        "QUERY": query,
    }
    if request.retrieval_scores is not None:
        contents["RETRIEVAL_SCORES"] = _scores(request.retrieval_scores, ids).tobytes()
    if request.timestamp is not None:
        timestamp = _whole(request.timestamp, "timestamp")
        if not 0 <= timestamp < 2**63:
            raise InvalidRequest(f"timestamp is {timestamp}; it is seconds since 1970, 0 or more")
        contents["TIMESTAMP"] = _INT64.pack(timestamp)
    if request.history is not None:
        contents |= {name: column.tobytes() for name, column in _history(request.history).items()}
    if request.filters:
        contents["FILTERS"] = _filters(request.filters)
    if request.trace:
        contents["TRACE"] = _INT32.pack(1)
    return packing.pack({_PLACES[name]: content for name, content in contents.items()}), names


def with_deadline(message: bytes, moment_us: int, sent_us: int) -> bytes:
    """The message, with the moment by which its caller wants an answer, and that at which it is sent: microseconds
    since 1970."""
    deadline = service_pb2.ModelInferRequest()
    deadline.parameters[contract.DEADLINE_PARAMETER].int64_param = moment_us
    deadline.parameters[contract.SENT_PARAMETER].int64_param = sent_us
    written: bytes = deadline.SerializeToString()
    return message + written


@lru_cache(1024)
def _header(model: str, size: int) -> bytes:
    """A message with everything but the packed request of ``size`` bytes and what few requests have."""
    message = service_pb2.ModelInferRequest(model_name=model)
    spec = contract.PACKED_REQUEST
    message.inputs.add(name=spec.name, datatype=spec.dtype, shape=(1, size))
    written: bytes = message.SerializeToString()
    return written


def _filters(filters: Mapping[str, Any]) -> bytes:
    if unknown := sorted(map(str, set(filters) - set(contract.FILTERS))):
        raise InvalidRequest(f"filters has {unknown[0]!r}; filters are {', '.join(contract.FILTERS)}")
    try:
        return json.dumps(dict(filters), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"filters cannot be written as JSON ({error}); send text and finite numbers") from None


def _with_id(request_id: str) -> bytes:
    if len(_text(request_id, "request_id")) > contract.MAX_REQUEST_ID_BYTES:
        raise InvalidRequest(
            f"request_id has {len(request_id.encode())} bytes; the limit is {contract.MAX_REQUEST_ID_BYTES}"
        )
    written: bytes = service_pb2.ModelInferRequest(id=request_id).SerializeToString()
    return written


def candidate_ids(request: RankRequest) -> tuple[NDArray[np.int64], dict[int, str]]:
    """Ids of the candidates as sent, and the id → string map of string ids.

    Raises:
        InvalidRequest: they are no ids.
    """
    return _ids(request.item_ids, "item_ids")


def decode(reply: Any, names: dict[int, str]) -> RankResponse:
    """The answer, without its padding.

    Raises:
        IncompatibleServer: an output of the contract is missing, of another type or of another length.
        ServerError: a score is not a finite number.
    """
    outputs, contents = reply.outputs, reply.raw_output_contents
    if len(outputs) != len(contents):
        raise IncompatibleServer(f"the reply has {len(outputs)} outputs and {len(contents)} contents; {_INSTALL}")
    name, datatype = contract.PACKED_RESPONSE.name, contract.PACKED_RESPONSE.dtype
    packed = {output.name: (output.datatype, raw) for output, raw in zip(outputs, contents, strict=True)}
    if (found := packed.get(name, ("absent", b"")))[0] != datatype:
        raise IncompatibleServer(f"output {name} is {found[0]}, not {datatype}; {_INSTALL}")
    try:
        parts = packing.unpack(found[1], contract.RESPONSE)
    except ValueError as error:
        raise IncompatibleServer(f"output {name} {error}; {_INSTALL}") from None
    arrays: dict[str, NDArray[Any]] = {}
    for spec in _ARRAYS:
        if (raw := parts.get(spec.name)) is None:
            raise IncompatibleServer(f"output {name} lacks {spec.name}; {_INSTALL}")
        if len(raw) % _WIDTH[spec.dtype]:
            raise IncompatibleServer(
                f"{spec.name} has {len(raw)} bytes, which is no number of {spec.dtype}; {_INSTALL}"
            )
        arrays[spec.name] = np.frombuffer(raw, _NUMPY[spec.dtype])
    ids, scores, reasons = arrays["RANKED_IDS"], arrays["SCORES"], arrays["REASONS"]
    if len(arrays["STATUS"]) != 4 or not len(ids) == len(scores) == len(reasons):
        lengths = ", ".join(f"{name} {len(array)}" for name, array in arrays.items())
        raise IncompatibleServer(f"the outputs' lengths do not fit ({lengths}); {_INSTALL}")
    count = len(ids)
    if count and ids[-1] == contract.PAD_ITEM_ID:
        count = int(np.count_nonzero(ids != contract.PAD_ITEM_ID))
    if not math.isfinite(scores.dot(scores)) and not np.isfinite(scores).all():
        at = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ServerError(f"SCORES[{at}] is {scores[at]}; the release that is served is broken")
    status, unknown, duplicates, filtered = arrays["STATUS"].tolist()
    return RankResponse(
        item_ids=own_ids(ids[:count], names),
        scores=scores[:count],
        reasons=reasons[:count],
        status=_status(status),
        unknown=unknown,
        duplicates=duplicates,
        filtered=filtered,
        trace=_trace(bytes(parts["TRACE_JSON"]), names) if "TRACE_JSON" in parts else None,
    )


def _trace(raw: bytes, names: dict[int, str]) -> dict[str, Any]:
    """The trace, with ids as they were sent."""
    try:
        found: dict[str, Any] = json.loads(raw)
        for item in found["items"]:
            item["item"] = names.get(item["item"], item["item"])
    except (ValueError, KeyError, TypeError) as error:
        raise IncompatibleServer(f"TRACE_JSON cannot be read ({error!r}); {_INSTALL}") from None
    return found


def own_ids(ids: NDArray[np.int64], names: dict[int, str]) -> NDArray[Any]:
    """Ids as they were sent: strings where strings were."""
    return np.array([names.get(item, str(item)) for item in ids.tolist()], np.str_) if names else ids


_SMALL = 2**40
"""One of four million hashes is below it; the numbers that shops count their items with all are."""


def check_kinds(request: RankRequest, names: dict[int, str], kinds: Mapping[str, str]) -> None:
    """Hold the kind of a request's ids against the catalogue's.

    Args:
        names: id → string of the request's items; empty: numbers were sent.
        kinds: ``item`` and ``user`` → ``numbers`` or ``strings``.

    Raises:
        InvalidRequest: it is another, so that nothing would be found.
    """
    item, user = kinds.get("item"), kinds.get("user")
    text = next(iter(names.values()), None) if item == "numbers" else None
    name = request.user_id if user == "numbers" and isinstance(request.user_id, str) else None
    for what, given in (("item", text), ("user", name)):
        if given is not None:
            raise InvalidRequest(f"{what} {given!r} is text, and the catalogue's {what} ids are numbers; send those")
    number = None
    if item == "strings" and not names:
        ids = np.asarray(request.item_ids)
        number = int(ids[0]) if int(ids.max()) < _SMALL else None
    whole = request.user_id if user == "strings" and isinstance(request.user_id, int) else None
    young = whole if whole is not None and 0 <= whole < _SMALL else None
    for what, count in (("item", number), ("user", young)):
        if count is not None:
            raise InvalidRequest(f"{what} {count} is a number, and the catalogue's {what} ids are strings; send those")


@lru_cache(64)
def _status(bits: int) -> contract.Status:
    return contract.Status(bits)


def _ids(values: ItemIds, what: str) -> tuple[NDArray[np.int64], dict[int, str]]:
    if type(values) is np.ndarray and values.dtype == np.int64 and values.ndim == 1:
        return values, {}
    if hasattr(values, "to_numpy"):  # a column of pandas or polars, whose first element may not be number 0
        values = values.to_numpy()
    if (
        not isinstance(values, Sequence | np.ndarray)
        or isinstance(values, str | bytes)
        or getattr(values, "ndim", 1) == 0
    ):
        raise InvalidRequest(f"{what} is {values!r}; it is a list of ids")
    if len(values) and isinstance(values[0], str):
        hashed = []
        for value in values:
            if not isinstance(value, str):
                raise InvalidRequest(f"{what} mixes strings with {value!r}; send one kind")
            _text(value, what)
            hashed.append(contract.stable_id(value))
        return np.array(hashed, np.int64), dict(zip(hashed, cast("Sequence[str]", values), strict=True))
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths within
        raise InvalidRequest(f"{what} holds lists; it is a flat list of ids") from None
    if array.ndim != 1:
        raise InvalidRequest(f"{what} has {array.ndim} dimensions; it is a flat list")
    if array.size and array.dtype.kind not in "iu":
        raise InvalidRequest(f"{what} has dtype {array.dtype}; ids are integers of at most 64 bits, or strings")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise InvalidRequest(f"{what} holds {array.max()}, above the largest INT64")
    return array.astype(np.int64, copy=False), {}


def _text(value: str, what: str) -> bytes:
    if not isinstance(value, str):
        raise InvalidRequest(f"{what} is {value!r}; it is text")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{what} is no valid Unicode: {error.reason} at {error.start}") from None


def _whole(value: int, what: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise InvalidRequest(f"{what} is {value!r}; it is a whole number") from None


def _user(user: int | str | None) -> int:
    """INT64 of a user.

    Raises:
        InvalidRequest: it is no id.
    """
    if type(user) is int and -(2**63) <= user < 2**63:
        return user
    if user is None:
        return contract.ANONYMOUS_USER
    return int(_ids(cast("list[str]", [user]), "user_id")[0][0])


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def _scores(values: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    try:
        scores = np.asarray(values, np.float32)
    except (ValueError, TypeError):
        raise InvalidRequest("retrieval_scores holds what is no number; send one finite number a candidate") from None
    if scores.shape != ids.shape:
        raise InvalidRequest(f"retrieval_scores has shape {scores.shape}, item_ids {ids.shape}: one a candidate")
    # The square of what is finite may overflow; only then is each looked at, which takes longer.
    if not math.isfinite(scores.dot(scores)) and not np.isfinite(scores).all():
        at = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise InvalidRequest(f"retrieval_scores[{at}] is {scores[at]}; send finite numbers")
    return scores


def _history(history: History) -> dict[str, NDArray[Any]]:
    """The tensors of a history."""
    ids, _ = _ids(history.item_ids, "history.item_ids")
    if len(ids) > contract.MAX_HISTORY:
        raise InvalidRequest(f"history has {len(ids)} events; the limit is {contract.MAX_HISTORY}: send the newest")
    behaviours = _whole_numbers(history.behaviours, "behaviours", np.int32)
    columns = {"behaviours": np.broadcast_to(behaviours, ids.shape) if not behaviours.ndim else behaviours}
    if history.timestamps is not None:
        columns["timestamps"] = times = _whole_numbers(history.timestamps, "timestamps", np.int64)
        if times.size and times.min() < 0:
            raise InvalidRequest(f"history.timestamps holds {times.min()}; seconds since 1970, 0 or more")
    for name, column in columns.items():
        if column.shape != ids.shape:
            raise InvalidRequest(f"history.{name} has shape {column.shape}, history.item_ids {ids.shape}")
    if not len(ids):
        # One padding event: an empty column reads like one that is not there.
        ids = np.array([contract.PAD_ITEM_ID], np.int64)
        columns = {name: np.zeros(1, column.dtype) for name, column in columns.items()}
    return {"HISTORY_IDS": ids, **{f"HISTORY_{name.upper()}": column for name, column in columns.items()}}


def _whole_numbers(values: Any, what: str, dtype: Any) -> NDArray[Any]:
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.asarray(None)
    if array.size and array.dtype.kind not in "iu":
        raise InvalidRequest(f"history.{what} holds what is no whole number; send one an event")
    limits = np.iinfo(dtype)
    if array.size and not limits.min <= array.min() <= array.max() <= limits.max:
        raise InvalidRequest(f"history.{what} holds {array.max()}; it goes from {limits.min} to {limits.max}")
    return array.astype(dtype, copy=False)
