"""The mask's grid → the model's canvas, and the synthetic slice back onto the mask's grid.

Training uses the same code.

The model synthesizes axial slices whose rows run from anterior to posterior and whose columns run
from the patient's right to the left, as DICOM's axial images do. Volumes come in any axis order:
the array axis nearest to the patient's inferior-superior axis counts the slices, the one nearest to
anterior-posterior the rows. Oblique volumes stay oblique: slices are synthesized along their own
axes, nothing is rotated.
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

# of the mask's: what is between stays in the core's cache, and is too small to be asked of the
# system anew each time
ROWS_AT_ONCE = 64
MOST_GROWTH = 64  # times the canvas' area; larger is taken for a wrong unit
Taps = tuple[
    NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]
]  # lower index, upper index, weight of the upper


class SliceGrid:
    """How the axial slices of one volume of `shape` (D, H, W) lie on the model's canvas.

    `axis`: the array axis that counts the slices; `count`: how many; `size`: (H, W) of the canvas
    in pixels; `covers`: whether the whole slice lies on it. Slices are named by their index k along
    `axis`, in the array's own order.

    With a pixel spacing, a slice smaller than the canvas lies in its middle. A larger one is cut to
    the canvas, which is what the network was trained on, about the slice's middle, moved as far as
    it takes to hold every voxel of `labels` (D, H, W); only where labels reach further than the
    canvas does it grow, by multiples of the divisor.
    """

    def __init__(
        self,
        policy: GridPolicy,
        geometry: Geometry,
        shape: tuple[int, int, int],
        labels: NDArray[np.uint8] | None = None,
    ):
        self._policy = policy
        slices, rows, columns = axial_axes(geometry)
        self.axis, self.count = slices, shape[slices]
        # array axis a is voxel index 2 - a; its sign says which way the patient axis runs along it
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
        self._transpose = (
            rows > columns
        )  # after taking slice k, rows come first when rows < columns
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
        self._from_mask = _both(
            *(_within(line.positions, line.extent) for line in lines)
        )  # pixels that lie on the slice
        self._from_canvas = _both(
            *(_within(line.inverse, line.size) for line in lines)
        )  # voxels that lie on the canvas
        self.covers = bool(self._from_canvas.all())

    def labels(self, volume: NDArray[np.uint8], k: int) -> NDArray[np.uint8]:
        """Slice k of a label `volume` (D, H, W) and its neighbours on the canvas: uint8 (Z, H, W),
        nearest, 0 outside.

        Neighbour n lies n x `slice_spacing` mm towards the head; past the volume's ends its last
        slice stands in.
        """
        z = self._policy.slices
        out = np.empty((z, *self.size), np.uint8)
        rows, columns = self._nearest
        for n in range(z):
            away = int(
                abs(n - z // 2) * (self._policy.slice_spacing or 0.0) / self._step + 0.5
            )  # slices: the same for every k
            near = min(max(k + (away if (n > z // 2) == self._up else -away), 0), self.count - 1)
            np.multiply(
                self._axial(volume, near).take(rows, 0).take(columns, 1),
                self._from_mask,
                out=out[n],
            )
        return out

    def image(self, volume: NDArray[Any], k: int, outside: float) -> NDArray[np.float32]:
        """Slice k of an intensity `volume` (D, H, W) on the canvas: float32 (H, W), linear,
        `outside` beyond the slice.
        """
        plane = self._axial(volume, k).astype(np.float32)
        out = _lerp(_lerp(plane, self._to_canvas[0], 0), self._to_canvas[1], 1)
        out[~self._from_mask] = outside
        return out

    def back(self, ct: NDArray[np.int16], out: NDArray[np.int16], outside: int) -> None:
        """Put a synthesized canvas, int16 (H, W), on the mask's own grid into `out`: int16, a slice
        of the volume in its own axis order, linear.

        Voxels beyond the canvas are `outside`.
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
        else:  # every pixel of the mask lies on a pixel of the canvas
            out[...] = ct[np.ix_(low, columns[0])]
        if not self.covers:
            out[~self._from_canvas] = outside

    def _spans(
        self, labels: NDArray[np.uint8]
    ) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        """First and last row, and column, that hold a label in any slice."""
        seen = [np.zeros(n, bool) for n in self._axial(labels, 0).shape]
        for k in range(self.count):
            plane = self._axial(labels, k)
            seen[0] |= plane.any(1)
            seen[1] |= plane.any(0)
        rows, columns = (np.flatnonzero(line) for line in seen)
        return (int(rows[0]), int(rows[-1])) if len(rows) else None, (
            (
                int(columns[0]),
                int(columns[-1]),
            )
            if len(columns)
            else None
        )

    def _axial(self, volume: NDArray[Any], k: int) -> NDArray[Any]:
        """A view of slice k with rows anterior → posterior and columns right → left."""
        plane = np.moveaxis(volume, self.axis, 0)[k]
        return (plane.T if self._transpose else plane)[self._flip]


def axial_axes(geometry: Geometry) -> tuple[int, int, int]:
    """The array axes that count (slices, rows, columns): the assignment of axes to S, P, L with
    the largest |cosines|.
    """
    cosines = np.abs(geometry.direction)  # [LPS axis, voxel axis]
    best = max(
        permutations(range(3)),
        key=lambda p: cosines[2, p[0]] + cosines[1, p[1]] + cosines[0, p[2]] - 1e-9 * _disorder(p),
    )
    return 2 - best[0], 2 - best[1], 2 - best[2]


def _disorder(permutation: tuple[int, ...]) -> int:
    """Ties (exactly 45 degrees) keep the array's own order (slices, rows, columns)."""
    return sum(
        abs(value - expected) for value, expected in zip(permutation, (2, 1, 0), strict=True)
    )


@dataclass(frozen=True)
class _Line:
    """One in-plane axis: `extent` voxels, `size` pixels of `scale` voxels each, the canvas'
    middle at voxel `centre`.
    """

    extent: int
    scale: float
    size: int
    centre: float

    @cached_property
    def positions(self) -> NDArray[np.float64]:
        """For each pixel its place in voxels.

        Even an equal spacing would fall half-way between voxels when the sizes differ by an odd
        number: the canvas is moved by half a pixel then, so that equal spacing copies.
        """
        places = (
            self.centre
            + (np.arange(self.size, dtype=np.float64) - (self.size - 1) / 2) * self.scale
        )
        return np.asarray(np.floor(places + 0.5 + 1e-9)) if abs(self.scale - 1) < 1e-6 else places

    @cached_property
    def inverse(self) -> NDArray[np.float64]:
        """For each voxel its place in pixels."""
        return (np.arange(self.extent) - self.positions[0]) / self.scale

    def nearest(self) -> NDArray[np.intp]:
        return np.clip(np.floor(self.positions + 0.5), 0, self.extent - 1).astype(np.intp)


def _line(
    extent: int, scale: float, side: int, divisor: int, span: tuple[int, int] | None
) -> _Line:
    """A canvas of `side` pixels about the middle of the voxels, moved or grown to hold `span`
    with a pixel to spare.
    """
    middle = (extent - 1) / 2
    if extent / scale <= side + 1e-6 or span is None:
        return _Line(extent, scale, side, middle)
    first, last = span[0] - 0.5 - scale, span[1] + 0.5 + scale
    size = max(side, divisor * int(np.ceil((last - first) / scale / divisor - 1e-9)))
    half = size * scale / 2
    return _Line(extent, scale, size, min(max(middle, last - half), first + half))


def _within(places: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Which places lie on one of `count` cells, whose borders are half a cell off their centres."""
    return (places > -0.5 - 1e-6) & (places < count - 0.5 + 1e-6)


def _both(rows: NDArray[np.bool_], columns: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return rows[:, None] & columns


def _linear(positions: NDArray[np.float64], extent: int) -> Taps:
    """Two neighbours and the upper one's weight; beyond the ends the last value holds."""
    clipped = np.clip(positions, 0, extent - 1)
    low = np.clip(np.floor(clipped + 1e-6), 0, extent - 1).astype(np.intp)
    weight = np.clip(clipped - low, 0, 1).astype(np.float32)
    weight[weight < 1e-5] = 0
    return low, np.minimum(low + 1, extent - 1), weight


def _lerp(plane: NDArray[np.float32], taps: Taps, axis: int) -> NDArray[np.float32]:
    """Linear interpolation along one axis, in plain multiply-adds: the same bits on every
    machine.
    """
    low, high, weight = taps
    if axis == 0:
        weight = weight[:, None]
    a, b = plane.take(low, axis), plane.take(high, axis)
    b -= a
    b *= weight
    a += b
    return a
