"""The contours of one region in one slice → its area: holes stay holes, what is there twice counts once, overlaps are united.

DICOM says of CLOSED_PLANAR contours only that an inner one may be a hole (PS3.3, C.8.8.6.3), and nothing of two that cross.
Decision 17 says why they are united.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from ..errors import UnreadableVolume
from .polygons import Contour, distance, fill, window
from .rings import Place, Rings

SAME = 0.05  # pixels: contours that lie this close to each other all around are one that was written twice
CANDIDATES = 8  # of those of equal area and extent, how many a contour is compared with
CORNERS = 1 << 11  # corners that are compared at once
MARGIN = 256  # pixels: how far a contour is followed beyond the image and all the others
MIN_CANVAS = 1 << 22  # pixels on which contours that leave the image may be compared, for any image
MIN_BEYOND = 1 << 24  # pixels outside of the image that contours may be looked at, each for itself


def distinct(contours: Sequence[Contour]) -> list[Contour]:
    """The contours without those that are there before, wherever they start and whichever way round they go.

    Args:
        contours: Each (n, 2), in pixels.

    Returns:
        Those that remain, in their order.
    """
    remaining: list[Contour] = []
    known: set[bytes] = set()
    alike: dict[tuple[int, ...], list[Contour]] = {}
    for contour in contours:
        key = _key(contour)
        if key in known:
            continue
        known.add(key)
        extent = np.concatenate([contour.min(axis=0), contour.max(axis=0)])
        reach = [{int(np.floor((x + d) / (4 * SAME))) for d in (-SAME, SAME)} for x in extent.tolist()]
        rivals = [other for cell in product(*reach) for other in alike.get(cell, ())[:CANDIDATES]]
        if any(_same(contour, other) for other in rivals):
            continue
        home = tuple(int(np.floor(x / (4 * SAME))) for x in extent.tolist())
        alike.setdefault(home, []).append(contour)
        remaining.append(contour)
    return remaining


def once_around(contour: Contour) -> Contour:
    """The contour without a second way around over the same corners, which would undo the first."""
    half = len(contour) // 2
    # A contour may be closed by its first corner once more, after each way around or after the last.
    for size in {half, half + 1} if half >= 3 else set():
        again = contour[size:]
        if len(again) >= 3 and np.abs(again - contour[: len(again)]).max() <= SAME:
            return contour[:size]
    return contour


def may_overlap(contours: Sequence[Contour]) -> bool:
    """Whether the extents of any two contours overlap."""
    if len(contours) < 2:
        return False
    extents = np.array([[*c.min(axis=0), *c.max(axis=0)] for c in contours])
    extents = extents[np.argsort(extents[:, 0])]
    for n, (_, top, right, bottom) in enumerate(extents[:-1]):
        behind = extents[n + 1 : n + 1 + int(np.searchsorted(extents[n + 1 :, 0], right, side="left"))]
        if ((behind[:, 1] < bottom) & (behind[:, 3] > top)).any():
            return True
    return False


def area(contours: Sequence[Contour], shape: tuple[int, int]) -> tuple[NDArray[np.bool_], int]:
    """The pixels of a region whose contours may lie in each other, beside each other or across each other.

    By the even-odd rule over rings: a contour inside another ring is a hole, or an island in a hole. A contour that crosses a ring is
    united with it. A contour that leaves a ring by at most a quarter of a pixel, as rounding makes it, is inside. Contours are
    compared where they lie, beyond the image too: its edge decides nothing.

    Args:
        contours: `distinct` ones, each (n, 2), in pixels.
        shape: Rows and columns of the image (H, W).

    Returns:
        Bool (H, W), and how many contours were united with others, of those that have to do with the image.

    Raises:
        UnreadableVolume: when contours overlap each other so far beyond the image that comparing them would take minutes.
    """
    result = np.zeros(shape, bool)
    united = 0
    for group in _groups(contours):
        if len(group) == 1:
            result |= fill(group, shape)
            continue
        low, high = _canvas(group, shape)
        columns, rows = (slice(max(0, lo), min(size, hi)) for lo, hi, size in zip(low, high, shape[::-1], strict=True))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            continue  # the whole group lies beside the image
        rings = _nested(group, low, (high[1] - low[1], high[0] - low[0]), shape)
        in_image = (slice(rows.start - low[1], rows.stop - low[1]), slice(columns.start - low[0], columns.stop - low[0]))
        result[rows, columns] |= rings.inside()[in_image]
        united += rings.united
    return result, united


def _nested(group: Sequence[Contour], low: tuple[int, int], size: tuple[int, int], shape: tuple[int, int]) -> Rings:
    """The rings of a group's contours on a canvas of `size` (H, W) whose first pixel is `low` (column, row) of the image."""
    placed = [(contour, place) for contour in group if (place := window(contour - low, size)) is not None]
    leaves = min(low) < 0 or low[1] + size[0] > shape[0] or low[0] + size[1] > shape[1]
    beyond = sum(_pixels(place) - _pixels(window(contour, shape)) for contour, place in placed) if leaves else 0
    image = shape[0] * shape[1]
    if size[0] * size[1] > max(MIN_CANVAS, 4 * image) or beyond > max(MIN_BEYOND, 16 * image):
        raise UnreadableVolume(
            "a structure set has contours that overlap each other far beyond its image",
            expected="outlines of structures",
            remedy="export it again, or give a grid that holds them with --like IMAGE",
        )
    rings = Rings(np.zeros(size, np.int32))
    for contour, place in sorted(placed, key=lambda pair: _size(pair[0]), reverse=True):
        rows, columns = place
        first = (low[0] + columns.start, low[1] + rows.start)
        rings.add(contour - low, place, fill([contour - first], (rows.stop - rows.start, columns.stop - columns.start)))
    return rings


def _groups(contours: Sequence[Contour]) -> list[list[Contour]]:
    """The contours in groups, in their order: the extents of those in different groups do not overlap."""
    extents = np.array([[*c.min(axis=0), *c.max(axis=0)] for c in contours])
    order = np.argsort(extents[:, 0])
    lefts, tops, rights, bottoms = extents[order].T
    ends = np.searchsorted(lefts, rights, side="left")
    labels = np.arange(len(contours))
    for n, end in enumerate(ends.tolist()):
        overlapping = (tops[n + 1 : end] < bottoms[n]) & (bottoms[n + 1 : end] > tops[n])
        others = labels[n + 1 : end][overlapping]
        if (others != labels[n]).any():
            labels[np.isin(labels, others)] = labels[n]
    groups: dict[int, list[Contour]] = {}
    for n in np.argsort(order).tolist():  # the place of each contour in `order`
        groups.setdefault(int(labels[n]), []).append(contours[order[n]])
    return [*groups.values()]


def _canvas(group: Sequence[Contour], shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where the contours of a group are compared: the first pixel, as (column, row) of the image, and the one behind the last."""
    lows = np.sort([c.min(axis=0) for c in group], axis=0)
    highs = np.sort([c.max(axis=0) for c in group], axis=0)
    # Beyond the image and all contours but one, that one is followed for a margin: the rest of it meets nothing.
    low = np.maximum(lows[0], np.minimum(lows[1] - MARGIN, 0))
    high = np.minimum(highs[-1], np.maximum(highs[-2] + MARGIN, shape[::-1]))
    left, top = np.floor(low).astype(int).tolist()
    right, bottom = np.ceil(high).astype(int).tolist()
    return (left, top), (right, bottom)


def _pixels(place: Place | None) -> int:
    """How many pixels a window has."""
    return 0 if place is None else (place[0].stop - place[0].start) * (place[1].stop - place[1].start)


def _key(contour: Contour) -> bytes:
    """The same bytes for the same corners, wherever they start and whichever way round they go."""
    if len(contour) > 1 and np.array_equal(contour[0], contour[-1]):
        contour = contour[:-1]
    first = int(np.lexsort((contour[:, 1], contour[:, 0]))[0])
    forward = np.roll(contour, -first, axis=0) + 0.0
    backward = np.roll(forward[::-1], 1, axis=0)
    return min(forward.tobytes(), backward.tobytes())


def _size(contour: Contour) -> float:
    """The area of a contour, in pixels."""
    x, y = (contour - contour[0]).T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def _same(one: Contour, other: Contour) -> bool:
    """Whether each corner of one lies on the other, within `SAME`, and the areas agree."""
    length = float(np.linalg.norm(one - np.roll(one, -1, axis=0), axis=1).sum())
    if abs(_size(one) - _size(other)) > SAME * length + SAME:
        return False
    return max(len(one), len(other)) <= CORNERS and _lies_on(one, other) and _lies_on(other, one)


def _lies_on(corners: Contour, outline: Contour) -> bool:
    """Whether each of the corners lies on the outline, within `SAME`."""
    blocks = np.array_split(corners, -(-len(corners) // 64))
    return all(distance(block, outline).max() <= SAME for block in blocks)
