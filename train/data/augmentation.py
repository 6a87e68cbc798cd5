"""Random affine maps of label maps and images: fewer patients suffice, and none is memorised.

Ranges are the original's (Keras' ImageDataGenerator): rotation and shear in degrees, shifts as
shares of width and height, and zoom, which is drawn for each axis.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ..config import AugmentConfig


def draw(config: AugmentConfig, count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw affine maps from output to input.

    Args:
        config: The ranges.
        count: The number of maps.
        rng: The random numbers.

    Returns:
        float32 (count, 2, 3), in coordinates of [-1, 1] across the image.
    """
    ranges = [
        config.rotation,
        config.shear,
        config.zoom,
        config.zoom,
        config.shift_width,
        config.shift_height,
    ]
    turn, shear, zoom_x, zoom_y, x, y = rng.uniform(-1, 1, (6, count)) * np.array(ranges)[:, None]
    turn, shear = np.radians(turn), np.radians(shear)
    # (2, 2, count)
    linear = np.array([[np.cos(turn), -np.sin(turn + shear)], [np.sin(turn), np.cos(turn + shear)]])
    linear /= np.array([1 + zoom_x, 1 + zoom_y])
    affine = np.concatenate([linear, np.array([2 * x, 2 * y])[:, None]], 1)
    return affine.transpose(2, 0, 1).astype(np.float32)


def augment(
    config: AugmentConfig,
    labels: Tensor,
    image: Tensor,
    rng: np.random.Generator,
    count: int | None = None,
    part: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """Move a batch: labels and image by one map, by one each, or one of them alone.

    Args:
        config: The ranges, and what to move.
        labels: uint8 (N, Z, H, W).
        image: float (N, 1, H, W) in [0, 1].
        rng: The random numbers.
        count: The number of slices of the batch over all ranks; None: N.
        part: The part of that batch which `labels` and `image` are.

    Returns:
        The labels and the image.
    """
    total = len(labels) if count is None else count
    for_labels = on_device(draw(config, total, rng)[part], labels.device)
    for_image = (
        for_labels if config.same else on_device(draw(config, total, rng)[part], labels.device)
    )
    moved = _labels(for_labels, labels) if config.labels else labels
    return moved, _image(for_image, image) if config.image else image


def apply(affine: Tensor, labels: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Apply affine maps; 0 comes in from outside.

    The image is interpolated by cubics: linear weights would take a third off the texture's
    amplitude.

    Args:
        affine: float (N, 2, 3), as `draw` returns them.
        labels: uint8 (N, Z, H, W), interpolated to the nearest.
        image: float (N, 1, H, W) in [0, 1].

    Returns:
        The labels, float, and the image.
    """
    return _labels(affine, labels), _image(affine, image)


def _labels(affine: Tensor, labels: Tensor) -> Tensor:
    """Move label maps, interpolated to the nearest."""
    return functional.grid_sample(
        labels.float(), _grid(affine, labels), mode="nearest", align_corners=False
    )


def _image(affine: Tensor, image: Tensor) -> Tensor:
    """Move images, interpolated by cubics and clipped to [0, 1]."""
    return functional.grid_sample(
        image, _grid(affine, image), mode="bicubic", align_corners=False
    ).clamp(0, 1)


def _grid(affine: Tensor, planes: Tensor) -> Tensor:
    """The positions in the input for every pixel of the output, (N, H, W, 2)."""
    h, w = planes.shape[-2:]
    # With these factors a rotation is one in pixels, also where H and W differ.
    square = on_device(np.array([[1, h / w, 1], [w / h, 1, 1]], np.float32), affine.device)
    return functional.affine_grid(affine * square, [len(planes), 1, h, w], align_corners=False)


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device as a tensor.

    On the way to a GPU it passes pinned memory, so that the host need not wait for the copy.

    Args:
        array: Any array.
        device: The device.

    Returns:
        The tensor.
    """
    tensor = torch.from_numpy(array)
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )
