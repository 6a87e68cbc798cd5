"""The INT8 graph for CPUs: static QDQ of the convolutions, as few of them left in float as the error allows.

Quantisers, calibration and file format are ONNX Runtime's (Jacob et al., "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference", CVPR 2018). Which layers stay in float is measured here, on masks of the training set.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QDQQuantizer, QuantType, create_calibrator
from onnxruntime.quantization.shape_inference import quant_pre_process

OPERATORS = ("Conv", "ConvTranspose")
PERCENTILE = 99.9995  # of an activation's values that its range holds: single outliers would make its steps coarse
AT_ONCE = 4  # slices: the calibrator keeps every activation of as many
Inputs = Mapping[str, NDArray[Any]]


class _Feed(CalibrationDataReader):  # type: ignore[misc]
    """Slices one by one, as ONNX Runtime's calibrators ask for them."""

    def __init__(self, inputs: Inputs, start: int, stop: int):
        self._rows: Iterator[dict[str, Any]] = ({k: v[n : n + 1] for k, v in inputs.items()} for n in range(start, stop))

    def get_next(self) -> dict[str, Any] | None:
        return next(self._rows, None)


@dataclass(frozen=True)
class Quantized:
    """What came out: the layers left in `floating` point, by node name, and how many there are in all."""

    floating: tuple[str, ...]
    layers: int


class Quantizer:
    """A float graph, calibrated once on `inputs` (arrays of n slices), from which INT8 graphs are made."""

    def __init__(self, source: Path, inputs: Inputs):
        count = len(next(iter(inputs.values())))
        with tempfile.TemporaryDirectory() as folder, _quiet():
            prepared = Path(folder) / "prepared.onnx"
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True, skip_optimization=True)  # H and W are dynamic
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
        self.layers = tuple(node.name for node in self._model.graph.node if node.op_type in OPERATORS)

    def write(self, path: Path, floating: Sequence[str]) -> None:
        """Quantise all layers but those named. Activations are unsigned (OpenVINO's results were wrong by 200 HU with signed
        ones), weights signed and per channel; a layer's output is quantised where the next layer reads it, not before.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        options = {"OpTypesToExcludeOutputQuantization": list(OPERATORS)}
        with _quiet():
            quantizer = QDQQuantizer(
                model, True, False, QuantType.QInt8, QuantType.QUInt8, self._ranges, [], list(floating), list(OPERATORS), options
            )
            quantizer.quantize_model()
        quantizer.model.save_model_to_file(str(path))


def quantize(source: Path, path: Path, inputs: Inputs, error: Callable[[Path], float], say: Callable[[str], None]) -> Quantized:
    """Write `path` with as many layers in INT8 as `error` allows: of a file, its error over what is allowed (1: just allowed).

    Where all layers together are above 1, each is tried alone, and the worst are left in float, as few as bisection finds to do.
    """
    quantizer = Quantizer(source, inputs)

    def tried(floating: Sequence[str]) -> float:
        quantizer.write(path, floating)
        return error(path)

    layers = quantizer.layers
    if tried(()) <= 1:
        return Quantized((), len(layers))
    say(f"  quantising all {len(layers)} layers costs too much: measuring each alone")
    alone = {layer: tried([other for other in layers if other != layer]) for layer in layers}
    worst = sorted(layers, key=lambda layer: -alone[layer])
    low, high = 0, len(worst)  # with `low` of the worst in float it is too much, with `high` it is not (all: the float graph)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if tried(worst[:middle]) <= 1 else (middle, high)
    quantizer.write(path, worst[:high])
    return Quantized(tuple(worst[:high]), len(layers))


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
