"""Proof that an exported file paints what the network paints: measured in HU, through the engine that will run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.engines.base import Engine
from runtime.errors import ParityError
from runtime.memory import HOST_STREAM

from .graph import LabelsToIntensity

FP32_MAX = 1  # HU: two correct FP32 computations may fall on either side of a half


@dataclass(frozen=True)
class Parity:
    """Absolute differences from FP32 torch in HU over `slices` slices, and the share of pixels that differ at all."""

    slices: int
    max: int
    mean: float
    differing: float

    def to_json(self) -> dict[str, Any]:
        return {key: round(value, 6) for key, value in asdict(self).items()}


def random_inputs(slices: int, z: int, size: tuple[int, int], classes: int, seed: int = 0) -> NDArray[np.uint8]:
    """Labels no anatomy would give, uint8 (slices, Z, H, W): every channel is hit everywhere."""
    return np.random.default_rng(seed).integers(0, classes, (slices, z, *size), np.uint8)


def measure(
    graph: LabelsToIntensity, engine: Engine, labels: NDArray[np.uint8], *, seed: int = 0, on_slice: Callable[[int], None] | None = None
) -> Parity:
    """Paint `labels` (n, Z, H, W) with both, with the same style and noise, and compare. H and W are multiples of the divisor."""
    rng = np.random.default_rng(seed)
    given: dict[str, NDArray[Any]] = {"labels": labels}
    for tensor in engine.spec.inputs:
        if tensor.name == "style":
            given["style"] = rng.standard_normal((len(labels), int(tensor.shape[1])), np.float32)
        elif tensor.name == "noise":
            given["noise"] = rng.integers(0, 256, (len(labels), *labels.shape[2:]), np.uint8)
    batch, total, differing, worst = engine.spec.batch, 0, 0, 0
    for start in range(0, len(labels), batch):
        picked = [min(n, len(labels) - 1) for n in range(start, start + batch)]  # the last batch is padded with its last slice
        inputs = {name: array[picked] for name, array in given.items()}
        out = np.empty((batch, *labels.shape[2:], 2), np.uint8)
        engine.run(inputs, out, stream=HOST_STREAM)
        with torch.inference_mode():
            expected = graph(**{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()
        valid = min(batch, len(labels) - start)
        delta = np.abs(_hu(out)[:valid].astype(np.int32) - _hu(expected)[:valid])
        total, differing, worst = total + int(delta.sum()), differing + int(np.count_nonzero(delta)), max(worst, int(delta.max()))
        if on_slice is not None:
            on_slice(start + valid)
    pixels = labels.shape[0] * labels.shape[2] * labels.shape[3]
    return Parity(len(labels), worst, total / pixels, differing / pixels)


def require(parity: Parity, file: str, what: str) -> None:
    """Raise `ParityError` when an FP32 file differs by more than FP32_MAX HU anywhere."""
    if parity.max > FP32_MAX:
        raise ParityError(
            f"{file} paints other values than the network on {what}: up to {parity.max} HU, {parity.mean:.3f} HU on average, "
            f"{100 * parity.differing:.2f} % of the pixels",
            expected=f"at most {FP32_MAX} HU anywhere",
            remedy="nothing was written; report this with the run's run.json",
        )


def _hu(pairs: NDArray[np.uint8]) -> NDArray[np.int16]:
    return np.ascontiguousarray(pairs).view("<i2")[..., 0]
