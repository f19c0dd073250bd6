"""What does Triton itself cost? Stages that do nothing, alone and three in a row, against what the ranking ensemble
adds to its stages in process.

    python benchmarks/hops.py

The difference between a stage in process and the same stage in a stub is cold caches and wake-ups; the rest is hops.
"""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from results import Figure, write
from trirank_build.serving.tritonserver import find_tritonserver
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException

MODEL = """import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([pb_utils.Tensor(
            "OUT", pb_utils.get_input_tensor_by_name(request, "IN").as_numpy())]) for request in requests]
"""
TENSOR = 'input {{ name: "IN" data_type: TYPE_FP32 dims: {n} }} output {{ name: "OUT" data_type: TYPE_FP32 dims: {n} }}'
CALLS, ROUNDS, STAGES = 500, 7, 3


def repository(folder: Path, size: int) -> None:
    """Stages s0 to s2 that give back what they get, and an ensemble of all three."""
    tensors = TENSOR.format(n=size)
    for at in range(STAGES):
        version = folder / "models" / f"s{at}" / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(MODEL)
        (version.parent / "config.pbtxt").write_text(f'name: "s{at}" backend: "python" max_batch_size: 8 {tensors}')
    steps = ", ".join(
        f'{{ model_name: "s{at}" model_version: -1 '
        f'input_map {{ key: "IN" value: "{"IN" if at == 0 else f"t{at}"}" }} '
        f'output_map {{ key: "OUT" value: "{"OUT" if at == STAGES - 1 else f"t{at + 1}"}" }} }}'
        for at in range(STAGES)
    )
    (folder / "models" / "rank" / "1").mkdir(parents=True)
    (folder / "models" / "rank" / "config.pbtxt").write_text(
        f'name: "rank" platform: "ensemble" max_batch_size: 8 {tensors} ensemble_scheduling {{ step [ {steps} ] }}'
    )


@contextmanager
def bare_triton(models: Path, scratch: Path) -> Iterator[str]:
    """The gRPC address of a server on a repository that is no release of ours."""
    binary = find_tritonserver(None, scratch)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [
        str(binary.path), *binary.arguments, f"--model-repository={models}", "--allow-http=false",
        "--allow-metrics=false", "--grpc-address=127.0.0.1", f"--grpc-port={address.partition(':')[2]}",
    ]  # fmt: skip
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, env={**os.environ, **binary.environment}, stdout=quiet, stderr=quiet)
    try:
        with triton.InferenceServerClient(address) as client:
            while True:
                try:
                    if client.is_server_ready():
                        break
                except InferenceServerException:  # it does not listen yet
                    assert process.poll() is None, "tritonserver has ended"
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:  # it waits for connections that are gone
            process.kill()
            process.wait()


def p50(client: triton.InferenceServerClient, model: str, size: int) -> float:
    """Median ms of a call."""
    tensor = triton.InferInput("IN", [1, size], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, size), np.float32))
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        client.infer(model, [tensor])
        times.append((time.perf_counter() - started) * 1e3)
    return float(np.median(times))


def main() -> None:
    """Measure and write ``results/hops.json``."""
    size = 256 * 22  # about what a request's largest tensor holds
    rounds: dict[str, list[float]] = {"one_stage_p50_ms": [], "three_stages_p50_ms": [], "hop_ms": []}
    with tempfile.TemporaryDirectory() as scratch:
        repository(Path(scratch), size)
        with bare_triton(Path(scratch) / "models", Path(scratch)) as address:
            client = triton.InferenceServerClient(address)
            p50(client, "rank", size)
            for _ in range(ROUNDS):
                one, three = p50(client, "s0", size), p50(client, "rank", size)
                rounds["one_stage_p50_ms"].append(one)
                rounds["three_stages_p50_ms"].append(three)
                rounds["hop_ms"].append((three - one) / (STAGES - 1))
            client.close()
    figures = [
        Figure(
            name,
            round(float(np.median(v)), 4),
            round(min(v), 4),
            round(max(v), 4),
            "ms",
            "stages that do nothing",
        )
        for name, v in rounds.items()
    ]
    write("hops", figures)
    for figure in figures:
        print(f"{figure.name:24} {figure.value:.3f} ms [{figure.low:.3f}, {figure.high:.3f}]")


if __name__ == "__main__":
    main()
