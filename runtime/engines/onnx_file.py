"""Check that an ONNX file holds its own weights; a graph with external data is refused.

The manifest states the SHA-256 of the graph, but not of a file that the graph names, which could be
any file of the machine. Export writes no such graph. The check walks the messages of onnx.proto
that can hold a tensor and skips everything else, the weights included. It takes a millisecond and
does not need the onnx package.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import ModelError, reading

MAX_DEPTH = 64  # of graphs within graphs
MAX_FIELDS = 4_000_000  # more than any network has
# onnx.proto: message → field number → message in it, as far as it can hold a tensor
MESSAGES: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {},
}
EXTERNAL_DATA, DATA_LOCATION = 13, 14  # fields of a TensorProto
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


def check_weights(path: Path) -> None:
    """Check that the ONNX file at `path` holds all of its weights.

    Args:
        path: the file.

    Raises:
        ModelError: the file keeps weights in other files, or is not an ONNX file.
    """
    expected = "an ONNX graph as export writes it, with its weights in it"
    with reading(path, expected, ModelError), open(path, "rb") as handle:
        try:
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                external = any(_external_tensors(data))
        except ValueError as exc:  # an empty file cannot be mapped
            raise ModelError(
                f"{path.name} is not a graph: {exc}",
                expected=expected,
                remedy="export the run again",
                file=path,
            ) from exc
    if external:
        raise ModelError(
            f"{path.name} keeps weights in other files, which no manifest describes",
            expected=expected,
            remedy="export the run again",
            file=path,
        )


def _external_tensors(data: mmap.mmap) -> Iterator[bool]:
    """Yield for each field of a tensor whether it refers to another file.

    Raises:
        ValueError: the file is not an ONNX file.
    """
    fields = 0
    pending = [("ModelProto", 0, len(data), 0)]
    while pending:
        message, position, end, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise ValueError("its graphs are nested too deeply")
        while position < end:
            fields += 1
            if fields > MAX_FIELDS:
                raise ValueError("it has too many fields")
            key, position = _varint(data, position, end)
            # protobuf drops the upper bits and would read another field than this walk
            if key >> 32:
                raise ValueError("a field of it has a number that no ONNX file has")
            number, kind = key >> 3, key & 7
            value, position = (
                _varint(data, position, end) if kind in (VARINT, BYTES) else (0, position)
            )
            start = position
            position += {VARINT: 0, BYTES: value, FIXED64: 8, FIXED32: 4}.get(kind, end)
            if position > end:
                raise ValueError("it is not an ONNX file, or it is cut off")
            if message == "TensorProto":
                yield number == EXTERNAL_DATA or (number == DATA_LOCATION and value != 0)
            elif kind == BYTES and (inner := MESSAGES[message].get(number)):
                pending.append((inner, start, position, depth + 1))


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    """A varint of protobuf and the position behind it."""
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("it is not an ONNX file, or it is cut off")
