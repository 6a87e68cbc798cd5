"""The structural similarity of images, without a library that leaves files behind."""

from __future__ import annotations

import torch

from train.metrics.volume_metrics import KERNEL

SIGMA = 1.5  # px, of the Gaussian window of KERNEL pixels


def similarity(x: torch.Tensor, y: torch.Tensor, span: float) -> float:
    """Mean structural similarity of two stacks of slices (Wang et al. 2004).

    It measures what `train.metrics.volume_metrics.similarity` measures, without torchmetrics. That
    imports matplotlib.pyplot, which leaves a list of the machine's fonts in the home folder; an
    export leaves no files but its own.

    Args:
        x: float32 (N, 1, H, W).
        y: float32 (N, 1, H, W).
        span: The largest possible value less the smallest.

    Returns:
        The mean over all pixels; 1 for equal stacks.
    """
    distances = torch.arange(KERNEL) - (KERNEL - 1) / 2
    bell = torch.exp(-((distances / SIGMA) ** 2) / 2)
    window = torch.outer(bell, bell)[None, None] / bell.sum() ** 2
    x, y = (torch.nn.functional.pad(image, [KERNEL // 2] * 4, mode="reflect") for image in (x, y))
    blurred = torch.nn.functional.conv2d(torch.cat([x, y, x * x, y * y, x * y]), window)
    mean_x, mean_y, xx, yy, xy = blurred.chunk(5)
    small, larger = (0.01 * span) ** 2, (0.03 * span) ** 2
    spread = (xx - mean_x**2).clamp(min=0) + (yy - mean_y**2).clamp(min=0)
    alike = (2 * mean_x * mean_y + small) * (2 * (xy - mean_x * mean_y) + larger)
    return float((alike / ((mean_x**2 + mean_y**2 + small) * (spread + larger))).mean())
