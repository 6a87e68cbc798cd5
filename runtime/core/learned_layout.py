"""Learned layouts: the tissues around a mask, from a template that a field deforms.

The template holds how likely each context class is around the mean labels of a cohort. A field, a
lattice of cubic B-splines, moves it onto a mask. Its weights are drawn from a normal distribution,
given the labels' centroids, extents and sizes: the part that labels tell is the mean, the rest
differs from seed to seed. Ribs stay whole, for a smooth field cannot tear them. What no two
patients share (the vessels of a lung) is drawn anew: voxels where two random fields are both near
zero are curves in space.

All numbers come from the seed, the mask and the variant, with plain multiply-adds: the same bytes
on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .layout import dense_volume
from .layout_model import FEATURES, SPLINE_VARIANCE, UNSEEN, Floats, LayoutModel, Tubes
from .resampling import axial_axes
from .rng import CaseRandom
from .splines import SplineAxis, spline_plane
from .volume import Geometry, LabelVolume


def canonical_view(array: NDArray[np.uint8], geometry: Geometry) -> NDArray[np.uint8]:
    """A view with slices feet → head, rows anterior → posterior, columns right → left.

    Args:
        array: (D, H, W), in any axis order.
        geometry: Where its voxels lie.
    """
    axes = axial_axes(geometry)
    view = array.transpose(axes)
    signs = (geometry.direction[2 - n, 2 - axis] for n, axis in enumerate(axes))
    return view[tuple(slice(None, None, -1 if sign < 0 else 1) for sign in signs)]


def canonical_step(geometry: Geometry) -> Floats:
    """The distance of voxels (z, y, x) of the canonical view, in mm."""
    return np.array([geometry.spacing[2 - axis] for axis in axial_axes(geometry)])


def label_features(labels: NDArray[np.uint8], step: Floats, count: int) -> Floats:
    """Where each label lies, how far it reaches, and how large it is.

    Args:
        labels: uint8 (D, H, W) in the canonical order.
        step: The distance of voxels (z, y, x) in mm.
        count: The number of labels, without the background.

    Returns:
        (count, `FEATURES`): centroid (z, y, x) in mm from the first voxel, standard deviations in
        mm, logarithm of the volume in mm³; NaN for a label without a voxel.
    """
    # Counts in integers along each axis: the same bits in any order.
    profiles = [np.zeros((count + 1, n), np.int64) for n in labels.shape]
    columns = np.arange(labels.shape[2])
    for k, plane in enumerate(labels):
        present = np.flatnonzero(np.bincount(plane.ravel(), minlength=count + 1)[: count + 1])
        for label in present[present > 0]:
            inside = plane == label
            profiles[0][label, k] = int(inside.sum())
            profiles[1][label] += inside.sum(1)
            profiles[2][label, columns] += inside.sum(0)
    features = np.full((count, FEATURES), np.nan)
    for label in range(1, count + 1):
        total = int(profiles[0][label].sum())
        if not total:
            continue
        for axis in range(3):
            places = np.arange(labels.shape[axis]) * step[axis]
            share = profiles[axis][label] / total
            centre = float((share * places).sum())
            features[label - 1, axis] = centre
            features[label - 1, 3 + axis] = np.sqrt((share * (places - centre) ** 2).sum())
        features[label - 1, 6] = np.log(total * step.prod())
    return features


def anchor_of(features: Floats, centroids: Floats) -> Floats:
    """The place of the template's anchor (z, y, x) in mm: where the labels' centroids fit best.

    Args:
        features: As `label_features` returns them, with one label at least.
        centroids: (L, 3), the mean place of each label from the anchor.
    """
    places = features[:, :3] - centroids
    return np.asarray(places[np.isfinite(places[:, 0])].mean(0))


def learned_layout(
    mask: LabelVolume, model: LayoutModel, random: CaseRandom, *, pixel: float = 0.0
) -> LabelVolume | None:
    """Draw the tissues around a mask.

    Args:
        mask: Expert labels.
        model: The cohort's layouts.
        random: The random numbers of the variant.
        pixel: Tissues are drawn for pixels of this size in mm where the mask's are finer.

    Returns:
        The dense map; None for a mask without any label that the cohort had.
    """
    step = canonical_step(mask.geometry)
    labels = canonical_view(mask.labels, mask.geometry)
    features = label_features(labels, step, len(model.centroids))
    features[model.scale[:, 0] >= UNSEEN] = np.nan
    if not np.isfinite(features[:, 0]).any():
        return None
    anchor = anchor_of(features, model.centroids)
    features[:, :3] -= anchor
    lattice = np.zeros(model.modes.shape[1:], np.float32)
    for weight, mode in zip(model.weights(features, random), model.modes, strict=True):
        lattice += np.float32(weight) * mode
    tissues = np.empty(mask.labels.shape, np.uint8)
    view = canonical_view(tissues, mask.geometry)
    drawn = _planes(model, lattice, view.shape, step, anchor, random, pixel)
    for target, plane in zip(view, drawn, strict=True):
        target[...] = plane
    return dense_volume(mask, tissues)


def _planes(
    model: LayoutModel,
    lattice: NDArray[np.float32],
    shape: tuple[int, ...],
    step: Floats,
    anchor: Floats,
    random: CaseRandom,
    pixel: float,
) -> Iterator[NDArray[np.uint8]]:
    """Yield the tissues of each slice (H, W)."""
    # Every n-th voxel of a slice, from the middle of n on.
    coarse = [1] + [max(1, int(pixel / step[n] + 1e-6)) for n in (1, 2)]
    places = [
        np.minimum(np.arange(0, shape[n], coarse[n]) + coarse[n] // 2, shape[n] - 1) * step[n]
        - anchor[n]
        for n in range(3)
    ]
    axes = [
        SplineAxis((places[n] - model.lattice_start[n]) / model.lattice_spacing, count)
        for n, count in enumerate(lattice.shape[1:])
    ]
    template = model.template.reshape(-1, len(model.classes))
    tubes = None if model.tubes is None else _TubeField(model.tubes, places, random)
    for k in range(shape[0]):
        at = []
        for axis in range(3):
            moved = spline_plane(lattice[axis], axes, k)
            resting = (places[0][k], places[1][:, None], places[2][None])[axis]
            place = (moved + resting - model.start[axis]) / model.step[axis]
            at.append(np.clip(place, 0, model.template.shape[axis] - 1).astype(np.float32))
        plane = model.classes[_likeliest(template, model.template.shape, at)]
        if tubes is not None:
            tubes.draw(plane, k)
        for axis in (1, 2):
            if coarse[axis] > 1:
                plane = np.repeat(plane, coarse[axis], axis - 1)
        yield plane[: shape[1], : shape[2]]


def _likeliest(
    template: NDArray[np.uint8], shape: tuple[int, ...], at: list[NDArray[np.float32]]
) -> NDArray[np.intp]:
    """The class with the largest interpolated value at places (H, W)."""
    lows = [np.minimum(place.astype(np.intp), n - 2) for place, n in zip(at, shape, strict=False)]
    weights = [(place - low)[..., None] for place, low in zip(at, lows, strict=True)]
    base = (lows[0] * shape[1] + lows[1]) * shape[2] + lows[2]
    total: NDArray[np.float32] | None = None
    for corner in range(8):
        a, b, c = corner >> 2, corner >> 1 & 1, corner & 1
        share = (weights[0] if a else 1 - weights[0]) * (weights[1] if b else 1 - weights[1])
        share = share * (weights[2] if c else 1 - weights[2])
        values = template.take(base + (a * shape[1] + b) * shape[2] + c, 0).astype(np.float32)
        values *= share
        total = values if total is None else total + values
    assert total is not None
    return total.argmax(-1)


class _TubeField:
    """Two random fields over a volume; where both are near zero, there is a tube."""

    def __init__(self, tubes: Tubes, places: list[Floats], random: CaseRandom):
        self._tubes = tubes
        scaled = [(line - line[0]) / tubes.spacing for line in places]
        counts = [int(line[-1]) + 4 for line in scaled]
        self._axes = [SplineAxis(*line) for line in zip(scaled, counts, strict=True)]
        norm = 1 / np.sqrt(SPLINE_VARIANCE)
        drawn = random.layout(1, 2 * int(np.prod(counts))).reshape(2, *counts)
        self._fields = (drawn * norm).astype(np.float32)

    def draw(self, plane: NDArray[np.uint8], k: int) -> None:
        """Put the tubes of slice k on a plane (H, W), where it shows the host."""
        first, second = (spline_plane(field, self._axes, k) for field in self._fields)
        distance = first * first + second * second
        host = plane == self._tubes.host
        for index, limit in zip(self._tubes.classes, self._tubes.limits, strict=True):
            plane[host & (distance < np.float32(limit * limit))] = index


def reaches_beyond(mask: LabelVolume, model: LayoutModel) -> bool:
    """Whether a mask has more slices than the template can cover.

    Args:
        mask: Expert labels.
        model: The cohort's layouts.
    """
    slices = canonical_view(mask.labels, mask.geometry).shape[0]
    length = slices * float(canonical_step(mask.geometry)[0])
    return bool(length > model.template.shape[0] * float(model.step[0]))
