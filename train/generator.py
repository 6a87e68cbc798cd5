"""The painter: a U-Net from one-hot labels (and white noise) to an image in [0, 1].

`reference` follows the original system: stride-2 4x4 convolutions down, transposed 4x4 convolution + 4x4 convolution up,
optional skips. `unet` is lighter: no second convolution on the way up but at full resolution, where features remain for
the head. H and W are multiples of `divisor`. Batch normalisation only: it folds into the convolutions and survives FP16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

WIDEST = 8  # channels double with depth up to so many times the first layer's
BN_MOMENTUM = 0.2  # 0.8 in Keras' convention
LEAK = 0.2
FAINT = 0.02  # the texture's amplitude at the start, against what initialisation would give
NOISE_MEAN, NOISE_SD = 127.5, 73.9  # of a uniform byte


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Model indices (N, Z, H, W), any dtype → float32 (N, Z * classes, H, W): channel z * classes + v is 1 where slice z holds v.

    Written with slices, Equal and Concat: a flatten with dynamic H, W would hang Shape nodes on a uint8 input.
    """
    values = labels.float()
    planes = [values[:, z : z + 1] == v for z in range(labels.shape[1]) for v in range(classes)]
    return torch.cat([plane.float() for plane in planes], 1)


def standardise_noise(noise: Tensor) -> Tensor:
    """Uniform random bytes, any shape and dtype → float32 of zero mean and unit variance."""
    return (noise.float() - NOISE_MEAN) / NOISE_SD


def same_conv4(channels_in: int, channels_out: int) -> nn.Sequential:
    """4x4 convolution, stride 1, padded to the same size as Keras does: one pixel before, two after."""
    return nn.Sequential(nn.ZeroPad2d((1, 2, 1, 2)), nn.Conv2d(channels_in, channels_out, 4))


class Texture(nn.Module):
    """CT texture: sum_k a_k(x) * (w_k * n)(x), white noise n filtered by learned kernels w_k, weighted by amplitude maps a_k.

    Linear in the noise, so what the network learns is the spectrum and the local amplitude of the texture.
    """

    def __init__(self, textures: int, kernel: int):
        super().__init__()
        self.filters = nn.Conv2d(1, textures, kernel, padding=kernel // 2, bias=False)

    def forward(self, amplitudes: Tensor, noise: Tensor) -> Tensor:
        """`amplitudes` (N, K, H, W), `noise` (N, 1, H, W) → (N, 1, H, W)."""
        return (amplitudes * self.filters(noise)).sum(1, keepdim=True)


class Generator(nn.Module):
    """`channels`: of the condition (classes * Z). The other arguments are the config's (train/config.py, GeneratorConfig)."""

    def __init__(self, channels: int, *, kind: str, filters: int, depth: int, skips: bool, textures: int = 0, texture_kernel: int = 7):
        super().__init__()
        self.channels, self.divisor, self.noisy, self.skips = channels, 2**depth, textures > 0, skips
        up, top = _KINDS[kind]
        widths = [filters * min(2**n, WIDEST) for n in range(depth)]
        self.encoder = nn.ModuleList(_down(a, b, first=n == 0) for n, (a, b) in enumerate(pairwise([channels, *widths])))
        self.decoder = nn.ModuleList()
        width = widths[-1]
        for target in reversed(widths[:-1]):
            self.decoder.append(up(width, target))
            width = target * (2 if skips else 1)
        self.top = top(width, channels, filters, textures)
        if self.noisy:
            self.texture = Texture(textures, texture_kernel)

    def forward(self, condition: Tensor, noise: Tensor | None = None) -> Tensor:
        """`condition` float (N, channels, H, W), `noise` float (N, 1, H, W) or None → image float (N, 1, H, W) in [0, 1].

        Without noise: the image a network with texture paints where the noise is zero.
        """
        return self.paint(condition, noise)[1]

    def paint(self, condition: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(image without texture, image with it), both as `forward` returns them; the same tensor when there is no noise."""
        base, amplitudes = self.logits(condition)
        smooth = torch.sigmoid(base)
        if noise is None or amplitudes is None:
            return smooth, smooth
        return smooth, torch.sigmoid(base + self.texture(amplitudes, noise))

    def logits(self, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the output activation gets without noise (N, 1, H, W), and the texture's amplitude maps (N, K, H, W) if any."""
        x, kept = condition, []
        for stage in self.encoder:
            x = stage(x)
            kept.append(x)
        for stage, skip in zip(self.decoder, reversed(kept[:-1]), strict=True):
            x = stage(x)
            if self.skips:
                x = torch.cat([x, skip], 1)
        base, amplitudes = self.top(x, condition)
        return base, amplitudes


class _TopReference(nn.Module):
    """From half resolution to the image, as the original does: a transposed convolution to one channel, a convolution."""

    def __init__(self, width: int, channels: int, filters: int, textures: int):
        super().__init__()
        self.image = nn.Sequential(nn.ConvTranspose2d(width, 1, 4, 2, 1), same_conv4(1, 1))
        self.amplitudes = nn.ConvTranspose2d(width, textures, 4, 2, 1) if textures else None

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.image(x), self.amplitudes(x) if self.amplitudes is not None else None


class _TopUnet(nn.Module):
    """From half resolution to features at full resolution, where the labels join again: organs' edges are not squeezed
    through the stages. Pixels are repeated, not deconvolved: a transposed convolution treats odd and even pixels apart,
    which shows as a checkerboard.
    """

    def __init__(self, width: int, channels: int, filters: int, textures: int):
        super().__init__()
        features = max(8, filters // 2)
        self.up = nn.Sequential(*_conv3(width, features), nn.Upsample(scale_factor=2))
        self.join = nn.Sequential(*_conv3(features + channels, features))
        self.image = nn.Conv2d(features, 1, 3, padding=1)
        self.amplitudes = nn.Conv2d(features, textures, 1) if textures else None

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        full = self.join(torch.cat([self.up(x), condition], 1))
        return self.image(full), self.amplitudes(full) if self.amplitudes is not None else None


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
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out, momentum=BN_MOMENTUM), nn.ReLU()]


_KINDS: dict[str, tuple[Callable[[int, int], nn.Module], type[_TopReference] | type[_TopUnet]]] = {
    "reference": (_up_reference, _TopReference),
    "unet": (_up_unet, _TopUnet),
}


def initialise(modules: Sequence[nn.Module]) -> None:
    """Glorot-uniform kernels and zero biases (Keras' defaults, the original's), from torch's current random state."""
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        if isinstance(module, Generator) and module.noisy:
            nn.init.normal_(module.texture.filters.weight, std=1 / module.texture.filters.kernel_size[0])  # unit variance out
            if module.top.amplitudes is not None:
                with torch.no_grad():
                    module.top.amplitudes.weight.mul_(FAINT)
