"""The reports that lie beside an exported graph: that it equals its module, and that its ranking survived.

`trirank export` and `trirank gate` write them, `trirank assemble` takes no graph without them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx

from trirank_build.artefacts import atomic_file, file_digest
from trirank_build.errors import BadModel
from trirank_build.export.beside import gate_path, parity_path
from trirank_build.export.onnx import beyond_tensorrt, export
from trirank_build.export.parity import Parity
from trirank_build.training.run import TrainedRun


def export_run(run: TrainedRun, onnx_path: Path) -> None:
    """Write a run's ranker as a graph, and the export's report beside it.

    Raises:
        BadModel: the graph differs from its module.
    """
    module = run.model()
    write_parity(onnx_path, export(module, run.features.spec, onnx_path), type(module).__name__)


def write_parity(onnx_path: Path, parity: Parity, module: str) -> dict[str, Any]:
    """Leave the export's report beside its graph; `assemble` takes no graph without one. Gives the report."""
    beyond = beyond_tensorrt(onnx.load(str(onnx_path), load_external_data=False))
    report = {"onnx": file_digest(onnx_path), "module": module, "beyond_tensorrt": beyond, **parity.to_json()}
    with atomic_file(parity_path(onnx_path)) as scratch:
        scratch.write_text(json.dumps(report, indent=1) + "\n")
    return report


def gate_of(onnx_path: Path, run: TrainedRun, allow_failing: bool) -> dict[str, Any] | None:
    """The gate's report on this very graph; None where there is none and none is needed.

    Raises:
        BadModel: it failed, or it is missing and the ranker is compressed.
    """
    path, allow = gate_path(onnx_path), "or say --allow-failing-gate"
    report: dict[str, Any] | None = None
    if path.is_file():
        try:
            read: dict[str, Any] = json.loads(path.read_text())
            report = read if read["onnx"] == file_digest(onnx_path) else None
        except (ValueError, KeyError) as error:
            raise BadModel(f"{path} is no report of the gate ({error}); run `trirank gate` again") from error
    if allow_failing:
        return report
    if report is None and run.facts.get("compression"):
        raise BadModel(f"{onnx_path} is compressed and has no report of the gate; run `trirank gate` on it, {allow}")
    if report is not None and not report["passed"]:
        raise BadModel(f"{onnx_path} did not pass the gate: {'; '.join(report['failures'])}. Compress less, {allow}")
    return report


def parity_of(onnx_path: Path) -> dict[str, Any]:
    """The export's report on this very graph.

    Raises:
        BadModel: there is none.
    """
    path = parity_path(onnx_path)
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        if report["onnx"] == file_digest(onnx_path):
            return report
        reason = "it is of another graph"
    except (OSError, ValueError, KeyError) as error:
        reason = str(error)
    raise BadModel(f"{onnx_path} has no parity report {path.name} ({reason}); make both with `trirank export`")
