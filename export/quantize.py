"""The INT8 graph for CPUs: static QDQ of the convolutions, fitted to what they are to give.

Quantisers, calibration and file format are ONNX Runtime's (Jacob et al., "Quantization and Training
of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018). Which layers are to
stay in float is measured here.
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
from .weight_reconstruction import ReconstructedWeights, fit, rounded

OPERATORS = ("Conv", "ConvTranspose")
# of an activation's values that its range holds: single outliers would make its steps coarse
PERCENTILE = 99.9995
AT_ONCE = 4  # slices: the calibrator keeps every activation of as many
MOVED = 16  # multiply-accumulates in whose time a core reads or writes one element
Inputs = Mapping[str, NDArray[Any]]


class _Feed(CalibrationDataReader):  # type: ignore[misc]
    """Slices one by one, as ONNX Runtime's calibrators ask for them."""

    def __init__(self, inputs: Inputs, start: int, stop: int):
        self._rows: Iterator[dict[str, Any]] = (
            {k: v[n : n + 1] for k, v in inputs.items()} for n in range(start, stop)
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._rows, None)


@dataclass(frozen=True)
class Quantized:
    """What was written: the layers left in `floating` point, by node name, and how many there
    are in all.
    """

    floating: tuple[str, ...]
    layers: int


class Quantizer:
    """A float graph, calibrated once on `inputs` (arrays of n slices), from which INT8 graphs
    are made.
    """

    def __init__(self, source: Path, inputs: Inputs):
        count = len(next(iter(inputs.values())))
        self._beside = (
            source.parent
        )  # an export that is killed leaves all that it made in one place
        self._sizes = {name: array.shape for name, array in inputs.items()}
        with tempfile.TemporaryDirectory(dir=source.parent) as folder, _quiet():
            prepared = Path(folder) / "prepared.onnx"
            quant_pre_process(
                str(source), str(prepared), skip_symbolic_shape=True, skip_optimization=True
            )  # H and W are dynamic
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
        for name in one_hot(self._model.graph) & set(
            self._ranges.keys()
        ):  # 0 and 1, which a histogram's bins miss
            self._ranges[name] = TensorData(lowest=np.float32(0), highest=np.float32(1))
        self.layers = tuple(
            node.name for node in self._model.graph.node if node.op_type in OPERATORS
        )
        self._shifts: dict[str, NDArray[np.float32]] = {}
        self._shifts = self._measure_shifts(inputs)

    def _measure_shifts(self, inputs: Inputs) -> dict[str, NDArray[np.float32]]:
        """By how much each layer's channels are higher on average when it alone is quantised, by
        layer: (C,) float32 of each.

        One graph holds both: every layer twice, of which the float one is read by what comes after
        it.
        """
        with tempfile.TemporaryDirectory(dir=self._beside) as folder, _quiet():
            path = Path(folder) / "both.onnx"
            self.write(path, ())
            both = onnx.load(path)
            graph, weights = (
                both.graph,
                {tensor.name: tensor for tensor in self._model.graph.initializer},
            )
            quantised = {node.name: node for node in graph.node}
            axes = numpy_helper.from_array(np.array([0, 2, 3], np.int64), "shift/axes")
            graph.initializer.append(axes)
            nodes = []
            del graph.output[:]
            for node in self._model.graph.node:
                if node.name not in self.layers:
                    continue
                twin, made = quantised[node.name], node.output[0]
                twin.output[0] = f"{made}/quantised"
                single = onnx.NodeProto()
                single.CopyFrom(node)
                single.name = f"{node.name}/float"
                for n, name in enumerate(node.input[1:], 1):  # the quantised graph may use the name
                    single.input[n] = f"{node.name}/float/{n}"
                    graph.initializer.append(
                        numpy_helper.from_array(
                            numpy_helper.to_array(weights[name]), single.input[n]
                        )
                    )
                nodes += [
                    single,
                    helper.make_node("Sub", [twin.output[0], made], [f"{made}/difference"]),
                    helper.make_node(
                        "ReduceMean",
                        [f"{made}/difference", "shift/axes"],
                        [f"{made}/shift"],
                        keepdims=0,
                    ),
                ]
                graph.output.append(helper.make_empty_tensor_value_info(f"{made}/shift"))
            graph.node.extend(nodes)
            session = ort.InferenceSession(
                both.SerializeToString(), providers=["CPUExecutionProvider"]
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
        """Quantise all layers but those named.

        Activations are unsigned (OpenVINO's results were wrong by 200 HU with signed ones), weights
        signed and per channel; a layer's output is quantised where the next layer reads it, not
        before.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        quantised = set(self.layers) - set(floating)
        self._round(model.graph, quantised)
        if self._shifts:
            self._correct(model.graph, quantised)
        options = {"OpTypesToExcludeOutputQuantization": list(OPERATORS)}
        with _quiet():
            quantizer = QDQQuantizer(
                model,
                True,
                False,
                QuantType.QInt8,
                QuantType.QUInt8,
                self._ranges,
                [],
                list(floating),
                list(OPERATORS),
                options,
            )
            quantizer.quantize_model()
        sources = {name: node for node in quantizer.model.nodes() for name in node.output}
        for node in (
            quantizer.model.nodes()
        ):  # ONNX Runtime has all readers of a tensor read what was quantised for one of them
            if node.name not in set(self.layers) - set(floating):
                for n, name in enumerate(node.input):
                    made = sources.get(name)
                    if (
                        made is not None
                        and made.op_type == "DequantizeLinear"
                        and made.input[0] in sources
                    ):
                        node.input[n] = sources[made.input[0]].input[0]
        hold_exactly(quantizer.model.graph())
        quantizer.model.save_model_to_file(str(path))

    def fitted(
        self, network: LabelsToIntensity, inputs: Inputs, floating: Sequence[str] = ()
    ) -> Quantizer:
        """One that quantises the same graph with weights fitted to INT8
        (export/weight_reconstruction.py), on the `network` it was exported from.
        """
        exact = one_hot(self._model.graph)
        layer_inputs = {
            node.name: node.input[0] for node in self._model.graph.node if node.name in self.layers
        }
        ranges = {
            layer: None if tensor in exact else self._range(tensor)
            for layer, tensor in layer_inputs.items()
        }
        reconstructed = fit(network, self._model.graph, ranges, inputs, floating)
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
        """What each layer takes, by name: its multiply-accumulates on a slice, and the elements
        it reads and writes at `MOVED` each.
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
        found = {}
        for node in model.graph.node:
            if node.name in self.layers:
                read, weights, made = (
                    shapes[name] for name in (node.input[0], node.input[1], node.output[0])
                )
                applied = (made if node.op_type == "Conv" else read)[
                    2:
                ]  # at as many places all weights are used
                moved = np.prod(read[1:]) + np.prod(made[1:])
                found[node.name] = float(np.prod(weights) * np.prod(applied) + MOVED * moved)
        return found

    def _round(self, graph: onnx.GraphProto, layers: Set[str]) -> None:
        """Put the layers' weights where 8 bits will hold them: see `rounded`."""
        weights = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.name in layers:
                tensor, name = numpy_helper.to_array(weights[node.input[1]]), f"{node.name}/weight"
                node.input[1] = name
                graph.initializer.append(
                    numpy_helper.from_array(rounded(tensor, node.op_type == "ConvTranspose"), name)
                )

    def _correct(self, graph: onnx.GraphProto, layers: Set[str]) -> None:
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


def one_hot(graph: onnx.GraphProto) -> set[str]:
    """The tensors of 0 and 1 alone: comparisons as numbers, put in another order, and side by
    side where the network sees several slices.
    """
    references_by_name = {node.output[0] for node in graph.node if node.op_type == "Equal"}
    references_by_name |= {
        tensor.name
        for tensor in graph.input
        if tensor.type.tensor_type.elem_type == onnx.TensorProto.BOOL
    }
    found: set[str] = set()
    for node in graph.node:
        moved = node.op_type in ("Concat", "Transpose") and found.issuperset(node.input)
        if moved or (node.op_type == "Cast" and node.input[0] in references_by_name):
            found.add(node.output[0])
    return found


def hold_exactly(graph: onnx.GraphProto) -> None:
    """Have what is 0 or 1 and read quantised be made as uint8 at once, and DequantizeLinear make
    it float: no arithmetic, and no step.
    """
    found = one_hot(graph)
    quantised = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] in found
    }
    back = {
        n.output[0]: quantised[n.input[0]]
        for n in graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in quantised
    }
    if not back:
        return
    graph.initializer.append(numpy_helper.from_array(np.float32(1), "one_hot/step"))
    graph.initializer.append(numpy_helper.from_array(np.uint8(0), "one_hot/zero"))
    nodes = []
    for node in (n for n in graph.node if n.output[0] not in {*quantised, *back}):
        nodes.append(node)
        node.input[:] = [back.get(name, name) for name in node.input]
        if node.op_type == "Cast" and node.output[0] in found:
            (to,), (name,) = node.attribute, node.output
            to.i, node.output[0] = onnx.TensorProto.UINT8, f"{name}/uint8"
            given = [node.output[0], "one_hot/step", "one_hot/zero"]
            nodes.append(
                helper.make_node("DequantizeLinear", given, [name], f"{name}/DequantizeLinear")
            )
    read = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)


def candidates(
    source: Path,
    path: Path,
    inputs: Inputs,
    network: LabelsToIntensity,
    fit_on: Inputs,
    error: Callable[[Path], float],
    say: Callable[[str], None],
) -> Iterator[Quantized]:
    """Write `path` with all layers in INT8, then with fewer and fewer, down to one: take the first
    that is near enough to the network.

    The layers are fitted to what the `network` that `source` was exported from gives on `fit_on`.
    To leave some in float, each is tried alone and not fitted: those go first whose squared `error`
    (HU, mean, on other slices) is largest for the work that they take over.
    """
    quantizer = Quantizer(source, inputs)
    layers = list(quantizer.layers)

    def written(floating: Sequence[str]) -> Quantized:
        quantizer.fitted(network, fit_on, floating).write(path, floating)
        return Quantized(tuple(floating), len(layers))

    say(f"  fitting {len(layers)} layers to INT8, on {len(fit_on['labels'])} slices")
    yield written(())
    say("  all of them cost too much: measuring each alone")
    work, alone = quantizer.work(), {}
    for layer in layers:
        quantizer.write(path, [other for other in layers if other != layer])
        alone[layer] = error(path)
    layers.sort(
        key=lambda layer: -(alone[layer] ** 2) / work[layer]
    )  # squares: what the errors of several add up as
    count = 1
    while count < len(layers):
        yield written(layers[:count])
        count = min(
            2 * count, (count + len(layers) + 1) // 2
        )  # one, two, four … in float; and from half of them on half of the rest


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The calibrator prints, and the quantiser warns through the root logger."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
            yield
    finally:
        logging.getLogger().setLevel(level)
