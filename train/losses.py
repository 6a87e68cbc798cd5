"""Losses: pure functions from tensors to named scalars, weighted and summed by train/step.py,
logged by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

TEXTURE_SIDES = (3, 5)  # pixels: fine grain and coarser mottle
FLOOR_SIDE = 4  # pixels
LEAST_DEVIATION = 0.002  # keeps the square root's slope finite; 4 HU in a range of 2048


def discriminator_losses(
    score_real: Tensor, score_fake: Tensor, gan: str = "lsgan"
) -> dict[str, Tensor]:
    """`lsgan` (Mao et al., ICCV 2017): real patches are to score 1, synthesized ones 0. `hinge`
    (Lim & Ye 2017): at least 1, at most -1.

    Each half counts half.
    """
    if gan == "hinge":
        return {
            "d_real": 0.5 * functional.relu(1 - score_real).mean(),
            "d_fake": 0.5 * functional.relu(1 + score_fake).mean(),
        }
    return {
        "d_real": 0.5 * (score_real - 1).square().mean(),
        "d_fake": 0.5 * score_fake.square().mean(),
    }


def generator_losses(
    score_fake: Tensor,
    fake_smooth: Tensor,
    fake: Tensor,
    real: Tensor,
    *,
    gan: str = "lsgan",
    weight: Tensor | float = 1.0,
) -> dict[str, Tensor]:
    """Images (N, 1, H, W) in [0, 1]: `smooth` without texture, `synthesized` with it.

    `adversarial`: synthetic patches are to score 1 (`hinge`: as high as they can).
    `reconstruction`: mean absolute difference of `smooth` and `real`: measured on `synthesized`,
    the best answer would be no texture; `weight`, (N, 1, H, W), says where it counts. `texture`:
    mean absolute difference of the noise floors.
    """
    texture = torch.stack(
        [(noise_floor(fake, side) - noise_floor(real, side)).abs().mean() for side in TEXTURE_SIDES]
    )
    adversarial = -score_fake.mean() if gan == "hinge" else (score_fake - 1).square().mean()
    return {
        "adversarial": adversarial,
        "reconstruction": ((fake_smooth - real).abs() * weight).mean(),
        "texture": texture.mean(),
    }


def feature_matching(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Mean absolute difference of the discriminator's features, each stage counted alike
    (pix2pixHD, Wang et al., CVPR 2018, eq. 4).
    """
    return torch.stack(
        [(a - b.detach()).abs().mean() for a, b in zip(fake, real, strict=True)]
    ).mean()


def centre_weight(labels: Tensor) -> Tensor:
    """Where a reconstruction counts when it is weighted: `labels` (N, Z, H, W) model indices →
    float32 (N, 1, H, W) in (0, 1].

    1 inside the mask (of the middle slice), outside a Gaussian of peak 1 about the mask's centroid,
    of variance 60 H along the rows' axis and 30 W along the columns' (the original system's
    numbers, in pixels squared); all 1 without a mask.
    """
    inside = (labels[:, labels.shape[1] // 2] != 0).float()  # (N, H, W)
    h, w = inside.shape[-2:]
    rows, columns = torch.arange(h, device=labels.device), torch.arange(w, device=labels.device)
    count = inside.sum((1, 2))
    some = count.clamp(min=1)
    y, x = ((inside.sum(axis) * line).sum(1) / some for axis, line in ((2, rows), (1, columns)))
    squared = (rows - y[:, None]).square()[:, :, None] / (60 * h) + (columns - x[:, None]).square()[
        :, None
    ] / (30 * w)
    everywhere = (count == 0).float()[:, None, None]
    return torch.maximum(torch.exp(-squared / 2), torch.maximum(inside, everywhere))[:, None]


def noise_floor(image: Tensor, side: int) -> Tensor:
    """The texture's standard deviation, anatomy left aside: (N, 1, H, W) → (N, 1, H // FLOOR_SIDE,
    W // FLOOR_SIDE).

    The deviation about the local mean in windows of `side` pixels; of neighbouring windows the
    flattest, which has no edge in it.
    """

    def mean(x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, side, 1, side // 2, count_include_pad=False)

    deviation = (mean((image - mean(image)).square()) + LEAST_DEVIATION**2).sqrt()
    return -functional.max_pool2d(-deviation, FLOOR_SIDE)


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum of weight x loss over the names of `losses`."""
    return torch.stack([weights[name] * value for name, value in losses.items()]).sum()
