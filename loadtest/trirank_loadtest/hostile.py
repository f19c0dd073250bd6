"""Requests that no sane client sends, of any model of a server: what it must shrug off without harm to anybody else.

Every model of a Triton server can be called, the stages of an ensemble too. From a model's own configuration come
tensors of right names and types whose shapes and values are anything, and now and then a wrong type, name or buffer.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.grpc import service_pb2, service_pb2_grpc

_WHOLE: dict[str, Any] = {"INT64": np.int64, "INT32": np.int32}
_SIZES = (0, 1, 2, 3, 8, 64, 256, 1024, 1025)


def hostile_calls(address: str, model: str, count: int, seed: int = 0, timeout_s: float = 10.0) -> Counter[str]:
    """Make ``count`` hostile calls of a model, one after the other.

    Returns:
        How often each gRPC status came back; OK among them.
    """
    rng = np.random.default_rng(seed)
    found: Counter[str] = Counter()
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        config = stub.ModelConfig(service_pb2.ModelConfigRequest(name=model), timeout=timeout_s).config
        for _ in range(count):
            try:
                stub.ModelInfer(_hostile(config, rng), timeout=timeout_s)
                found["OK"] += 1
            except grpc.RpcError as error:  # noqa: PERF203  # is what is counted
                found[error.code().name] += 1
    return found


def _hostile(config: Any, rng: np.random.Generator) -> Any:
    message = service_pb2.ModelInferRequest(model_name=config.name)
    varied = int(rng.choice(_SIZES))
    for tensor in config.input:
        if tensor.optional and rng.random() < 0.5:
            continue
        dtype = pb.DataType.Name(tensor.data_type).removeprefix("TYPE_").replace("STRING", "BYTES")
        # Mostly of one length, so that a call gets through to where lengths are no longer looked at.
        length = varied if rng.random() < 0.8 else int(rng.choice(_SIZES))
        shape = [1, *(length if axis < 0 else axis for axis in tensor.dims)]
        raw = _contents(dtype, int(np.prod(shape)), rng)
        luck = rng.random()
        if luck < 0.03:
            shape = [*shape, 1]
        elif luck < 0.06:
            raw = raw[: len(raw) // 2]
        elif luck < 0.09:
            dtype = "INT64" if dtype != "INT64" else "FP32"
        message.inputs.add(name=tensor.name, datatype=dtype, shape=shape)
        message.raw_input_contents.append(raw)
    return message


def _contents(dtype: str, count: int, rng: np.random.Generator) -> bytes:
    if dtype == "BYTES":
        words = [b"home", b"search", bytes(rng.integers(0, 256, int(rng.integers(0, 3000)), np.uint8))]
        chosen = [words[at] for at in rng.integers(0, 3, count)]
        return b"".join(len(word).to_bytes(4, "little") + word for word in chosen)
    if dtype == "FP32":
        odd = np.array([np.nan, np.inf, -np.inf, 0, 1, -1, 3e38], np.float32)
        return np.where(rng.random(count) < 0.5, rng.normal(size=count), rng.choice(odd, count)).astype("<f4").tobytes()
    limits = np.iinfo(_WHOLE[dtype])
    odd = np.array([limits.min, limits.max, -1, 0, 1, 2, 7, 63, 10**6], _WHOLE[dtype])
    mild = rng.integers(0, 5, count).astype(_WHOLE[dtype])  # often lawful, so that the odd ones are met further in
    return np.where(rng.random(count) < rng.choice([0.0, 0.02, 0.5]), rng.choice(odd, count), mild).tobytes()
