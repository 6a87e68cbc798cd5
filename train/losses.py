"""Losses as pure functions: tensors in, named scalars out.

train/step.py weights and sums them, and training logs them by name. The name of a generator loss is
also the name of its weight in `LossConfig` (train/config.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor
from torch.nn import functional

from .config import LossConfig

# The name of the feature matching loss, which only some configs compute.
FEATURES = "features"
# In pixels: fine grain and coarser mottle.
TEXTURE_SIDES = (3, 5)
# In pixels.
FLOOR_SIDE = 4
# It keeps the square root's slope finite; 4 HU in a range of 2048.
LEAST_DEVIATION = 0.002


def discriminator_losses(
    score_real: Tensor, score_fake: Tensor, gan: str = "lsgan"
) -> dict[str, Tensor]:
    """Compute the discriminator's losses, each with a factor of one half.

    `lsgan` (Mao et al., ICCV 2017) draws the scores of real patches to 1 and of synthetic ones to
    0; `hinge` (Lim & Ye 2017) to at least 1 and at most -1.

    Args:
        score_real: Scores of real patches, any shape.
        score_fake: Scores of synthetic patches, any shape.
        gan: "lsgan" or "hinge".

    Returns:
        The losses `d_real` and `d_fake`.
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
    """Compute the generator's losses, except feature matching.

    `adversarial` draws the scores of synthetic patches to 1 (`hinge`: as high as possible).
    `reconstruction` is the mean absolute difference of `fake_smooth` and `real`; on `fake`, the
    best answer would be an image without texture. `texture` is the mean absolute difference of the
    noise floors of `fake` and `real`.

    Args:
        score_fake: The discriminator's scores of synthetic patches, any shape.
        fake_smooth: Synthetic images without texture, (N, 1, H, W) in [0, 1].
        fake: Synthetic images with texture, likewise.
        real: Real images, likewise.
        gan: "lsgan" or "hinge".
        weight: Where the reconstruction counts, (N, 1, H, W) or a number.

    Returns:
        The losses by name.
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
    """Compute the mean absolute difference of the discriminator's features.

    Each block counts alike (pix2pixHD, Wang et al., CVPR 2018, equation 4).

    Args:
        fake: The features of synthetic images, one (N, C, H, W) per block.
        real: The features of real images, likewise; no gradient flows into them.

    Returns:
        A scalar.
    """
    return torch.stack(
        [(a - b.detach()).abs().mean() for a, b in zip(fake, real, strict=True)]
    ).mean()


def centre_weight(labels: Tensor) -> Tensor:
    """Weight the reconstruction by the distance from the mask.

    The weight is 1 inside the mask of the middle slice. Outside it is a Gaussian of peak 1 about
    the mask's centroid, with a variance of 60 H along the rows' axis and of 30 W along the columns'
    (the original system's numbers, in pixels squared). Without a mask it is 1 everywhere.

    Args:
        labels: (N, Z, H, W) model indices.

    Returns:
        float32 (N, 1, H, W) in (0, 1].
    """
    inside = (labels[:, labels.shape[1] // 2] != 0).float()  # (N, H, W)
    h, w = inside.shape[-2:]
    rows, columns = torch.arange(h, device=labels.device), torch.arange(w, device=labels.device)
    count = inside.sum((1, 2))
    divisor = count.clamp(min=1)
    y, x = ((inside.sum(axis) * line).sum(1) / divisor for axis, line in ((2, rows), (1, columns)))
    squared_y = (rows - y[:, None]).square()[:, :, None] / (60 * h)
    squared_x = (columns - x[:, None]).square()[:, None] / (30 * w)
    gaussian = torch.exp(-(squared_y + squared_x) / 2)
    everywhere = (count == 0).float()[:, None, None]
    return torch.maximum(gaussian, torch.maximum(inside, everywhere))[:, None]


def noise_floor(image: Tensor, side: int) -> Tensor:
    """Measure the standard deviation of the texture without that of the anatomy.

    It is the deviation about the local mean in windows of `side` pixels. Of neighbouring windows
    the flattest counts, which contains no edge.

    Args:
        image: (N, 1, H, W).
        side: The windows' side in pixels.

    Returns:
        (N, 1, H // FLOOR_SIDE, W // FLOOR_SIDE).
    """

    def mean(x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, side, 1, side // 2, count_include_pad=False)

    deviation = (mean((image - mean(image)).square()) + LEAST_DEVIATION**2).sqrt()
    return -functional.max_pool2d(-deviation, FLOOR_SIDE)


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum weight x loss over the names of `losses`.

    Args:
        losses: Scalars by name.
        weights: Weights by name; it may hold more names.

    Returns:
        A scalar.
    """
    return torch.stack([weights[name] * value for name, value in losses.items()]).sum()


def generator_weights(config: LossConfig) -> dict[str, float]:
    """Look up the weight of every loss of the generator.

    `Step` calls this when it is made, so that a loss without a weight fails before the first step.

    Args:
        config: The section of the config.

    Returns:
        The weights by the losses' names.

    Raises:
        TypeError: `LossConfig` has no number of that name: a mistake in the code, not in a config.
    """
    # The meta device computes shapes alone, so the losses tell their names at no cost.
    image = torch.zeros(1, 1, 8, 8, device="meta")
    names = [*generator_losses(image, image, image, image, gan=config.gan), FEATURES]
    fields = asdict(config)
    for name in names:
        if not isinstance(fields.get(name), (int, float)):
            raise TypeError(f"the loss {name!r} needs a weight of that name in LossConfig")
    return {name: fields[name] for name in names}
