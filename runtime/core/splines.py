"""Cubic B-splines on a lattice, evaluated one slice at a time.

Products instead of powers, and sums in a fixed order: the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class SplineAxis:
    """The 4 lattice points that weigh on each place along one axis, and their weights.

    Args:
        places: Places in lattice cells, (n,); those outside the lattice count as its border.
        count: Lattice points along the axis, at least 4.

    Attributes:
        cells: The first of the 4 points, (n,).
        weights: float64 (4, n).
    """

    def __init__(self, places: NDArray[np.float64], count: int):
        self.cells = np.clip(np.floor(places).astype(np.intp), 0, count - 4)
        t = np.clip(places - self.cells, 0, 1)
        r, t2, t3 = 1 - t, t * t, t * t * t
        weights = [r * r * r, 3 * t3 - 6 * t2 + 4, -3 * t3 + 3 * t2 + 3 * t + 1, t3]
        self.weights = np.stack(weights) / 6

    def matrix(self, count: int) -> NDArray[np.float32]:
        """The weights of all `count` lattice points, float32 (n, count)."""
        out = np.zeros((len(self.cells), count), np.float32)
        rows = np.arange(len(self.cells))
        for n in range(4):
            out[rows, self.cells + n] = self.weights[n]
        return out

    def along(self, lattice: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
        """A lattice (y, x) at all places of one of its axes."""
        weights = self.weights.astype(np.float32)
        weights = weights[:, :, None] if axis == 0 else weights
        out = lattice.take(self.cells, axis)
        out *= weights[0]
        for n in range(1, 4):
            term = lattice.take(self.cells + n, axis)
            term *= weights[n]
            out += term
        return out


def spline_plane(
    lattice: NDArray[np.float32], axes: Sequence[SplineAxis], k: int
) -> NDArray[np.float32]:
    """Evaluate a lattice (z, y, x) on slice k, at all places along y and x.

    Args:
        lattice: float32 (z, y, x).
        axes: The places along z, y and x.
        k: Index of the place along z.

    Returns:
        float32 (H, W).
    """
    z = axes[0]
    weights = z.weights[:, k].astype(np.float32)
    terms = [lattice[z.cells[k] + n] * weights[n] for n in range(4)]
    plane = terms[0] + terms[1] + terms[2] + terms[3]
    return axes[2].along(axes[1].along(plane, 0), 1)
