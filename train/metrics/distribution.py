"""Are synthetic volumes distributed as real ones? Measures of two sets that share no mask.

Every measure compares two sets of samples, so the same function measures synthetic against real,
a control against real, and real against real: the last is the value that no synthesis should beat.

A sample is (image, labels, spacing): float or integer (D, H, W) from the feet to the head, uint8
model indices, mm along (D, H, W). Images are in HU unless an `Intensity` says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional

from runtime.core.manifest import Intensity

from .features import density_coverage, features, frechet_distance, kernel_distance, standardised
from .memory import spread_rows
from .scores import HU, as_hu, body_mask, plain_tree, texture
from .volume_metrics import LEAST_VOXELS, Places, outline_step, wasserstein

BONE_HU, GAS_HU = 300.0, -500.0
# A vessel in the lung is brighter than this, and narrower than twice this many pixels.
VESSEL_HU, VESSEL_PIXELS = -200.0, 2
# Of images in other units: the quantiles of the real voxels without a label.
DARK_QUANTILE, BRIGHT_QUANTILE = 0.1, 0.95
# The most slices of each plane whose features are computed.
MOST_PLANES = 256
PLANES = ("axial", "coronal", "sagittal")
# Steps of a histogram over the whole range: 1 HU of -1024 to 1024.
STEPS = 2048


class Sample(NamedTuple):
    """One labelled image; any tuple of these three serves.

    Attributes:
        image: (D, H, W), HU or arbitrary units.
        labels: uint8 (D, H, W), model indices; 0 is the background.
        spacing: mm along (D, H, W).
    """

    image: NDArray[Any]
    labels: NDArray[np.uint8]
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)


Samples = Sequence[tuple[NDArray[Any], NDArray[np.uint8], tuple[float, float, float]]]


def distribution(
    samples: Samples,
    real: Samples,
    names: Sequence[str],
    *,
    intensity: Intensity = HU,
    places: Sequence[Places | None] = (None, None),
    planes: Sequence[str] = PLANES,
) -> dict[str, Any]:
    """Measure how far a set of samples is from a set of real ones.

    Args:
        samples: Synthetic samples, a control's, or other real ones.
        real: Real samples.
        names: The names of the indices 1, 2, ...
        intensity: The images' unit and range.
        places: For each set, the slices' numbers in their volumes; None: samples are whole volumes.
        planes: Of `PLANES`, those whose features are compared; samples that are not whole have
            axial ones only.

    Returns:
        JSON data: "frechet" and "kernel": {plane: train/metrics/features.py}; "gradient": W1 of the
        gradient magnitudes in the slice inside the bodies, per pixel, in the images' unit;
        "outside": `shares` of both sets; "outline_step" of both in pixels; "clipped": % of the
        body's voxels at either end of the range; "organs": {name: `organ_ratios`}. The real set's
        values end in "_true".
    """
    groups = (samples, real)
    bodies = [[body_mask(image, intensity) for image, _, _ in group] for group in groups]
    steps = [
        np.concatenate([gradients(s[0], b, intensity) for s, b in zip(g, inside, strict=True)])
        for g, inside in zip(groups, bodies, strict=True)
    ]
    outlines = [outline_step(b, p) for b, p in zip(bodies, places, strict=True)]
    thresholds = tissue_thresholds(real, bodies[1], intensity)
    outside = [
        shares(group, inside, thresholds) for group, inside in zip(groups, bodies, strict=True)
    ]
    result: dict[str, Any] = {
        **feature_distances(samples, real, intensity, planes),
        "gradient": wasserstein(*steps) * _step(intensity),
        "outside": {
            **outside[0],
            **{f"{name}_true": share for name, share in outside[1].items()},
        },
        "outline_step": outlines[0],
        "outline_step_true": outlines[1],
        "clipped": clipped(samples, bodies[0], intensity),
        "clipped_true": clipped(real, bodies[1], intensity),
        "organs": {
            name: organ_ratios(samples, real, index, intensity)
            for index, name in enumerate(names, 1)
        },
    }
    return plain_tree(result)


def feature_distances(
    samples: Samples, real: Samples, intensity: Intensity = HU, planes: Sequence[str] = PLANES
) -> dict[str, dict[str, float]]:
    """Compute Fréchet and kernel distance of random-convolution features, for each plane.

    As many slices of both sets are compared, at most `MOST_PLANES`.

    Args:
        samples: The first set.
        real: Real samples; their features' standard deviations are the unit.
        intensity: The images' unit and range.
        planes: Of `PLANES`.

    Returns:
        {"frechet": {plane: distance}, "kernel": {plane: distance}}.
    """
    result: dict[str, dict[str, float]] = {"frechet": {}, "kernel": {}}
    for name in planes:
        axis = PLANES.index(name)
        counts = [sum(image.shape[axis] for image, _, _ in group) for group in (samples, real)]
        count = min(MOST_PLANES, *counts)
        rows = [_plane_features(group, axis, count, intensity) for group in (samples, real)]
        first, second = (standardised(row, rows[1]) for row in rows)
        result["frechet"][name] = frechet_distance(first, second)
        result["kernel"][name] = kernel_distance(first, second)
    return result


def prdc(samples: Samples, real: Samples, intensity: Intensity = HU) -> dict[str, float]:
    """Compute precision, recall, density and coverage of the axial slices' features.

    Args:
        samples: The first set.
        real: Real samples.
        intensity: The images' unit and range.

    Returns:
        `density_coverage` of train/metrics/features.py.

    Raises:
        MissingComponent: The extra `metrics` is not installed.
    """
    counts = [sum(len(image) for image, _, _ in group) for group in (samples, real)]
    count = min(MOST_PLANES, *counts)
    rows = [_plane_features(group, 0, count, intensity) for group in (samples, real)]
    first, second = (standardised(row, rows[1]) for row in rows)
    result: dict[str, float] = plain_tree(density_coverage(first, second))
    return result


def _plane_features(
    samples: Samples, axis: int, count: int, intensity: Intensity
) -> NDArray[np.float64]:
    """Features of `count` slices across one axis, evenly spaced over all samples.

    Rows of a coronal or sagittal slice are as far apart as its columns: pixels are squares.
    """
    places = [(n, k) for n, sample in enumerate(samples) for k in range(sample[0].shape[axis])]
    chosen = spread_rows(np.array(places), count)
    rows = []
    for n, (image, _, spacing) in enumerate(samples):
        numbers = chosen[chosen[:, 0] == n, 1]
        if not len(numbers):
            continue
        planes = np.moveaxis(np.take(image, numbers, axis), axis, 0)
        (planes,) = as_hu([planes], intensity)
        values = np.clip(planes, HU.low, HU.high).astype(np.float32)
        if axis and spacing[0] != spacing[3 - axis]:
            height = max(1, round(values.shape[1] * spacing[0] / spacing[3 - axis]))
            tensor = functional.interpolate(
                torch.from_numpy(values)[:, None], (height, values.shape[2]), mode="bilinear"
            )
            values = tensor[:, 0].numpy()
        rows.append(features(values))
    return np.concatenate(rows)


def gradients(
    image: NDArray[Any], inside: NDArray[np.bool_], intensity: Intensity = HU
) -> NDArray[np.int64]:
    """Compute the magnitude of the gradient in each slice, inside the body.

    Args:
        image: (D, H, W).
        inside: The body, bool (D, H, W).
        intensity: The image's unit and range.

    Returns:
        Magnitudes per pixel in steps of 1/2048 of the range (1 HU of -1024 to 1024), (n,).
    """
    rows, columns = np.gradient(image.astype(np.float32), axis=(1, 2))
    magnitude = np.hypot(rows, columns)[inside] / np.float32(_step(intensity))
    return np.rint(magnitude).astype(np.int64)


def _step(intensity: Intensity) -> float:
    """The width of a histogram's step in the images' unit."""
    return 1.0 if intensity.unit == HU.unit else (intensity.high - intensity.low) / STEPS


def tissue_thresholds(
    real: Samples, bodies: Sequence[NDArray[np.bool_]], intensity: Intensity = HU
) -> tuple[float, float]:
    """Find the thresholds below which a voxel is gas, and above which it is bone.

    Args:
        real: Real samples.
        bodies: Their bodies.
        intensity: The images' unit and range.

    Returns:
        `GAS_HU` and `BONE_HU`; for other units two quantiles of the real voxels without a label
        inside the bodies: "dark" and "bright".
    """
    if intensity.unit == HU.unit:
        return GAS_HU, BONE_HU
    values = np.concatenate(
        [
            image[inside & (labels == 0)]
            for (image, labels, _), inside in zip(real, bodies, strict=True)
        ]
    )
    if not values.size:
        return float(intensity.low), float(intensity.high)
    dark, bright = np.quantile(values, (DARK_QUANTILE, BRIGHT_QUANTILE))
    return float(dark), float(bright)


def shares(
    samples: Samples, bodies: Sequence[NDArray[np.bool_]], thresholds: tuple[float, float]
) -> dict[str, float]:
    """Measure how much of the body outside the labels is bone, gas, and vessels in the lung.

    Args:
        samples: The samples.
        bodies: Their bodies, each found in its own image.
        thresholds: `tissue_thresholds`.

    Returns:
        In %: "bone" and "gas" of the body's voxels without a label. "vessels", of the lung's: the
        narrow bright places that closing the gas in a slice fills. For other units than HU "bone"
        is what is bright, "gas" what is dark, and "vessels" has no meaning.
    """
    dark, bright = thresholds
    voxels = bone = gas = vessel = lung = 0
    for (image, labels, _), inside in zip(samples, bodies, strict=True):
        free = inside & (labels == 0)
        is_gas = inside & (image < dark)
        voxels += int(free.sum())
        bone += int((free & (image > bright)).sum())
        gas += int((free & is_gas).sum())
        closed = np.stack(
            [ndimage.binary_closing(plane, iterations=VESSEL_PIXELS) for plane in is_gas]
        )
        lung += int(closed.sum())
        vessel += int((closed & free & (image > VESSEL_HU)).sum())
    return {
        "bone": _percent(bone, voxels),
        "gas": _percent(gas, voxels),
        "vessels": _percent(vessel, lung) if dark == GAS_HU else float("nan"),
    }


def clipped(
    samples: Samples, bodies: Sequence[NDArray[np.bool_]], intensity: Intensity = HU
) -> float:
    """Count the voxels at the upper end of the range.

    Args:
        samples: The samples.
        bodies: Their bodies.
        intensity: The images' unit and range.

    Returns:
        % of the bodies' voxels.
    """
    # The output activation comes near the bound and is rounded.
    bound = intensity.high - _step(intensity)
    at_bound = sum(
        int((image[inside] >= bound).sum())
        for (image, _, _), inside in zip(samples, bodies, strict=True)
    )
    return _percent(at_bound, sum(int(inside.sum()) for inside in bodies))


def organ_ratios(
    samples: Samples, real: Samples, index: int, intensity: Intensity = HU
) -> dict[str, float] | None:
    """Compare one label's voxels, all samples pooled.

    Args:
        samples: The first set.
        real: Real samples.
        index: The label's index.
        intensity: The images' unit and range.

    Returns:
        "median_error", "iqr_ratio" and "texture_ratio" (the first set's over the real one's),
        "clipped" (% of its voxels at the upper bound) and "clipped_true"; None where a set has
        (almost) none of it.
    """
    values, textures, at_bound = [], [], []
    bound = intensity.high - _step(intensity)
    for group in (samples, real):
        regions = [labels == index for _, labels, _ in group]
        pooled = np.concatenate([image[r] for (image, _, _), r in zip(group, regions, strict=True)])
        if pooled.size < LEAST_VOXELS:
            return None
        values.append(np.percentile(pooled, (25, 50, 75)))
        textures.append(texture([image for image, _, _ in group], regions))
        at_bound.append(_percent(int((pooled >= bound).sum()), pooled.size))
    (low, median, high), (true_low, true_median, true_high) = values
    return {
        "median_error": float(median - true_median),
        "iqr_ratio": _ratio(high - low, true_high - true_low),
        "texture_ratio": _ratio(textures[0], textures[1]),
        "clipped": at_bound[0],
        "clipped_true": at_bound[1],
    }


def _ratio(value: float, true: float) -> float:
    return float(value / true) if true > 0 else float("nan")


def _percent(count: int, total: int) -> float:
    return 100 * count / total if total else float("nan")
