"""What tests of several rooms share."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager

from trirank import contract
from trirank_build.artefacts import file_digest
from trirank_build.engines.plan import PlanManifest
from trirank_build.serving.tritonserver import find_tritonserver

METRICS = {
    "nv_inference_request_success", "nv_inference_request_failure", "nv_inference_count", "nv_inference_exec_count",
    "nv_inference_request_duration_us", "nv_inference_queue_duration_us", "nv_inference_compute_infer_duration_us",
    "nv_inference_pending_request_count", "nv_cpu_utilization", "nv_cpu_memory_used_bytes", "nv_cpu_memory_total_bytes",
    "trirank_release_ndcg10",
}  # fmt: skip
"""All that dashboard, alerts and HPA ask for; tests/e2e holds a real server to it."""


def manifest_of(plan, onnx, **changes):
    """A manifest that says that a file is a plan of TensorRT built from a graph."""
    profiles = [
        {"bucket": b, "min_batch": 1, "opt_batch": 8, "max_batch": contract.MAX_BATCH} for b in contract.BUCKETS
    ]
    fields = {
        "flavour": "tensorrt", "version": "10.8.0", "sm": "sm86", "cuda": "12", "flags": [], "workspace_bytes": 1 << 30,
        "profiles": profiles, "onnx": file_digest(onnx), "plan": file_digest(plan),
    }  # fmt: skip
    return PlanManifest(**(fields | changes))


@contextmanager
def bare_server(models, tmp_path, *arguments):
    """Triton as somebody else might start it."""
    binary = find_tritonserver(None, tmp_path / "server")
    ports = []
    for _ in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    command = [
        str(binary.path), *binary.arguments, f"--model-repository={models}", "--exit-on-error=false",
        "--exit-timeout-secs=10", *arguments,  # of 30 by default, as long as the wait below was: seen once to take all
        *(f"--{name}-address=127.0.0.1" for name in ("grpc", "http", "metrics")),
        *(f"--{name}-port={port}" for name, port in zip(("grpc", "http", "metrics"), ports, strict=True)),
    ]  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **binary.environment})
    try:
        deadline = time.monotonic() + 60
        while True:  # by HTTP, which stays plain where gRPC is encrypted
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{ports[1]}/v2/health/live", timeout=1)
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield f"127.0.0.1:{ports[0]}"
    finally:
        process.terminate()
        process.wait(60)
