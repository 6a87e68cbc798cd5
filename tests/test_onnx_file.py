"""A graph is taken only with its weights in it: what the manifest's SHA-256 does not cover is
not read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime.core.errors import ModelError
from runtime.engines.onnx_file import MESSAGES, check_weights


def elsewhere(location: str = "weights.bin") -> TensorProto:
    tensor = TensorProto(
        name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value=location)
    return tensor


def model(node_tensor: TensorProto | None = None, **graph: object) -> onnx.ModelProto:
    """`ct = labels + w`; `node_tensor`: the value of a constant besides."""
    weights = numpy_helper.from_array(np.zeros(4, np.float32), "w")
    nodes = [helper.make_node("Add", ["labels", "w"], ["ct"])]
    if node_tensor is not None:
        nodes.append(helper.make_node("Constant", [], ["c"], value=node_tensor))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("labels", "ct")
    ]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], **{"initializer": [weights], **graph})
    return helper.make_model(made)


def nested(depth: int) -> onnx.ModelProto:
    graph = model(elsewhere()).graph
    for _ in range(depth):
        graph = helper.make_graph(
            [helper.make_node("If", ["x"], ["y"], then_branch=graph)], "g", [], []
        )
    return helper.make_model(graph)


def function() -> onnx.ModelProto:
    made = model()
    constant = helper.make_node("Constant", [], ["c"], value=elsewhere())
    made.functions.append(
        helper.make_function("own", "F", [], ["c"], [constant], [helper.make_opsetid("", 18)])
    )
    return made


def sparse() -> onnx.ModelProto:
    made = model()
    made.graph.sparse_initializer.add().values.CopyFrom(elsewhere())
    return made


def training() -> onnx.ModelProto:
    made = model()
    made.training_info.add().algorithm.CopyFrom(model(initializer=[elsewhere()]).graph)
    return made


ELSEWHERE = {
    "beside": lambda: model(initializer=[elsewhere()]),
    "above": lambda: model(initializer=[elsewhere("../weights.bin")]),
    "anywhere": lambda: model(initializer=[elsewhere("/etc/passwd")]),
    "in a constant": lambda: model(elsewhere()),
    "in a branch": lambda: nested(3),
    "in a function": function,
    "in a sparse tensor": sparse,
    "in a training graph": training,
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_external_onnx_weights_are_refused(where: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(ELSEWHERE[where]().SerializeToString())
    with pytest.raises(ModelError, match=r"model\.onnx keeps weights in other files"):
        check_weights(path)


def test_embedded_onnx_weights_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model(numpy_helper.from_array(np.ones(3, np.float32))).SerializeToString())
    check_weights(path)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 50, b"\x3a\xff\xff\xff\xff\x0f", b"\x0b", b"\x08" * 9]
)
def test_bad_onnx_graph_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.onnx is not a graph"):
        check_weights(path)


def field(number: int, content: bytes) -> bytes:
    """A message within another, as protobuf writes it."""
    size, length = len(content), b""
    while size > 0x7F:
        length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def test_endless_onnx_graphs_are_refused(tmp_path: Path) -> None:
    graph, path = b"", tmp_path / "model.onnx"
    for _ in range(500):
        graph = field(1, field(5, field(6, graph)))  # a node's attribute that is a graph
    path.write_bytes(field(7, graph))
    with pytest.raises(ModelError, match="too deep"):
        check_weights(path)


def test_wide_onnx_field_numbers(tmp_path: Path) -> None:
    """A field number that is too wide hides no weights.

    ONNX Runtime and OpenVINO drop what a field's key has beyond 32 bits: to them this is the graph,
    with its weights elsewhere.
    """
    path = tmp_path / "model.onnx"
    graph = model(initializer=[elsewhere()]).graph.SerializeToString()
    path.write_bytes(b"\xba\x80\x80\x80\x10" + field(7, graph)[1:])
    with pytest.raises(ModelError, match="is not a graph: a field of it has a number"):
        check_weights(path)


def test_truncated_onnx_graph_is_refused(tmp_path: Path) -> None:
    """Where the cut falls into the graph; the checksum of the manifest covers the rest."""
    whole, path = ELSEWHERE["in a branch"]().SerializeToString(), tmp_path / "model.onnx"
    for length in range(20, len(whole) - 20):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            check_weights(path)


def test_tensor_messages_of_onnx_are_known() -> None:
    """Every message that holds a tensor is known.

    onnx.proto itself is asked: a message or a field that a later version gains shows here.
    """
    messages = onnx.ModelProto.DESCRIPTOR.file.message_types_by_name
    holding, before = {"TensorProto"}, set[str]()
    while holding != before:
        before = set(holding)
        holding |= {
            m.name
            for m in messages.values()
            if any(f.message_type and f.message_type.name in before for f in m.fields)
        }
    known = {
        name: {
            f.number: f.message_type.name
            for f in messages[name].fields
            if f.message_type and f.message_type.name in holding
        }
        for name in holding
    }
    known["TensorProto"] = {}
    assert known == MESSAGES
    tensor = messages["TensorProto"].fields_by_name
    assert (tensor["external_data"].number, tensor["data_location"].number) == (13, 14)
