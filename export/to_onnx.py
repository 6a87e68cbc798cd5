"""Export of the graph as an ONNX file, opset 21, with dynamic N, H and W."""

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

# The first with native GroupNormalization and 16-bit casts; TensorRT >= 10.9 parses it.
OPSET = 21
# H and W in units of the divisor. Neither is 1 and they differ, so that the exporter takes no size
# for a constant.
_EXAMPLE = {"N": 2, "H": 2, "W": 3}


def example_inputs(specs: tuple[TensorSpec, ...], divisor: int) -> dict[str, torch.Tensor]:
    """Zeros of the inputs' dtypes, at some N, H and W that the graph allows.

    Args:
        specs: The graph's inputs.
        divisor: What H and W are multiples of.

    Returns:
        A tensor for each input, by name.
    """
    sizes = {"N": _EXAMPLE["N"], "H": _EXAMPLE["H"] * divisor, "W": _EXAMPLE["W"] * divisor}
    shapes = {s.name: [sizes[d] if isinstance(d, str) else d for d in s.shape] for s in specs}
    return {s.name: torch.zeros(shapes[s.name], dtype=getattr(torch, s.dtype)) for s in specs}


def to_onnx(graph: LabelsToIntensity, manifest: Manifest, path: Path) -> None:
    """Write `graph` to `path`; H and W stay multiples of the grid's divisor.

    The file is not written atomically: the model folder around it is. It carries the manifest's
    graph signature (`Manifest.signature`), and its nodes bear the names of the network's modules.

    Args:
        graph: The network to export; it is put into evaluation mode.
        manifest: Names, dtypes and shapes of the inputs and of the output.
        path: The file to write.

    Raises:
        onnx.checker.ValidationError: The written graph does not pass ONNX's full check.
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
    # without a limit of size, so that large weights are folded too
    onnxscript.optimizer.optimize(
        program.model, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize
    )
    model = program.model_proto
    name_nodes(model.graph)
    onnx.helper.set_model_props(model, {METADATA: manifest.signature()})
    onnx.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)


class NodeNames:
    """The names of a graph's nodes: MODULE/OPERATOR, such as generator.encoder.0.0/Conv.

    The second node of an operator in one module ends in ".2", and so on.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def next(self, module: str, operator: str) -> str:
        """The name of the next node of `operator` in `module` ("": outside of every module)."""
        # export.graph.Fp16Layer wraps a layer as its attribute `layer`
        name = f"{(module or 'graph').replace('.layer', '')}/{operator}"
        self._counts[name] += 1
        return name if self._counts[name] == 1 else f"{name}.{self._counts[name]}"


def name_nodes(graph: onnx.GraphProto) -> None:
    """Name each node after its module (`NodeNames`) and drop the exporter's notes.

    Args:
        graph: The exporter's graph; changed in place.
    """
    names = NodeNames()
    for node in graph.node:
        notes = {note.key: note.value for note in node.metadata_props}
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
        module = next((scope for scope in reversed(scopes[:-1]) if scope), "")
        node.name = names.next(module, node.op_type)
        node.ClearField("metadata_props")
    # The graph's own notes come in another order each time, but the same network has to give the
    # same file.
    for element in (graph, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        element.ClearField("metadata_props")
