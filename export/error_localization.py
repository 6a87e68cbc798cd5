"""Where in the network an exported graph goes wrong: the outputs of its stages against those of
the network itself.
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

SLICES = 4  # synthesized to find the region
PREFIX = "generator."
ROUNDING = {
    "fp32": 1e-5,
    "fp16": 3e-3,
    "int8": 5e-2,
}  # relative errors of whole regions that a right file may have
IMAGE = (  # the whole graph's output: what goes wrong here alone lies behind the generator
    "image in HU"
)


@dataclass(frozen=True)
class Region:
    """A stage's output: `error` is the root mean square of what differs over that of the
    network's values.
    """

    name: str
    error: float


def stages(graph: LabelsToIntensity) -> dict[str, nn.Module]:
    """The parts of the generator in which errors are told apart, by their name in the network,
    in the order of their work.
    """
    generator = graph.generator
    found: dict[str, nn.Module] = {}
    for name, child in generator.named_children():
        parts = (
            list(child.named_children())
            if isinstance(child, nn.ModuleList) or name == "top"
            else []
        )
        found.update({f"{name}.{inner}": part for inner, part in parts} or {name: child})
    return found


def regions(
    graph: LabelsToIntensity, path: Path, inputs: Mapping[str, NDArray[Any]]
) -> list[Region]:
    """The error of each stage of the graph in `path` on the first `inputs`, in the order of the
    graph, the image last.
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
    found = session.run(list(outputs.values()), few)
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        found[:-1] = [
            _as_large(got, expected[stage]) for stage, got in zip(outputs, found[:-1], strict=False)
        ]
    found[-1] = _hu(found[-1])
    return [
        Region(stage, _error(got, expected[stage]))
        for stage, got in zip(outputs, found, strict=True)
    ]


def worst(found: list[Region], precision: str) -> Region:
    """The region whose error is the largest multiple of all errors before it, or of what
    rounding alone makes of it.
    """
    before, ratios = ROUNDING[precision], []
    for region in found:
        ratios.append(region.error / before)
        before = max(before, region.error)
    return found[int(np.argmax(ratios))]


def table(found: list[Region], precision: str) -> str:
    """The regions for a person, the worst marked."""
    bad, width = worst(found, precision), max(len(region.name) for region in found)
    rows = [
        f"    {r.name:<{width}}  {100 * r.error:9.4f}"
        f" %{'  <- the worst region' if r is bad else ''}"
        for r in found
    ]
    return "\n".join(["  error of each region's output, relative to the network's:", *rows])


def _network(
    graph: LabelsToIntensity, inputs: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    outputs: dict[str, NDArray[Any]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs[name] = output.float().numpy()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in stages(graph).items()]
    try:
        with torch.inference_mode():
            outputs[IMAGE] = _hu(
                graph(**{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()
            )
    finally:
        for handle in handles:
            handle.remove()
    return outputs  # the image is last


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


def _as_large(found: NDArray[Any], expected: NDArray[Any]) -> NDArray[Any]:
    """`found` with each channel scaled to be nearest to `expected`: INT8 holds channels at other
    scales, which the layers after undo.
    """
    if found.shape != expected.shape:
        return found
    along = (0, *range(2, found.ndim))
    product, power = (
        (found * other).sum(along, np.float64, keepdims=True) for other in (expected, found)
    )
    return found * np.maximum(product / np.maximum(power, 1e-30), 0)


def _error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    if found.shape != expected.shape:
        return float("inf")
    scale = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
    return float(np.sqrt(np.mean(np.square(found.astype(np.float64) - expected)))) / max(
        scale, 1e-12
    )


def _hu(pairs: NDArray[np.uint8]) -> NDArray[np.int16]:
    return np.ascontiguousarray(pairs).view("<i2")[..., 0]
