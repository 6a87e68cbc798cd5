"""The exported graph: labels in, intensities out. Everything between a mask and Hounsfield units is in here."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from runtime.contract import Intensity
from train.generator import Generator, one_hot, standardise_noise


class LabelsToIntensity(nn.Module):
    """`runtime.contract`'s graph round a trained generator: uint8 labels (style, noise) → int16 HU as little-endian bytes.

    FP32 throughout: 65536 does not fit FP16. First node on each input is a Cast to float, the last a Cast to uint8, for
    TensorRT allows uint8 at the border only (and has no int16).
    """

    def __init__(self, generator: Generator, classes: int, intensity: Intensity):
        super().__init__()
        self.generator, self.classes = generator.eval(), classes
        self.low, self.high = float(intensity.low), float(intensity.high)

    def forward(self, labels: Tensor, style: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """`labels` uint8 (N, Z, H, W), `style` float32 (N, S), `noise` uint8 (N, H, W) → uint8 (N, H, W, 2)."""
        white = None if noise is None else standardise_noise(noise).unsqueeze(1)
        image = self.generator(one_hot(labels, self.classes), white, style)[:, 0]  # (N, H, W) in [0, 1]
        values = torch.clamp(torch.round(image * (self.high - self.low) + self.low), self.low, self.high)
        unsigned = torch.where(values < 0, values + 65536.0, values)
        upper = torch.floor(unsigned / 256.0)
        return torch.stack([unsigned - 256.0 * upper, upper], -1).to(torch.uint8)
