"""A graph as TensorRT wants it, saying the same.

TensorRT takes an INT8 constant only where DequantizeLinear follows it at once. CPU engines are fast when rows of an
INT8 table are gathered first and scaled after; here the table is dequantised first, which TensorRT does once, while
it builds. Codes of codebooks, which are INT8 numbers and nothing quantised, become INT32.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def for_tensorrt(model: onnx.ModelProto) -> onnx.ModelProto:
    """The rewritten graph; the given one stays as it is."""
    written = onnx.ModelProto()
    written.CopyFrom(model)
    graph = written.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for gather in [node for node in graph.node if node.op_type == "Gather"]:
        table = constants.get(gather.input[0])
        if table is None or table.data_type != TensorProto.INT8:
            continue
        (cast,) = _followers(graph, gather)
        followers = _followers(graph, cast)
        if cast.op_type == "Cast" and len(followers) == 1 and followers[0].op_type == "Mul":
            (scaled,) = followers
            scale = _producer(graph, next(name for name in scaled.input if name != cast.output[0]))
            gather.input[0] = _dequantised(graph, table, constants[scale.input[0]])
            gather.output[0] = scaled.output[0]
            for node in (cast, scaled, scale):
                graph.node.remove(node)
        else:
            gather.input[0] = _as_int32(graph, table)
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    return written


def _dequantised(graph: onnx.GraphProto, table: TensorProto, scale: TensorProto) -> str:
    """Put a DequantizeLinear of all rows in front; gives its output."""
    flat, name = numpy_helper.to_array(scale).reshape(-1), f"{table.name}_dequantised"
    if name in {node.output[0] for node in graph.node}:
        return name
    graph.initializer.extend([
        numpy_helper.from_array(flat, f"{name}_scale"),
        numpy_helper.from_array(np.zeros(len(flat), np.int8), f"{name}_zero"),
    ])  # fmt: skip
    inputs = [table.name, f"{name}_scale", f"{name}_zero"]
    graph.node.insert(0, helper.make_node("DequantizeLinear", inputs, [name], axis=0))
    return name


def _as_int32(graph: onnx.GraphProto, table: TensorProto) -> str:
    name = f"{table.name}_int32"
    if name not in {tensor.name for tensor in graph.initializer}:
        graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(table).astype(np.int32), name))
    return name


def _followers(graph: onnx.GraphProto, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [other for other in graph.node if node.output[0] in other.input]


def _producer(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(node for node in graph.node if name in node.output)
