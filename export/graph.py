"""The exported graph: labels in, intensities out.

Everything between a mask and Hounsfield units is in here.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from runtime.core.manifest import Intensity
from train.networks.generator import Generator, one_hot, standardise_noise


class LabelsToIntensity(nn.Module):
    """The exported graph around a trained generator: labels (style, noise) to HU.

    It is FP32 before and after the generator, because FP16 cannot hold every HU. The first node of
    each input is a Cast to float and the last node a Cast to uint8: TensorRT allows uint8 at the
    graph's border only, and has no int16. The contract is that of `runtime.core.manifest`.
    """

    def __init__(self, generator: Generator, classes: int, intensity: Intensity):
        super().__init__()
        self.generator, self.classes = generator.eval(), classes
        self.low, self.high = float(intensity.low), float(intensity.high)
        self.precision = torch.float32  # of the stages
        # what the low and the high byte of a little-endian value divide it by
        self.places = torch.tensor([1.0, 1 / 256])

    def forward(
        self, labels: Tensor, style: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Synthesize slices.

        Args:
            labels: uint8 (N, Z, H, W), model indices.
            style: float32 (N, S); for a generator with a mean skip the contrast, (N, classes) in
                the image's unit.
            noise: uint8 (N, H, W), uniform random bytes.

        Returns:
            uint8 (N, H, W, 2): int16 HU as little-endian bytes.
        """
        unit_noise = None if noise is None else standardise_noise(noise).unsqueeze(1)
        condition = one_hot(labels, self.classes).to(self.precision)
        if style is not None and self.generator.mean_skip is not None:
            # A contrast is in the image's unit.
            style = style / (self.high - self.low)
        image = self.generator(condition, unit_noise, style)[1][:, 0]  # (N, H, W) in [0, 1]
        hu = torch.round(image * (self.high - self.low) + self.low)
        values = torch.clamp(hu, self.low, self.high)
        # The product is exact, and saves a Concat of single values, which is slow.
        pair = torch.floor(values.unsqueeze(-1) * self.places.to(values.device))
        return (pair - 256.0 * torch.floor(pair / 256.0)).to(torch.uint8)


class Fp16Layer(nn.Module):
    """A layer with FP16 weights, inputs and output."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer.half()

    @property
    def weight(self) -> Tensor:
        """The weights of the layer, FP16."""
        weight: Tensor = self.layer.weight
        return weight

    def forward(self, *inputs: Tensor) -> Tensor:
        """Compute the layer on `inputs` as FP16; returns FP16."""
        out: Tensor = self.layer(*(x.half() for x in inputs))
        return out


class Fp32Norm(nn.Module):
    """A norm in FP32 between FP16 layers."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` in FP32; returns the dtype of `x`."""
        out: Tensor = self.layer(x.float())
        return out.to(x.dtype)


def fuse_batch_norm(graph: LabelsToIntensity) -> LabelsToIntensity:
    """Fuse each batch norm into the convolution before it.

    Args:
        graph: The network; it is not changed.

    Returns:
        A copy that computes the same in evaluation mode.
    """
    graph = copy.deepcopy(graph)
    for block in [m for m in graph.modules() if isinstance(m, nn.Sequential)]:
        for n in range(len(block) - 1, 0, -1):
            before, norm = block[n - 1], block[n]
            if isinstance(before, (nn.Conv2d, nn.ConvTranspose2d)) and isinstance(
                norm, nn.BatchNorm2d
            ):
                block[n - 1] = fuse_conv_bn_eval(
                    before, norm, transpose=isinstance(before, nn.ConvTranspose2d)
                )
                block[n] = nn.Identity()
    return graph


def to_fp16(graph: LabelsToIntensity) -> LabelsToIntensity:
    """Convert the layers to FP16.

    Norms, all that follows the last layers (`Generator.forward`) and the labels' contrast stay
    FP32.

    Args:
        graph: The network; it is not changed.

    Returns:
        A copy with FP16 weights.
    """
    graph = copy.deepcopy(graph)
    graph.precision = torch.float16
    for parent in [m for m in graph.modules() if not isinstance(m, (Fp16Layer, Fp32Norm))]:
        for name, layer in parent.named_children():
            if layer is graph.generator.contrast:
                continue
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                setattr(parent, name, Fp16Layer(layer))
            elif isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)):
                setattr(parent, name, Fp32Norm(layer))
    return graph
