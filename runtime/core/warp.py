"""Warp a real CT together with its mask: new training pairs without a network.

The deformation is that of the variants of a mask (`runtime.core.deformation`). The intensities move
at random by class: each label and each tissue outside the labels gets its own shift and its own
gain about its median, and all get one common shift, as contrast timing and tube voltage differ
between patients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .deformation import DeformationField, DeformationParams, DeformedMask, MaskDeformer
from .errors import InputError
from .rng import CaseRandom
from .tissue_classes import Histogram, gaussian, tissue_plane, tissue_thresholds
from .volume import LabelVolume, Volume

EDGE_BLUR = 0.7  # sigma in pixels, of the intensity change, so that classes do not get an edge

Planes = Callable[[int], NDArray[np.float32]]


@dataclass(frozen=True)
class IntensityJitter:
    """How far intensities move, as standard deviations of normal draws.

    Attributes:
        shift: Shift of one class, in HU. For images in other units, in 500ths of the range between
            their 1 % and 99 % quantiles.
        stable_shift: Shift of gas and of fat, whose HU hardly differ between patients.
        gain: The logarithm of the factor about the median of a class.
        common: One more shift for all classes, for the contrast phase, as `shift`.
    """

    shift: float = 22.0
    stable_shift: float = 9.0
    gain: float = 0.15
    common: float = 12.0


@dataclass(frozen=True)
class _Statistics:
    """The statistics of one image.

    Attributes:
        thresholds: Thresholds between the tissues, float32 (4,).
        medians: Median of each class, float32 (256,).
        least: The least value of the image.
        scale: The factor from the jitter's unit to the image's.
    """

    thresholds: NDArray[np.float32]
    medians: NDArray[np.float32]
    least: float
    scale: float


class Warp:
    """Makes variants of one real pair, the image one slice after the other.

    It computes only once what the variants share.

    Args:
        image: The real image.
        mask: Model indices on the same grid.
        ranges: How far shapes may differ, as for the variants of a mask.
        jitter: How far intensities may differ; None keeps them.
        unit: "HU", or another unit of the image.

    Raises:
        InputError: Image and mask are not on one grid.
    """

    def __init__(
        self,
        image: Volume,
        mask: LabelVolume,
        *,
        ranges: DeformationParams | None = None,
        jitter: IntensityJitter | None = None,
        unit: str = "HU",
    ) -> None:
        if image.values.shape != mask.labels.shape or not np.allclose(
            image.geometry.affine, mask.geometry.affine, atol=1e-3
        ):
            raise InputError(
                f"the image has {image.values.shape} voxels, the mask {mask.labels.shape}, or their"
                " positions differ",
                expected="image and mask on one grid",
                remedy="resample the mask onto its image",
            )
        self._image, self._mask, self._jitter, self._unit = image.values, mask, jitter, unit
        self._ranges = ranges or DeformationParams()

    def variant(
        self, seed: int, variant: int
    ) -> tuple[NDArray[np.float32], LabelVolume, tuple[str, ...]]:
        """One warped pair; it depends on (seed, digest of the mask, variant) and the image alone.

        Args:
            seed: Seed of the draws.
            variant: The number of the variant; 0 keeps the shape, and its intensities move.

        Returns:
            The image, float32 (D, H, W) in its unit; the mask, moved by the same field; warnings
            for a person.
        """
        deformed, planes = self.planes(seed, variant)
        return np.stack(list(planes)), deformed.volume, deformed.warnings

    def planes(self, seed: int, variant: int) -> tuple[DeformedMask, Iterator[NDArray[np.float32]]]:
        """As `variant`, but the image comes slice by slice (H, W), each computed on demand.

        A voxel from beyond the image gets the image's least value, its air or padding. A voxel with
        a label, where the mask reaches the border, gets the tissue of the border.

        Args:
            seed: Seed of the draws.
            variant: The number of the variant; 0 keeps the shape, and its intensities move.

        Returns:
            The mask with its warnings, and the slices of the image, float32.
        """
        deformed, field = MaskDeformer(self._mask, self._ranges, seed).deformed(variant)
        plane = self._moved(CaseRandom(seed, self._mask.digest, variant))
        if field is None:
            return deformed, map(plane, range(len(self._image)))
        return deformed, self._resampled(plane, field, deformed.volume.labels)

    def _moved(self, random: CaseRandom) -> Planes:
        """A function that returns a slice of the image, float32 (H, W), with moved intensities."""
        if self._jitter is None:
            return lambda k: self._image[k].astype(np.float32)
        jitter, of = self._jitter, self._statistics
        draws = random.intensity(1 + 2 * 256)
        stable = np.arange(256) < (2 if self._unit == "HU" else 0)  # gas and fat
        deviation = np.where(stable, jitter.stable_shift, jitter.shift)
        common = np.where(stable, 0.0, jitter.common * draws[0])
        gain = np.expm1(jitter.gain * draws[1::2]).astype(np.float32)
        shift = ((deviation * draws[2::2] + common) * of.scale).astype(np.float32)
        offset = shift - gain * of.medians

        def plane(k: int) -> NDArray[np.float32]:
            values = self._image[k].astype(np.float32)
            classes = tissue_plane(values, self._mask.labels[k], of.thresholds)
            change = gain.take(classes) * values + offset.take(classes)
            change[values == of.least] = 0  # padding and blank air keep their value
            return values + gaussian(change, EDGE_BLUR)

        return plane

    @cached_property
    def _statistics(self) -> _Statistics:
        image, labels = self._image, self._mask.labels
        low, high = float(image.min()), float(image.max())
        thresholds = tissue_thresholds(image, labels, self._unit)
        by_class: dict[int, Histogram] = {}
        all_values = Histogram(low, high)
        for values, of in zip(image, labels, strict=True):
            classes = tissue_plane(values, of, thresholds)
            for value in np.flatnonzero(np.bincount(classes.ravel())).tolist():
                by_class.setdefault(value, Histogram(low, high)).add(
                    values[classes == value].astype(np.float64)
                )
            if self._unit != "HU":
                all_values.add(values.astype(np.float64))
        medians = np.zeros(256, np.float32)
        for value, histogram in by_class.items():
            medians[value] = histogram.quantile(0.5)
        if self._unit == "HU":
            return _Statistics(thresholds, medians, low, 1.0)
        scale = (all_values.quantile(0.99) - all_values.quantile(0.01)) / 500
        return _Statistics(thresholds, medians, low, scale)

    def _resampled(
        self, plane: Planes, field: DeformationField, labels: NDArray[np.uint8]
    ) -> Iterator[NDArray[np.float32]]:
        """The image, resampled through `field`, trilinear, slice by slice (H, W)."""
        depth, height, width = self._image.shape
        rows, columns = np.arange(height), np.arange(width)
        ring, least = _Ring(plane, self._image.shape), np.float32(self._image.min())
        for k in range(depth):
            first, weight = [], []
            is_outside = np.zeros((height, width), bool)
            for axis, size in enumerate(self._image.shape):
                place = field.places(axis, k, rows, columns)
                is_outside |= (place < -0.5) | (place > size - 0.5)
                np.clip(place, 0, size - 1, out=place)
                low = np.minimum(place.astype(np.intp), max(size - 2, 0))
                first.append(low)
                weight.append(place - low)
            flat = ring.holding(int(first[0].min()), min(int(first[0].max()) + 1, depth - 1))
            corner = first[1] * width + first[2]
            down, right = (width if height > 1 else 0), (1 if width > 1 else 0)
            slices = []
            for z in (first[0], np.minimum(first[0] + 1, depth - 1)):
                at = ring.starts(z) + corner
                lines = []
                for y in (0, down):
                    lower, upper = flat.take(at + y), flat.take(at + (y + right))
                    lines.append(lower + weight[2] * (upper - lower))
                slices.append(lines[0] + weight[1] * (lines[1] - lines[0]))
            out = slices[0] + weight[0] * (slices[1] - slices[0])
            out[is_outside & (labels[k] == 0)] = least
            yield out


class _Ring:
    """The source slices for one deformed slice: as many as it needs, not the complete volume."""

    def __init__(self, plane: Planes, shape: tuple[int, ...]):
        self._plane, self._size = plane, shape[1] * shape[2]
        self._planes = np.empty((0, self._size), np.float32)
        self._indices: list[int] = []  # which slice is in each row of `_planes`

    def holding(self, low: int, high: int) -> NDArray[np.float32]:
        """The values of all slices of the ring, flat; those from `low` to `high` are in it."""
        if high - low >= len(self._indices):
            count = high - low + 1 + 4  # the next slices may need a little more
            planes, indices = np.empty((count, self._size), np.float32), [-1] * count
            for k in self._indices:
                if low <= k <= high:
                    planes[k % count], indices[k % count] = self._planes[k % len(self._indices)], k
            self._planes, self._indices = planes, indices
        for k in range(low, high + 1):
            row = k % len(self._indices)
            if self._indices[row] != k:
                self._planes[row] = self._plane(k).ravel()
                self._indices[row] = k
        return self._planes.ravel()

    def starts(self, k: NDArray[np.intp]) -> NDArray[np.intp]:
        """Where slice `k` begins in the last result of `holding`."""
        return k % len(self._indices) * self._size
