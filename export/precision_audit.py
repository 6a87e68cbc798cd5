"""The precision audit: is an FP16 engine really FP16?

FP16 layers are counted in the ONNX graph, in the network that TensorRT parsed, and in the engine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runtime.core.errors import BuildError

# The least share of the weights and of the convolutions. Norms and the output stay FP32.
LEAST_HALF = 0.8
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_CONVOLUTIONS = ("CONVOLUTION", "DECONVOLUTION")


@dataclass(frozen=True)
class LayerTypes:
    """The layers of a network.

    Attributes:
        rows: (name, operation, types of the outputs) of each layer, in the network's order.
    """

    rows: tuple[tuple[str, str, tuple[str, ...]], ...]

    @property
    def half(self) -> float:
        """The share of the convolutions that give FP16 (0 when there is none)."""
        types = [outputs for _, operation, outputs in self.rows if operation in _CONVOLUTIONS]
        return sum("HALF" in outputs for outputs in types) / max(1, len(types))

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as JSON data."""
        return [
            {"name": name, "type": operation, "outputs": list(outputs)}
            for name, operation, outputs in self.rows
        ]


def read_network(trt: Any, network: Any) -> LayerTypes:
    """The types that TensorRT gave every layer when it parsed the graph.

    It has to keep them, because the network is strongly typed.

    Args:
        trt: The tensorrt module.
        network: Its `INetworkDefinition`.

    Returns:
        The types of all layers.
    """
    rows = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = tuple(layer.get_output(n).dtype.name for n in range(layer.num_outputs))
        rows.append((str(layer.name), str(layer.type.name), outputs))
    return LayerTypes(tuple(rows))


def half_weights(path: Path) -> float:
    """The share of FP16 weights in an ONNX file.

    Args:
        path: The file.

    Returns:
        The share of the weights of convolutions and matrix products, 0 to 1.
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    weight_names = {
        name for node in graph.node if node.op_type in _WEIGHTED for name in node.input[1:2]
    }
    sizes = [
        (tensor.data_type == onnx.TensorProto.FLOAT16, math.prod(tensor.dims))
        for name, tensor in initializers.items()
        if name in weight_names
    ]
    return sum(size for half, size in sizes if half) / max(1, sum(size for _, size in sizes))


def require_half(share: float, what: str, file: Path) -> None:
    """Require that nearly all of a share is FP16.

    Args:
        share: The share that is FP16, 0 to 1.
        what: What it is the share of, for the message.
        file: The ONNX file.

    Raises:
        BuildError: The share is below `LEAST_HALF`.
    """
    if share < LEAST_HALF:
        raise BuildError(
            f"only {100 * share:.0f} % of {what} are FP16",
            expected=f"at least {100 * LEAST_HALF:.0f} % in an FP16 engine",
            remedy="export the run again, or ask for --precision fp32",
            file=file,
        )


def half_convolutions(information: Mapping[str, Any]) -> tuple[int, int]:
    """Count the convolutions in the inspector's JSON.

    Layers are fused and renamed. The graph's own names survive in them, so every layer with `conv`
    in its name or type counts.

    Args:
        information: The inspector's JSON of an engine.

    Returns:
        (layers that read or write FP16, all layers), of those that convolve.
    """
    # a row is only a name where the inspector does not tell types
    rows = [row for row in information.get("Layers", ()) if isinstance(row, Mapping)]
    keys = ("Name", "LayerType", "ParameterType")
    named = [row for row in rows if "conv" in " ".join(str(row.get(key)) for key in keys).lower()]
    types = [layer_types for layer_types in (set(_types(row)) for row in named) if layer_types]
    return sum("half" in layer_types for layer_types in types), len(types)


def _types(row: Mapping[str, Any]) -> Iterator[str]:
    """`half` or `float` for each tensor of a layer.

    TensorRT writes "Half", "FP16" or "Row major linear FP16 format".
    """
    for tensor in (*row.get("Inputs", ()), *row.get("Outputs", ())):
        text = str(tensor.get("Format/Datatype", "")).lower()
        if "half" in text or "fp16" in text:
            yield "half"
        elif "float" in text or "fp32" in text:
            yield "float"


@dataclass(frozen=True)
class Inspection:
    """What the built engine says of itself.

    Attributes:
        activations: Bytes of activation memory per profile, or None.
        information: The inspector's JSON, or None.
        reason: Why one of them is None.
    """

    activations: tuple[int, ...] | None = None
    information: Mapping[str, Any] | None = None
    reason: str = ""


def inspect_plan(
    trt: Any,
    plan: bytes,
    shapes: Mapping[str, Sequence[Sequence[int]]],
    *,
    native: bool,
    logger: Any,
) -> Inspection:
    """Load an engine with the TensorRT that built it and read its layers.

    They are read at the best shapes of each input. A version-compatible engine is read through the
    lean runtime's library of the same version. Call it only where there is a GPU: TensorRT's
    `Runtime` ends the process without one (`runtime.engines.gpu.probe`).

    Args:
        trt: The tensorrt module.
        plan: The engine.
        shapes: By input: its smallest, best and largest shape.
        native: Whether the engine is for this version of TensorRT alone.
        logger: A TensorRT logger.

    Returns:
        Memory and layers, or the reason why they cannot be read.
    """
    runtime = loader = trt.Runtime(logger)  # each has to outlive what it loads
    if not native:
        library = lean_library()
        if library is None:
            return Inspection(
                reason=(
                    "tensorrt-lean-cu13-libs is not installed, through which version-compatible"
                    " engines are read"
                )
            )
        loader = runtime.load_runtime(str(library))
        if loader is None:
            return Inspection(
                reason=f"{library.name} does not load: it has to be of TensorRT {trt.__version__}"
            )
    engine = loader.deserialize_cuda_engine(plan)
    if engine is None:
        return Inspection(reason="TensorRT does not load the engine back here")
    memory = tuple(
        int(engine.get_device_memory_size_for_profile_v2(n))
        for n in range(engine.num_optimization_profiles)
    )
    inspector = engine.create_engine_inspector()
    context = engine.create_execution_context()
    if inspector is None or context is None:
        return Inspection(memory, None, "the runtime that loads it has no engine inspector")
    for name, (_, best, _) in shapes.items():
        if not context.set_input_shape(name, tuple(best)):
            return Inspection(memory, None, f"the engine refuses {tuple(best)} for {name}")
    inspector.execution_context = context  # with dynamic shapes, types are told for a context alone
    try:
        information = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    except (TypeError, ValueError) as exc:
        return Inspection(memory, None, f"the inspector's answer is no JSON ({exc})")
    return Inspection(memory, information, "")


def lean_library() -> Path | None:
    """Find the lean runtime's shared library.

    Returns:
        Its file, or None where the package is not installed.
    """
    spec = find_spec("tensorrt_lean_libs")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    return next(
        (file for folder in folders for file in sorted(Path(folder).glob("*nvinfer_lean*"))), None
    )
