"""RankRequest → protobuf and protobuf → RankResponse; no side effects, shared by every kind of client.

The KServe message is built directly: tensors go once from numpy to ``raw_input_contents``.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from trirank import contract
from trirank._errors import IncompatibleServer, InvalidRequest
from trirank._types import ItemIds, RankRequest, RankResponse

_SPECS = {spec.name: spec for spec in contract.REQUEST}
_NUMPY = {"INT64": np.int64, "INT32": np.int32, "FP32": np.float32}
_INT32 = np.iinfo(np.int32)


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
    if not 1 <= request.top_k <= contract.MAX_TOP_K:
        raise InvalidRequest(f"top_k is {request.top_k}; it goes from 1 to {contract.MAX_TOP_K}")
    query = _text(request.query, "query")
    if len(query) > contract.MAX_QUERY_BYTES:
        raise InvalidRequest(f"query has {len(query)} bytes; the limit is {contract.MAX_QUERY_BYTES}")
    scenario = request.scenario or ("search" if request.query else "home")

    message = service_pb2.ModelInferRequest(model_name=model)
    user = (
        contract.ANONYMOUS_USER
        if request.user_id is None
        else _ids(cast("list[str]", [request.user_id]), "user_id")[0][0]
    )
    _add(message, "USER_ID", np.array([user], np.int64))
    _add(message, "ITEM_IDS", _padded(ids, bucket, contract.PAD_ITEM_ID))
    _add(message, "TOP_K", np.array([request.top_k], np.int32))
    _add_bytes(message, "SCENARIO", _text(scenario, "scenario"))
    if query:
        _add_bytes(message, "QUERY", query)
    if request.retrieval_scores is not None:
        scores = np.asarray(request.retrieval_scores, np.float32)
        if scores.shape != ids.shape:
            raise InvalidRequest(f"retrieval_scores has shape {scores.shape}, item_ids {ids.shape}: one a candidate")
        if not np.isfinite(scores).all():
            at = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise InvalidRequest(f"retrieval_scores[{at}] is {scores[at]}; send finite numbers")
        _add(message, "RETRIEVAL_SCORES", _padded(scores, bucket, 0))
    if request.timestamp is not None:
        if not 0 <= request.timestamp < 2**63:
            raise InvalidRequest(f"timestamp is {request.timestamp}; it is seconds since 1970, 0 or more")
        _add(message, "TIMESTAMP", np.array([request.timestamp], np.int64))
    if request.history is not None:
        _add_history(message, request)
    return message, names


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


def _padded(array: NDArray[Any], length: int, fill: int) -> NDArray[Any]:
    if len(array) == length:
        return np.ascontiguousarray(array)
    padded = np.full(length, fill, array.dtype)
    padded[: len(array)] = array
    return padded


def _add(message: Any, name: str, array: NDArray[Any]) -> None:
    message.inputs.add(name=name, datatype=_SPECS[name].dtype, shape=(1, len(array)))
    message.raw_input_contents.append(array.tobytes())


def _add_bytes(message: Any, name: str, value: bytes) -> None:
    message.inputs.add(name=name, datatype="BYTES", shape=(1, 1))
    message.raw_input_contents.append(len(value).to_bytes(4, "little") + value)


def _add_history(message: Any, request: RankRequest) -> None:
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
    _add(message, "HISTORY_IDS", ids)
    for name, column in columns.items():
        if column.shape != ids.shape:
            raise InvalidRequest(f"{name.lower()} has shape {column.shape}, history.item_ids {ids.shape}")
        _add(message, name, column)
