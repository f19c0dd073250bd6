"""PyTriton: functions of Python bound to a Triton of its own, an instance for each of PEER_WORKERS. The request is one
BYTES tensor, so that Triton may batch requests of any length.

    PEER_RELEASE=… PEER_WORKERS=2 PEER_MAX_BATCH=32 python benchmarks/peers/pytriton_server.py PORT
"""

from __future__ import annotations

import socket
import sys
from typing import Any

import numpy as np
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
from stages import Stages, max_batch, workers


class Instance:
    """One instance's function; its stages are loaded by the first call, in the thread that makes it."""

    stages: Stages | None = None

    def __call__(self, requests: list[Any]) -> list[dict[str, np.ndarray]]:
        self.stages = self.stages or Stages()
        answers = self.stages([bytes(request["REQUEST"][0, 0]) for request in requests])
        return [{"RESPONSE": np.array([[answer]], object)} for answer in answers]


def free_port() -> int:
    """Of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    ports = {"grpc_port": int(sys.argv[1]), "http_port": free_port(), "metrics_port": free_port()}
    hosts = {f"{name}_address": "127.0.0.1" for name in ("http", "grpc", "metrics")}
    with Triton(config=TritonConfig(**ports, **hosts)) as triton:
        triton.bind(
            model_name="rank",
            infer_func=[Instance() for _ in range(workers())],
            inputs=[Tensor(name="REQUEST", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="RESPONSE", dtype=bytes, shape=(1,))],
            config=ModelConfig(batching=max_batch() > 1, max_batch_size=max_batch(), batcher=DynamicBatcher()),
            strict=False,
        )
        triton.serve()
