"""Multiply-accumulates of an ONNX graph, counted from its nodes at fixed input sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import onnx

COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def count(path: Path, sizes: Mapping[str, int]) -> int:
    """Count the multiply-accumulates of one run: convolutions and matrix products.

    Norms, activations and resizing are not counted, as is usual.

    Args:
        path: The ONNX file.
        sizes: The sizes of the named dimensions N, H and W.

    Returns:
        The count.
    """
    nodes, shapes = _inferred(path, sizes)
    return sum(_node(node, shapes) for node in nodes)


def traffic(path: Path, sizes: Mapping[str, int], bytes_per_value: int) -> int:
    """Count the bytes that convolutions read and write in one run, weights included.

    Each tensor counts once: a device without a cache moves no less.

    Args:
        path: The ONNX file.
        sizes: The sizes of the named dimensions N, H and W.
        bytes_per_value: 2 for FP16.

    Returns:
        Bytes.
    """
    nodes, shapes = _inferred(path, sizes)
    moved = (
        math.prod(shapes[name])
        for node in nodes
        if node.op_type in COUNTED
        for name in (*node.input[:2], node.output[0])
    )
    return bytes_per_value * sum(moved)


def _inferred(
    path: Path, sizes: Mapping[str, int]
) -> tuple[list[onnx.NodeProto], dict[str, tuple[int, ...]]]:
    """The graph's nodes, and the shape of every tensor."""
    model = onnx.load(str(path))
    for tensor in model.graph.input:
        for axis, dim in enumerate(tensor.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value"):
                dim.dim_value = _size(axis, len(tensor.type.tensor_type.shape.dim), sizes)
    del model.graph.value_info[:]  # written for dynamic sizes
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {t.name: tuple(t.dims) for t in inferred.initializer}
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    return list(inferred.node), shapes


def _size(axis: int, rank: int, sizes: Mapping[str, int]) -> int:
    """N first; H and W last where the tensor is an image (labels, noise)."""
    if axis == 0:
        return sizes["N"]
    return sizes["H"] if axis == rank - 2 else sizes["W"]


def _node(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Multiply-accumulates of one node."""
    if node.op_type not in COUNTED:
        return 0
    x, weight, out = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    if node.op_type == "Conv":  # weight (out, in / groups, kernel …)
        return math.prod(out) * math.prod(weight[1:])
    # weight (in, out / groups, kernel …): every input value is multiplied by all of it
    if node.op_type == "ConvTranspose":
        return math.prod(x) * math.prod(weight[1:])
    return math.prod(out) * x[-1]
