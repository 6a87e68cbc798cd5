"""A real CT deformed together with its mask, the intensity of every tissue moved at random: new pairs without a network.

The deformation is the one that variants of a mask have (`runtime.variants`). The intensities move by
class: each label and each tissue outside the labels gets a shift and a gain of its own about its
median, and all get one common shift, as contrast timing and tube voltage differ between patients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import InputError, UsageError
from .randomness import CaseRandom
from .variants import DeformationField, Ranges, Shapes
from .volume import LabelVolume, Volume

HU_THRESHOLDS = (-500.0, -30.0, 130.0, 300.0)  # gas | fat | soft tissue | contrast, spongy bone | bone
TISSUES = ("gas", "fat", "soft", "mid", "dense")
QUANTILES = (0.1, 0.35, 0.65, 0.9)  # of an image that is not in HU: five classes too
TISSUE_BLUR = 0.5  # pixels, before the thresholds: noise makes no classes of its own
EDGE_BLUR = 0.7  # pixels, of the intensity change: no edge is drawn where a class ends


@dataclass(frozen=True)
class IntensityJitter:
    """How far intensities move, as standard deviations of normal draws.

    Attributes:
        shift: of one class, HU. Of images in other units: this many 500ths of their 1 % to 99 % range.
        stable_shift: the same for gas and fat, whose HU hardly differ between patients.
        gain: of the logarithm of the factor about the class median.
        common: one more shift for all classes, HU: the contrast phase.
    """

    shift: float = 22.0
    stable_shift: float = 9.0
    gain: float = 0.15
    common: float = 12.0


def tissue_map(image: NDArray[np.floating], labels: NDArray[np.uint8], unit: str) -> NDArray[np.uint8]:
    """A class for every voxel: its label, else its tissue by intensity.

    Args:
        image: (D, H, W), HU or arbitrary units.
        labels: uint8 (D, H, W), model indices; 0 is no label.
        unit: "HU" takes `HU_THRESHOLDS`, any other the `QUANTILES` of the voxels without a label.

    Returns:
        uint8 (D, H, W): 0 to 4 for `TISSUES`, 5 and up for the labels 1 and up.

    Raises:
        UsageError: where labels and tissues do not fit into 256 classes.
    """
    if int(labels.max()) + len(TISSUES) > 256:
        raise UsageError(
            f"the mask holds label {labels.max()}",
            expected=f"at most {256 - len(TISSUES)} labels beside the tissues",
            remedy="map labels together with --labels MAP.json",
        )
    smooth = np.stack([_blur(plane, TISSUE_BLUR) for plane in image.astype(np.float32)])
    if unit == "HU":
        thresholds = np.array(HU_THRESHOLDS)
    else:
        outside = smooth[labels == 0]
        thresholds = np.quantile(outside if outside.size else smooth, QUANTILES)
    classes = np.searchsorted(thresholds, smooth, side="right").astype(np.uint8)
    return np.where(labels > 0, labels + np.uint8(len(TISSUES) - 1), classes)


class Warp:
    """Variants of one real pair. What they share is computed once.

    Args:
        image: the real image; its grid must be the mask's.
        mask: labels as model indices on the same grid.
        ranges: how far shapes differ, as for the variants of a mask.
        jitter: how far intensities differ; None leaves them as they are.
        unit: "HU" or another unit of `image`.

    Raises:
        InputError: where image and mask are not on one grid.
    """

    def __init__(
        self,
        image: Volume,
        mask: LabelVolume,
        *,
        ranges: Ranges | None = None,
        jitter: IntensityJitter | None = None,
        unit: str = "HU",
    ) -> None:
        if image.values.shape != mask.labels.shape or not np.allclose(image.geometry.affine, mask.geometry.affine, atol=1e-3):
            raise InputError(
                f"the image has {image.values.shape} voxels, the mask {mask.labels.shape}, or they lie apart",
                expected="image and mask on one grid",
                remedy="resample the mask onto its image",
            )
        self._image = np.asarray(image.values, np.float32)
        self._mask, self._jitter, self._unit = mask, jitter, unit
        self._ranges = ranges or Ranges()

    def variant(self, seed: int, variant: int) -> tuple[NDArray[np.float32], LabelVolume, tuple[str, ...]]:
        """One deformed pair, a function of (seed, digest of the mask, variant) and the image.

        Returns:
            The image, float32 (D, H, W) in its unit; the mask moved by the same field; what a person
            should be told. Variant 0 keeps the shape; its intensities move as those of any other.
        """
        varied, field = Shapes(self._mask, self._ranges, seed).deformed(variant)
        random = CaseRandom(seed, self._mask.digest, variant)
        image = self._image
        if self._jitter is not None:
            image = image + self._intensity_change(random)
        if field is not None:
            image = np.stack(list(_resample(image, field)))
        return image, varied.volume, varied.warnings

    def _intensity_change(self, random: CaseRandom) -> NDArray[np.float32]:
        """What is added to the image, float32 (D, H, W), blurred within slices."""
        assert self._jitter is not None
        classes = tissue_map(self._image, self._mask.labels, self._unit)
        present = np.unique(classes)
        low, high = np.percentile(self._image, (1, 99))
        scale = 1.0 if self._unit == "HU" else (high - low) / 500.0
        draws = random.intensity(1 + 2 * 256)
        common = self._jitter.common * scale * draws[0]
        change = np.zeros(self._image.shape, np.float32)
        for value in present.tolist():
            inside = classes == value
            values = self._image[inside]
            stable = self._unit == "HU" and value < 2
            shift = (self._jitter.stable_shift if stable else self._jitter.shift) * scale
            gain = np.exp(self._jitter.gain * draws[1 + 2 * value])
            median = np.median(values)
            moved = (gain - 1) * (values - median) + shift * draws[2 + 2 * value]
            change[inside] = moved + (0.0 if stable else common)
        change[self._image == self._image.min()] = 0  # padding and blanked air stay what they are
        return np.stack([_blur(plane, EDGE_BLUR) for plane in change])


def _resample(image: NDArray[np.float32], field: DeformationField) -> Iterator[NDArray[np.float32]]:
    """The image where `field` takes each voxel from, trilinear, slice after slice (H, W)."""
    depth, height, width = image.shape
    rows, columns = np.arange(height), np.arange(width)
    flat = image.ravel()
    for k in range(depth):
        first, weight = [], []
        for axis, size in enumerate(image.shape):
            place = np.clip(field.places(axis, k, rows, columns), 0, size - 1)
            low = np.minimum(np.floor(place).astype(np.intp), max(size - 2, 0))
            first.append(low)
            weight.append(place - low)
        step = (height * width if depth > 1 else 0, width if height > 1 else 0, 1 if width > 1 else 0)
        corner = (first[0] * height + first[1]) * width + first[2]
        planes = []
        for z in (0, step[0]):
            lines = []
            for y in (0, step[1]):
                left, right = flat.take(corner + z + y), flat.take(corner + z + y + step[2])
                lines.append(left + weight[2] * (right - left))
            planes.append(lines[0] + weight[1] * (lines[1] - lines[0]))
        yield planes[0] + weight[0] * (planes[1] - planes[0])


def _blur(plane: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """A Gaussian of `sigma` pixels over (H, W); the border is continued."""
    reach = max(1, int(np.ceil(3 * sigma)))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for axis in (0, 1):
        size = plane.shape[axis]
        pads = [(reach, reach) if n == axis else (0, 0) for n in (0, 1)]
        padded = np.pad(plane, pads, mode="edge")
        total = np.zeros(plane.shape, np.float32)
        for n, weight in enumerate(kernel):
            total += weight * padded.take(range(n, n + size), axis)
        plane = total
    return plane
