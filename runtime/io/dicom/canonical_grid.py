"""The grid of a mask as canonical axial slices, which DICOM needs.

On the canonical grid rows run from anterior to posterior, columns from the patient's right to the
left, and slices towards the head, each along the nearest array axis. That is also the convention of
the model's canvas (`runtime.core.resampling`). Transposing and reversing axes brings any of the 48
axis orders and flips into this right-handed form. Every voxel keeps its position in mm, and oblique
grids stay oblique.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import GeometryError
from ...core.resampling import axial_axes
from ...core.volume import CTSlab, Geometry

SHEAR_TOLERANCE_MM = 1e-3  # the largest error of the far corner on orthogonal axes


@dataclass(frozen=True)
class CanonicalGrid:
    """The canonical grid of a volume, and the way from its array to that grid.

    Attributes:
        geometry: the canonical grid.
        shape: (slices, rows, columns) of the canonical grid.
        order: the array axes of the volume, in the order of `shape`.
        flips: whether each axis of `shape` is reversed.
    """

    geometry: Geometry
    shape: tuple[int, int, int]
    order: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    @classmethod
    def of(cls, geometry: Geometry, shape: tuple[int, ...]) -> CanonicalGrid:
        """Derive the canonical grid of a volume.

        Args:
            geometry: the grid of the volume.
            shape: (D, H, W) of its array.

        Returns:
            The canonical grid.

        Raises:
            GeometryError: orthogonal slices cannot hold the grid, because it is sheared (within the
                tolerance of `Geometry`).
        """
        order = axial_axes(geometry)
        affine = np.eye(4)
        affine[:3, 3] = geometry.origin
        flips = []
        # array axis a is voxel index 2 - a, and so is canonical axis n
        for n, axis in enumerate(order):
            column = geometry.affine[:3, 2 - axis]
            flips.append(bool(column[2 - n] < 0))
            if flips[-1]:
                affine[:3, 3] += (shape[axis] - 1) * column
            affine[:3, 2 - n] = -column if flips[-1] else column
        _refuse_sheared(affine, [shape[axis] for axis in order])
        slices, rows, columns = (shape[axis] for axis in order)
        return cls(Geometry(affine), (slices, rows, columns), order, (flips[0], flips[1], flips[2]))

    def view(self, array: NDArray[Any]) -> NDArray[Any]:
        """View an array on the canonical grid without copying it.

        Args:
            array: an array (D, H, W) on the mask's grid, or a slab of it.

        Returns:
            A view (slices, rows, columns).
        """
        steps = tuple(slice(None, None, -1 if flip else None) for flip in self.flips)
        return array.transpose(self.order)[steps]

    def numbers(self, slab: CTSlab) -> range:
        """Return the numbers, from 0, of the canonical slices in the slab's `view`."""
        count = slab.hu.shape[self.order[0]]
        first = self.shape[0] - slab.start - count if self.flips[0] else slab.start
        return range(first, first + count)

    def position(self, k: int) -> list[float]:
        """Return the center of the first voxel of canonical slice k in mm (LPS)."""
        return [float(v) for v in self.geometry.affine[:3, 3] + k * self.geometry.affine[:3, 2]]

    @property
    def orientation(self) -> list[float]:
        """The direction cosines of rows and columns, Image Orientation (Patient)."""
        return [float(v) for v in self.geometry.direction[:, :2].T.ravel()]


def _refuse_sheared(affine: NDArray[np.float64], shape: list[int]) -> None:
    """Raise `GeometryError` where orthogonal axes would move the far corner too far."""
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
