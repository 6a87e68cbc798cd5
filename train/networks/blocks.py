"""What generators are built of: stages down, stages up, and the top that ends at full resolution,
for each kind.

Batch normalisation only: it folds into the convolutions at export and survives FP16
(docs/decisions/0007-what-a-style-means.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDEST = 8  # channels double with depth up to so many times the first layer's
BN_MOMENTUM = 0.2  # 0.8 in Keras' convention
LEAK = 0.2


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """`parts` (N, C, H, W) side by side as channels."""
    return torch.cat(list(parts), 1) if len(parts) > 1 else parts[0]


def same_conv4(channels_in: int, channels_out: int) -> nn.Sequential:
    """4x4 convolution, stride 1, padded to the same size as Keras does: one pixel before, two
    after.
    """
    return nn.Sequential(nn.ZeroPad2d((1, 2, 1, 2)), nn.Conv2d(channels_in, channels_out, 4))


class BlockConv2d(nn.Conv2d):
    """`pixel_unshuffle(convolution, block)` as one convolution of stride `block`: what would be a
    few channels at every pixel, which leave most of a vector register empty, are many at fewer
    pixels. The weights are the plain convolution's (odd, padded to the same size), set at each
    place of the block; an exported file holds the result.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, block: int, *, bias: bool = True
    ):
        super().__init__(channels_in, channels_out, kernel, padding=kernel // 2, bias=bias)
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, F * block², H / block, W / block), channel f * block² + i * block +
        j.
        """
        last = self.block - 1
        places = [
            functional.pad(self.weight, (j, last - j, i, last - i))
            for i in range(self.block)
            for j in range(self.block)
        ]
        bias = None if self.bias is None else self.bias.repeat_interleave(len(places))
        return functional.conv2d(
            x, torch.stack(places, 1).flatten(0, 1), bias, self.block, self.padding
        )


class SumConv2d(nn.Conv2d):
    """A 1x1 convolution of `cat(parts, 1)` as a sum of convolutions of each: nothing is copied
    together, and in INT8 each has a range of its own.
    """

    def forward(self, *parts: Tensor) -> Tensor:
        """`parts` (N, C, H, W) → (N, F, H, W)."""
        first, *others = parts
        start = first.shape[1]
        x = functional.conv2d(first, self.weight[:, :start], self.bias)
        for part in others:
            x = x + functional.conv2d(part, self.weight[:, start : start + part.shape[1]])
            start += part.shape[1]
        return x


class JoinConv2d(nn.Conv2d):
    """`SumConv2d` of `[*parts, pixel_unshuffle(condition, 2)]`: what is 1x1 on the condition's 2x2
    blocks is 2x2 of stride 2 on the condition.
    """

    def forward(self, condition: Tensor, *parts: Tensor) -> Tensor:
        """`condition` (N, C, H, W), `parts` (N, C', H / 2, W / 2) → (N, F, H / 2, W / 2)."""
        start = self.in_channels - 4 * condition.shape[1]
        x = functional.conv2d(
            condition, self.weight[:, start:].reshape(self.out_channels, -1, 2, 2), self.bias, 2
        )
        for part in reversed(parts):
            stop, start = start, start - part.shape[1]
            x = x + functional.conv2d(part, self.weight[:, start:stop])
        return x


class Join(nn.Sequential):
    """Layers of which the first takes several tensors."""

    def forward(self, *inputs: Tensor) -> Tensor:
        first, *others = self
        x: Tensor = first(*inputs)
        for layer in others:
            x = layer(x)
        return x


class Modulation(nn.Module):
    """Features scaled and shifted as the style says: x * (1 + A s) + B s (FiLM, Perez et al., AAAI
    2018).

    No bias and zeros at first: the style 0, the mean patient's, leaves the features as they are.
    These per-sample factors come after the batch normalisation, which still folds into its
    convolution.
    """

    def __init__(self, style: int, width: int):
        super().__init__()
        self.factors = nn.Linear(style, 2 * width, bias=False)
        nn.init.zeros_(self.factors.weight)

    def forward(self, x: Tensor, style: Tensor | None) -> Tensor:
        """`x` (N, C, H, W), `style` (N, S) or None for 0."""
        if style is None:
            return x
        scale, shift = self.factors(style)[:, :, None, None].chunk(2, 1)
        return x * (1 + scale) + shift


class ReferenceHead(nn.Module):
    """From half resolution to the image, as the original does: a transposed convolution to one
    channel, a convolution.
    """

    block = 1  # the side of the blocks of pixels that it gives as channels

    def __init__(self, width: int, channels: int, filters: int, textures: int, style: int):
        super().__init__()
        self.image = nn.Sequential(nn.ConvTranspose2d(width, 1, 4, 2, 1), same_conv4(1, 1))
        self.amplitudes = nn.ConvTranspose2d(width, textures, 4, 2, 1) if textures else None

    def forward(
        self, parts: Sequence[Tensor], condition: Tensor, style: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        x = concatenate(parts)
        return self.image(x), self.amplitudes(x) if self.amplitudes is not None else None


class UnetHead(nn.Module):
    """From half resolution to features at full resolution, where the labels join again: organs'
    edges are not squeezed through the stages. Pixels are repeated, not deconvolved: a transposed
    convolution treats odd and even pixels apart, which shows as a checkerboard.
    """

    block = 1

    def __init__(self, width: int, channels: int, filters: int, textures: int, style: int):
        super().__init__()
        features = max(8, filters // 2)
        self.up = nn.Sequential(*_conv3(width, features), nn.Upsample(scale_factor=2))
        self.join = nn.Sequential(*_conv3(features + channels, features))
        self.modulation = Modulation(style, features) if style else None
        self.image = nn.Conv2d(features, 1, 3, padding=1)
        self.amplitudes = nn.Conv2d(features, textures, 1) if textures else None

    def forward(
        self, parts: Sequence[Tensor], condition: Tensor, style: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        full = self.join(torch.cat([self.up(concatenate(parts)), condition], 1))
        if self.modulation is not None:
            full = self.modulation(full, style)
        return self.image(full), self.amplitudes(full) if self.amplitudes is not None else None


class EdgeHead(nn.Module):
    """From half resolution to the image without a convolution of features at full resolution: the
    labels join with their 2x2 blocks as channels, so that edges stay where they are, and the image
    leaves as 2x2 blocks too (Shi et al., CVPR 2016).
    """

    block = 2

    def __init__(self, width: int, channels: int, filters: int, textures: int, style: int):
        super().__init__()
        self.join = Join(*_separable(width + 4 * channels, filters, JoinConv2d))
        self.modulation = Modulation(style, filters) if style else None
        self.image = BlockConv2d(filters, 4, 3, 2)
        self.amplitudes = nn.Conv2d(filters, 4 * textures, 1) if textures else None

    def forward(
        self, parts: Sequence[Tensor], condition: Tensor, style: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        half = self.join(condition, *parts)
        if self.modulation is not None:
            half = self.modulation(half, style)
        return functional.pixel_shuffle(self.image(half), 2), (
            self.amplitudes(half) if self.amplitudes is not None else None
        )


def _down(channels_in: int, channels_out: int, *, first: bool) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, 4, 2, 1, bias=first)
    norm = [] if first else [nn.BatchNorm2d(channels_out, momentum=BN_MOMENTUM)]
    return nn.Sequential(conv, *norm, nn.LeakyReLU(LEAK))


def _up_reference(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(channels_in, channels_out, 4, 2, 1),
        same_conv4(channels_out, channels_out),
        nn.ReLU(),
        nn.BatchNorm2d(channels_out, momentum=BN_MOMENTUM),
    )


def _up_unet(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(channels_in, channels_out, 4, 2, 1, bias=False),
        nn.BatchNorm2d(channels_out, momentum=BN_MOMENTUM),
        nn.ReLU(),
    )


def _conv3(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out, momentum=BN_MOMENTUM),
        nn.ReLU(),
    ]


def _separable(
    channels_in: int, channels_out: int, mixer: type[nn.Conv2d] = nn.Conv2d
) -> list[nn.Module]:
    """1x1, then 3x3 for each channel alone (Howard et al., "MobileNets", 2017): about 1/9 of a
    3x3 convolution's work.
    """
    mix = mixer(channels_in, channels_out, 1, bias=False)
    spread = nn.Conv2d(channels_out, channels_out, 3, padding=1, groups=channels_out, bias=False)
    norms = [nn.BatchNorm2d(channels_out, momentum=BN_MOMENTUM) for _ in range(2)]
    return [mix, norms[0], nn.ReLU(), spread, norms[1], nn.ReLU()]


def _down_edge(channels_in: int, channels_out: int, *, first: bool) -> nn.Sequential:
    if first:
        return _down(channels_in, channels_out, first=True)
    shrink = nn.Conv2d(channels_in, channels_in, 4, 2, 1, groups=channels_in, bias=False)
    mix = nn.Conv2d(channels_in, channels_out, 1, bias=False)
    norms = [nn.BatchNorm2d(n, momentum=BN_MOMENTUM) for n in (channels_in, channels_out)]
    return nn.Sequential(shrink, norms[0], nn.LeakyReLU(LEAK), mix, norms[1], nn.LeakyReLU(LEAK))


def _up_edge(channels_in: int, channels_out: int) -> Join:
    mix, norm, relu, *spread = _separable(channels_in, channels_out, SumConv2d)
    return Join(
        mix, norm, relu, nn.Upsample(scale_factor=2), *spread
    )  # channels are mixed where pixels are few


class Architecture(NamedTuple):
    """The parts of one kind of generator."""

    down: Callable[..., nn.Module]
    up: Callable[[int, int], nn.Module]
    top: type[ReferenceHead] | type[UnetHead] | type[EdgeHead]


ARCHITECTURES = {
    "reference": Architecture(_down, _up_reference, ReferenceHead),
    "unet": Architecture(_down, _up_unet, UnetHead),
    "edge": Architecture(_down_edge, _up_edge, EdgeHead),
}
