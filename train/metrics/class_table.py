"""The control without a network: real tissue maps, deformed and coloured by class, with noise.

A generator that is not better than this table is not needed. Each training patient's labels and
automatic tissue classes (`runtime.core.tissue_classes.tissue_map`) are deformed as the variants of
a mask are. Each class gets the median of the training patients; the edges are blurred, and coloured
noise as strong as the class's own spread is added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from runtime.core.manifest import Intensity
from runtime.core.tissue_classes import tissue_map
from runtime.core.volume import Geometry, LabelVolume, Volume
from runtime.core.warp import Warp

from .distribution import Sample, Samples
from .scores import body_mask

# In pixels, of the edges. With 0.7 the control loses ribs and vessels, with 0 edges are too sharp.
EDGE_BLUR = 0.4
# In pixels: a scanner's noise is not white.
NOISE_BLUR = (0.7, 0.7)
# The class of air and table outside the body; `tissue_map` never gives it.
OUTSIDE = 255
# From the interquartile range of a normal distribution to its standard deviation.
IQR_PER_DEVIATION = 1.349


def coloured_tissues(
    samples: Samples, intensity: Intensity, seed: int, variants: Iterable[int]
) -> list[Sample]:
    """Colour the tissue maps of real samples.

    Args:
        samples: The training patients' images and labels.
        intensity: The images' unit and range.
        seed: The seed of the deformations and of the noise.
        variants: The numbers of the deformations; 0 keeps a patient's own shape.

    Returns:
        For each sample and variant an int16 image with its deformed labels.
    """
    maps = [tissue_classes(image, labels, intensity) for image, labels, _ in samples]
    medians, deviations = class_statistics([image for image, _, _ in samples], maps)
    random = np.random.default_rng([seed, 4])
    numbers, coloured = tuple(variants), []
    for (_, labels, spacing), classes in zip(samples, maps, strict=True):
        geometry = Geometry.from_spacing(spacing[::-1])
        mask = LabelVolume(np.ascontiguousarray(labels), geometry)
        # The same field moves the medians and the noise.
        middle, spread = (
            Warp(Volume(statistic[classes], geometry), mask, unit=intensity.unit)
            for statistic in (medians, deviations)
        )
        for number in numbers:
            image, deformed, _ = middle.variant(seed, number)
            strength, _, _ = spread.variant(seed, number)
            noise = gaussian_filter(random.standard_normal(image.shape), (0, *NOISE_BLUR))
            smooth = gaussian_filter(image, (0, EDGE_BLUR, EDGE_BLUR))
            noisy = np.rint(smooth + noise / noise.std() * strength)
            limited = np.clip(noisy, intensity.low, intensity.high).astype(np.int16)
            coloured.append(Sample(limited, deformed.labels, spacing))
    return coloured


def tissue_classes(
    image: NDArray[np.generic], labels: NDArray[np.uint8], intensity: Intensity
) -> NDArray[np.uint8]:
    """Find the class of every voxel; what is outside the body is a class of its own.

    Without it, the air around the patient decides the median of the lung.

    Args:
        image: (D, H, W).
        labels: uint8 (D, H, W), model indices.
        intensity: The image's unit and range.

    Returns:
        uint8 (D, H, W): `tissue_map`, and `OUTSIDE`.
    """
    classes = tissue_map(image.astype(np.float32), labels, intensity.unit)
    outside = ~body_mask(image, intensity) & (labels == 0)
    return np.where(outside, np.uint8(OUTSIDE), classes)


def class_statistics(
    images: Sequence[NDArray[np.generic]], maps: Sequence[NDArray[np.uint8]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Measure every class over the voxels of all images.

    Args:
        images: (D, H, W) each.
        maps: Their classes.

    Returns:
        Medians and robust standard deviations, float32 (256,).
    """
    medians, deviations = np.zeros(256, np.float32), np.zeros(256, np.float32)
    values = np.concatenate([image.ravel() for image in images])
    classes = np.concatenate([tissues.ravel() for tissues in maps])
    for number in np.unique(classes).tolist():
        low, middle, high = np.percentile(values[classes == number], (25, 50, 75))
        medians[number], deviations[number] = middle, (high - low) / IQR_PER_DEVIATION
    return medians, deviations
