"""From planar contours to the pixels inside them.

The memory depends on the size of the image, not on the contours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

# (n, 2): column and row of its corners in pixels.
Contour = NDArray[np.float64]

# Edges that are in memory together.
EDGES = 1 << 14
# Crossings of edges and rows that are in memory together.
CROSSINGS = 1 << 18


def fill(contours: Sequence[Contour], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels whose centre lies inside, by the even-odd rule over all `contours` together.

    A hole may be a contour of its own, or be joined to the outer contour by a keyhole, whose two
    sides cancel. A centre on a left or upper edge is inside, on a right or lower edge outside, so
    that neighbours with a common edge neither overlap nor leave a gap.

    Args:
        contours: Each (n, 2), pixel centres at integers; the last corner joins the first.
        shape: Rows and columns of the image (H, W).

    Returns:
        Bool (H, W).
    """
    inside = np.zeros(shape, bool)
    box = _box(contours, shape)
    if box is None:
        return inside
    top, bottom, first, stop = box
    # One column more than the box has, for edges at or beyond its right side.
    columns = stop - first + 1
    counts = np.zeros((bottom - top) * columns, np.uint8)
    for rows, crossings in _crossings(contours, (top, bottom), (first, stop)):
        toggles = np.bincount((rows - top) * columns + (crossings - first), minlength=len(counts))
        # Only the last bit counts, so an overflow does no harm.
        counts += toggles.astype(np.uint8)
    odd = np.cumsum(counts.reshape(-1, columns)[:, :-1], axis=1, dtype=np.uint8) & 1
    inside[top:bottom, first:stop] = odd
    return inside


def window(contour: Contour, shape: tuple[int, int]) -> tuple[slice, slice] | None:
    """Rows and columns of the image that a contour can reach; None if it reaches no pixel.

    Args:
        contour: Its corners (n, 2), in pixels.
        shape: Rows and columns of the image (H, W).
    """
    box = _box([contour], shape)
    return None if box is None else (slice(box[0], box[1]), slice(box[2], box[3]))


def contains(outline: Contour, points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points lie inside an outline, by the even-odd rule.

    It needs memory for m x n numbers.

    Args:
        outline: Its corners (n, 2).
        points: (m, 2), in the same pixels.

    Returns:
        Bool (m,).
    """
    start, end = outline, np.roll(outline, -1, axis=0)
    x, y = points[:, :1], points[:, 1:]
    crossed = (start[:, 1] <= y) != (end[:, 1] <= y)
    rise = np.where(end[:, 1] == start[:, 1], 1, end[:, 1] - start[:, 1])
    left_of_edge = x < start[:, 0] + (y - start[:, 1]) * (end[:, 0] - start[:, 0]) / rise
    odd: NDArray[np.bool_] = np.count_nonzero(crossed & left_of_edge, axis=1) % 2 == 1
    return odd


def _box(contours: Sequence[Contour], shape: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """First row, row after the last, first column and column after the last that contours reach."""
    if not contours:
        return None
    lowest = np.min([c.min(axis=0) for c in contours], axis=0)
    highest = np.max([c.max(axis=0) for c in contours], axis=0)
    first, top = (int(x) for x in np.clip(np.ceil(lowest), 0, shape[::-1]))
    stop, bottom = (int(x) for x in np.clip(np.ceil(highest), 0, shape[::-1]))
    return (top, bottom, first, stop) if top < bottom and first < stop else None


def _crossings(
    contours: Sequence[Contour], rows: tuple[int, int], columns: tuple[int, int]
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Where edges cross the lines through the centres of `rows`.

    Yields:
        The row of each crossing, and the first column whose centre is not left of it.
    """
    for edges in _batches(contours):
        # Downwards, so that an edge that two contours share is crossed at the same bits.
        upper, lower = np.where(
            edges[0, :, 1] <= edges[1, :, 1],
            edges.transpose(2, 0, 1),
            edges[::-1].transpose(2, 0, 1),
        ).transpose(1, 2, 0)
        x0, y0, x1, y1 = upper[:, 0], upper[:, 1], lower[:, 0], lower[:, 1]
        # Rows r whose line y = r the edge crosses: first <= r < last.
        first, last = (np.clip(np.ceil(y), *rows).astype(np.intp) for y in (y0, y1))
        count = last - first
        crossed = np.flatnonzero(count)
        for part in _parts(count[crossed]):
            chosen = crossed[part]
            rows_crossed = count[chosen]
            edge = np.repeat(chosen, rows_crossed)
            start_of_edge = np.cumsum(rows_crossed) - rows_crossed
            row = np.arange(len(edge)) - np.repeat(start_of_edge - first[chosen], rows_crossed)
            slope = (x1 - x0)[edge] / (y1 - y0)[edge]
            column = np.ceil(x0[edge] + (row - y0[edge]) * slope)
            yield row, np.clip(column, *columns).astype(np.intp)


def _batches(contours: Sequence[Contour]) -> Iterator[NDArray[np.float64]]:
    """The edges of all contours as (2, n, 2), start and end, in batches of about `EDGES`."""
    waiting: list[NDArray[np.float64]] = []
    size = 0
    for contour in contours:
        closed = np.concatenate([contour, contour[:1]])
        for start in range(0, len(contour), EDGES):
            piece = closed[start : start + EDGES + 1]
            waiting.append(np.stack([piece[:-1], piece[1:]]))
            size += len(piece) - 1
            if size >= EDGES:
                yield np.concatenate(waiting, axis=1)
                waiting, size = [], 0
    if waiting:
        yield np.concatenate(waiting, axis=1)


def _parts(count: NDArray[np.intp]) -> Iterator[slice]:
    """Runs of edges whose rows together are at most `CROSSINGS`, or one edge alone."""
    ends = np.cumsum(count)
    start = 0
    while start < len(count):
        crossings_before = int(ends[start - 1]) if start else 0
        limit = crossings_before + CROSSINGS
        stop = max(start + 1, int(np.searchsorted(ends, limit, side="right")))
        yield slice(start, stop)
        start = stop
