"""Planar contours → the pixels inside them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def fill(contours: Sequence[NDArray[np.float64]], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels whose centre lies inside, by the even-odd rule over all `contours` together; bool `shape` (H, W).

    Each contour is (n, 2): column and row of its corners in pixels, pixel centres at whole numbers; the last corner joins the first.
    A hole may thus be a contour of its own, or be joined to the outer one by a keyhole, whose two sides cancel. A centre on a left
    or upper edge is inside, on a right or lower one outside, so that neighbours that share an edge neither overlap nor leave a gap.
    """
    height, width = shape
    toggles: list[NDArray[np.intp]] = []
    for contour in contours:
        ends = np.stack([contour, np.roll(contour, -1, axis=0)])
        ends = np.where(ends[0, :, 1] <= ends[1, :, 1], ends.transpose(2, 0, 1), ends[::-1].transpose(2, 0, 1))
        (x0, x1), (y0, y1) = ends  # downwards, so that an edge that two contours share is crossed at the same bits
        # rows r whose line y = r the edge crosses: low <= r < high
        first, last = (np.clip(np.ceil(y), 0, height).astype(np.intp) for y in (y0, y1))
        count = last - first
        edge = np.repeat(np.arange(len(contour)), count)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count - first, count)
        slope = (x1 - x0)[edge] / (y1 - y0)[edge]
        crossing = np.clip(np.ceil(x0[edge] + (row - y0[edge]) * slope), 0, width).astype(np.intp)
        toggles.append(row * (width + 1) + crossing)
    counts = np.bincount(np.concatenate(toggles), minlength=height * (width + 1)) if toggles else np.zeros(height * (width + 1), int)
    inside = np.cumsum(counts.reshape(height, width + 1)[:, :width], axis=1, dtype=np.uint8) & 1
    return inside.astype(bool)
