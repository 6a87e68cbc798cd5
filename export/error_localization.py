"""Per-stage error localization: in which stage of the network an exported graph goes wrong.

The outputs of the graph's stages are compared with those of the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .graph import LabelsToIntensity

SLICES = 4  # synthesized to localize the error
PREFIX = "generator."
# The relative error of a stage's output that rounding alone may cause.
ROUNDING = {"fp32": 1e-5, "fp16": 3e-3, "int8": 5e-2, "int8-gpu": 5e-2}
# The graph's output. Where it alone is wrong, the error lies behind the generator.
IMAGE = "image in HU"


@dataclass(frozen=True)
class StageError:
    """The error of one stage's output.

    Attributes:
        name: The stage's name in the network.
        error: The root mean square of the difference, relative to that of the network's values.
    """

    name: str
    error: float


def stages(graph: LabelsToIntensity) -> dict[str, nn.Module]:
    """The parts of the generator whose errors are told apart.

    Args:
        graph: The network.

    Returns:
        The modules by their name in the network, in the order of execution.
    """
    generator = graph.generator
    modules: dict[str, nn.Module] = {}
    for name, child in generator.named_children():
        parts = (
            list(child.named_children())
            if isinstance(child, nn.ModuleList) or name == "top"
            else []
        )
        modules.update({f"{name}.{inner}": part for inner, part in parts} or {name: child})
    return modules


def stage_errors(
    graph: LabelsToIntensity, path: Path, inputs: Mapping[str, NDArray[Any]]
) -> list[StageError]:
    """Measure the error of each stage of an exported file.

    Args:
        graph: The network that the file was exported from.
        path: The ONNX file.
        inputs: The network's inputs by name; the first few slices are used.

    Returns:
        The stages in the order of the graph, the image last.
    """
    import onnxruntime

    few = {name: array[:SLICES] for name, array in inputs.items()}
    expected = _network(graph, few)
    model = onnx.load(path)
    outputs = {**_outputs(model.graph, list(expected)), IMAGE: model.graph.output[0].name}
    have = {value.name for value in model.graph.output}
    model.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in outputs.values() if name not in have
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    values = session.run(list(outputs.values()), few)
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        values[:-1] = [
            _rescale_channels(output, expected[stage])
            for stage, output in zip(outputs, values[:-1], strict=False)
        ]
    values[-1] = _hu(values[-1])
    return [
        StageError(stage, _error(output, expected[stage]))
        for stage, output in zip(outputs, values, strict=True)
    ]


def worst_stage(measured: list[StageError], precision: str) -> StageError:
    """The stage where the error starts.

    Args:
        measured: What `stage_errors` returned.
        precision: One of `ROUNDING`.

    Returns:
        The stage whose error is the largest multiple of the errors before it, or of rounding alone.
    """
    before, ratios = ROUNDING[precision], []
    for stage in measured:
        ratios.append(stage.error / before)
        before = max(before, stage.error)
    return measured[int(np.argmax(ratios))]


def table(measured: list[StageError], precision: str) -> str:
    """A table of the stages for a person, with the worst one marked.

    Args:
        measured: What `stage_errors` returned.
        precision: One of `ROUNDING`.

    Returns:
        Lines of text.
    """
    bad, width = worst_stage(measured, precision), max(len(stage.name) for stage in measured)
    rows = [
        f"    {r.name:<{width}}  {100 * r.error:9.4f} %{'  <- the worst stage' if r is bad else ''}"
        for r in measured
    ]
    return "\n".join(["  error of each stage's output, relative to the network's:", *rows])


def _network(
    graph: LabelsToIntensity, inputs: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """The output of each stage of the network by name, and the image in HU, last."""
    outputs: dict[str, NDArray[Any]] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs[name] = output.float().numpy()

        return hook

    handles = [
        module.register_forward_hook(hook_for(name)) for name, module in stages(graph).items()
    ]
    try:
        with torch.inference_mode():
            outputs[IMAGE] = _hu(
                graph(**{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()
            )
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _outputs(graph: onnx.GraphProto, names: list[str]) -> dict[str, str]:
    """Stage → the tensor it ends with, for every stage whose nodes are in the graph."""
    ends: dict[str, str] = {}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        module = node.name.removeprefix(PREFIX).split("/")[0]
        for name in names:
            if module == name or module.startswith(f"{name}."):
                ends.pop(name, None)  # in the order in which the stages end
                ends[name] = node.output[0]
    return ends


def _rescale_channels(output: NDArray[Any], expected: NDArray[Any]) -> NDArray[Any]:
    """Scale each channel to be nearest to `expected`.

    INT8 graphs hold channels at other scales, which the layers after them undo.
    """
    if output.shape != expected.shape:
        return output
    axes = (0, *range(2, output.ndim))
    product = (output * expected).sum(axes, np.float64, keepdims=True)
    power = (output * output).sum(axes, np.float64, keepdims=True)
    return output * np.maximum(product / np.maximum(power, 1e-30), 0)


def _error(output: NDArray[Any], expected: NDArray[Any]) -> float:
    """The root mean square of the difference, relative to that of `expected`."""
    if output.shape != expected.shape:
        return float("inf")
    scale = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
    difference = np.sqrt(np.mean(np.square(output.astype(np.float64) - expected)))
    return float(difference) / max(scale, 1e-12)


def _hu(pairs: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Little-endian pairs of bytes (…, 2) as int16 HU."""
    return np.ascontiguousarray(pairs).view("<i2")[..., 0]
