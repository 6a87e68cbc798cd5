"""The mask's grid → the model's canvas, and the synthetic slice back onto the mask's grid.

Training uses the same code.

The model synthesizes axial slices. Their rows run from anterior to posterior and their columns from
the patient's right to the left, as in axial DICOM images. A volume may have any axis order: the
array axis nearest to the patient's inferior-superior axis counts the slices, the one nearest to
anterior-posterior the rows. Oblique volumes stay oblique: slices follow the volume's axes, without
a rotation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import GeometryError
from .manifest import GridPolicy
from .volume import Geometry

# Rows of the mask that one step resamples. The arrays in between then stay in the cache of a core,
# and are small enough that no step allocates memory from the system.
ROWS_AT_ONCE = 64
MOST_GROWTH = 64  # times the area of the canvas; a larger one means a wrong unit
# Lower index, upper index, weight of the upper one.
Taps = tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]


class SliceGrid:
    """How the axial slices of one volume lie on the model's canvas.

    With a pixel spacing, a slice smaller than the canvas lies in its middle. A larger slice is cut
    to the canvas of the training, about the slice's middle, moved as far as needed to hold every
    label. Where the labels reach further than the canvas, the canvas grows by multiples of the
    divisor.

    Args:
        policy: The grid of the model.
        geometry: Where the voxels lie.
        shape: (D, H, W) of the volume.
        labels: uint8 (D, H, W); None for a volume without labels.
        classes: Labels from this one on are context, for which the canvas does not grow; None:
            there are none.

    Attributes:
        axis: The array axis that counts the slices; slice k is the k-th along it.
        count: The number of slices.
        size: (H, W) of the canvas in pixels.
        covers: Whether the complete slice lies on the canvas.

    Raises:
        GeometryError: The labels need far more than the canvas of the training.
    """

    def __init__(
        self,
        policy: GridPolicy,
        geometry: Geometry,
        shape: tuple[int, int, int],
        labels: NDArray[np.uint8] | None = None,
        classes: int | None = None,
    ):
        self._policy = policy
        self._classes = classes
        slices, rows, columns = axial_axes(geometry)
        self.axis, self.count = slices, shape[slices]
        # Array axis a is voxel index 2 - a. The sign tells whether the patient's axis runs along it
        # or against it.
        sign = {
            a: np.sign(geometry.direction[2 - n, 2 - a])
            for n, a in enumerate((slices, rows, columns))
        }
        spacing = {a: geometry.spacing[2 - a] for a in range(3)}
        self._up = bool(sign[slices] > 0)  # k grows towards the head
        self._flip = (
            slice(None, None, int(sign[rows]) or 1),
            slice(None, None, int(sign[columns]) or 1),
        )
        self._transpose = rows > columns  # a slice of the array has its rows first otherwise
        self._step = spacing[slices]

        extent = (shape[rows], shape[columns])
        if policy.pixel_spacing is None:  # fit the slice to the canvas
            lines = [
                _Line(n, n / side, side, (n - 1) / 2)
                for n, side in zip(extent, policy.canvas, strict=True)
            ]
        else:
            scale = (
                policy.pixel_spacing[0] / spacing[rows],
                policy.pixel_spacing[1] / spacing[columns],
            )
            larger = any(
                n / s > side + 1e-6 for n, s, side in zip(extent, scale, policy.canvas, strict=True)
            )
            spans = self._spans(labels) if larger and labels is not None else (None, None)
            lines = [
                _line(n, s, side, policy.divisor, span)
                for n, s, side, span in zip(extent, scale, policy.canvas, spans, strict=True)
            ]
        self.size = (lines[0].size, lines[1].size)
        if self.size[0] * self.size[1] > MOST_GROWTH * policy.canvas[0] * policy.canvas[1]:
            span = " x ".join(
                f"{line.size * step:.0f}"
                for line, step in zip(lines, policy.pixel_spacing or (), strict=True)
            )
            raise GeometryError(
                f"its labels span {span} mm",
                expected=f"at most {MOST_GROWTH} times the canvas the model was trained on",
                remedy=(
                    "check the voxel spacing and its unit, and the mask for stray voxels far off"
                ),
            )
        self._nearest = [line.nearest() for line in lines]
        self._to_canvas = [_linear(line.positions, line.extent) for line in lines]
        self._to_mask = [_linear(line.inverse, line.size) for line in lines]
        # The pixels that lie on the slice, and the voxels that lie on the canvas.
        self._from_mask = _both(*(_within(line.positions, line.extent) for line in lines))
        self._from_canvas = _both(*(_within(line.inverse, line.size) for line in lines))
        self.covers = bool(self._from_canvas.all())

    def labels(self, volume: NDArray[np.uint8], k: int) -> NDArray[np.uint8]:
        """Put a slice of labels and its neighbours on the canvas, with the nearest neighbour.

        Neighbour n lies n x `slice_spacing` mm towards the head. Beyond the ends of the volume its
        last slice goes on.

        Args:
            volume: uint8 (D, H, W).
            k: Index of the slice.

        Returns:
            uint8 (Z, H, W); 0 outside the volume.
        """
        z = self._policy.slices
        out = np.empty((z, *self.size), np.uint8)
        rows, columns = self._nearest
        for n in range(z):
            # The distance in slices is the same for every k.
            away = int(abs(n - z // 2) * (self._policy.slice_spacing or 0.0) / self._step + 0.5)
            near = min(max(k + (away if (n > z // 2) == self._up else -away), 0), self.count - 1)
            plane = self._axial(volume, near).take(rows, 0).take(columns, 1)
            np.multiply(plane, self._from_mask, out=out[n])
        return out

    def image(self, volume: NDArray[Any], k: int, outside: float) -> NDArray[np.float32]:
        """Put a slice of intensities on the canvas, with linear interpolation.

        Args:
            volume: Intensities (D, H, W).
            k: Index of the slice.
            outside: The value of pixels beyond the slice.

        Returns:
            float32 (H, W).
        """
        plane = self._axial(volume, k).astype(np.float32)
        out = _lerp(_lerp(plane, self._to_canvas[0], 0), self._to_canvas[1], 1)
        out[~self._from_mask] = outside
        return out

    def back(self, ct: NDArray[np.int16], out: NDArray[np.int16], outside: int) -> None:
        """Resample a synthetic slice from the canvas to the mask's grid, linearly.

        Args:
            ct: int16 HU (H, W), the canvas.
            out: int16, a slice of the volume in the array's axis order; the result is written here.
            outside: The value of voxels beyond the canvas, in HU.
        """
        out = (out.T if self._transpose else out)[self._flip]
        (low, high, weight), columns = self._to_mask
        if weight.any() or columns[2].any():
            for start in range(0, len(low), ROWS_AT_ONCE):
                rows = slice(start, start + ROWS_AT_ONCE)
                first, last = low[rows][0], high[rows][-1]
                plane = _lerp(ct[first : last + 1].astype(np.float32), columns, 1)
                plane = _lerp(plane, (low[rows] - first, high[rows] - first, weight[rows]), 0)
                out[rows] = np.rint(plane, out=plane)
        else:  # every voxel of the mask lies on a pixel of the canvas
            out[...] = ct[np.ix_(low, columns[0])]
        if not self.covers:
            out[~self._from_canvas] = outside

    def _spans(
        self, labels: NDArray[np.uint8]
    ) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        """The first and last row, and the first and last column, with a label in any slice."""
        in_row, in_column = (np.zeros(n, bool) for n in self._axial(labels, 0).shape)
        for k in range(self.count):
            plane = self._axial(labels, k)
            if self._classes is not None:
                plane = (plane > 0) & (plane < self._classes)
            in_row |= plane.any(1)
            in_column |= plane.any(0)
        rows, columns = np.flatnonzero(in_row), np.flatnonzero(in_column)
        if not len(rows):
            return None, None
        return (int(rows[0]), int(rows[-1])), (int(columns[0]), int(columns[-1]))

    def _axial(self, volume: NDArray[Any], k: int) -> NDArray[Any]:
        """A view of slice k with rows anterior → posterior and columns right → left."""
        plane = np.moveaxis(volume, self.axis, 0)[k]
        return (plane.T if self._transpose else plane)[self._flip]


def axial_axes(geometry: Geometry) -> tuple[int, int, int]:
    """The array axes that count (slices, rows, columns).

    Of all assignments of the axes to superior, posterior and left, it takes the one with the
    largest sum of |cosines|.

    Args:
        geometry: Where the voxels lie.
    """
    cosines = np.abs(geometry.direction)  # [LPS axis, voxel axis]
    best = max(
        permutations(range(3)),
        key=lambda p: cosines[2, p[0]] + cosines[1, p[1]] + cosines[0, p[2]] - 1e-9 * _disorder(p),
    )
    return 2 - best[0], 2 - best[1], 2 - best[2]


def _disorder(permutation: tuple[int, ...]) -> int:
    """How far an assignment is from the array's order, which wins a tie (exactly 45 degrees)."""
    return sum(
        abs(value - expected) for value, expected in zip(permutation, (2, 1, 0), strict=True)
    )


@dataclass(frozen=True)
class _Line:
    """One in-plane axis of the slice and of the canvas.

    Attributes:
        extent: Voxels of the slice.
        scale: Voxels per pixel.
        size: Pixels of the canvas.
        centre: The middle of the canvas, in voxels.
    """

    extent: int
    scale: float
    size: int
    centre: float

    @cached_property
    def positions(self) -> NDArray[np.float64]:
        """The position of each pixel, in voxels.

        With equal spacings, pixels would lie half-way between voxels where the sizes differ by an
        odd number. The canvas then moves by half a pixel, so that equal spacings copy the values.
        """
        steps = np.arange(self.size, dtype=np.float64) - (self.size - 1) / 2
        places = self.centre + steps * self.scale
        return np.asarray(np.floor(places + 0.5 + 1e-9)) if abs(self.scale - 1) < 1e-6 else places

    @cached_property
    def inverse(self) -> NDArray[np.float64]:
        """The position of each voxel, in pixels."""
        return (np.arange(self.extent) - self.positions[0]) / self.scale

    def nearest(self) -> NDArray[np.intp]:
        """The voxel nearest to each pixel."""
        return np.clip(np.floor(self.positions + 0.5), 0, self.extent - 1).astype(np.intp)


def _line(
    extent: int, scale: float, side: int, divisor: int, span: tuple[int, int] | None
) -> _Line:
    """A canvas of `side` pixels about the middle of the voxels.

    It moves and grows as far as needed to hold `span` and one more pixel at either end.
    """
    middle = (extent - 1) / 2
    if extent / scale <= side + 1e-6 or span is None:
        return _Line(extent, scale, side, middle)
    first, last = span[0] - 0.5 - scale, span[1] + 0.5 + scale
    size = max(side, divisor * int(np.ceil((last - first) / scale / divisor - 1e-9)))
    half = size * scale / 2
    return _Line(extent, scale, size, min(max(middle, last - half), first + half))


def _within(places: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Which places lie on one of `count` cells; cell n reaches from n - 0.5 to n + 0.5."""
    return (places > -0.5 - 1e-6) & (places < count - 0.5 + 1e-6)


def _both(rows: NDArray[np.bool_], columns: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where both the row and the column are true (H, W)."""
    return rows[:, None] & columns


def _linear(positions: NDArray[np.float64], extent: int) -> Taps:
    """The two neighbours of each position and the upper one's weight; the ends go on beyond."""
    clipped = np.clip(positions, 0, extent - 1)
    low = np.clip(np.floor(clipped + 1e-6), 0, extent - 1).astype(np.intp)
    weight = np.clip(clipped - low, 0, 1).astype(np.float32)
    weight[weight < 1e-5] = 0
    return low, np.minimum(low + 1, extent - 1), weight


def _lerp(plane: NDArray[np.float32], taps: Taps, axis: int) -> NDArray[np.float32]:
    """Linear interpolation along one axis.

    It uses plain multiply-adds: the same bits on every machine.
    """
    low, high, weight = taps
    if axis == 0:
        weight = weight[:, None]
    a, b = plane.take(low, axis), plane.take(high, axis)
    b -= a
    b *= weight
    a += b
    return a
