"""Fine branches inside a class, such as the vessels of a lung: how many, how thick."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from runtime.core.layout_model import SPLINE_SLOPE, Tubes

from .registration import ClassMap

REACH_MM = 9.0  # gaps of the host up to twice as wide are branches
LEAST_SHARE = 1e-3  # of the host: less is not drawn
# The area of voxel faces over that of a surface, the mean over its directions.
FACES = 1.5
# Lattice points of the random fields, in mm.
FINEST_MM, COARSEST_MM = 4.0, 40.0


def fine_branches(one: ClassMap, host: int | None, labels: int) -> NDArray[np.uint8]:
    """Find what is thin and lies inside a class, in each slice.

    Args:
        one: The map.
        host: The class; None for none.
        labels: The number of rows of the label table: expert labels are no branches.

    Returns:
        uint8 (D, H, W): the class of each voxel of a branch, 0 elsewhere.
    """
    if host is None:
        return np.zeros(one.classes.shape, np.uint8)
    inside = one.classes == host
    is_branch = closing(inside, one) & ~inside & (one.classes >= labels)
    return np.where(is_branch, one.classes, np.uint8(0))


def closing(inside: NDArray[np.bool_], one: ClassMap) -> NDArray[np.bool_]:
    """Close gaps in each slice, up to twice `REACH_MM`.

    Args:
        inside: bool (D, H, W).
        one: The map that it belongs to.
    """
    steps = max(1, round(REACH_MM / float(one.step[1:].mean())))
    cross = ndimage.generate_binary_structure(2, 1)[None]
    padded = np.pad(inside, ((0, 0), (steps, steps), (steps, steps)))
    closed = ndimage.binary_closing(padded, cross, iterations=steps)
    return np.asarray(closed[:, steps:-steps, steps:-steps])


def fit_tubes(
    maps: Sequence[ClassMap],
    branches: Sequence[NDArray[np.uint8]],
    drawn: Sequence[ClassMap],
    host: int,
    labels: int,
) -> Tubes | None:
    """Fit random tubes to the branches of a cohort.

    Args:
        maps: The training patients' maps, with the host in the place of their branches.
        branches: What `fine_branches` found in each.
        drawn: Layouts without tubes: what is thin in them needs no tube.
        host: The class that the tubes run in.
        labels: The number of rows of the label table.

    Returns:
        The tubes; None where the cohort has too few branches.
    """
    shares = _shares(maps, branches, host)
    shares -= _shares(drawn, [fine_branches(one, host, labels) for one in drawn], host)
    shares = np.maximum(shares, 0)
    classes = [int(n) for n in np.flatnonzero(shares)]
    total = float(shares.sum())
    if total < LEAST_SHARE or total > 0.5:
        return None
    # The innermost class has the highest index: it is the brightest, and its edge a mean.
    inner = np.cumsum(shares[classes][::-1])[::-1]
    # The sum of two squared normal numbers lies below x with the probability 1 - exp(-x / 2).
    limits = np.sqrt(-2 * np.log1p(-inner))
    radius = _radius(branches, maps[0].step)
    spacing = SPLINE_SLOPE * radius / float(limits[0])
    return Tubes(
        host,
        tuple(classes),
        tuple(float(limit) for limit in limits),
        float(np.clip(spacing, FINEST_MM, COARSEST_MM)),
    )


def _shares(
    maps: Sequence[ClassMap], branches: Sequence[NDArray[np.uint8]], host: int
) -> NDArray[np.float64]:
    """The share of each class (256,) in the branches of the host, of host and branches."""
    counts = np.zeros(256)
    for one, fine in zip(maps, branches, strict=True):
        counts += np.bincount(fine.ravel(), minlength=256)
        counts[0] += ((one.classes == host) & (fine == 0)).sum() - (fine == 0).sum()
    total = max(1.0, counts.sum())
    counts[0] = 0
    return np.asarray(counts / total)


def _radius(branches: Sequence[NDArray[np.uint8]], step: NDArray[np.float64]) -> float:
    """The mean radius of the branches in mm: twice a tube's volume over its surface."""
    volume = surface = 0.0
    for fine in branches:
        inside = fine > 0
        volume += float(inside.sum()) * float(step.prod())
        for axis in range(3):
            faces = np.diff(inside, axis=axis).sum()
            surface += float(faces) * float(step.prod() / step[axis])
    return 2 * volume / max(surface / FACES, 1e-6)
