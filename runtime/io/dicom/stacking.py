"""Derive a grid from the positions of planes (PS3.3 C.7.6.2.1.1).

A SEG, a series of labels or of a CT, and the series that contours were drawn on all state one
position per plane. A message names the source by its pseudonym.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import GeometryError
from ...core.volume import Geometry

SLICE_TOLERANCE = 0.01  # the distance of a slice from its even place, in slice spacings
# Up to the larger of these, in mm and in slice spacings, a stack is read with a note …
UNEVEN_MM, UNEVEN = 0.1, 0.05
# … but not beyond this, in slice spacings: a missing slice moves others by half a spacing.
UNEVEN_AT_MOST = 0.25
SHEAR_TOLERANCE = 1e-3  # the sideways drift of the slices, per mm of stack
ORIENTATION_TOLERANCE = 1e-4  # the difference of direction cosines within a series
MAX_SLICES = 4096


def finite_numbers(value: Any, count: int, name: str, what: str) -> NDArray[np.float64]:
    """Read the numbers of a geometric attribute.

    Args:
        value: the value of the attribute.
        count: how many numbers it must have.
        name: the pseudonym of the source, for the message.
        what: the name of the attribute, for the message.

    Returns:
        float64 (count,), all finite.

    Raises:
        GeometryError: the attribute is missing or wrong.
    """
    try:
        array = np.array([float(x) for x in value], float)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.shape != (count,) or not np.isfinite(array).all():
        raise GeometryError(
            f"{name} states no usable {what}",
            expected=f"{count} numbers; geometry is never guessed",
            remedy="export it with its geometry",
            file=Path(name),
        )
    return array


def stack(
    positions: NDArray[np.float64],
    orientation: NDArray[np.float64],
    pixel_spacing: NDArray[np.float64],
    name: str,
    *,
    step: float | None = None,
    thickness: float | None = None,
    gaps: bool = False,
    notes: list[str] | None = None,
) -> tuple[Geometry, NDArray[np.intp], int]:
    """Derive the grid of a stack of parallel planes (PS3.3 C.7.6.2.1.1).

    Slices count along the normal, so that the grid is right-handed whatever the order of the files.

    Args:
        positions: (N, 3), ImagePositionPatient of each plane in mm.
        orientation: (6,), the direction cosines of ImageOrientationPatient.
        pixel_spacing: (2,), the distance of rows and of columns in mm.
        name: the pseudonym of the source, for messages.
        step: the distance of slices as the file states it, in mm.
        thickness: the distance of slices where there is one slice and no `step`, in mm; 1 mm where
            it is missing too.
        gaps: whether planes may be missing and several may share a place, as in a SEG.
        notes: a list that receives notes for the user.

    Returns:
        The grid, the slice number of each plane (N,), and the number of slices.

    Raises:
        GeometryError: the stack is sheared (tilted) or uneven, or slices are missing or duplicate.
    """

    def wrong(fact: str, remedy: str) -> GeometryError:
        return GeometryError(
            f"{name} {fact}",
            expected="parallel slices at even distances, straight above each other",
            remedy=remedy,
            file=Path(name),
        )

    row, column = orientation[:3], orientation[3:]
    if (
        abs(np.linalg.norm(row) - 1) > 1e-3
        or abs(np.linalg.norm(column) - 1) > 1e-3
        or abs(row @ column) > 1e-3
    ):
        raise wrong(
            f"states the orientation {orientation.tolist()}, which is not orthonormal",
            "export it with its geometry",
        )
    if (pixel_spacing <= 0).any() or any(
        s is not None and not 0 < s < 1e4 for s in (step, thickness)
    ):
        raise wrong(
            f"states the spacing {[*pixel_spacing.tolist(), step]}", "export it with its geometry"
        )
    row, column = row / np.linalg.norm(row), column / np.linalg.norm(column)
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    height = positions @ normal
    order = np.argsort(height, kind="stable")
    lowest = positions[order[0]]
    drift = np.linalg.norm(
        (positions - lowest) - np.outer(height - height[order[0]], normal), axis=1
    )
    if (drift > 1e-2 + SHEAR_TOLERANCE * np.abs(height - height[order[0]])).any():
        raise wrong(
            f"is sheared: its slices drift {drift.max():.2f} mm sideways (gantry tilt, or planes of"
            " several stacks)",
            "resample it to an orthogonal grid first",
        )
    k, spacing, uneven = _places(height[order] - height[order[0]], step, gaps, wrong)
    if uneven and notes is not None:
        notes.append(
            f"{name} is uneven: slices lie up to {uneven:.2g} mm off even distances; their mean of"
            f" {spacing:.4g} mm is used"
        )
    slices = np.empty(len(positions), np.intp)
    slices[order] = k
    if not k[-1]:
        spacing = step or thickness or 1.0
    affine = np.eye(4)
    affine[:3, 0] = row * pixel_spacing[1]
    affine[:3, 1] = column * pixel_spacing[0]
    affine[:3, 2] = normal * spacing
    affine[:3, 3] = lowest
    return Geometry(affine), slices, int(k[-1]) + 1


def _places(
    height: NDArray[np.float64],
    step: float | None,
    gaps: bool,
    wrong: Callable[[str, str], GeometryError],
) -> tuple[NDArray[np.intp], float, float]:
    """Assign slices to the ascending heights of planes (mm, from 0).

    Returns:
        The slice of each height, the distance of slices in mm, and the largest error of a height in
        mm, 0 where it is within the tolerance.
    """
    apart = np.diff(height)
    if gaps and apart.size:
        apart = apart[apart > SLICE_TOLERANCE * (step or np.median(apart))]
    if not apart.size:
        return np.zeros(len(height), np.intp), 1.0, 0.0
    # positions decide; the stated distance is needed where no two slices are neighbors
    if gaps:
        ratio = apart.min() / step if step else 0.0
        stated = round(ratio) >= 1 and abs(ratio - round(ratio)) <= SLICE_TOLERANCE * round(ratio)
        unit = step if step and stated else float(apart.min())
        k = np.rint(height / unit)
        places = np.unique(k)
        if len(places) > 2 and (common := np.gcd.reduce(places[: 1 << 16].astype(int))) > 1:
            raise wrong(
                f"states slices {step:g} mm apart, but none of its {len(places)} lie closer than"
                f" {common * unit:g} mm",
                "correct SpacingBetweenSlices, or give every slice",
            )
    else:
        if (apart < SLICE_TOLERANCE * np.median(apart)).any() or not np.median(apart):
            raise wrong("has duplicate slices: two lie in one place", "take the duplicates out")
        k = np.arange(len(height), dtype=float)
    # the full stack gives the distance more exactly than two neighbors
    spacing, off = _off_even(height, k)
    # for uneven slices the smallest distance is a poor unit: try one slice per distinct height
    if gaps and off > SLICE_TOLERANCE * spacing + 1e-3:
        steps = np.r_[0, np.diff(height) > SLICE_TOLERANCE * (step or np.median(apart))]
        consecutive = np.cumsum(steps).astype(float)
        mean, error = _off_even(height, consecutive)
        if error <= _uneven(mean) and (step is None or abs(mean - step) <= _uneven(step)):
            k, spacing, off = consecutive, mean, error
    if k[-1] >= MAX_SLICES:
        raise wrong(
            f"spans {k[-1] + 1:.0f} slices", f"at most {MAX_SLICES} are read; check its positions"
        )
    if off > max(SLICE_TOLERANCE * spacing + 1e-3, _uneven(spacing)):
        distances = np.unique(np.round(apart, 3))
        listed = ", ".join(f"{d:g}" for d in distances[:6])
        multiples = distances / distances[0]
        if not gaps and np.allclose(multiples, np.rint(multiples), atol=SLICE_TOLERANCE):
            raise wrong(
                f"has slices {listed} mm apart (some are missing)",
                "give the whole series, at even distances",
            )
        raise wrong(
            f"is uneven: it has slices {listed} mm apart",
            "resample it to even distances, or export it so",
        )
    return k.astype(np.intp), spacing, off if off > SLICE_TOLERANCE * spacing + 1e-3 else 0.0


def _off_even(height: NDArray[np.float64], k: NDArray[np.float64]) -> tuple[float, float]:
    """The mean distance of slices `k` and the largest error of a height, both in mm."""
    spacing = float(height[-1] / k[-1])
    return spacing, float(np.abs(height - k * spacing).max())


def _uneven(spacing: float) -> float:
    """The largest error of a slice that is read with a note, in mm."""
    return min(max(UNEVEN_MM, UNEVEN * spacing), UNEVEN_AT_MOST * spacing)
