"""`trirank engine explain`: which engine a plan is, for which GPU, from which model, and whether it is any good."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from trirank_build.engines.lock import key_of
from trirank_build.engines.machine import Machine
from trirank_build.engines.plan import PlanManifest, load_plan_manifest
from trirank_build.engines.verify import verify
from trirank_build.export.beside import gate_path
from trirank_build.export.onnx import read_onnx


def explain(plan: Path, onnx_path: Path | None = None, machine: Machine | None = None) -> list[tuple[str, str]]:
    """Question and answer, one after the other.

    Args:
        onnx_path: the graph that it came from, if at hand: what is in it and what the gate said of it.

    Raises:
        BadModel: the plan has no readable manifest, or is no longer what was built, or the graph is damaged.
    """
    manifest = load_plan_manifest(plan)
    machine = machine or Machine.here()
    answers = [
        ("file", f"{plan}, {plan.stat().st_size / 1e6:.1f} MB, digest {manifest.plan[:12]}"),
        ("made by", f"{manifest.flavour} {manifest.version}, CUDA {manifest.cuda}"),
        ("for", _gpus(manifest)),
        ("flags", ", ".join(manifest.flags) or "none"),
        ("workspace", f"{manifest.workspace_bytes >> 20} MiB"),
        ("profiles", "; ".join(_profile(profile) for profile in manifest.profiles)),
        ("key", key_of(manifest).digest[:12]),
        ("from ONNX", manifest.onnx[:12]),
    ]
    if onnx_path is not None:
        answers += _graph(onnx_path)
        answers.append(("gate", _gate(onnx_path, manifest)))
    answers.append(("as it was built", "; ".join(verify(plan, onnx_path)) or "yes"))
    here = [sm for sm in machine.sms if manifest.runs_on(sm)]
    gpus = ", ".join(machine.sms) or "no GPU"
    answers.append(("runs here", f"yes, on {here[0]}" if here else f"no: this machine has {gpus}"))
    return answers


def _gpus(manifest: PlanManifest) -> str:
    also = {
        "none": "and no other GPU",
        "ampere_plus": "and any GPU from Ampere on",
        "same_compute_capability": "and any other GPU of that compute capability",
    }
    return f"{manifest.sm}, {also[manifest.hardware_compatibility]}"


def _profile(profile: dict[str, int]) -> str:
    return "{bucket} candidates: batch {min_batch} to {max_batch}, best at {opt_batch}".format(**profile)


def _graph(path: Path) -> list[tuple[str, str]]:
    graph = read_onnx(path).graph
    operators = Counter(node.op_type for node in graph.node).most_common()
    stored: Counter[str] = Counter()
    for tensor in graph.initializer:
        kind = TensorProto.DataType.Name(tensor.data_type)
        stored[kind] += int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    sizes = ", ".join(f"{size / 1e3:,.1f} kB of {kind}" for kind, size in stored.most_common())
    return [
        ("operators", ", ".join(f"{count} {name}" for name, count in operators[:8])),
        ("weights", sizes),
    ]


def _gate(onnx_path: Path, manifest: PlanManifest) -> str:
    path = gate_path(onnx_path)
    if not path.is_file():
        return f"no report {path.name}; run `trirank gate`"
    report = json.loads(path.read_text())
    if report["onnx"] != manifest.onnx:
        return f"{path.name} is of another graph, {report['onnx'][:12]}"
    last = report["stages"][-1]
    ratio = last["ndcg_ratio"]
    interval = f"[{ratio['low']:.4f}, {ratio['high']:.4f}]"
    kept = f"NDCG@10 {last['ndcg10']['value']:.4f}, {ratio['value']:.4f} {interval} of the dense ranker's"
    if report["passed"]:
        return f"passed: {kept} ({last['stage']})"
    return f"failed: {'; '.join(report['failures'])}; {kept}"
