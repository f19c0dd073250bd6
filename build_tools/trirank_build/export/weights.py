"""Weights beside a graph: protobuf holds 2 GB at most, and a table of ten million items alone may have more.

The graph then names a file beside it, called after its content: so a graph's digest says which weights it has, and
several graphs can lie in one folder (ONNX's external data).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx
import onnx_ir
from google.protobuf.message import DecodeError

from trirank_build.artefacts import WEIGHTS, file_digest
from trirank_build.errors import BadModel

LARGEST = 1_000_000_000
"""Bytes of weights that a graph holds itself."""
_LEAST = 1 << 20
"""Bytes of a tensor that goes into a file."""


def detached(model: onnx_ir.Model, folder: Path) -> onnx.ModelProto:
    """A graph as protobuf; of one with more than LARGEST bytes of weights they are put into a file in ``folder``."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size <= LARGEST:
        return onnx_ir.to_proto(model)
    scratch = folder / f".{os.getpid()}{WEIGHTS}.tmp"
    graph = folder / f".{os.getpid()}.graph.tmp"
    try:
        onnx_ir.save(model, graph, external_data=scratch.name, size_threshold_bytes=_LEAST)
        name = file_digest(scratch)[:16] + WEIGHTS
        os.replace(scratch, folder / name)
        found = onnx.load(str(graph), load_external_data=False)
    finally:
        graph.unlink(missing_ok=True)
        scratch.unlink(missing_ok=True)
    for tensor in _outside(found):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    return found


def weights_of(path: Path, model: onnx.ModelProto | None = None) -> list[Path]:
    """The files that a graph has its weights in; none: they are in it.

    Raises:
        BadModel: one is missing or too short, or lies elsewhere.
    """
    model = onnx.load(str(path), load_external_data=False) if model is None else model
    ends: dict[str, int] = {}
    for tensor in _outside(model):
        said = {entry.key: entry.value for entry in tensor.external_data}
        name = said.get("location", "")
        if name != Path(name).name or not name:
            raise BadModel(f"{path} has weights in {name!r}; they must lie in a file beside it. Export again")
        end = int(said.get("offset", 0)) + int(said.get("length", 0))
        ends[name] = max(ends.get(name, 0), end)
    for name, end in ends.items():
        file = path.with_name(name)
        if not file.is_file():
            raise BadModel(f"{path} has its weights in {name}, which is not beside it; copy both, or export again")
        if file.stat().st_size < end:
            raise BadModel(f"{file} has {file.stat().st_size:,} bytes of {end:,}; copy it again, or export again")
    return [path.with_name(name) for name in sorted(ends)]


def graph_bytes(path: Path) -> int:
    """Size of a graph with its weights."""
    return sum(file.stat().st_size for file in (path, *weights_of(path)))


def copy_graph(path: Path, target: Path) -> None:
    """Copy a graph, and its weights beside it."""
    for file in weights_of(path):
        if target.parent.resolve() != path.parent.resolve():
            shutil.copyfile(file, target.with_name(file.name))
    shutil.copyfile(path, target)


def named_weights(path: Path) -> set[Path]:
    """The files that a graph names, whether they are there or not; none of one that is not there or cannot be read."""
    try:
        outside = _outside(onnx.load(str(path), load_external_data=False))
    except (OSError, DecodeError):
        return set()
    said = [entry.value for tensor in outside for entry in tensor.external_data if entry.key == "location"]
    return {path.with_name(Path(name).name) for name in said}


def drop_unused(path: Path, before: set[Path]) -> None:
    """Remove those of the weights ``before`` that neither the graph at ``path`` nor another beside it names."""
    if not before:
        return
    used = named_weights(path)
    for graph in path.parent.glob("*.onnx"):
        used |= named_weights(graph)
    for file in before - used:
        file.unlink(missing_ok=True)


def _outside(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    return [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
