"""RankRequest → protobuf and protobuf → RankResponse; no side effects, shared by every kind of client.

The KServe message is built directly: tensors go once from numpy to ``raw_input_contents``.
"""

from __future__ import annotations

import operator
import struct
from functools import lru_cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from trirank import contract
from trirank._errors import IncompatibleServer, InvalidRequest
from trirank._types import ItemIds, RankRequest, RankResponse

_SPECS = {spec.name: spec for spec in contract.REQUEST}
_NUMPY = {"INT64": np.int64, "INT32": np.int32, "FP32": np.float32}
_INT64, _INT32 = struct.Struct("<q"), struct.Struct("<i")
_PADDING = _INT64.pack(contract.PAD_ITEM_ID) * contract.MAX_CANDIDATES
_ZEROS = bytes(4 * contract.MAX_CANDIDATES)


def encode(request: RankRequest, model: str) -> tuple[Any, dict[int, str]]:
    """The ModelInferRequest of a request, and the id → string map of string ids.

    Raises:
        InvalidRequest: a value that no server would accept; nothing was sent.
    """
    ids, names = candidate_ids(request)
    if (ids == contract.PAD_ITEM_ID).any():
        raise InvalidRequest(f"item_ids holds {contract.PAD_ITEM_ID}, which stands for padding; leave it out")
    try:
        bucket = contract.bucket_for(len(ids))
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    top_k = _whole(request.top_k, "top_k")
    if not 1 <= top_k <= contract.MAX_TOP_K:
        raise InvalidRequest(f"top_k is {top_k}; it goes from 1 to {contract.MAX_TOP_K}")
    query = _text(request.query, "query")
    if len(query) > contract.MAX_QUERY_BYTES:
        raise InvalidRequest(f"query has {len(query)} bytes; the limit is {contract.MAX_QUERY_BYTES}")
    scenario = request.scenario or ("search" if request.query else "home")

    tensors: dict[str, tuple[int, bytes]] = {
        "USER_ID": (1, _INT64.pack(_user(request.user_id))),
        "ITEM_IDS": (bucket, _padded(ids, bucket, _PADDING)),
        "TOP_K": (1, _INT32.pack(top_k)),
        "SCENARIO": (1, _with_length(_text(scenario, "scenario"))),
    }
    if query:
        tensors["QUERY"] = (1, _with_length(query))
    if request.retrieval_scores is not None:
        scores = np.asarray(request.retrieval_scores, np.float32)
        if scores.shape != ids.shape:
            raise InvalidRequest(f"retrieval_scores has shape {scores.shape}, item_ids {ids.shape}: one a candidate")
        if not np.isfinite(scores).all():
            at = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise InvalidRequest(f"retrieval_scores[{at}] is {scores[at]}; send finite numbers")
        tensors["RETRIEVAL_SCORES"] = (bucket, _padded(scores, bucket, _ZEROS))
    if request.timestamp is not None:
        timestamp = _whole(request.timestamp, "timestamp")
        if not 0 <= timestamp < 2**63:
            raise InvalidRequest(f"timestamp is {timestamp}; it is seconds since 1970, 0 or more")
        tensors["TIMESTAMP"] = (1, _INT64.pack(timestamp))
    if request.history is not None:
        _add_history(tensors, request)
    message = service_pb2.ModelInferRequest.FromString(
        _header(model, tuple((name, length) for name, (length, _) in tensors.items()))
    )
    message.raw_input_contents.extend([raw for _, raw in tensors.values()])
    return message, names


@lru_cache(256)
def _header(model: str, tensors: tuple[tuple[str, int], ...]) -> bytes:
    """A message with everything but contents. Requests of a service have few different ones, and reading one back is
    several times faster than adding tensor by tensor."""
    message = service_pb2.ModelInferRequest(model_name=model)
    for name, length in tensors:
        message.inputs.add(name=name, datatype=_SPECS[name].dtype, shape=(1, length))
    written: bytes = message.SerializeToString()
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
        IncompatibleServer: an output of the contract is missing or of another type.
    """
    found = {
        output.name: (output.datatype, raw)
        for output, raw in zip(reply.outputs, reply.raw_output_contents, strict=True)
    }
    arrays: dict[str, NDArray[Any]] = {}
    for spec in contract.RESPONSE:
        datatype, raw = found.get(spec.name, ("absent", b""))
        if datatype != spec.dtype:
            raise IncompatibleServer(
                f"output {spec.name} is {datatype}, not {spec.dtype}; this client speaks contract "
                f"{contract.CONTRACT_VERSION}: install the client that fits the server"
            )
        arrays[spec.name] = np.frombuffer(raw, _NUMPY[spec.dtype])
    ids = arrays["RANKED_IDS"]
    count = int(np.count_nonzero(ids != contract.PAD_ITEM_ID))
    status, unknown, duplicates, filtered = arrays["STATUS"].tolist()
    return RankResponse(
        item_ids=ids[:count],
        scores=arrays["SCORES"][:count],
        reasons=arrays["REASONS"][:count],
        status=contract.Status(status),
        unknown=unknown,
        duplicates=duplicates,
        filtered=filtered,
        names=names,
    )


def _ids(values: ItemIds, what: str) -> tuple[NDArray[np.int64], dict[int, str]]:
    if len(values) and isinstance(values[0], str):
        names: dict[int, str] = {}
        for value in values:
            if not isinstance(value, str):
                raise InvalidRequest(f"{what} mixes strings with {value!r}; send one kind")
            names[contract.stable_id(value)] = value
        return np.fromiter((contract.stable_id(str(value)) for value in values), np.int64, len(values)), names
    array = np.asarray(values)
    if array.ndim != 1:
        raise InvalidRequest(f"{what} has {array.ndim} dimensions; it is a flat list")
    if array.size and array.dtype.kind not in "iu":
        raise InvalidRequest(f"{what} has dtype {array.dtype}; ids are integers of at most 64 bits, or strings")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise InvalidRequest(f"{what} holds {array.max()}, above the largest INT64")
    return array.astype(np.int64, copy=False), {}


def _text(value: str, what: str) -> bytes:
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


def _padded(array: NDArray[Any], length: int, padding: bytes) -> bytes:
    raw = array.tobytes()
    return raw + padding[: length * array.itemsize - len(raw)]


def _with_length(value: bytes) -> bytes:
    """One element of a BYTES tensor."""
    return len(value).to_bytes(4, "little") + value


def _add_history(tensors: dict[str, tuple[int, bytes]], request: RankRequest) -> None:
    history = request.history
    assert history is not None
    ids, _ = _ids(history.item_ids, "history.item_ids")
    if len(ids) > contract.MAX_HISTORY:
        raise InvalidRequest(f"history has {len(ids)} events; the limit is {contract.MAX_HISTORY}: send the newest")
    columns = {"HISTORY_BEHAVIOURS": np.broadcast_to(np.asarray(history.behaviours, np.int32), ids.shape)}
    if history.timestamps is not None:
        columns["HISTORY_TIMESTAMPS"] = np.asarray(history.timestamps, np.int64)
    if not len(ids):
        # Triton has no room for an empty tensor here; one padding event says the same.
        ids = np.array([contract.PAD_ITEM_ID], np.int64)
        columns = {name: np.zeros(1, column.dtype) for name, column in columns.items()}
    tensors["HISTORY_IDS"] = (len(ids), ids.tobytes())
    for name, column in columns.items():
        if column.shape != ids.shape:
            raise InvalidRequest(f"{name.lower()} has shape {column.shape}, history.item_ids {ids.shape}")
        tensors[name] = (len(ids), column.tobytes())
