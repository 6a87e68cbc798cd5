"""Layouts: from a mask to a dense map, in which every voxel has a class.

A model with a context (`runtime.core.context`) synthesizes from a dense map: expert labels, and
around them the tissue of every other voxel. A layout is where these tissues come from. Here is the
one that is given: the tissues of a real CT of the mask
(`runtime.core.tissue_classes.classes_of_volume`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .deformation import DeformationField, move_labels
from .volume import LabelVolume


def dense_volume(
    mask: LabelVolume, tissues: NDArray[np.uint8], field: DeformationField | None = None
) -> LabelVolume:
    """Put a mask onto the tissues around it.

    Args:
        mask: Expert labels; of a deformed variant, those that `field` moved.
        tissues: uint8 (D, H, W) context classes on the grid of the mask, before `field`.
        field: Moves the tissues as it moved the mask; None where the mask kept its shape.

    Returns:
        The dense map: model indices on the mask's grid.
    """
    dense = tissues.copy() if field is None else move_labels(tissues, field)
    # Slice by slice, and in place: a volume of booleans is as large as the volume itself.
    for plane, labels in zip(dense, mask.labels, strict=True):
        np.copyto(plane, labels, where=labels > 0)
    return replace(mask, labels=dense)
