"""Module → ONNX with dynamic batch and candidate axes, named and typed as the contract says."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxslim
import torch
from torch import nn
from trirank import contract
from trirank_backend.features import FeatureSpec

from trirank_build.artefacts import WEIGHTS, atomic_file
from trirank_build.errors import BadModel
from trirank_build.export.operators import TENSORRT_OPERATORS
from trirank_build.export.parity import Parity, check_parity, sample_inputs
from trirank_build.export.weights import detached, drop_unused, named_weights, weights_of
from trirank_build.models.checkpoint import load_checkpoint, load_weights

OPSET = 18


def export(module: nn.Module, spec: FeatureSpec, path: Path) -> Parity:
    """Write the graph whole or not at all, after it was found equal to the module; large weights go beside it
    (export.weights).

    Raises:
        BadModel: the module does not take or give what the contract says, or the graph differs from it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replaced, before = named_weights(path), set(path.parent.glob(f"*{WEIGHTS}"))
    with atomic_file(path) as scratch:
        write_graph(module, spec, scratch)
        try:
            parity = check_parity(module, scratch, spec)
        except BaseException:
            for file in named_weights(scratch) - before:
                file.unlink(missing_ok=True)
            raise
    drop_unused(path, replaced)
    return parity


def write_graph(module: nn.Module, spec: FeatureSpec, path: Path) -> None:
    """Write the graph, held to the contract but not to the module.

    Raises:
        BadModel: the module does not take or give what the contract says, or cannot be exported.
    """
    module = module.eval()
    inputs = {
        name: torch.from_numpy(array) for name, array in sample_inputs(spec, 2, 64, np.random.default_rng(0)).items()
    }
    _check_call(module, inputs, spec)
    batch, candidates = torch.export.Dim("batch", min=1), torch.export.Dim("candidates", min=1)
    shapes = {
        tensor.name: {0: batch} | ({1: candidates} if tensor.shape[0] < 0 else {})
        for tensor in contract.ranker_inputs(spec.shape)
    }
    advice = "forward must work for any batch and any number of candidates, without branches on values"
    write_module(module, inputs, shapes, "scores", path, advice)
    check_onnx(path, spec)


def write_module(
    module: nn.Module, inputs: dict[str, torch.Tensor], shapes: dict[str, Any], output: str, path: Path, advice: str
) -> None:
    """Write the graph of a module with one output.

    Args:
        shapes: of each input its axes that may have any size, as torch.export takes them.

    Raises:
        BadModel: it cannot be exported.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            program = torch.onnx.export(
                _exported(module),
                kwargs=inputs,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=list(inputs),
                output_names=[output],
                opset_version=OPSET,
                verbose=False,
                external_data=False,
            )
        assert program is not None
        # Drops what the exporter notes about every node (half of a small file) and constants that are there twice.
        # ONNX Runtime's own optimiser would turn INT8 weights back into floats; neither makes the graph faster.
        proto = detached(program.model, path.parent)
        written = onnxslim.slim(proto)
        del written.graph.input[:]  # without those that the module does not use, which Triton sends all the same
        written.graph.input.extend(proto.graph.input)
        onnx.save(written, str(path))
    except Exception as error:  # the exporter raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadModel(f"{type(module).__name__} cannot be exported: {reason}; {advice}") from error


def _exported(module: nn.Module) -> nn.Module:
    """The module in the form that is written: quantised layers hold INT8 there."""
    if not any(hasattr(part, "exported") for part in module.modules()):
        return module
    copied = copy.deepcopy(module)
    for name, part in module.named_modules():
        if hasattr(part, "exported"):
            parent, _, last = name.rpartition(".")
            setattr(copied.get_submodule(parent), last, part.exported())
    return copied


def read_onnx(path: Path) -> onnx.ModelProto:
    """A graph that ONNX's own checker finds whole; weights that lie beside it are not read.

    Raises:
        BadModel: it or its weights are truncated or damaged.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
        weights_of(path, model)
        onnx.checker.check_model(str(path.resolve()))
    except BadModel:
        raise
    except Exception as error:  # protobuf's and onnx's exceptions share no base
        raise BadModel(f"{path} is no whole ONNX graph ({str(error).strip().splitlines()[0]}); export again") from error
    return model


def check_onnx(path: Path, spec: FeatureSpec) -> onnx.ModelProto:
    """Hold a graph to the contract.

    Raises:
        BadModel: it is truncated, of an older opset, or a tensor's name, type or shape differs.
    """
    model = read_onnx(path)
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset < OPSET:
        raise BadModel(f"{path} is of opset {opset}; trirank takes {OPSET} and later, export again")
    for kind, values, specs in (
        ("input", model.graph.input, contract.ranker_inputs(spec.shape)),
        ("output", model.graph.output, contract.ranker_outputs(spec.shape)),
    ):
        found = {value.name: value.type.tensor_type for value in values}
        if set(found) != {tensor.name for tensor in specs}:
            raise BadModel(f"{path}: {kind}s are {sorted(found)}, the contract says {sorted(s.name for s in specs)}")
        for tensor in specs:
            wanted = {"INT32": onnx.TensorProto.INT32, "FP32": onnx.TensorProto.FLOAT}[tensor.dtype]
            dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in found[tensor.name].shape.dim]
            if found[tensor.name].elem_type != wanted or dims != [-1, *tensor.shape]:
                raise BadModel(
                    f"{path}: {kind} {tensor.name} is {onnx.TensorProto.DataType.Name(found[tensor.name].elem_type)} "
                    f"{dims}; the contract says {tensor.dtype} {[-1, *tensor.shape]} (-1: dynamic)"
                )
    return model


def beyond_tensorrt(model: onnx.ModelProto) -> list[str]:
    """Operators of a graph that TensorRT's parser does not take, by name; a CPU engine may run them all the same."""
    used = {f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in model.graph.node}
    return sorted(used - TENSORRT_OPERATORS)


def parse_arguments(text: str, spec: FeatureSpec) -> dict[str, Any]:
    """Constructor arguments from JSON. The values ``"$vocabulary_size"``, ``"$tasks"`` and the other sizes of
    contract.PackedShape stand for what the features were fitted to.

    Raises:
        BadModel: it is no JSON object, or names a size that there is not.
    """
    sizes = {"vocabulary_size": spec.vocabulary_size, **spec.shape._asdict()}
    try:
        arguments = json.loads(text)
        if not isinstance(arguments, dict):
            raise TypeError("not an object")
        return {
            name: sizes[value[1:]] if isinstance(value, str) and value.startswith("$") else value
            for name, value in arguments.items()
        }
    except (ValueError, TypeError, KeyError) as error:
        raise BadModel(
            f"--arguments {text!r} ({error}); write a JSON object, with ${', $'.join(sizes)} for sizes"
        ) from error


def load_module(reference: str, arguments: dict[str, Any], checkpoint: Path) -> nn.Module:
    """A team's own module: ``package.module:Class``, its constructor's arguments, and its weights.

    Raises:
        BadModel: there is no such class, or it cannot be constructed.
        BadCheckpoint: the weights are damaged, unsafe, or of another shape.
    """
    name, _, attribute = reference.partition(":")
    try:
        kind = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadModel(
            f"{reference} cannot be imported ({error}); write package.module:Class, on the Python path"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise BadModel(f"{reference} is no torch.nn.Module class")
    try:
        module = kind(**arguments)
    except TypeError as error:
        raise BadModel(f"{reference} cannot be made with {json.dumps(arguments)}: {error}; see --arguments") from error
    load_weights(module, load_checkpoint(checkpoint)[0], checkpoint)
    return module.eval()


def _check_call(module: nn.Module, inputs: dict[str, torch.Tensor], spec: FeatureSpec) -> None:
    try:
        with torch.inference_mode():
            scores = module(**inputs)
    except Exception as error:  # a team's code may raise anything
        raise BadModel(
            f"{type(module).__name__}.forward({', '.join(inputs)}) failed on a sample batch: {error}"
        ) from error
    wanted = (*inputs["candidates"].shape[:2], spec.shape.tasks)
    if not isinstance(scores, torch.Tensor) or tuple(scores.shape) != wanted or scores.dtype != torch.float32:
        found = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise BadModel(
            f"{type(module).__name__}.forward gives {found}; the contract says float32 {list(wanted)} [B, N, T]"
        )
