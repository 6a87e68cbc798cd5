"""A model made by hand in milliseconds: the whole contract (Z = 3, style, noise), one
convolution, no training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from fake_engines import plan_of
from onnx import TensorProto, helper, numpy_helper

from runtime.core.atomic_files import sha256_of, write_json
from runtime.core.labels import MM_WHS
from runtime.core.manifest import METADATA, GridPolicy, Intensity, Manifest, ModelFile

STYLE = 4


def manifest() -> Manifest:
    grid = GridPolicy((64, 64), (3.0, 3.0), 32, 3, 5.0)
    return Manifest(
        "made by hand",
        MM_WHS,
        grid,
        Intensity("HU", -1024, 1024),
        style=STYLE,
        noise=True,
        files={},
    )


def graph(made: Manifest, size: int | None = None) -> bytes:
    """A 5 x 5 convolution over the three slices, plus noise, plus the style's sum, in HU.

    `size`: it computes one slice of size x size alone.
    """
    weights = np.random.default_rng(0).normal(0, 8, (1, 3, 5, 5)).astype(np.float32)
    numbers = {
        "w": weights,
        "128": 128.0,
        "scale": 0.5,
        "gain": 40.0,
        "low": -1024.0,
        "high": 1024.0,
        "0": 0.0,
        "65536": 65536.0,
        "256": 256.0,
    }
    values = {name: np.asarray(value, np.float32) for name, value in numbers.items()}
    axes = {"one": [1], "last": [-1], "planes": [2, 3]}
    initializers = [numpy_helper.from_array(value, name) for name, value in values.items()]
    if size is not None:
        axes["fixed"] = [1, 1, size, size]
    initializers += [
        numpy_helper.from_array(np.array(value, np.int64), name) for name, value in axes.items()
    ]
    steps = [
        ("Cast", ["labels"], "l", {"to": TensorProto.FLOAT}),
        ("Conv", ["l", "w"], "c" if size is None else "c0", {"pads": [2, 2, 2, 2]}),
        *([] if size is None else [("Reshape", ["c0", "fixed"], "c", {})]),
        ("Cast", ["noise"], "n0", {"to": TensorProto.FLOAT}),
        ("Unsqueeze", ["n0", "one"], "n1", {}),
        ("Sub", ["n1", "128"], "n2", {}),
        ("Mul", ["n2", "scale"], "n", {}),
        ("ReduceSum", ["style", "one"], "s0", {"keepdims": 1}),
        ("Unsqueeze", ["s0", "planes"], "s1", {}),
        ("Mul", ["s1", "gain"], "s", {}),
        ("Add", ["c", "n"], "v0", {}),
        ("Add", ["v0", "s"], "v1", {}),
        ("Round", ["v1"], "v2", {}),
        ("Clip", ["v2", "low", "high"], "v", {}),
        ("Less", ["v", "0"], "negative", {}),
        ("Add", ["v", "65536"], "wrapped", {}),
        ("Where", ["negative", "wrapped", "v"], "u", {}),
        ("Div", ["u", "256"], "h0", {}),
        ("Floor", ["h0"], "hi", {}),
        ("Mul", ["hi", "256"], "h1", {}),
        ("Sub", ["u", "h1"], "lo", {}),
        ("Squeeze", ["lo", "one"], "lo1", {}),
        ("Squeeze", ["hi", "one"], "hi1", {}),
        ("Unsqueeze", ["lo1", "last"], "lo2", {}),
        ("Unsqueeze", ["hi1", "last"], "hi2", {}),
        ("Concat", ["lo2", "hi2"], "bytes", {"axis": -1}),
        ("Cast", ["bytes"], "ct", {"to": TensorProto.UINT8}),
    ]
    kinds = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}
    inputs = [
        helper.make_tensor_value_info(t.name, kinds[t.dtype], list(t.shape)) for t in made.inputs
    ]
    output = helper.make_tensor_value_info("ct", TensorProto.UINT8, list(made.output.shape))
    nodes = [
        helper.make_node(op, ins, [out], name=out, **attributes)
        for op, ins, out, attributes in steps
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "hand", inputs, [output], initializers),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    helper.set_model_props(model, {METADATA: made.signature()})
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def write_model(folder: Path, size: int | None = None) -> Path:
    """The folder with its FP32 graph, the same as "FP16" and as engines of the fake GPU, so
    that results must agree to the bit.
    """
    folder.mkdir(parents=True)
    made = manifest()
    data = graph(made, size)
    files = {}
    for name, kind, precision, content in (
        ("model.onnx", "onnx", "fp32", data),
        ("model.fp16.onnx", "onnx", "fp16", data),
        ("model.engine", "engine", "fp16", plan_of(data, made)),
        ("model.rtx.engine", "rtx-engine", "fp16", plan_of(data, made)),
    ):
        (folder / name).write_bytes(content)
        facts = {"compute_capabilities": ["8.6", "8.9"]} if kind == "rtx-engine" else {}
        files[name] = ModelFile(kind, precision, len(content), sha256_of(folder / name), facts)
    whole = {**made.to_json(), "files": {name: vars(file) for name, file in files.items()}}
    write_json(folder / "manifest.json", whole)
    return folder
