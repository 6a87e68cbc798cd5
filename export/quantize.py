"""The INT8 graphs: convolutions with static QDQ and reconstructed weights.

Quantizer, calibration and file format are ONNX Runtime's (Jacob et al., "Quantization and Training
of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018). This module
measures which layers have to stay FP32.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QDQQuantizer,
    QuantType,
    create_calibrator,
)
from onnxruntime.quantization.calibrate import TensorData
from onnxruntime.quantization.shape_inference import quant_pre_process

from .graph import LabelsToIntensity
from .quantized_graph import bound_concatenated, hold_exactly, one_hot
from .weight_reconstruction import (
    ASYMMETRIC,
    SYMMETRIC,
    ActivationSteps,
    ReconstructedWeights,
    reconstruct_weights,
    rounded,
)

OPERATORS = ("Conv", "ConvTranspose")
# The share of an activation's values that its range covers: single outliers would make its steps
# coarse.
PERCENTILE = 99.9995
AT_ONCE = 4  # slices at once: the calibrator keeps all their activations
MOVED = 16  # multiply-accumulates in the time that a core takes to read or write one element
Inputs = Mapping[str, NDArray[Any]]


class _Feed(CalibrationDataReader):  # type: ignore[misc]
    """Slices one by one, in the form that ONNX Runtime's calibrators ask for."""

    def __init__(self, inputs: Inputs, start: int, stop: int):
        self._rows: Iterator[dict[str, Any]] = (
            {k: v[n : n + 1] for k, v in inputs.items()} for n in range(start, stop)
        )

    def get_next(self) -> dict[str, Any] | None:
        """The next slice's inputs by name, or None at the end."""
        return next(self._rows, None)


@dataclass(frozen=True)
class Quantized:
    """A candidate that was written.

    Attributes:
        floating: Names of the nodes that stayed FP32.
        layers: The number of layers, quantized or not.
    """

    floating: tuple[str, ...]
    layers: int


class Quantizer:
    """Writes INT8 graphs of one FP32 graph, which it calibrates once.

    Args:
        source: The FP32 graph's file; temporary files are written beside it.
        inputs: The graph's inputs by name, arrays of n slices.
        steps: How activations and biases are held: `ASYMMETRIC` is what CPUs compute best,
            `SYMMETRIC` is the only form that TensorRT takes.
    """

    def __init__(self, source: Path, inputs: Inputs, steps: ActivationSteps = ASYMMETRIC):
        self._steps = steps
        count = len(next(iter(inputs.values())))
        # an export that is killed leaves all its files in this one folder
        self._folder = source.parent
        self._sizes = {name: array.shape for name, array in inputs.items()}
        with tempfile.TemporaryDirectory(dir=source.parent) as folder, _quiet():
            prepared = Path(folder) / "prepared.onnx"
            # no symbolic shapes, because H and W are dynamic
            quant_pre_process(
                str(source), str(prepared), skip_symbolic_shape=True, skip_optimization=True
            )
            self._model = onnx.load(prepared)
            calibrator = create_calibrator(
                prepared,
                list(OPERATORS),
                str(Path(folder) / "augmented.onnx"),
                CalibrationMethod.Percentile,
                extra_options={"percentile": PERCENTILE},
            )
            for start in range(0, count, AT_ONCE):
                calibrator.collect_data(_Feed(inputs, start, min(start + AT_ONCE, count)))
            self._ranges = calibrator.compute_data()
        # one-hot tensors hold 0 and 1, which the histogram's bins miss
        for name in one_hot(self._model.graph) & set(self._ranges.keys()):
            self._ranges[name] = TensorData(lowest=np.float32(0), highest=np.float32(1))
        self.layers = tuple(
            node.name for node in self._model.graph.node if node.op_type in OPERATORS
        )
        self._shifts: dict[str, NDArray[np.float32]] = {}
        self._shifts = self._measure_shifts(inputs)

    def _measure_shifts(self, inputs: Inputs) -> dict[str, NDArray[np.float32]]:
        """The mean shift of each layer's channels (C,) when it alone is quantized, by layer.

        One graph measures all of them: it holds every layer twice, and later layers read the FP32
        one.
        """
        with tempfile.TemporaryDirectory(dir=self._folder) as folder, _quiet():
            path = Path(folder) / "both.onnx"
            self.write(path, ())
            paired = onnx.load(path)
            graph = paired.graph
            weights = {tensor.name: tensor for tensor in self._model.graph.initializer}
            quantized = {node.name: node for node in graph.node}
            axes = numpy_helper.from_array(np.array([0, 2, 3], np.int64), "shift/axes")
            graph.initializer.append(axes)
            nodes = []
            del graph.output[:]
            for node in self._model.graph.node:
                if node.name not in self.layers:
                    continue
                twin, output = quantized[node.name], node.output[0]
                twin.output[0] = f"{output}/quantized"
                single = onnx.NodeProto()
                single.CopyFrom(node)
                single.name = f"{node.name}/float"
                for n, name in enumerate(node.input[1:], 1):  # the quantized graph may use the name
                    single.input[n] = f"{node.name}/float/{n}"
                    graph.initializer.append(
                        numpy_helper.from_array(
                            numpy_helper.to_array(weights[name]), single.input[n]
                        )
                    )
                nodes += [
                    single,
                    helper.make_node("Sub", [twin.output[0], output], [f"{output}/difference"]),
                    helper.make_node(
                        "ReduceMean",
                        [f"{output}/difference", "shift/axes"],
                        [f"{output}/shift"],
                        keepdims=0,
                    ),
                ]
                graph.output.append(helper.make_empty_tensor_value_info(f"{output}/shift"))
            graph.node.extend(nodes)
            session = ort.InferenceSession(
                paired.SerializeToString(), providers=["CPUExecutionProvider"]
            )
        count = len(next(iter(inputs.values())))
        starts = range(0, count, AT_ONCE)
        runs = [
            session.run(None, {name: array[n : n + AT_ONCE] for name, array in inputs.items()})
            for n in starts
        ]
        return {
            layer: np.mean(shift, 0)
            for layer, shift in zip(self.layers, zip(*runs, strict=True), strict=True)
        }

    def write(self, path: Path, floating: Sequence[str]) -> None:
        """Write the graph with all layers in INT8 but those named.

        Weights are signed and per channel. A layer's output is quantized where the next layer
        reads it, not before.

        Args:
            path: The file to write.
            floating: The layers that stay FP32, by node name.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        quantized = set(self.layers) - set(floating)
        self._round(model.graph, quantized)
        if self._shifts:
            self._correct(model.graph, quantized)
        symmetric = self._steps is SYMMETRIC
        options = {
            "OpTypesToExcludeOutputQuantization": list(OPERATORS),
            "ActivationSymmetric": symmetric,
            "QuantizeBias": self._steps.rounds_bias,
        }
        with _quiet():
            quantizer = QDQQuantizer(
                model,
                True,
                False,
                QuantType.QInt8,
                QuantType.QInt8 if symmetric else QuantType.QUInt8,
                self._ranges,
                [],
                list(floating),
                list(OPERATORS),
                options,
            )
            quantizer.quantize_model()
        sources = {name: node for node in quantizer.model.nodes() for name in node.output}
        # Where one reader of a tensor is quantized, ONNX Runtime makes all its readers read the
        # quantized tensor: the FP32 ones get theirs back.
        for node in quantizer.model.nodes():
            if node.name in quantized:
                continue
            for n, name in enumerate(node.input):
                source = sources.get(name)
                if source is None or source.op_type != "DequantizeLinear":
                    continue
                if source.input[0] in sources:
                    node.input[n] = sources[source.input[0]].input[0]
        if symmetric:
            bound_concatenated(quantizer.model.graph())
        else:  # TensorRT takes no uint8 between nodes
            hold_exactly(quantizer.model.graph())
        quantizer.model.save_model_to_file(str(path))

    def fitted(
        self, network: LabelsToIntensity, inputs: Inputs, floating: Sequence[str] = ()
    ) -> Quantizer:
        """A quantizer of the same graph with weights reconstructed for INT8.

        Args:
            network: The network that the graph was exported from.
            inputs: The inputs to fit on, by name, arrays of n slices.
            floating: The layers that will stay FP32, by node name.

        Returns:
            A new quantizer (`export.weight_reconstruction` computes its weights).

        Raises:
            ValueError: Network and graph do not agree.
        """
        exact = one_hot(self._model.graph)
        layer_inputs = {
            node.name: node.input[0] for node in self._model.graph.node if node.name in self.layers
        }
        ranges = {
            layer: None if tensor in exact else self._range(tensor)
            for layer, tensor in layer_inputs.items()
        }
        reconstructed = reconstruct_weights(
            network, self._model.graph, ranges, inputs, floating, self._steps
        )
        result = copy.copy(self)
        result._model, result._shifts = onnx.ModelProto(), {}
        result._model.CopyFrom(self._model)
        graph = result._model.graph
        for node in graph.node:
            if node.name in reconstructed:
                names = [f"{node.name}/fitted/{part}" for part in ReconstructedWeights._fields]
                node.input[1:] = names
                graph.initializer.extend(
                    numpy_helper.from_array(array, name)
                    for array, name in zip(reconstructed[node.name], names, strict=True)
                )
        return result

    def _range(self, name: str) -> tuple[float, float]:
        low, high = (float(np.asarray(end).item()) for end in self._ranges[name].range_value)
        return min(low, 0.0), max(high, 0.0)

    def work(self) -> dict[str, float]:
        """Estimate what each layer costs on a slice.

        Returns:
            By layer: its multiply-accumulates, and `MOVED` for each element that it reads or
            writes.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        del model.graph.value_info[:]
        for tensor in model.graph.input:
            shape = tensor.type.tensor_type.shape
            for dim, size in zip(shape.dim, (1, *self._sizes[tensor.name][1:]), strict=True):
                dim.dim_value = size
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        shapes = {
            v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in (*inferred.value_info, *inferred.output)
        }
        shapes |= {name: list(size) for name, size in self._sizes.items()}
        shapes |= {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
        costs = {}
        for node in model.graph.node:
            if node.name in self.layers:
                layer_input, weights, output = (
                    shapes[name] for name in (node.input[0], node.input[1], node.output[0])
                )
                # the pixels at which all weights are used
                applied = (output if node.op_type == "Conv" else layer_input)[2:]
                moved = np.prod(layer_input[1:]) + np.prod(output[1:])
                costs[node.name] = float(np.prod(weights) * np.prod(applied) + MOVED * moved)
        return costs

    def _round(self, graph: onnx.GraphProto, layers: Set[str]) -> None:
        """Move the layers' weights to the steps of 8 bits (`rounded`)."""
        weights = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.name in layers:
                tensor, name = numpy_helper.to_array(weights[node.input[1]]), f"{node.name}/weight"
                node.input[1] = name
                graph.initializer.append(
                    numpy_helper.from_array(rounded(tensor, node.op_type == "ConvTranspose"), name)
                )

    def _correct(self, graph: onnx.GraphProto, layers: Set[str]) -> None:
        """Take the measured shifts off the layers' biases."""
        weights = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.name not in layers:
                continue
            name = f"{node.name}/bias"
            bias = -self._shifts[node.name]
            if len(node.input) > 2:
                bias = bias + numpy_helper.to_array(weights[node.input[2]])
                node.input[2] = name
            else:
                node.input.append(name)
            graph.initializer.append(numpy_helper.from_array(bias.astype(np.float32), name))


def candidates(
    source: Path,
    path: Path,
    inputs: Inputs,
    network: LabelsToIntensity,
    fit_on: Inputs,
    error: Callable[[Path], float],
    say: Callable[[str], None],
    steps: ActivationSteps = ASYMMETRIC,
) -> Iterator[Quantized]:
    """Write `path` with all layers in INT8, then with fewer and fewer, down to one.

    The caller takes the first candidate that is near enough to the network. To choose the layers
    that stay FP32, each layer is quantized alone, with its own weights: those whose squared error
    is largest for the work they save come first.

    Args:
        source: The FP32 graph's file.
        path: The file to write each candidate to.
        inputs: What to calibrate on, by name.
        network: The network that `source` was exported from.
        fit_on: What to reconstruct the weights on, by name.
        error: The mean error of a file in HU, on other slices.
        say: Prints a line of progress.
        steps: How the file holds activations and biases.

    Yields:
        What was written.
    """
    quantizer = Quantizer(source, inputs, steps)
    layers = list(quantizer.layers)

    def write_candidate(floating: Sequence[str]) -> Quantized:
        quantizer.fitted(network, fit_on, floating).write(path, floating)
        return Quantized(tuple(floating), len(layers))

    say(f"  fitting {len(layers)} layers to INT8, on {len(fit_on['labels'])} slices")
    yield write_candidate(())
    say("  all of them cost too much: measuring each alone")
    work, alone = quantizer.work(), {}
    for layer in layers:
        quantizer.write(path, [name for name in layers if name != layer])
        alone[layer] = error(path)
    # squares, because the errors of several layers add up as squares
    layers.sort(key=lambda layer: -(alone[layer] ** 2) / work[layer])
    # One, two, four … layers stay FP32; from half of them on, half of the rest is added each time.
    count = 1
    while count < len(layers):
        yield write_candidate(layers[:count])
        count = min(2 * count, (count + len(layers) + 1) // 2)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the calibrator's prints and the quantizer's warnings (through the root logger)."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
            yield
    finally:
        logging.getLogger().setLevel(level)
