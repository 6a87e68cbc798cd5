"""A mask's grid seen as the upright axial slices that a scanner would have made, as DICOM wants
them.

Rows run from anterior to posterior, columns from the patient's right to the left, slices towards
the head, each along the array axis nearest to it: the convention of the model's canvas
(`runtime.core.resampling`). Any of the 48 axis orders and flips becomes so by transposing and
reversing, right-handed, and every voxel stays at its place in mm. Oblique grids stay oblique.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import GeometryError
from ...core.resampling import axial_axes
from ...core.volume import CTSlab, Geometry

SHEAR_TOLERANCE_MM = 1e-3  # how far the far corner may lie from where orthogonal axes would put it


@dataclass(frozen=True)
class CanonicalGrid:
    """`geometry` and `shape` (slices, rows, columns) of the upright grid; `order` and `flips`:
    how an array becomes it.
    """

    geometry: Geometry
    shape: tuple[int, int, int]
    order: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    @classmethod
    def of(cls, geometry: Geometry, shape: tuple[int, ...]) -> CanonicalGrid:
        """Raises `GeometryError` for a grid so sheared (within `Geometry`'s tolerance) that
        orthogonal slices cannot hold it.
        """
        order = axial_axes(geometry)
        affine = np.eye(4)
        affine[:3, 3] = geometry.origin
        flips = []
        for n, axis in enumerate(
            order
        ):  # array axis a is voxel index 2 - a, upright axis n likewise
            column = geometry.affine[:3, 2 - axis]
            flips.append(bool(column[2 - n] < 0))
            if flips[-1]:
                affine[:3, 3] += (shape[axis] - 1) * column
            affine[:3, 2 - n] = -column if flips[-1] else column
        _refuse_sheared(affine, [shape[axis] for axis in order])
        slices, rows, columns = (shape[axis] for axis in order)
        return cls(Geometry(affine), (slices, rows, columns), order, (flips[0], flips[1], flips[2]))

    def view(self, array: NDArray[Any]) -> NDArray[Any]:
        """An array (D, H, W) on the mask's grid, or a slab of it, as upright (slices, rows,
        columns); nothing is copied.
        """
        return array.transpose(self.order)[
            tuple(slice(None, None, -1 if flip else None) for flip in self.flips)
        ]

    def numbers(self, slab: CTSlab) -> range:
        """Which upright slices, counted from 0, the slab's `view` holds."""
        count = slab.hu.shape[self.order[0]]
        first = self.shape[0] - slab.start - count if self.flips[0] else slab.start
        return range(first, first + count)

    def position(self, k: int) -> list[float]:
        """Centre of the first voxel of upright slice k in mm."""
        return [float(v) for v in self.geometry.affine[:3, 3] + k * self.geometry.affine[:3, 2]]

    @property
    def orientation(self) -> list[float]:
        """DICOM's Image Orientation (Patient): the directions in which columns, then rows are
        counted.
        """
        return [float(v) for v in self.geometry.direction[:, :2].T.ravel()]


def _refuse_sheared(affine: NDArray[np.float64], shape: list[int]) -> None:
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    along, down = affine[:3, 0] / lengths[0], affine[:3, 1] / lengths[1]
    square = down - (down @ along) * along
    square /= np.linalg.norm(square)
    axes = np.stack([along, square, np.cross(along, square)], 1) * lengths
    off = np.abs(axes - affine[:3, :3]) @ (np.array(shape[::-1]) - 1)
    if off.max() > SHEAR_TOLERANCE_MM:
        raise GeometryError(
            f"its grid is sheared: orthogonal slices would put the far corner {off.max():.3g}"
            " mm off",
            expected=f"at most {SHEAR_TOLERANCE_MM} mm for DICOM",
            remedy="write a volume format, or resample the mask first",
        )
