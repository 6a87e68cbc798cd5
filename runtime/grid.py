"""The mask's grid → the model's canvas, and the painted slice back onto the mask's grid. Training uses the same code.

The model paints axial slices whose rows run from anterior to posterior and whose columns run from the patient's right to
the left, as DICOM's axial images do. Volumes come in any axis order: the array axis nearest to the patient's
inferior-superior axis counts the slices, the one nearest to anterior-posterior the rows. Oblique volumes stay oblique:
slices are painted along their own axes, nothing is rotated.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .contract import GridPolicy
from .volume import Geometry

Taps = tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]  # lower index, upper index, weight of the upper


class SliceGrid:
    """How the axial slices of one volume of `shape` (D, H, W) lie on the model's canvas.

    `axis`: the array axis that counts the slices; `count`: how many; `size`: (H, W) of the canvas in pixels.
    Slices are named by their index k along `axis`, in the array's own order.
    """

    def __init__(self, policy: GridPolicy, geometry: Geometry, shape: tuple[int, int, int]):
        self._policy, self._shape = policy, shape
        slices, rows, columns = _axial_axes(geometry)
        self.axis, self.count = slices, shape[slices]
        # array axis a is voxel index 2 - a; its sign says which way the patient axis runs along it
        sign = {a: np.sign(geometry.direction[2 - n, 2 - a]) for n, a in enumerate((slices, rows, columns))}
        spacing = {a: geometry.spacing[2 - a] for a in range(3)}
        self._up = bool(sign[slices] > 0)  # k grows towards the head
        self._flip = (slice(None, None, int(sign[rows]) or 1), slice(None, None, int(sign[columns]) or 1))
        self._transpose = rows > columns  # after taking slice k, rows come first when rows < columns
        self._step = spacing[slices]

        extent = (shape[rows], shape[columns])
        if policy.pixel_spacing is None:  # fit the slice to the canvas
            self.size = policy.canvas
            scale = (extent[0] / self.size[0], extent[1] / self.size[1])
        else:
            scale = (policy.pixel_spacing[0] / spacing[rows], policy.pixel_spacing[1] / spacing[columns])
            self.size = (
                _canvas(extent[0] / scale[0], policy.canvas[0], policy.divisor),
                _canvas(extent[1] / scale[1], policy.canvas[1], policy.divisor),
            )
        # Centres coincide. Where sizes differ by an odd number of pixels the centre would fall between pixels and even an
        # unscaled grid would be resampled: the canvas is moved by half a pixel then, so that equal spacing copies pixels.
        maps = [_canvas_positions(self.size[n], extent[n], scale[n]) for n in (0, 1)]
        self._nearest = [_nearest(positions, extent[n]) for n, positions in enumerate(maps)]
        self._to_canvas = [_linear(positions, extent[n]) for n, positions in enumerate(maps)]
        self._to_mask = [_linear(_inverse(maps[n], extent[n]), self.size[n]) for n in (0, 1)]
        self._inside = [(positions > -0.5 - 1e-6) & (positions < extent[n] - 0.5 + 1e-6) for n, positions in enumerate(maps)]

    def labels(self, volume: NDArray[np.uint8], k: int) -> NDArray[np.uint8]:
        """Slice k of a label `volume` (D, H, W) and its neighbours on the canvas: uint8 (Z, H, W), nearest, 0 outside.

        Neighbour n lies n x `slice_spacing` mm towards the head; past the volume's ends its last slice stands in.
        """
        z = self._policy.slices
        out = np.zeros((z, *self.size), np.uint8)
        rows, columns = self._nearest
        for n in range(z):
            offset = (n - z // 2) * (self._policy.slice_spacing or 0.0) / self._step
            near = min(max(round(k + (offset if self._up else -offset)), 0), self.count - 1)
            plane = self._axial(volume, near)
            np.copyto(out[n], plane[np.ix_(rows, columns)], where=self._inside[0][:, None] & self._inside[1])
        return out

    def image(self, volume: NDArray[Any], k: int, outside: float) -> NDArray[np.float32]:
        """Slice k of an intensity `volume` (D, H, W) on the canvas: float32 (H, W), linear, `outside` beyond the slice."""
        plane = self._axial(volume, k).astype(np.float32)
        out = _lerp(_lerp(plane, self._to_canvas[0], 0), self._to_canvas[1], 1)
        out[~(self._inside[0][:, None] & self._inside[1])] = outside
        return out

    def back(self, ct: NDArray[np.int16]) -> NDArray[np.int16]:
        """A painted canvas, int16 (H, W), on the mask's own grid: int16, the volume's slice in its own axis order, linear."""
        rows, columns = self._to_mask
        if rows[2].any() or columns[2].any():
            plane = _lerp(_lerp(ct.astype(np.float32), rows, 0), columns, 1)
            out = np.rint(plane, out=plane).astype(np.int16)
        else:  # every pixel of the mask lies on a pixel of the canvas
            out = ct[np.ix_(rows[0], columns[0])]
        out = out[self._flip]
        return out.T if self._transpose else out

    def _axial(self, volume: NDArray[Any], k: int) -> NDArray[Any]:
        """A view of slice k with rows anterior → posterior and columns right → left."""
        plane = np.moveaxis(volume, self.axis, 0)[k]
        return (plane.T if self._transpose else plane)[self._flip]


def _axial_axes(geometry: Geometry) -> tuple[int, int, int]:
    """The array axes that count (slices, rows, columns): the assignment of axes to S, P, L with the largest |cosines|."""
    cosines = np.abs(geometry.direction)  # [LPS axis, voxel axis]
    best = max(permutations(range(3)), key=lambda p: cosines[2, p[0]] + cosines[1, p[1]] + cosines[0, p[2]] - 1e-9 * _disorder(p))
    return 2 - best[0], 2 - best[1], 2 - best[2]


def _disorder(permutation: tuple[int, ...]) -> int:
    """Ties (exactly 45 degrees) keep the array's own order (slices, rows, columns)."""
    return sum(abs(value - expected) for value, expected in zip(permutation, (2, 1, 0), strict=True))


def _canvas(pixels: float, least: int, divisor: int) -> int:
    """The smallest multiple of `divisor` that holds `pixels` and is no less than `least`."""
    return max(least, divisor * int(np.ceil((pixels - 1e-6) / divisor)))


def _canvas_positions(size: int, extent: int, scale: float) -> NDArray[np.float64]:
    """For each of `size` canvas pixels its position on the mask's axis of `extent` voxels; `scale` voxels a pixel."""
    centre = (extent - 1) / 2
    positions = centre + (np.arange(size, dtype=np.float64) - (size - 1) / 2) * scale
    if abs(scale - 1) < 1e-6:
        return np.asarray(np.floor(positions + 0.5 + 1e-9))  # an odd difference: half a pixel aside instead of half-way between
    return positions


def _inverse(positions: NDArray[np.float64], extent: int) -> NDArray[np.float64]:
    """For each of `extent` mask voxels its position on the canvas (positions are evenly spaced)."""
    scale = positions[1] - positions[0] if len(positions) > 1 else 1.0
    return (np.arange(extent) - positions[0]) / scale


def _nearest(positions: NDArray[np.float64], extent: int) -> NDArray[np.intp]:
    return np.clip(np.floor(positions + 0.5), 0, extent - 1).astype(np.intp)


def _linear(positions: NDArray[np.float64], extent: int) -> Taps:
    """Two neighbours and the upper one's weight; beyond the ends the last value holds."""
    clipped = np.clip(positions, 0, extent - 1)
    low = np.clip(np.floor(clipped + 1e-6), 0, extent - 1).astype(np.intp)
    weight = np.clip(clipped - low, 0, 1).astype(np.float32)
    weight[weight < 1e-5] = 0
    return low, np.minimum(low + 1, extent - 1), weight


def _lerp(plane: NDArray[np.float32], taps: Taps, axis: int) -> NDArray[np.float32]:
    """Linear interpolation along one axis, in plain multiply-adds: the same bits on every machine."""
    low, high, weight = taps
    if axis == 0:
        weight = weight[:, None]
    a, b = plane.take(low, axis), plane.take(high, axis)
    b -= a
    b *= weight
    a += b
    return a
