"""Planar contours → the pixels inside them, in memory that depends on the image and not on the
contours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Contour = NDArray[np.float64]  # (n, 2): column and row of its corners in pixels

EDGES = 1 << 14  # edges that are looked at together
CROSSINGS = 1 << 18  # crossings of edges and rows that are held at once


def fill(contours: Sequence[Contour], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels whose centre lies inside, by the even-odd rule over all `contours` together.

    A hole may thus be a contour of its own, or be joined to the outer one by a keyhole, whose two
    sides cancel. A centre on a left or upper edge is inside, on a right or lower one outside, so
    that neighbours that share an edge neither overlap nor leave a gap.

    Args:
        contours: Each (n, 2), pixel centres at whole numbers; the last corner joins the first.
        shape: Rows and columns of the image (H, W).

    Returns:
        Bool (H, W).
    """
    inside = np.zeros(shape, bool)
    box = _box(contours, shape)
    if box is None:
        return inside
    top, bottom, left, right = box
    # One column more than the box has, for edges at or beyond its right side.
    columns = right - left + 1
    counts = np.zeros((bottom - top) * columns, np.uint8)
    for rows, crossings in _crossings(contours, (top, bottom), (left, right)):
        toggles = np.bincount((rows - top) * columns + (crossings - left), minlength=len(counts))
        counts += toggles.astype(np.uint8)  # the last bit says it all
    odd = np.cumsum(counts.reshape(-1, columns)[:, :-1], axis=1, dtype=np.uint8) & 1
    inside[top:bottom, left:right] = odd
    return inside


def window(contour: Contour, shape: tuple[int, int]) -> tuple[slice, slice] | None:
    """Rows and columns of the image that a contour can reach, None where it reaches none."""
    box = _box([contour], shape)
    return None if box is None else (slice(box[0], box[1]), slice(box[2], box[3]))


def contains(outline: Contour, points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the points (m, 2) lie inside an outline (n, 2), by the even-odd rule: bool (m,).

    It holds m x n numbers.
    """
    start, end = outline, np.roll(outline, -1, axis=0)
    x, y = points[:, :1], points[:, 1:]
    crossed = (start[:, 1] <= y) != (end[:, 1] <= y)
    rise = np.where(end[:, 1] == start[:, 1], 1, end[:, 1] - start[:, 1])
    beside = x < start[:, 0] + (y - start[:, 1]) * (end[:, 0] - start[:, 0]) / rise
    odd: NDArray[np.bool_] = np.count_nonzero(crossed & beside, axis=1) % 2 == 1
    return odd


def _box(contours: Sequence[Contour], shape: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """First row, row behind the last, and the same of columns, of the pixels that the contours
    can hold.
    """
    if not contours:
        return None
    lowest = np.min([c.min(axis=0) for c in contours], axis=0)
    highest = np.max([c.max(axis=0) for c in contours], axis=0)
    left, top = (int(x) for x in np.clip(np.ceil(lowest), 0, shape[::-1]))
    right, bottom = (int(x) for x in np.clip(np.ceil(highest), 0, shape[::-1]))
    return (top, bottom, left, right) if top < bottom and left < right else None


def _crossings(
    contours: Sequence[Contour], rows: tuple[int, int], columns: tuple[int, int]
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Where edges cross the lines through the centres of `rows`: the row, and the first column
    whose centre is not left of it.
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
            much = count[chosen]
            edge = np.repeat(chosen, much)
            row = np.arange(len(edge)) - np.repeat(np.cumsum(much) - much - first[chosen], much)
            slope = (x1 - x0)[edge] / (y1 - y0)[edge]
            yield (
                row,
                np.clip(np.ceil(x0[edge] + (row - y0[edge]) * slope), *columns).astype(np.intp),
            )


def _batches(contours: Sequence[Contour]) -> Iterator[NDArray[np.float64]]:
    """The edges of all contours as (2, n, 2): start and end, a bounded number at once."""
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
        done = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + CROSSINGS, side="right")))
        yield slice(start, stop)
        start = stop
