"""Masks to measure with: a heart in every label, at the sizes that people have."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.core.manifest import LabelTable
from runtime.core.volume import Geometry, LabelVolume

SIZES = {
    "64x128x128": (64, 128, 128),
    "128x256x256": (128, 256, 256),
    "300x512x512": (300, 512, 512),
}
# Whatever the matrix, in mm: in plane, and along z.
FIELD_OF_VIEW, LENGTH = 380.0, 300.0


def mask(shape: tuple[int, int, int], classes: int) -> LabelVolume:
    """Nested ellipsoids, one a label, which compress as well as anatomy does.

    Args:
        shape: (D, H, W).
        classes: The number of labels.

    Returns:
        A mask of model indices with a body-sized field of view.
    """
    d, h, w = shape
    z, y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    radius = np.sqrt(
        (z[:, None, None] / 0.8) ** 2
        + (y[None, :, None] / 0.5) ** 2
        + (x[None, None, :] / 0.6) ** 2
    )
    labels = np.where(
        radius < 1, np.minimum((radius * (classes - 1)).astype(np.uint8) + 1, classes - 1), 0
    ).astype(np.uint8)
    return LabelVolume(
        labels, Geometry(np.diag([FIELD_OF_VIEW / w, FIELD_OF_VIEW / h, LENGTH / d, 1.0]))
    )


def values(volume: LabelVolume, table: LabelTable) -> NDArray[Any]:
    """A mask in the values that its file holds.

    Args:
        volume: A mask of model indices.
        table: The labels.

    Returns:
        uint16 (D, H, W).
    """
    return np.array([label.value for label in table.labels], np.uint16)[volume.labels]
