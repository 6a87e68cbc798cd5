"""Edits of a quantized graph besides its convolutions: what is held exactly, what is bounded."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper


def one_hot(graph: onnx.GraphProto) -> set[str]:
    """Find the tensors that hold 0 and 1 only.

    Args:
        graph: The FP32 or the INT8 graph.

    Returns:
        The names of comparisons that are cast to numbers, and of their transposes and
        concatenations.
    """
    booleans = {node.output[0] for node in graph.node if node.op_type == "Equal"}
    booleans |= {
        tensor.name
        for tensor in graph.input
        if tensor.type.tensor_type.elem_type == onnx.TensorProto.BOOL
    }
    names: set[str] = set()
    for node in graph.node:
        moved = node.op_type in ("Concat", "Transpose") and names.issuperset(node.input)
        if moved or (node.op_type == "Cast" and node.input[0] in booleans):
            names.add(node.output[0])
    return names


def hold_exactly(graph: onnx.GraphProto) -> None:
    """Hold one-hot tensors as uint8 and dequantize them with a step of 1: nothing is rounded.

    Args:
        graph: The quantized graph; changed in place.
    """
    exact = one_hot(graph)
    quantized = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] in exact
    }
    back = {
        n.output[0]: quantized[n.input[0]]
        for n in graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in quantized
    }
    if not back:
        return
    graph.initializer.append(numpy_helper.from_array(np.float32(1), "one_hot/step"))
    graph.initializer.append(numpy_helper.from_array(np.uint8(0), "one_hot/zero"))
    nodes = []
    for node in (n for n in graph.node if n.output[0] not in {*quantized, *back}):
        nodes.append(node)
        node.input[:] = [back.get(name, name) for name in node.input]
        if node.op_type == "Cast" and node.output[0] in exact:
            (to,), (name,) = node.attribute, node.output
            to.i, node.output[0] = onnx.TensorProto.UINT8, f"{name}/uint8"
            dequantized_from = [node.output[0], "one_hot/step", "one_hot/zero"]
            nodes.append(
                helper.make_node(
                    "DequantizeLinear", dequantized_from, [name], f"{name}/DequantizeLinear"
                )
            )
    input_names = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in graph.initializer if tensor.name in input_names]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)


def bound_concatenated(graph: onnx.GraphProto) -> None:
    """Take the maximum of each concatenated tensor and its lowest step before it is quantized.

    No value changes, because quantizing ends there too. Without the node OpenVINO 2026.4 moves a
    signed quantization before the concatenation, and there rounds to whole numbers instead of
    steps: images were wrong by 140 to 200 HU (docs/decisions/0034-int8-that-tensorrt-takes.md). A
    `Clip` of the same ends is taken away again.

    Args:
        graph: The quantized graph; changed in place.
    """
    concatenated = {n.output[0] for n in graph.node if n.op_type == "Concat"}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in concatenated:
            name = node.input[0]
            lowest = np.float32(-128) * constants[node.input[1]]
            graph.initializer.append(numpy_helper.from_array(lowest, f"{name}/lowest"))
            bounded = f"{name}/bounded"
            nodes.append(
                helper.make_node("Max", [name, f"{name}/lowest"], [bounded], f"{name}/Max")
            )
            node.input[0] = bounded
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
