"""The generator: a U-Net from one-hot labels (and white noise) to an image in [0, 1].

`reference` follows the original system: stride-2 4x4 convolutions down, transposed 4x4 convolution
and 4x4 convolution up, optional skips. `unet` is lighter: on the way up, only the full resolution
has a second convolution, whose features remain for the head. `edge` is the lightest, for machines
without a GPU: depthwise-separable, with nothing wide at full resolution. H and W are multiples of
`divisor`. train/networks/blocks.py holds the parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from .blocks import ARCHITECTURES, WIDEST, BlockConv2d, Join, Modulation, OutputHead, concatenate

# The noise's standard deviation is at most so many times that of the class's real texture.
NOISE_LIMIT = 1.5
# A mean skip's intensities lie so far from the ends of the range at least: 5 HU of 2048.
LEAST_SHARE = 0.0025
# The factor of the amplitude maps' weights at the start: the first images have little texture.
NOISE_INIT_SCALE = 0.02
# Of the image's weights, beside a mean skip: it starts as the image of the classes' means.
IMAGE_INIT_SCALE = 0.1
# The noise's largest standard deviation in logits. Near the ends of the range, where the sigmoid is
# flat, more would make rare bright pixels of a noise that is said to be small.
MOST_NOISE = 0.6
# Of a uniform byte.
NOISE_MEAN, NOISE_SD = 127.5, 73.9


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Encode model indices as one-hot channels.

    Each slice is compared channels last, which is how engines hold what they convolve: no engine
    transposes the result. Written with slices, Equal and Concat: a flatten with dynamic H, W would
    put Shape nodes on a uint8 input.

    Args:
        labels: Model indices (N, Z, H, W), any dtype.
        classes: The number of labels, with the background.

    Returns:
        float32 (N, Z * classes, H, W): channel z * classes + v is 1 where slice z holds v.
    """
    values = labels.float()
    indices = torch.arange(classes, dtype=torch.float32, device=labels.device)
    slices = [values[:, z : z + 1].permute(0, 2, 3, 1) == indices for z in range(labels.shape[1])]
    return torch.cat([is_label.float().permute(0, 3, 1, 2) for is_label in slices], 1)


def standardise_noise(noise: Tensor) -> Tensor:
    """Scale uniform random bytes to zero mean and unit variance.

    Args:
        noise: Bytes of any shape and dtype.

    Returns:
        float32 of the same shape.
    """
    return (noise.float() - NOISE_MEAN) / NOISE_SD


class NoiseInjection(nn.Module):
    """CT texture: sum_k a_k(x) * (w_k * n)(x).

    Learned kernels w_k filter white noise n, and amplitude maps a_k weight the results. The sum is
    linear in the noise, so the network learns the spectrum and the local amplitude of the texture.
    All tensors have `block` x `block` pixels as channels, as the output head gives its maps.
    """

    def __init__(self, textures: int, kernel: int, block: int):
        super().__init__()
        self.textures, self.block = textures, block
        self.filters = BlockConv2d(1, textures, kernel, block, bias=False)

    def start(self, correlation: float) -> None:
        """Give the first filter a cohort's grain and unit gain.

        Args:
            correlation: The texture's correlation between neighbouring pixels, in (0, 0.7).
        """
        if self.filters.kernel_size[0] < 3:
            return
        # White noise behind (a, 1, a) along both axes has 2a / (1 + 2a²) between neighbours.
        a = (1 - math.sqrt(1 - 2 * correlation**2)) / (2 * correlation)
        line = torch.tensor([a, 1.0, a]) / math.sqrt(1 + 2 * a**2)
        middle = self.filters.kernel_size[0] // 2
        with torch.no_grad():
            kernel = self.filters.weight[0, 0].zero_()
            kernel[middle - 1 : middle + 2, middle - 1 : middle + 2] = line[:, None] * line

    def forward(self, amplitudes: Tensor, noise: Tensor) -> Tensor:
        """Filter the noise and weight it.

        Args:
            amplitudes: (N, K * block², H / block, W / block).
            noise: Standardised noise (N, 1, H, W).

        Returns:
            (N, block², H / block, W / block), to be added to the logits.
        """
        shaped = amplitudes * self.filters(noise)
        if self.block == 1:
            return shaped.sum(1, keepdim=True)
        # The sum over k as a matrix product: no engine moves channels for it, and quantisation,
        # which changes convolutions, leaves it alone.
        identity = torch.eye(self.block**2, dtype=shaped.dtype, device=shaped.device)
        places = identity.repeat(self.textures, 1)
        return (shaped.permute(0, 2, 3, 1) @ places).permute(0, 3, 1, 2)


class MeanSkip(nn.Module):
    """The path from the classes to the image that passes no layer: one intensity a class.

    It starts as the image of each class's mean intensity behind a narrow point spread function, so
    that training learns the rest: the control without a network is where it begins. A style is the
    contrast: how far the intensity of each class lies from the cohort's. The path adds it exactly,
    whatever the network has learned.

    Args:
        classes: The number of classes.

    Attributes:
        logits: The logit of each class, (classes,), trained.
        spread: The point spread function along both axes is (spread, 1, spread), by its sum. It is
            the cohort's, a number: trained, it grew far beyond it, for a mean of what may be is
            smooth.
        medians: The cohort's intensity of each class in [0, 1], (classes,).
        noise_limit: The noise's largest standard deviation as a share of the range, (classes,).
    """

    def __init__(self, classes: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(classes))
        self.medians: Tensor
        self.noise_limit: Tensor
        self.spread: Tensor
        self.register_buffer("spread", torch.zeros(()))
        self.register_buffer("medians", torch.full((classes,), 0.5))
        self.register_buffer("noise_limit", torch.full((classes,), 0.25))

    def start(self, means: Tensor, medians: Tensor, noise: Tensor, spread: float) -> None:
        """Start at a cohort's statistics.

        Args:
            means: The mean intensity of each class in [0, 1], (classes,).
            medians: The median one.
            noise: The standard deviation of its texture, as a share of the range.
            spread: Of the point spread function.
        """
        with torch.no_grad():
            self.spread.fill_(spread)
            self.logits.copy_(_logit(means))
            self.medians.copy_(medians)
            self.noise_limit.copy_(NOISE_LIMIT * noise)

    def forward(self, labels: Tensor, style: Tensor | None) -> Tensor:
        """Give every pixel the intensity of its class and, at edges, of its neighbours.

        Args:
            labels: One-hot classes of the middle slice (N, classes, H, W).
            style: The contrast as a share of the range, (N, classes); None for the cohort's.

        Returns:
            Logits, float32 (N, 1, H, W).
        """
        logits = self.logits[None]
        if style is not None:
            logits = logits + _logit(self.medians + style) - _logit(self.medians)
        image = of_class(labels, torch.sigmoid(logits))
        return _logit(self._spread(image))

    def _spread(self, image: Tensor) -> Tensor:
        """The image behind the point spread function: sums, as no engine quantises these."""
        a = self.spread
        # The border repeats itself: a scan does not darken where it ends.
        x = functional.pad(image, (1, 1, 1, 1), mode="replicate")
        x = (x[:, :, 1:-1] + a * (x[:, :, :-2] + x[:, :, 2:])) / (1 + 2 * a)
        return (x[..., 1:-1] + a * (x[..., :-2] + x[..., 2:])) / (1 + 2 * a)

    def limit(self, labels: Tensor, contrast: Tensor) -> Tensor:
        """The largest standard deviation of the noise, (N, 1, H, W) in logits.

        Args:
            labels: As in `forward`.
            contrast: What `forward` returned.
        """
        image = torch.sigmoid(contrast)
        # The slope of the logit converts intensities to logits, at edges that of the mixture.
        limit = of_class(labels, self.noise_limit[None]) / (image * (1 - image))
        return limit.clamp(max=MOST_NOISE)


def of_class(labels: Tensor, values: Tensor) -> Tensor:
    """Give every pixel the value of its class.

    A matrix product: no engine quantises it, and it needs no convolution.

    Args:
        labels: One-hot classes (N, classes, H, W).
        values: (N, classes) or (1, classes).

    Returns:
        float32 (N, 1, H, W).
    """
    return (labels.float() * values[:, :, None, None]).sum(1, keepdim=True)


def _logit(share: Tensor) -> Tensor:
    """The input of the sigmoid for an output, kept off its flat ends."""
    p = share.clamp(LEAST_SHARE, 1 - LEAST_SHARE)
    return torch.log(p / (1 - p))


class Generator(nn.Module):
    """The generator of one of the `ARCHITECTURES`.

    The names of its modules (encoder, decoder, top, texture ...) are names of weights in users' run
    folders: see train/networks/blocks.py.

    Args:
        channels: Channels of the condition: classes * Z.
        kind: The architecture.
        filters: Channels of the first layer.
        depth: The number of stride-2 blocks.
        skips: Whether features skip from the encoder to the decoder.
        textures: The number of noise filters; 0: the network takes no noise.
        texture_kernel: Their side in pixels, odd.
        style: The length of a style; 0: the network takes no style.
        mean_skip: Whether the classes' intensities lead to the image directly (`MeanSkip`). A
            style is then the contrast of each class, of any length but 0.
        slices: Z, the slices of the condition.
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
        mean_skip: bool = False,
        slices: int = 1,
    ):
        super().__init__()
        self.channels, self.divisor = channels, 2**depth
        self.classes = channels // slices
        self.noisy, self.skips = textures > 0, skips
        self.style = self.classes if mean_skip and style else style
        if mean_skip:
            # The classes' image is one more channel, and no layer but this path takes the style.
            channels, style = channels + 1, 0
        down, up, make_head = ARCHITECTURES[kind]
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
        self.top: OutputHead = make_head(width, channels, filters, textures, style)
        # A style mostly changes the brightness of each label. Added to the logits, this change
        # need not pass through few features.
        self.contrast = nn.Linear(style, channels, bias=False) if style else None
        if self.contrast is not None:
            nn.init.zeros_(self.contrast.weight)
        if self.noisy:
            self.texture = NoiseInjection(textures, texture_kernel, self.top.block)
        self.mean_skip = MeanSkip(self.classes) if mean_skip else None

    def forward(
        self, condition: Tensor, noise: Tensor | None = None, style: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Synthesize images without and with texture.

        From the logits on, everything is FP32, whatever the precision of the blocks: near 1, a
        sigmoid in FP16 has steps of 1 HU.

        Args:
            condition: One-hot labels, float (N, channels, H, W).
            noise: Standardised noise (N, 1, H, W); None: no texture.
            style: (N, S); None: the style 0.

        Returns:
            The images without texture and those with it, float (N, 1, H, W) in [0, 1]; the same
            tensor without noise.
        """
        contrast = self._contrast(condition, style)
        if self.mean_skip is not None and contrast is not None:
            prior = torch.sigmoid(contrast).to(condition.dtype)
            base, amplitudes = self.logits(torch.cat([condition, prior], 1))
        else:
            base, amplitudes = self.logits(condition, style)
        base = base.float()
        fake_smooth = self._image(base, contrast)
        if noise is None or amplitudes is None:
            return fake_smooth, fake_smooth
        amplitudes = amplitudes.float()
        if self.mean_skip is None:
            return fake_smooth, self._image(base + self.texture(amplitudes, noise), contrast)
        assert contrast is not None
        limit = self._limit(condition, contrast)
        amplitudes = self._from_real_texture(amplitudes, limit)
        texture = self.texture(amplitudes, noise) * self._gain(amplitudes, limit)
        return fake_smooth, self._image(base + texture, contrast)

    def logits(
        self, condition: Tensor, style: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the input of the output activation, without noise and contrast.

        Args:
            condition: As in `forward`.
            style: As in `forward`.

        Returns:
            Logits and amplitude maps (or None), as an `OutputHead` returns them.
        """
        x, features = condition, list[Tensor]()
        for block in self.encoder:
            x = block(x)
            features.append(x)
        parts = [x]
        for n, (block, skip) in enumerate(zip(self.decoder, reversed(features[:-1]), strict=True)):
            x = block(*parts) if isinstance(block, Join) else block(concatenate(parts))
            if len(self.modulations):
                x = self.modulations[n](x, style)
            parts = [x, skip] if self.skips else [x]
        base, amplitudes = self.top(parts, condition, style)
        return base, amplitudes

    def _contrast(self, condition: Tensor, style: Tensor | None) -> Tensor | None:
        """What is added to every pixel's logit for its label and the style, (N, 1, H, W)."""
        if self.mean_skip is not None:
            return self.mean_skip(self._middle(condition), style)
        if self.contrast is None or style is None:
            return None
        return (condition * self.contrast(style)[:, :, None, None]).sum(1, keepdim=True)

    def _middle(self, condition: Tensor) -> Tensor:
        """The classes of the middle slice of a condition, (N, classes, H, W)."""
        first = self.channels // self.classes // 2 * self.classes
        return condition[:, first : first + self.classes]

    def _limit(self, condition: Tensor, contrast: Tensor) -> Tensor:
        """The noise's largest deviation in logits, (N, block², H / block, W / block)."""
        assert self.mean_skip is not None
        limit = self.mean_skip.limit(self._middle(condition), contrast)
        return limit if self.top.block == 1 else functional.pixel_unshuffle(limit, self.top.block)

    def _from_real_texture(self, amplitudes: Tensor, limit: Tensor) -> Tensor:
        """Amplitudes that count from the real texture: the first filter has it at the start."""
        first, others = amplitudes.split(
            [limit.shape[1], amplitudes.shape[1] - limit.shape[1]], dim=1
        )
        return torch.cat([first + limit / NOISE_LIMIT, others], 1)

    def _gain(self, amplitudes: Tensor, limit: Tensor) -> Tensor:
        """The factor that keeps the noise within its class's limit, in blocks as `amplitudes`."""
        filters = self.texture.filters.weight.float().flatten(1)
        # The variance of a weighted sum of filtered white noise is a quadratic form of its weights.
        n, _, h, w = amplitudes.shape
        maps = amplitudes.reshape(n, self.texture.textures, self.top.block**2, h, w)
        maps = maps.permute(0, 2, 3, 4, 1)
        power = ((maps @ (filters @ filters.T)) * maps).sum(-1)
        return limit * torch.rsqrt(torch.maximum(power, limit.square()) + 1e-12)

    def _image(self, logits: Tensor, contrast: Tensor | None) -> Tensor:
        """The image of logits in blocks: see `OutputHead`."""
        full = functional.pixel_shuffle(logits, self.top.block) if self.top.block > 1 else logits
        return torch.sigmoid(full if contrast is None else full + contrast)


def initialise(modules: Sequence[nn.Module]) -> None:
    """Set Glorot-uniform kernels and zero biases, which are Keras' and so the original's defaults.

    Args:
        modules: The networks; torch's current random state decides their weights.
    """
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        if isinstance(module, Generator) and module.mean_skip is not None:
            with torch.no_grad():
                last = [m for m in module.top.image.modules() if isinstance(m, nn.Conv2d)][-1]
                last.weight.mul_(IMAGE_INIT_SCALE)
        if isinstance(module, Generator) and module.noisy:
            # The filtered noise has unit variance.
            filters = module.texture.filters
            nn.init.normal_(filters.weight, std=1 / filters.kernel_size[0])
            if module.top.amplitudes is not None:
                with torch.no_grad():
                    module.top.amplitudes.weight.mul_(NOISE_INIT_SCALE)
