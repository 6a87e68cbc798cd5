"""The discriminator: scores overlapping patches of an image, given the labels it was synthesized
from (or without them).

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", 2017 (PatchGAN).
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from .blocks import BN_MOMENTUM, LEAK, WIDEST, same_conv4


class Discriminator(nn.Module):
    """`channels`: of the condition; 0 for an unconditional discriminator.

    `patch_size`: a power of two, its log2 is the depth.
    """

    def __init__(self, channels: int, *, filters: int, patch_size: int, conditional: bool = True):
        super().__init__()
        depth = patch_size.bit_length() - 1
        self.conditional = conditional
        widths = [
            1 + (channels if conditional else 0),
            *(filters * min(2**n, WIDEST) for n in range(depth)),
        ]
        self.stages = nn.ModuleList(
            _stage(a, b, first=n == 0) for n, (a, b) in enumerate(pairwise(widths))
        )
        self.score = same_conv4(widths[-1], 1)

    def forward(self, condition: Tensor, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`condition` (N, C, H, W), `image` (N, 1, H, W) → scores (N, 1, H / patch_size, W /
        patch_size), each stage's features.
        """
        first, *others = self.stages
        x = first[1](_joined(first[0], image, condition) if self.conditional else first[0](image))
        features = [x]
        for stage in others:
            x = stage(x)
            features.append(x)
        return self.score(x), features


def _joined(conv: nn.Conv2d, image: Tensor, condition: Tensor) -> Tensor:
    """`conv` of image and condition as one tensor, as a sum of two convolutions: nothing large is
    copied together, and no gradient is computed towards the labels, which need none (a fifth to a
    quarter less time for a step of phantom.json on a CPU).
    """
    of_image, of_condition = conv.weight.split([1, conv.in_channels - 1], 1)
    return functional.conv2d(condition, of_condition, conv.bias, 2, 1) + functional.conv2d(
        image, of_image, None, 2, 1
    )


def _stage(channels_in: int, channels_out: int, *, first: bool) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, 4, 2, 1, bias=first)
    norm = [] if first else [nn.BatchNorm2d(channels_out, momentum=BN_MOMENTUM)]
    return nn.Sequential(conv, *norm, nn.LeakyReLU(LEAK))
