"""What tests of several rooms share."""

from __future__ import annotations

from trirank import contract
from trirank_build.artefacts import file_digest
from trirank_build.engines.plan import PlanManifest

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
