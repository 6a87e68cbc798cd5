"""Layouts: from a mask to a dense map, in which every voxel has a class.

A model with a context (`runtime.core.context`) synthesizes from a dense map: expert labels, and
around them the tissue of every other voxel. A layout is where these tissues come from. Here is the
one that is given: the tissues of a real CT of the mask.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .context import Context
from .deformation import DeformationField, move_labels
from .manifest import GridPolicy
from .resampling import axial_axes
from .tissue_classes import blur_in_pixels, context_plane, dense_labels
from .volume import Geometry, LabelVolume


def tissues_of_image(
    image: NDArray[Any], geometry: Geometry, context: Context, policy: GridPolicy, labels: int
) -> NDArray[np.uint8]:
    """Find the context class of every voxel of an image, whatever the order of its axes.

    Args:
        image: (D, H, W), in the context's unit.
        geometry: Where the voxels lie.
        context: The rule that the model was trained with.
        policy: The model's grid.
        labels: The number of rows of the label table, with the background.

    Returns:
        uint8 (D, H, W): 0 outside the body, or model indices from `labels` on.
    """
    axes = axial_axes(geometry)
    out = np.empty(image.shape, np.uint8)
    axial_image, axial_out = image.transpose(axes), out.transpose(axes)
    slices, rows, columns = (geometry.spacing[2 - axis] for axis in axes)
    axial = Geometry.from_spacing((columns, rows, slices))
    blur = blur_in_pixels(context, policy, axial, axial_image.shape)
    for plane, classes in zip(axial_image, axial_out, strict=True):
        classes[...] = context_plane(plane, context, labels, blur)
    return out


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
    moved = tissues if field is None else move_labels(tissues, field)
    return replace(mask, labels=dense_labels(mask.labels, moved))
