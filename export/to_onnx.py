"""The graph as an ONNX file, opset 21, with dynamic N, H and W."""

from __future__ import annotations

import ast
import logging
import sys
import warnings
from collections import Counter
from pathlib import Path

import onnx
import onnxscript.optimizer
import torch

from runtime.core.manifest import METADATA, Manifest, TensorSpec

from .graph import LabelsToIntensity

OPSET = 21  # the first with native GroupNormalization and 16-bit casts; TensorRT >= 10.9 parses it
_EXAMPLE = {
    "N": 2,
    "H": 2,
    "W": 3,
}  # in units of the divisor for H, W: unlike numbers, none of them 1, so that none is baked in


def example_inputs(specs: tuple[TensorSpec, ...], divisor: int) -> dict[str, torch.Tensor]:
    """Zeros of the inputs' dtypes with some allowed N, H, W."""
    sizes = {"N": _EXAMPLE["N"], "H": _EXAMPLE["H"] * divisor, "W": _EXAMPLE["W"] * divisor}
    shapes = {s.name: [sizes[d] if isinstance(d, str) else d for d in s.shape] for s in specs}
    return {s.name: torch.zeros(shapes[s.name], dtype=getattr(torch, s.dtype)) for s in specs}


def to_onnx(graph: LabelsToIntensity, manifest: Manifest, path: Path) -> None:
    """Write `graph` to `path` (not atomically: the model folder around it is).

    H and W stay multiples of the grid's divisor.

    The file states the manifest's contract (`Manifest.statement`), and its nodes bear the names of
    the network's modules. Raises onnx's `ValidationError` when the written graph does not pass the
    full checker.
    """
    specs, divisor = manifest.inputs, manifest.grid.divisor
    batch = torch.export.Dim("N", min=1)
    multiple = {
        "H": torch.export.Dim("h", min=1) * divisor,
        "W": torch.export.Dim("w", min=1) * divisor,
    }
    shapes = {
        s.name: {
            axis: batch if d == "N" else multiple[d]
            for axis, d in enumerate(s.shape)
            if isinstance(d, str)
        }
        for s in specs
    }
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        quiet = logging.getLogger("torch.onnx")
        level = quiet.level
        quiet.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                graph.eval(),
                (),
                kwargs=example_inputs(specs, divisor),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                input_names=[s.name for s in specs],
                output_names=[manifest.output.name],
                external_data=False,
                verbose=False,
            )
        finally:
            quiet.setLevel(level)
    assert program is not None
    onnxscript.optimizer.optimize(
        program.model, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize
    )  # large weights too
    model = program.model_proto
    name_nodes(model.graph)
    onnx.helper.set_model_props(model, {METADATA: manifest.signature()})
    onnx.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)


def name_nodes(graph: onnx.GraphProto) -> None:
    """Name each node MODULE/OPERATOR, such as generator.encoder.0.0/Conv, and drop what else the
    exporter notes of its source.
    """
    seen: Counter[str] = Counter()
    for node in graph.node:
        notes = {note.key: note.value for note in node.metadata_props}
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
        module = next((scope for scope in reversed(scopes[:-1]) if scope), "graph").replace(
            ".layer", ""
        )  # of export.graph.Half
        name = f"{module}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}.{seen[name]}"
        node.ClearField("metadata_props")
    for noted in (graph, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        noted.ClearField(
            "metadata_props"
        )  # the graph's are in another order each time: the same network is to be the same file
