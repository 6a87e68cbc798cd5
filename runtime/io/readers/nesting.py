"""The contours of one region in one slice → its area.

Holes stay holes, what is there twice counts once, and overlaps are united. DICOM says of
CLOSED_PLANAR contours only that an inner one may be a hole (PS3.3, C.8.8.6.3), and nothing of two
that cross. Decision 17 says why they are united.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...core.errors import UnreadableVolume
from .crossings import TOLERANCE, Outline, Relation, relation
from .polygons import Contour, fill, window

MOST_OVERLAPS = 1 << 15  # pairs of contours of a plane whose extents overlap
THIN = 1.0  # pixels: a wall between two contours that is said to be thin
LINE_CORNERS = 1 << 20  # lines times corners that are looked at together
MOST_LINES = 64  # across a contour, on which it is looked for areas that it encloses twice


@dataclass(frozen=True)
class Area:
    """A region in one plane.

    Attributes:
        components: The contours that are united with each other. Pixels in an odd number of
            components belong to the region.
        repeated: How many contours were there before and were left out.
        united: How many contours were united with others.
        touching: How many contours overlap another one by up to `TOLERANCE` and were not united.
        overlaid: How many contours go around some area twice, which is left out.
        thin: How many contours lie in another one and leave less than `THIN` of it.
    """

    components: tuple[tuple[Contour, ...], ...]
    repeated: int = 0
    united: int = 0
    touching: int = 0
    thin: int = 0
    overlaid: int = 0

    def pixels(self, shape: tuple[int, int]) -> NDArray[np.bool_]:
        """The pixels of the region in an image of `shape`, rows and columns: bool (H, W)."""
        result = fill([c[0] for c in self.components if len(c) == 1], shape)
        for component in self.components:
            if len(component) == 1:
                continue
            union = np.zeros(shape, bool)
            for contour in component:
                if place := window(contour, shape):
                    rows, columns = place
                    size = (rows.stop - rows.start, columns.stop - columns.start)
                    union[place] |= fill([contour - [columns.start, rows.start]], size)
            result ^= union
        return result


def area(contours: Sequence[Contour], *, xor: bool = False) -> Area:
    """The area of a region whose contours may lie in each other, beside each other or across.

    Contours that cross are united, and so are those that cross one of these. What is united counts
    as one contour; one that lies in another is a hole, or an island in a hole. One that runs within
    `TOLERANCE` of another's outline all around is there already and is left out.

    Args:
        contours: Each (n, 2), in pixels.
        xor: Whether contours that cross are combined by exclusive or instead.

    Raises:
        UnreadableVolume: when so many contours overlap that comparing them would take minutes.
    """
    if len(contours) == 1:
        return Area(((contours[0],),), overlaid=int(encloses_twice(contours[0])))
    distinct = [*{_key(contour): contour for contour in contours}.values()]
    sizes = [_size(contour) for contour in distinct]
    # The larger first: of two the smaller one is compared with the larger one.
    order = sorted(range(len(distinct)), key=lambda n: -sizes[n])
    distinct, sizes = [distinct[n] for n in order], [sizes[n] for n in order]
    outlines = [Outline(contour) for contour in distinct]
    repeated: set[int] = set()
    touching: set[int] = set()
    thin: set[int] = set()
    crossing: list[tuple[int, int]] = []
    for larger, smaller in _overlapping(distinct):
        lies, by_tolerance = relation(outlines[smaller], outlines[larger])
        wall = (sizes[larger] - sizes[smaller]) / outlines[smaller].length
        if lies is Relation.TRACES:
            repeated.add(smaller)
        elif lies is Relation.TRACED:
            repeated.add(larger)
        elif lies is Relation.CROSSING:
            crossing.append((larger, smaller))
        elif by_tolerance:
            touching.add(smaller)
        elif lies is Relation.INSIDE and wall < THIN:
            thin.add(smaller)
    if xor:
        crossing = []
        touching = set()
    remaining = [n for n in range(len(distinct)) if n not in repeated]
    components = _united(remaining, crossing)
    return Area(
        tuple(tuple(distinct[n] for n in component) for component in components),
        len(contours) - len(remaining),
        len(remaining) - len(components),
        len(touching - repeated),
        len(thin - repeated),
        sum(encloses_twice(distinct[n]) for n in remaining),
    )


def once_around(contour: Contour) -> Contour:
    """The contour without a second way around over the same corners, which would undo the first."""
    half = len(contour) // 2
    # A contour may be closed by its first corner once more, after each way around or after the
    # last.
    for size in {half, half + 1} if half >= 3 else set():
        again = contour[size:]
        if len(again) >= 3 and np.abs(again - contour[: len(again)]).max() <= TOLERANCE:
            return contour[:size]
    return contour


def encloses_twice(contour: Contour) -> bool:
    """Whether a contour goes around some area twice, as seen on `MOST_LINES` lines across it.

    The even-odd rule leaves such an area out, and nothing says whether it was meant so.

    Args:
        contour: Its corners (n, 2), in pixels.
    """
    start, end = contour, np.concatenate([contour[1:], contour[:1]])
    top, bottom = contour[:, 1].min(), contour[:, 1].max()
    lines = max(4, min(MOST_LINES, int(bottom - top), LINE_CORNERS // len(contour)))
    rows = top + (bottom - top) * (np.arange(lines) + 0.5) / lines
    below = contour[:, 1] <= rows[:, None]
    crossed = below != np.concatenate([below[:, 1:], below[:, :1]], axis=1)
    line, edge = np.nonzero(crossed)
    if np.bincount(line).max(initial=0) <= 2:
        return False
    start, end = start[edge], end[edge]
    x = start[:, 0] + (rows[line] - start[:, 1]) * (end - start)[:, 0] / (end - start)[:, 1]
    order = np.lexsort((x, line))
    turns = np.cumsum(np.where(end[order, 1] > start[order, 1], 1, -1))  # 0 at the end of a line
    widths = np.diff(x[order], append=np.inf)
    return bool(((turns % 2 == 0) & (turns != 0) & (widths > TOLERANCE)).any())


def _overlapping(contours: Sequence[Contour]) -> Iterator[tuple[int, int]]:
    """Each two contours, by number, whose extents overlap; the lower number first."""
    lows = np.array([contour.min(axis=0) for contour in contours]).reshape(-1, 2)
    highs = np.array([contour.max(axis=0) for contour in contours]).reshape(-1, 2)
    pairs = 0
    for n in range(len(contours)):
        across, along = ((lows[n + 1 :] < highs[n]) & (highs[n + 1 :] > lows[n])).T
        others = np.flatnonzero(across & along) + n + 1
        pairs += len(others)
        if pairs > MOST_OVERLAPS:
            raise UnreadableVolume(
                f"a structure set has a slice in which contours overlap more than {MOST_OVERLAPS}"
                " times",
                expected="outlines of structures",
                remedy="export it again",
            )
        yield from ((n, other) for other in others.tolist())


def _united(contours: Sequence[int], crossing: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The contours, by number, in groups: those that cross are in one group."""
    group_of = {n: [n] for n in contours}
    for one, other in crossing:
        if one not in group_of or other not in group_of or group_of[one] is group_of[other]:
            continue
        larger, smaller = sorted((group_of[one], group_of[other]), key=len, reverse=True)
        larger += smaller
        group_of |= dict.fromkeys(smaller, larger)
    return [*{id(group): group for group in group_of.values()}.values()]


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
