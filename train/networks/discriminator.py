"""The discriminator: it scores overlapping patches of an image, given the labels or without them.

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", 2017 (PatchGAN).
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from .blocks import BN_MOMENTUM, LEAK, WIDEST, same_conv4


class Discriminator(nn.Module):
    """A PatchGAN discriminator.

    Args:
        channels: Channels of the condition.
        filters: Channels of the first layer; they double with depth.
        patch_size: The side of a patch in pixels, a power of two; its log2 is the depth.
        conditional: Whether it sees the condition.
    """

    def __init__(self, channels: int, *, filters: int, patch_size: int, conditional: bool = True):
        super().__init__()
        depth = patch_size.bit_length() - 1
        self.conditional = conditional
        widths = [
            1 + (channels if conditional else 0),
            *(filters * min(2**n, WIDEST) for n in range(depth)),
        ]
        # "stages" and "score" are names of weights in users' checkpoints: see blocks.py.
        self.stages = nn.ModuleList(
            _block(a, b, first=n == 0) for n, (a, b) in enumerate(pairwise(widths))
        )
        self.score = same_conv4(widths[-1], 1)

    def forward(self, condition: Tensor, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Score the patches of an image.

        Args:
            condition: (N, C, H, W); an unconditional discriminator ignores it.
            image: (N, 1, H, W).

        Returns:
            Scores (N, 1, H / patch_size, W / patch_size), and the features of each block.
        """
        first, *more_blocks = self.stages
        x = first[1](_joined(first[0], image, condition) if self.conditional else first[0](image))
        features = [x]
        for block in more_blocks:
            x = block(x)
            features.append(x)
        return self.score(x), features


def _joined(conv: nn.Conv2d, image: Tensor, condition: Tensor) -> Tensor:
    """Convolve image and condition, as one tensor, by a sum of two convolutions.

    It copies nothing large and computes no gradient towards the labels, which need none: a step of
    phantom.json takes a fifth to a quarter less time on a CPU.
    """
    of_image, of_condition = conv.weight.split([1, conv.in_channels - 1], 1)
    return functional.conv2d(condition, of_condition, conv.bias, 2, 1) + functional.conv2d(
        image, of_image, None, 2, 1
    )


def _block(channels_in: int, channels_out: int, *, first: bool) -> nn.Sequential:
    """A block of stride 2; the first has no normalisation."""
    conv = nn.Conv2d(channels_in, channels_out, 4, 2, 1, bias=first)
    norm = [] if first else [nn.BatchNorm2d(channels_out, momentum=BN_MOMENTUM)]
    return nn.Sequential(conv, *norm, nn.LeakyReLU(LEAK))
