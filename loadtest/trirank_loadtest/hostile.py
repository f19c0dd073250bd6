"""Requests that no sane client sends, of any model of a server: what it must shrug off without harm to anybody else.

Every model of a Triton server can be called, the stages of an ensemble too. From a model's own configuration come
tensors of right names and types whose shapes and values are anything, and now and then a wrong type, name or buffer.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections import Counter
from typing import Any, NamedTuple

import grpc
import numpy as np
from trirank import contract, packing
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.grpc import service_pb2, service_pb2_grpc

_WHOLE: dict[str, Any] = {"INT64": np.int64, "INT32": np.int32, "UINT8": np.uint8}
_SIZES, _ROWS = (0, 1, 2, 3, 8, 64, 100, 256, 1024, 1025), (1, 1, 1, 1, 1, 2, 33, 0)


_HTTP = {200: "OK", 400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 500: "INTERNAL", 503: "UNAVAILABLE"}


class Answers(NamedTuple):
    """What came back: how often each gRPC status (HTTP's by the same names), and what was said with any that no caller
    has earned: neither OK nor INVALID_ARGUMENT."""

    statuses: Counter[str]
    broken: list[str]


def hostile_calls(
    address: str, model: str, count: int, seed: int = 0, timeout_s: float = 10.0, over_http: str | None = None
) -> Answers:
    """Make ``count`` hostile calls of a model, one after the other.

    Args:
        address: ``host:port`` of gRPC, which is asked for the model's configuration in any case.
        over_http: ``host:port`` of HTTP, to which calls go then, as binary tensors; None: they go by gRPC.
    """
    rng = np.random.default_rng(seed)
    found = Answers(Counter(), [])
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        config = stub.ModelConfig(service_pb2.ModelConfigRequest(name=model), timeout=timeout_s).config
        for _ in range(count):
            message = _hostile(config, rng)
            status, words = (
                _by_grpc(stub, message, timeout_s) if over_http is None else _by_http(over_http, message, timeout_s)
            )
            found.statuses[status] += 1
            if status not in ("OK", "INVALID_ARGUMENT"):
                found.broken.append(f"{status}: {words}")
    return found


def _by_grpc(stub: Any, message: Any, timeout_s: float) -> tuple[str, str]:
    try:
        stub.ModelInfer(message, timeout=timeout_s)
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""
    return "OK", ""


def _by_http(address: str, message: Any, timeout_s: float) -> tuple[str, str]:
    """The same message, as KServe's binary extension of HTTP has it."""
    inputs = [
        {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape),
         "parameters": {"binary_data_size": len(raw)}}
        for tensor, raw in zip(message.inputs, message.raw_input_contents, strict=True)
    ]  # fmt: skip
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    request = urllib.request.Request(
        f"http://{address}/v2/models/{message.model_name}/infer",
        head + b"".join(message.raw_input_contents),
        {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            reply.read()
            return "OK", ""
    except urllib.error.HTTPError as error:
        return _HTTP.get(error.code, str(error.code)), error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:  # it did not answer, or not in time
        return "UNAVAILABLE", str(error)


def _hostile(config: Any, rng: np.random.Generator) -> Any:
    message = service_pb2.ModelInferRequest(model_name=config.name)
    varied, rows = int(rng.choice(_SIZES)), int(rng.choice(_ROWS))
    packed = contract.PACKED_REQUEST.name in {tensor.name for tensor in config.input} and rng.random() < 0.3
    for tensor in config.input:
        if _left_out(tensor, packed, rng):
            continue
        dtype = pb.DataType.Name(tensor.data_type).removeprefix("TYPE_").replace("STRING", "BYTES")
        # Mostly of lengths that fit each other, so that a call gets through to where lengths are no longer looked at.
        length = varied if rng.random() < 0.9 else int(rng.choice(_SIZES))
        if tensor.name == contract.HANDOVER.name:
            length = contract.HANDOVER_HEADER + 2 * length
        shape = [rows, *(length if axis < 0 else axis for axis in tensor.dims)]
        raw = _contents(dtype, int(np.prod(shape)), rng)
        if tensor.name == contract.HANDOVER.name and rng.random() < 0.8:
            raw = _mostly_lawful(raw, shape)
        if tensor.name == contract.PACKED_REQUEST.name:
            rows, raw = 1, _packed(rng)
            shape = [rows, len(raw)]
        luck = rng.random()
        if luck < 0.02:
            shape = [*shape, 1]
        elif luck < 0.04:
            raw = raw[: len(raw) // 2]
        elif luck < 0.06:
            dtype = "INT64" if dtype != "INT64" else "FP32"
        message.inputs.add(name=tensor.name, datatype=dtype, shape=shape)
        message.raw_input_contents.append(raw)
    return message


def _left_out(tensor: Any, packed: bool, rng: np.random.Generator) -> bool:
    """Mostly so that a call gets through the door: what is required, or all in one."""
    if tensor.name == contract.PACKED_REQUEST.name:
        return not packed and rng.random() < 0.98
    if packed:
        return bool(rng.random() < 0.98)
    needed = tensor.name in contract.REQUIRED
    return bool(tensor.optional and rng.random() < (0.03 if needed else 0.5))


def _packed(rng: np.random.Generator) -> bytes:
    """All tensors in one, of lawful and odd contents, and now and then with a byte, a number or its end changed."""
    length, contents = int(rng.choice(_SIZES)), {}
    for place, spec in enumerate(contract.REQUEST):
        if spec.optional and rng.random() < (0.03 if spec.name in contract.REQUIRED else 0.5):
            continue
        raw = _contents(spec.dtype, length if spec.shape == (-1,) else 1, rng)
        contents[place] = raw[4:] if spec.dtype == "BYTES" else raw
    if rng.random() < 0.3:  # so that some get through to where the work is done
        contents = _lawful(rng)
    message = bytearray(packing.pack(contents))
    luck = rng.random() if rng.random() < 0.7 else 1.0
    if luck < 0.1:
        message[int(rng.integers(len(message)))] ^= 1 << int(rng.integers(8))
    elif luck < 0.2:
        at = 4 * int(rng.integers(min(len(message) // 4, 1 + 2 * len(contents))))
        message[at : at + 4] = int(rng.choice([-(2**31), -1, 0, 3, 2**31 - 1])).to_bytes(4, "little", signed=True)
    elif luck < 0.3:
        del message[int(rng.integers(len(message))) :]
    return bytes(message)


def _lawful(rng: np.random.Generator) -> dict[int, bytes]:
    """A request that is answered, of any items that there may be."""
    ids = rng.integers(1, 1000, int(rng.integers(1, contract.MAX_CANDIDATES)))
    said = {
        "USER_ID": np.int64(rng.integers(-1, 50)).tobytes(), "ITEM_IDS": ids.astype("<i8").tobytes(),
        "TOP_K": np.int32(rng.integers(1, 20)).tobytes(), "SCENARIO": b"home",
    }  # fmt: skip
    places = packing.places(contract.REQUEST)
    return {places[name]: content for name, content in said.items()}


def _mostly_lawful(raw: bytes, shape: list[int]) -> bytes:
    """A handover whose counts fit its length, so that it gets through to its rows and signals."""
    numbers = np.frombuffer(raw, np.int32).reshape(shape).copy()
    numbers[:, 3] = np.clip(numbers[:, 3], 1, 4)  # TOP_K
    numbers[:, 4:8] = 0  # the policy, unknown candidates, retrieval's scores, a trace
    numbers[:, 17] %= 2  # whether the answer is packed
    return numbers.tobytes()


def _contents(dtype: str, count: int, rng: np.random.Generator) -> bytes:
    """Lawful values, one or a few odd ones among them, or nothing else."""
    if dtype == "BYTES":
        words = [b"home", b"search", bytes(rng.integers(0, 256, int(rng.integers(0, 3000)), np.uint8))]
        chosen = [words[at] for at in rng.choice(3, count, p=[0.7, 0.2, 0.1])]
        return b"".join(len(word).to_bytes(4, "little") + word for word in chosen)
    odd_ones = min(count, int(rng.choice([0, 1, 3, count], p=[0.5, 0.2, 0.2, 0.1])))
    spoilt = rng.choice(count, odd_ones, replace=False) if odd_ones else np.zeros(0, np.int64)
    if dtype == "FP32":
        numbers = rng.normal(size=count).astype(np.float32)
        numbers[spoilt] = rng.choice(np.array([np.nan, np.inf, -np.inf, 0, 3e38], np.float32), odd_ones)
        return numbers.tobytes()
    limits = np.iinfo(_WHOLE[dtype])
    values = rng.integers(0, 5, count).astype(_WHOLE[dtype])
    odd = np.array([limits.min, limits.max, -1, 0, 7, 63, 10**6]).astype(_WHOLE[dtype])
    values[spoilt] = rng.choice(odd, odd_ones)
    return values.tobytes()
