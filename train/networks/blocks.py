"""The parts of every architecture: down blocks, up blocks, and the output head.

Batch normalisation only: it folds into the convolutions at export and survives FP16
(docs/decisions/0007-what-a-style-means.md).

The names of nn.Module attributes are the names of weights in users' run folders and of nodes in
exported graphs. They stay as they are, also where a better word is in use elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

# Channels double with depth up to so many times the first layer's.
WIDEST = 8
# 0.8 in Keras' convention.
BN_MOMENTUM = 0.2
LEAK = 0.2


@runtime_checkable
class OutputHead(Protocol):
    """What `Generator` needs of an output head: it leads from half resolution to the image.

    A head is an nn.Module made as `Head(width, channels, filters, textures, style)`: the channels
    of its `parts` together, of the condition, and of the first layer; the number of noise filters;
    the length of a style. Its image and amplitude maps leave with `block` x `block` pixels as
    channels (torch's pixel_unshuffle), so that no layer needs to run at full resolution.

    Attributes:
        block: The side of these blocks in pixels; 1 is an image as it is.
        image: The last layer before the output activation; exported graphs carry its name.
        amplitudes: The layer that gives the noise gain, or None where the network takes no noise.
            `initialise` scales its weight.
    """

    block: int
    image: nn.Module
    amplitudes: nn.Module | None

    def __call__(
        self, parts: Sequence[Tensor], condition: Tensor, style: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the logits of the image and the noise gain.

        Args:
            parts: Features (N, C', H / 2, W / 2), of the decoder and of a skip if any.
            condition: One-hot labels (N, channels, H, W).
            style: (N, S), or None for the style 0.

        Returns:
            Logits (N, block², H / block, W / block), and amplitude maps (N, K * block², H / block,
            W / block) for K noise filters, or None without noise.
        """
        ...


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors along the channels.

    Args:
        parts: Tensors (N, C, H, W) that differ in C alone.

    Returns:
        (N, sum of C, H, W).
    """
    return torch.cat(list(parts), 1) if len(parts) > 1 else parts[0]


def same_conv4(channels_in: int, channels_out: int) -> nn.Sequential:
    """Make a 4x4 convolution of stride 1 that keeps the size.

    It pads as Keras does: one pixel before, two after.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.

    Returns:
        The padding and the convolution.
    """
    return nn.Sequential(nn.ZeroPad2d((1, 2, 1, 2)), nn.Conv2d(channels_in, channels_out, 4))


class BlockConv2d(nn.Conv2d):
    """`pixel_unshuffle(convolution, block)` as one convolution of stride `block`.

    A few channels at every pixel leave most of a vector register empty; this layer computes many
    channels at fewer pixels. The weights are those of the plain convolution (odd, padded to the
    same size), set at each place of the block; an exported file holds the result.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, block: int, *, bias: bool = True
    ):
        super().__init__(channels_in, channels_out, kernel, padding=kernel // 2, bias=bias)
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Convolve.

        Args:
            x: (N, C, H, W).

        Returns:
            (N, F * block², H / block, W / block), with channel f * block² + i * block + j.
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
    """A 1x1 convolution of `cat(parts, 1)` as a sum of convolutions, one for each part.

    It copies no part, and in INT8 each part has a range of its own.
    """

    def forward(self, *parts: Tensor) -> Tensor:
        """Convolve and sum.

        Args:
            *parts: Tensors (N, C, H, W) that differ in C alone.

        Returns:
            (N, F, H, W).
        """
        first, *more_parts = parts
        start = first.shape[1]
        x = functional.conv2d(first, self.weight[:, :start], self.bias)
        for part in more_parts:
            x = x + functional.conv2d(part, self.weight[:, start : start + part.shape[1]])
            start += part.shape[1]
        return x


class JoinConv2d(nn.Conv2d):
    """`SumConv2d` of `[*parts, pixel_unshuffle(condition, 2)]`.

    A 1x1 convolution of the condition's 2x2 blocks is a 2x2 convolution of stride 2 of the
    condition.
    """

    def forward(self, condition: Tensor, *parts: Tensor) -> Tensor:
        """Convolve and sum.

        Args:
            condition: (N, C, H, W).
            *parts: (N, C', H / 2, W / 2).

        Returns:
            (N, F, H / 2, W / 2).
        """
        start = self.in_channels - 4 * condition.shape[1]
        x = functional.conv2d(
            condition, self.weight[:, start:].reshape(self.out_channels, -1, 2, 2), self.bias, 2
        )
        for part in reversed(parts):
            stop, start = start, start - part.shape[1]
            x = x + functional.conv2d(part, self.weight[:, start:stop])
        return x


class Join(nn.Sequential):
    """A sequence of layers of which the first takes several tensors."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Apply the layers in their order.

        Args:
            *inputs: The inputs of the first layer.

        Returns:
            The output of the last layer.
        """
        first, *more_layers = self
        x: Tensor = first(*inputs)
        for layer in more_layers:
            x = layer(x)
        return x


class Modulation(nn.Module):
    """Scale and shift features by the style: x * (1 + A s) + B s (FiLM, Perez et al., AAAI 2018).

    There is no bias and the weights start at zero: the style 0, that of the mean patient, leaves
    the features as they are. These factors differ from sample to sample, so they come after the
    batch normalisation, which still folds into its convolution.
    """

    def __init__(self, style: int, width: int):
        super().__init__()
        self.factors = nn.Linear(style, 2 * width, bias=False)
        nn.init.zeros_(self.factors.weight)

    def forward(self, x: Tensor, style: Tensor | None) -> Tensor:
        """Scale and shift.

        Args:
            x: Features (N, C, H, W).
            style: (N, S), or None for the style 0.

        Returns:
            (N, C, H, W).
        """
        if style is None:
            return x
        scale, shift = self.factors(style)[:, :, None, None].chunk(2, 1)
        return x * (1 + scale) + shift


class ReferenceHead(nn.Module):
    """The original's `OutputHead`: a transposed convolution to one channel, then a convolution."""

    block = 1

    def __init__(self, width: int, channels: int, filters: int, textures: int, style: int):
        super().__init__()
        self.image = nn.Sequential(nn.ConvTranspose2d(width, 1, 4, 2, 1), same_conv4(1, 1))
        self.amplitudes = nn.ConvTranspose2d(width, textures, 4, 2, 1) if textures else None

    def forward(
        self, parts: Sequence[Tensor], condition: Tensor, style: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the logits and the noise gain: see `OutputHead`."""
        x = concatenate(parts)
        return self.image(x), self.amplitudes(x) if self.amplitudes is not None else None


class UnetHead(nn.Module):
    """The `OutputHead` that ends in features at full resolution, where the labels join again.

    Edges of organs need not pass through the decoder. Pixels are repeated and not deconvolved: a
    transposed convolution treats odd and even pixels apart, which shows as a checkerboard.
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
        """Compute the logits and the noise gain: see `OutputHead`."""
        full = self.join(torch.cat([self.up(concatenate(parts)), condition], 1))
        if self.modulation is not None:
            full = self.modulation(full, style)
        return self.image(full), self.amplitudes(full) if self.amplitudes is not None else None


class EdgeHead(nn.Module):
    """The `OutputHead` without a convolution of features at full resolution.

    The labels join with their 2x2 blocks as channels, so that edges stay where they are, and the
    image leaves as 2x2 blocks too (Shi et al., CVPR 2016).
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
        """Compute the logits and the noise gain: see `OutputHead`."""
        half = self.join(condition, *parts)
        if self.modulation is not None:
            half = self.modulation(half, style)
        logits = functional.pixel_shuffle(self.image(half), 2)
        return logits, self.amplitudes(half) if self.amplitudes is not None else None


def _down(channels_in: int, channels_out: int, *, first: bool) -> nn.Sequential:
    """A block of the encoder, of stride 2; the first has no normalisation."""
    conv = nn.Conv2d(channels_in, channels_out, 4, 2, 1, bias=first)
    norm = [] if first else [nn.BatchNorm2d(channels_out, momentum=BN_MOMENTUM)]
    return nn.Sequential(conv, *norm, nn.LeakyReLU(LEAK))


def _up_reference(channels_in: int, channels_out: int) -> nn.Sequential:
    """A block of the reference's decoder: deconvolution and convolution."""
    return nn.Sequential(
        nn.ConvTranspose2d(channels_in, channels_out, 4, 2, 1),
        same_conv4(channels_out, channels_out),
        nn.ReLU(),
        nn.BatchNorm2d(channels_out, momentum=BN_MOMENTUM),
    )


def _up_unet(channels_in: int, channels_out: int) -> nn.Sequential:
    """A block of the unet's decoder: a deconvolution."""
    return nn.Sequential(
        nn.ConvTranspose2d(channels_in, channels_out, 4, 2, 1, bias=False),
        nn.BatchNorm2d(channels_out, momentum=BN_MOMENTUM),
        nn.ReLU(),
    )


def _conv3(channels_in: int, channels_out: int) -> list[nn.Module]:
    """A 3x3 convolution with normalisation and activation."""
    return [
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out, momentum=BN_MOMENTUM),
        nn.ReLU(),
    ]


def _separable(
    channels_in: int, channels_out: int, mixer: type[nn.Conv2d] = nn.Conv2d
) -> list[nn.Module]:
    """A 1x1 convolution, then a 3x3 one for each channel alone (Howard et al., "MobileNets", 2017).

    It needs about 1/9 of the work of a 3x3 convolution.
    """
    mix = mixer(channels_in, channels_out, 1, bias=False)
    spread = nn.Conv2d(channels_out, channels_out, 3, padding=1, groups=channels_out, bias=False)
    norms = [nn.BatchNorm2d(channels_out, momentum=BN_MOMENTUM) for _ in range(2)]
    return [mix, norms[0], nn.ReLU(), spread, norms[1], nn.ReLU()]


def _down_edge(channels_in: int, channels_out: int, *, first: bool) -> nn.Sequential:
    """A block of the edge's encoder, depthwise-separable."""
    if first:
        return _down(channels_in, channels_out, first=True)
    shrink = nn.Conv2d(channels_in, channels_in, 4, 2, 1, groups=channels_in, bias=False)
    mix = nn.Conv2d(channels_in, channels_out, 1, bias=False)
    norms = [nn.BatchNorm2d(n, momentum=BN_MOMENTUM) for n in (channels_in, channels_out)]
    return nn.Sequential(shrink, norms[0], nn.LeakyReLU(LEAK), mix, norms[1], nn.LeakyReLU(LEAK))


def _up_edge(channels_in: int, channels_out: int) -> Join:
    """A block of the edge's decoder, depthwise-separable."""
    mix, norm, relu, *spread = _separable(channels_in, channels_out, SumConv2d)
    # Channels are mixed before the upsampling, where pixels are few.
    return Join(mix, norm, relu, nn.Upsample(scale_factor=2), *spread)


class Architecture(NamedTuple):
    """The parts of one architecture.

    Attributes:
        down: Makes a block of the encoder, of stride 2.
        up: Makes a block of the decoder, of stride 1/2.
        head: Makes the output head: see `OutputHead`.
    """

    down: Callable[..., nn.Module]
    up: Callable[[int, int], nn.Module]
    head: Callable[[int, int, int, int, int], OutputHead]


# By the config key generator.kind.
ARCHITECTURES = {
    "reference": Architecture(_down, _up_reference, ReferenceHead),
    "unet": Architecture(_down, _up_unet, UnetHead),
    "edge": Architecture(_down_edge, _up_edge, EdgeHead),
}
