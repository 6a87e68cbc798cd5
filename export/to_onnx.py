"""The graph as an ONNX file, opset 21, with dynamic N, H and W."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import onnx
import torch

from runtime.contract import TensorSpec

from .graph import LabelsToIntensity

OPSET = 21  # the first with native GroupNormalization and 16-bit casts; TensorRT >= 10.9 parses it
_EXAMPLE = {"N": 2, "H": 2, "W": 3}  # in units of the divisor for H, W: unlike numbers, none of them 1, so that none is baked in


def example_inputs(specs: tuple[TensorSpec, ...], divisor: int) -> dict[str, torch.Tensor]:
    """Zeros of the inputs' dtypes with some allowed N, H, W."""
    sizes = {"N": _EXAMPLE["N"], "H": _EXAMPLE["H"] * divisor, "W": _EXAMPLE["W"] * divisor}
    shapes = {s.name: [sizes[d] if isinstance(d, str) else d for d in s.shape] for s in specs}
    return {s.name: torch.zeros(shapes[s.name], dtype=getattr(torch, s.dtype)) for s in specs}


def to_onnx(graph: LabelsToIntensity, specs: tuple[TensorSpec, ...], divisor: int, path: Path) -> None:
    """Write `graph` to `path` (not atomically: the model folder around it is). H and W stay multiples of `divisor`.

    Raises onnx's `ValidationError` when the written graph does not pass the full checker.
    """
    batch = torch.export.Dim("N", min=1)
    multiple = {"H": torch.export.Dim("h", min=1) * divisor, "W": torch.export.Dim("w", min=1) * divisor}
    shapes = {s.name: {axis: batch if d == "N" else multiple[d] for axis, d in enumerate(s.shape) if isinstance(d, str)} for s in specs}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        quiet = logging.getLogger("torch.onnx")
        level = quiet.level
        quiet.setLevel(logging.ERROR)
        try:
            torch.onnx.export(
                graph.eval(),
                (),
                str(path),
                kwargs=example_inputs(specs, divisor),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                input_names=[s.name for s in specs],
                output_names=["ct"],
                external_data=False,
                verbose=False,
            )
        finally:
            quiet.setLevel(level)
    onnx.checker.check_model(str(path), full_check=True)
