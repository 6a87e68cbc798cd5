"""An engine without a network, for tests of embedding code: offline and in milliseconds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..core.labels import MM_WHS
from ..core.manifest import GridPolicy, Intensity, LabelTable, Manifest
from .base import EngineOptions, EngineSpec, Inputs
from .cpu.base import HostEngine

NOISE_STEP = 8  # noise bytes for one HU


class FakeEngine(HostEngine):
    """Gives each label one value, evenly spaced over the model's intensity range.

    Label index n of 0 … K becomes low + n (high - low) / K, plus (noise - 128) / 8 HU where the
    model takes noise.
    """

    name = "fake (no network: one value per label)"

    def __init__(self, manifest: Manifest, batch: int = 2, options: EngineOptions | None = None):
        super().__init__(options)
        self.spec = EngineSpec(manifest.inputs, manifest.output, batch, streams=self.streams)
        low, high, count = manifest.intensity.low, manifest.intensity.high, manifest.classes
        self._limits = (low, high)
        self._values = np.rint(np.linspace(low, high, count)).astype(np.int32)

    def _infer(self, inputs: Inputs, out: NDArray[np.uint8]) -> None:
        labels = inputs["labels"]
        hu = self._values[np.minimum(labels[:, labels.shape[1] // 2], len(self._values) - 1)]
        if "noise" in inputs:
            hu = hu + (inputs["noise"].astype(np.int32) - 128) // NOISE_STEP
        out.view("<i2")[..., 0] = np.clip(hu, *self._limits)


def fake_manifest(
    labels: LabelTable = MM_WHS,
    *,
    pixel_spacing: tuple[float, float] | None = (3.0, 3.0),
    slices: int = 1,
    noise: bool = True,
) -> Manifest:
    """Make a manifest without files: `Synthesizer(m, FakeEngine(m))` needs nothing on disk.

    Args:
        labels: the label table.
        pixel_spacing: (row, column) distance of the canvas in mm; None for that of the mask.
        slices: the number of neighbouring slices that the network sees.
        noise: whether the model takes noise.

    Returns:
        A manifest of a model in HU on a canvas of 32 x 32 pixels.
    """
    grid = GridPolicy((32, 32), pixel_spacing, 32, slices, 3.0 if slices > 1 else None)
    return Manifest(
        "fake", labels, grid, Intensity("HU", -1024, 1024), style=0, noise=noise, files={}
    )
