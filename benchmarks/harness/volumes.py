"""Masks to measure with: a heart in every label, at the sizes people have."""

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
FIELD_OF_VIEW = 380.0  # mm in plane, and
LENGTH = 300.0  # along z, whatever the matrix


def mask(shape: tuple[int, int, int], classes: int) -> LabelVolume:
    """Nested ellipsoids, one a label, in a body-sized field of view: as compressible as anatomy,
    unlike noise.
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
    """As a file holds them: the table's own values, uint16."""
    return np.array([label.value for label in table.labels], np.uint16)[volume.labels]
