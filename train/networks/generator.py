"""The inference thread: a U-Net from one-hot labels (and white noise) to an image in [0, 1].

`reference` follows the original system: stride-2 4x4 convolutions down, transposed 4x4 convolution
+ 4x4 convolution up, optional skips. `unet` is lighter: no second convolution on the way up but at
full resolution, where features remain for the head. `edge` is the lightest, for machines without a
GPU: depthwise-separable, nothing wide at full resolution. H and W are multiples of `divisor`.
train/networks/blocks.py holds their parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from .blocks import ARCHITECTURES, WIDEST, BlockConv2d, Join, Modulation, concatenate

NOISE_INIT_SCALE = (
    0.02  # the texture's amplitude at the start, against what initialisation would give
)
NOISE_MEAN, NOISE_SD = 127.5, 73.9  # of a uniform byte


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Model indices (N, Z, H, W), any dtype → float32 (N, Z * classes, H, W): channel z * classes +
    v is 1 where slice z holds v.

    Each slice is compared channels last, which is how engines hold what they convolve: nothing is
    put in another order afterwards. Written with slices, Equal and Concat: a flatten with dynamic
    H, W would hang Shape nodes on a uint8 input.
    """
    values = labels.float()
    indices = torch.arange(classes, dtype=torch.float32, device=labels.device)
    slices = [values[:, z : z + 1].permute(0, 2, 3, 1) == indices for z in range(labels.shape[1])]
    return torch.cat([found.float().permute(0, 3, 1, 2) for found in slices], 1)


def standardise_noise(noise: Tensor) -> Tensor:
    """Uniform random bytes, any shape and dtype → float32 of zero mean and unit variance."""
    return (noise.float() - NOISE_MEAN) / NOISE_SD


class NoiseInjection(nn.Module):
    """CT texture: sum_k a_k(x) * (w_k * n)(x), white noise n filtered by learned kernels w_k,
    weighted by amplitude maps a_k.

    Linear in the noise, so what the network learns is the spectrum and the local amplitude of the
    texture. All of it with `block` x `block` pixels as channels, as the top gives its maps.
    """

    def __init__(self, textures: int, kernel: int, block: int):
        super().__init__()
        self.textures, self.block = textures, block
        self.filters = BlockConv2d(1, textures, kernel, block, bias=False)

    def forward(self, amplitudes: Tensor, noise: Tensor) -> Tensor:
        """`amplitudes` (N, K * block², H / block, W / block), `noise` (N, 1, H, W) → (N, block²,
        H / block, W / block).
        """
        shaped = amplitudes * self.filters(noise)
        if self.block == 1:
            return shaped.sum(1, keepdim=True)
        # The sum over k as a product: no engine moves channels for it, and it is no convolution, so
        # never quantised.
        places = torch.eye(self.block**2, dtype=shaped.dtype, device=shaped.device).repeat(
            self.textures, 1
        )
        return (shaped.permute(0, 2, 3, 1) @ places).permute(0, 3, 1, 2)


class Generator(nn.Module):
    """`channels`: of the condition (classes * Z).

    The other arguments are the config's (train/config.py, GeneratorConfig).
    """

    def __init__(
        self,
        channels: int,
        *,
        kind: str,
        filters: int,
        depth: int,
        skips: bool,
        textures: int = 0,
        texture_kernel: int = 7,
        style: int = 0,
    ):
        super().__init__()
        self.channels, self.divisor, self.noisy, self.skips, self.style = (
            channels,
            2**depth,
            textures > 0,
            skips,
            style,
        )
        down, up, top = ARCHITECTURES[kind]
        widths = [filters * min(2**n, WIDEST) for n in range(depth)]
        self.encoder = nn.ModuleList(
            down(a, b, first=n == 0) for n, (a, b) in enumerate(pairwise([channels, *widths]))
        )
        self.decoder = nn.ModuleList()
        width = widths[-1]
        for target in reversed(widths[:-1]):
            self.decoder.append(up(width, target))
            width = target * (2 if skips else 1)
        self.modulations = nn.ModuleList(
            Modulation(style, target) for target in reversed(widths[:-1]) if style
        )
        self.top = top(width, channels, filters, textures, style)
        # The most of a style is by how much brighter each label is: said directly, it need not be
        # squeezed through few features.
        self.contrast = nn.Linear(style, channels, bias=False) if style else None
        if self.contrast is not None:
            nn.init.zeros_(self.contrast.weight)
        if self.noisy:
            self.texture = NoiseInjection(textures, texture_kernel, top.block)

    def forward(
        self, condition: Tensor, noise: Tensor | None = None, style: Tensor | None = None
    ) -> Tensor:
        """Image float (N, 1, H, W) in [0, 1], from float `condition` (N, channels, H, W), `noise`
        (N, 1, H, W), `style` (N, S).

        Without noise or style: the image that a network which takes them synthesizes where they are
        zero.
        """
        return self.generate(condition, noise, style)[1]

    def generate(
        self, condition: Tensor, noise: Tensor | None = None, style: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(image without texture, image with it), both as `forward` returns them; the same tensor
        when there is no noise.

        From the logits on all is FP32, in whatever precision the stages compute: a sigmoid near 1
        has steps of 1 HU in FP16.
        """
        base, amplitudes = self.logits(condition, style)
        base, contrast = base.float(), self._contrast(condition, style)
        fake_smooth = self._image(base, contrast)
        if noise is None or amplitudes is None:
            return fake_smooth, fake_smooth
        return fake_smooth, self._image(base + self.texture(amplitudes.float(), noise), contrast)

    def logits(
        self, condition: Tensor, style: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What the output activation gets without noise and contrast, and the texture's amplitude
        maps if any, both with the top's blocks as channels: (N, block², H / block, W / block) and
        (N, K * block², H / block, W / block).
        """
        x, kept = condition, []
        for stage in self.encoder:
            x = stage(x)
            kept.append(x)
        parts = [x]
        for n, (stage, skip) in enumerate(zip(self.decoder, reversed(kept[:-1]), strict=True)):
            x = stage(*parts) if isinstance(stage, Join) else stage(concatenate(parts))
            if self.style:
                x = self.modulations[n](x, style)
            parts = [x, skip] if self.skips else [x]
        base, amplitudes = self.top(parts, condition, style)
        return base, amplitudes

    def _contrast(self, condition: Tensor, style: Tensor | None) -> Tensor | None:
        if self.contrast is None or style is None:
            return None
        return (condition * self.contrast(style)[:, :, None, None]).sum(1, keepdim=True)

    def _image(self, logits: Tensor, contrast: Tensor | None) -> Tensor:
        whole = functional.pixel_shuffle(logits, self.top.block) if self.top.block > 1 else logits
        return torch.sigmoid(whole if contrast is None else whole + contrast)


def initialise(modules: Sequence[nn.Module]) -> None:
    """Glorot-uniform kernels and zero biases (Keras' defaults, the original's), from torch's
    current random state.
    """
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        if isinstance(module, Generator) and module.noisy:
            nn.init.normal_(
                module.texture.filters.weight, std=1 / module.texture.filters.kernel_size[0]
            )  # unit variance out
            if module.top.amplitudes is not None:
                with torch.no_grad():
                    module.top.amplitudes.weight.mul_(NOISE_INIT_SCALE)
