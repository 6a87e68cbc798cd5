"""Fit a layout model to a cohort of dense maps: template, modes, and what the labels tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from runtime.core.layout_model import UNSEEN, LayoutModel
from runtime.core.learned_layout import (
    anchor_of,
    label_features,
    learned_layout,
)
from runtime.core.rng import CaseRandom
from runtime.core.volume import Geometry, LabelVolume

from .branches import fine_branches, fit_tubes
from .registration import ClassMap, Lattice, Registration

LATTICE_MM = 27.0
MARGIN_MM = 15.0  # of the template, beyond the largest field of view
KEPT_ENERGY, MOST_MODES = 0.97, 20
NOISES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
LEAST_SCALE = (1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.05)  # of the features, in mm and 1
TEMPLATE_BLUR = 0.5  # voxels
LEAST_SHARE = 0.005  # of a class in the template
LEAST_COUNT = 0.3  # voxels of the cohort behind a voxel of the template
OUTLINE_BLUR = 1.2
CALIBRATIONS, MOST_BIAS = 7, 2.0
QUANTA = 28.0  # steps of the template's values for a factor of e
MEASURED = 6  # patients whose drawn layouts are compared with the true ones

Floats = NDArray[np.float64]


def fit_layouts(
    maps: Sequence[ClassMap], labels: int, classes: int, host: int | None
) -> LayoutModel:
    """Fit a layout model.

    Args:
        maps: Dense maps of the training patients, with the model indices of a context; each holds
            a label, and all have one `step`.
        labels: The number of rows of the label table, with the background.
        classes: The number of classes that a layout may show; the unknown class comes after them.
        host: The class inside which fine branches are drawn at random; None for none.

    Returns:
        The model.
    """
    features = np.array(
        [
            label_features(
                np.where(one.classes < labels, one.classes, np.uint8(0)), one.step, labels - 1
            )
            for one in maps
        ]
    )
    anchors, centroids = _anchors(features)
    maps = [replace(one, start=-anchor) for one, anchor in zip(maps, anchors, strict=True)]
    features[:, :, :3] -= anchors[:, None]
    branches = [fine_branches(one, host, labels) for one in maps]
    if host is not None:
        maps = [
            replace(one, classes=np.where(fine, np.uint8(host), one.classes))
            for one, fine in zip(maps, branches, strict=True)
        ]
    low = np.min([one.start for one in maps], 0) - MARGIN_MM
    high = np.max([[one.axis(n)[-1] for n in range(3)] for one in maps], 0) + MARGIN_MM
    depth, height, width = (int(n) for n in np.ceil((high - low) / maps[0].step) + 1)
    lattice = Lattice.around(low, high, LATTICE_MM)
    registration = Registration(maps, classes, lattice, low, (depth, height, width))
    registration.run()
    values, indices = _template(registration, maps, labels, classes)
    modes, weights = _modes(registration.fields)
    mean, scale, covariance, shared, noise = _regression(features, weights, modes)
    model = LayoutModel(
        template=_quantized(values),
        classes=indices,
        start=low,
        step=maps[0].step,
        lattice_start=lattice.start,
        lattice_spacing=lattice.spacing,
        modes=modes,
        centroids=centroids,
        mean=mean,
        scale=scale,
        covariance=covariance,
        shared=shared,
        noise=noise,
    )
    measured = [maps[n] for n in _spread(len(maps), MEASURED)]
    model = _calibrated(model, values, measured)
    if host is None:
        return model
    drawn = [_drawn(one, model) for one in measured]
    return replace(model, tubes=fit_tubes(maps, branches, drawn, host, labels))


def _anchors(features: Floats) -> tuple[Floats, Floats]:
    """The anchor of each patient, and the labels' mean places from it.

    Labels may be absent from a patient, so both are found in turns.
    """
    places = features[:, :, :3]
    anchors = np.array([anchor_of(one, np.zeros(3)) for one in features])
    for _ in range(10):
        centroids = _mean(places - anchors[:, None])
        anchors = np.array([anchor_of(one, centroids) for one in features])
    return anchors, centroids


def _mean(values: Floats) -> Floats:
    """The mean over patients of what is a number; 0 where none is."""
    is_number = np.isfinite(values)
    return np.asarray(np.where(is_number, values, 0).sum(0) / np.maximum(is_number.sum(0), 1))


def _template(
    registration: Registration, maps: Sequence[ClassMap], labels: int, classes: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """The logarithm of each class's share where there is no label, and the model indices.

    What is outside the body has a smooth outline of its own; inside, the other classes compete.
    """
    indices = np.array([0, *range(labels, classes)], np.uint8)
    index = np.full(256, 255, np.uint8)
    index[indices] = np.arange(len(indices))
    counts = registration.shares([index[one.classes] for one in maps], len(indices))
    occurs = counts.sum((1, 2, 3)) > 0
    indices, counts = indices[occurs], counts[occurs]
    outside = ndimage.gaussian_filter(counts[0], OUTLINE_BLUR, mode="nearest")
    total = ndimage.gaussian_filter(counts.sum(0), OUTLINE_BLUR, mode="nearest")
    for one in counts:
        ndimage.gaussian_filter(one, TEMPLATE_BLUR, output=one, mode="nearest")
    inside = counts[1:].sum(0)
    step = maps[0].step
    shares = _filled(counts[1:] / np.maximum(inside, 1e-6), inside < LEAST_COUNT, step)
    outside = _filled((outside / np.maximum(total, 1e-6))[None], counts.sum(0) < LEAST_COUNT, step)
    shares *= 1 - outside
    shares = np.concatenate([outside, shares])
    return np.asarray(np.log(np.maximum(shares, LEAST_SHARE)), np.float32), indices


def _filled(
    values: NDArray[np.float32], empty: NDArray[np.bool_], step: Floats
) -> NDArray[np.float32]:
    """Values (n, D, H, W), with those of the nearest place where a place is empty."""
    nearest = ndimage.distance_transform_edt(
        empty, step, return_distances=False, return_indices=True
    )
    return np.asarray(values[:, nearest[0], nearest[1], nearest[2]], np.float32)


def _quantized(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The template (D, H, W, K) of logarithms (K, D, H, W)."""
    steps = np.clip((values - values.max()) * QUANTA + 255, 0, 255)
    return np.ascontiguousarray(np.moveaxis(np.rint(steps).astype(np.uint8), 0, -1))


def _calibrated(
    model: LayoutModel, values: NDArray[np.float32], measured: Sequence[ClassMap]
) -> LayoutModel:
    """Make each class as frequent in drawn layouts as in the cohort: averaging thins bone."""
    bias, rate, previous = np.zeros(len(values)), np.ones(len(values)), np.zeros(len(values))
    target, best, least = _frequencies(measured, model), model, np.inf
    for _ in range(CALIBRATIONS):
        change = np.log(target / _frequencies([_drawn(one, model) for one in measured], model))
        error = float((target * np.abs(change)).sum())
        if error < least:
            best, least = model, error
        # A class that went too far goes back by half as much.
        rate[change * previous < 0] /= 2
        previous = change
        bias = np.clip(bias + rate * change, -MOST_BIAS, MOST_BIAS)
        biased = values + bias.astype(np.float32)[:, None, None, None]
        model = replace(model, template=_quantized(biased))
    return best


def _frequencies(maps: Sequence[ClassMap], model: LayoutModel) -> Floats:
    """How many voxels of each class of the template there are, one at least."""
    counts = sum(np.bincount(one.classes.ravel(), minlength=256) for one in maps)
    return np.maximum(np.asarray(counts, np.float64)[model.classes], 1)


def _modes(fields: NDArray[np.float32]) -> tuple[NDArray[np.float32], Floats]:
    """Principal components of the fields, and each patient's weights, of variance 1."""
    rows = fields.reshape(len(fields), -1).astype(np.float64)
    values, vectors = np.linalg.eigh(rows @ rows.T / len(rows))
    order = np.argsort(values)[::-1]
    # Patients who are all alike need no field: their modes are zero.
    energy = np.cumsum(values[order]) / max(values.sum(), 1e-9)
    count = min(int(np.searchsorted(energy, KEPT_ENERGY)) + 1, MOST_MODES, len(rows) - 1)
    chosen = order[:count]
    weights = vectors[:, chosen] * np.sqrt(len(rows))
    modes = weights.T @ rows / len(rows)
    return modes.reshape(count, *fields.shape[1:]).astype(np.float32), weights


def _regression(
    features: Floats, weights: Floats, modes: NDArray[np.float32]
) -> tuple[Floats, Floats, Floats, Floats, float]:
    """The joint normal distribution of features and weights.

    The noise is the one with the least error of leave-one-out predictions, in the fields' energy.
    """
    mean = _mean(features)
    scale = np.maximum(np.sqrt(_mean(np.square(features - mean))), LEAST_SCALE)
    scale[~np.isfinite(features).any(0)] = UNSEEN
    scaled = np.nan_to_num((features - mean) / scale).reshape(len(features), -1)
    kernel = scaled @ scaled.T / len(scaled)
    energy = np.square(modes.astype(np.float64)).sum((1, 2, 3, 4))

    def error(noise: float) -> float:
        hat = kernel @ np.linalg.inv(kernel + noise * np.eye(len(kernel)))
        rest = (weights - hat @ weights) / (1 - np.diag(hat))[:, None]
        return float((np.square(rest).mean(0) * energy).sum())

    noise = min(NOISES, key=error)
    covariance, shared = scaled.T @ scaled / len(scaled), weights.T @ scaled / len(scaled)
    return mean, scale, covariance, shared, noise


def _drawn(one: ClassMap, model: LayoutModel) -> ClassMap:
    """A layout of a training patient's labels, on the grid of its map."""
    sparse = np.where(one.classes <= len(model.centroids), one.classes, 0).astype(np.uint8)
    mask = LabelVolume(sparse, Geometry.from_spacing(one.step[::-1]))
    dense = learned_layout(mask, model, CaseRandom(0, mask.digest, 0))
    assert dense is not None  # patients without a label were left out
    return replace(one, classes=dense.labels)


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` numbers, evenly spaced."""
    return sorted({int(n) for n in np.linspace(0, count - 1, min(count, most)).round()})
