"""What lies beside an exported graph, and where."""

from __future__ import annotations

from pathlib import Path


def parity_path(onnx_path: Path) -> Path:
    """Where `trirank export` leaves its report."""
    return onnx_path.with_suffix(".parity.json")


def gate_path(onnx_path: Path) -> Path:
    """Where `trirank gate` leaves its report."""
    return onnx_path.with_suffix(".gate.json")


def engine_path(onnx_path: Path) -> Path:
    """Where the choice of an engine stays once it was measured."""
    return onnx_path.with_suffix(".engine.json")
