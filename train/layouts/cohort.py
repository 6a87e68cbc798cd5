"""Fit layouts to the training patients of a run, from their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from runtime.core.context import Context
from runtime.core.layout_model import LayoutModel
from runtime.core.learned_layout import canonical_step, canonical_view
from runtime.core.manifest import GridPolicy, Intensity, LabelTable
from runtime.core.resampling import axial_axes
from runtime.core.tissue_classes import classes_of_volume, dense_labels
from runtime.core.volume import LabelVolume

from ..data.checks import read_pair
from ..data.dataset import grid_of
from ..data.pairs import Pair
from .fit import MARGIN_MM, fit_layouts
from .registration import ClassMap

LEAST_PATIENTS, LEAST_SLICES = 4, 4
MOST_VOXELS = 1_500_000  # of the template
HOST = "gas"  # the tissue of HU whose fine branches no two patients share: a lung's vessels

Floats = NDArray[np.float64]


def fit_pairs(
    pairs: Sequence[Pair],
    table: LabelTable,
    policy: GridPolicy,
    intensity: Intensity,
    context: Context,
) -> LayoutModel | None:
    """Fit a layout model to training patients.

    Args:
        pairs: Their files; synthetic ones do not count.
        table: The label table.
        policy: The grid policy.
        intensity: The intensity range.
        context: The rule of the context classes.

    Returns:
        The model; None where pixels have no size in mm, or fewer than `LEAST_PATIENTS` volumes have
        a label.

    Raises:
        InputError: A file cannot be read.
    """
    if policy.pixel_spacing is None:
        return None
    grids = {pair.name: grid_of(pair.image) for pair in pairs if not pair.synthetic}
    volumes = {
        name: (canonical_step(geometry), np.array(shape)[[*axial_axes(geometry)]])
        for name, (geometry, shape) in grids.items()
        if shape[axial_axes(geometry)[0]] >= LEAST_SLICES
    }
    if len(volumes) < LEAST_PATIENTS:
        return None
    step = _common_step([*volumes.values()], policy.pixel_spacing)
    maps = []
    for pair in pairs:
        if pair.name not in volumes or pair.synthetic:
            continue
        labels, image, _ = read_pair(pair, table, intensity, spaced=True)
        if labels.labels.any():
            tissues = classes_of_volume(image.values, image.geometry, context, len(table), policy)
            dense = replace(labels, labels=dense_labels(labels.labels, tissues))
            maps.append(class_map(dense, step))
    if len(maps) < LEAST_PATIENTS:
        return None
    host = len(table) + context.tissues.index(HOST) if HOST in context.tissues else None
    return fit_layouts(maps, len(table), len(table) + len(context) - 1, host)


def class_map(volume: LabelVolume, step: Floats) -> ClassMap:
    """Put a dense map on voxels of a common size, with the nearest neighbour.

    Args:
        volume: The dense map, in any axis order.
        step: The distance of voxels (z, y, x) in mm.

    Returns:
        The map; its first voxel is at 0.
    """
    view, spacing = canonical_view(volume.labels, volume.geometry), canonical_step(volume.geometry)
    for axis in range(3):
        count = max(2, round(view.shape[axis] * spacing[axis] / step[axis]))
        places = (np.arange(count) * step[axis] / spacing[axis] + 0.5).astype(np.intp)
        view = view.take(np.minimum(places, view.shape[axis] - 1), axis)
    return ClassMap(view, np.zeros(3), step)


def _common_step(
    volumes: Sequence[tuple[Floats, NDArray[np.int64]]], pixel: tuple[float, float]
) -> Floats:
    """The voxel size of the template in mm: the cohort's, as far as memory allows.

    In the plane it is not finer than the model's pixels.
    """
    step = np.median([spacing for spacing, _ in volumes], 0)
    step[1:] = np.maximum(step[1:], pixel)
    extent = np.max([spacing * shape for spacing, shape in volumes], 0) + 2 * MARGIN_MM
    voxels = float(np.prod(extent / step))
    return np.asarray(step * max(1.0, voxels / MOST_VOXELS) ** (1 / 3))
