"""From the contours of one region in one slice to its area.

Holes stay holes, copies of a contour count once, and overlapping contours are united. DICOM states
of CLOSED_PLANAR contours only that an inner one may be a hole (PS3.3, C.8.8.6.3), and nothing of
two that cross. Decision 17 gives the reasons to unite them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...core.errors import UnreadableVolume
from .clear_relations import relations
from .crossings import TOLERANCE, Outline, Relation, Work
from .polygons import Contour, fill, window

# Pairs of contours of a plane whose extents overlap.
MOST_OVERLAPS = 1 << 15
# Pixels: the user is told of a thinner wall between two contours.
THIN = 1.0
# Lines times corners that are in memory together.
LINE_CORNERS = 1 << 20
# Lines across a contour on which areas that it encloses twice are searched.
MOST_LINES = 64


@dataclass(frozen=True)
class Area:
    """A region in one plane.

    Attributes:
        components: Groups of contours; the contours of a group are united. Pixels in an odd number
            of components belong to the region.
        repeated: Number of contours that were left out as copies of others.
        united: Number of contours that were united with others.
        touching: Number of contours that overlap another one by up to `TOLERANCE` and were not
            united.
        thin: Number of contours that lie in another one and leave a wall thinner than `THIN`.
        overlaid: Number of contours that go around some area twice, which is left out.
    """

    components: tuple[tuple[Contour, ...], ...]
    repeated: int = 0
    united: int = 0
    touching: int = 0
    thin: int = 0
    overlaid: int = 0

    def pixels(self, shape: tuple[int, int]) -> NDArray[np.bool_]:
        """The pixels of the region.

        Args:
            shape: Rows and columns of the image (H, W).

        Returns:
            Bool (H, W).
        """
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


def area(contours: Sequence[Contour], *, xor: bool = False, work: Work | None = None) -> Area:
    """The area of a region whose contours may be nested, separate or overlapping.

    Contours that cross are united, directly or through others, and count as one contour. A contour
    inside another one is a hole, or an island in a hole. A contour whose outline runs within
    `TOLERANCE` of another's outline is a copy and is left out.

    Args:
        contours: Each (n, 2), in pixels.
        xor: Whether contours that cross are combined by exclusive or instead.
        work: What comparing them may take; None for what a structure set may take.

    Raises:
        UnreadableVolume: So many contours overlap that their comparison takes more.
    """
    if len(contours) == 1:
        return Area(((contours[0],),), overlaid=int(encloses_twice(contours[0])))
    distinct = [*{_key(contour): contour for contour in contours}.values()]
    sizes = [_size(contour) for contour in distinct]
    # In descending order of size: of two contours the smaller is compared with the larger.
    order = sorted(range(len(distinct)), key=lambda n: -sizes[n])
    distinct, sizes = [distinct[n] for n in order], [sizes[n] for n in order]
    outlines = [Outline(contour) for contour in distinct]
    repeated: set[int] = set()
    touching: set[int] = set()
    thin: set[int] = set()
    crossing: list[tuple[int, int]] = []
    pairs = [*_overlapping(distinct)]
    for (larger, smaller), (lies, by_tolerance) in zip(
        pairs, relations(outlines, pairs, work or Work()), strict=True
    ):
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
    components = _groups_of_crossing(remaining, crossing)
    return Area(
        tuple(tuple(distinct[n] for n in component) for component in components),
        len(contours) - len(remaining),
        len(remaining) - len(components),
        len(touching - repeated),
        len(thin - repeated),
        sum(encloses_twice(distinct[n]) for n in remaining),
    )


def once_around(contour: Contour) -> Contour:
    """The contour without a second turn over the same corners, which would undo the first one.

    Args:
        contour: Its corners (n, 2), in pixels.
    """
    half = len(contour) // 2
    # A contour may be closed by its first corner once more, after each way around or after the
    # last.
    for size in {half, half + 1} if half >= 3 else set():
        again = contour[size:]
        if len(again) >= 3 and np.abs(again - contour[: len(again)]).max() <= TOLERANCE:
            return contour[:size]
    return contour


def encloses_twice(contour: Contour) -> bool:
    """Whether a contour goes around some area twice, as seen on up to `MOST_LINES` lines across it.

    The even-odd rule leaves such an area out; the file does not state whether it was meant so.

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
    """Pairs of contours, by number, whose extents overlap; the lower number comes first."""
    lows = np.array([contour.min(axis=0) for contour in contours]).reshape(-1, 2)
    highs = np.array([contour.max(axis=0) for contour in contours]).reshape(-1, 2)
    # Along the columns a contour overlaps only those that begin at most one width before it.
    by_column = np.argsort(lows[:, 0], kind="stable")
    begins = lows[by_column, 0]
    widest = (highs[:, 0] - lows[:, 0]).max(initial=0)
    first = np.searchsorted(begins, lows[:, 0] - widest, side="left")
    last = np.searchsorted(begins, highs[:, 0], side="left")
    pairs = 0
    for n in range(len(contours)):
        near = by_column[first[n] : last[n]]
        near = near[near > n]
        overlap = (lows[near] < highs[n]) & (highs[near] > lows[n])
        overlapping = np.sort(near[overlap[:, 0] & overlap[:, 1]])
        pairs += len(overlapping)
        if pairs > MOST_OVERLAPS:
            raise UnreadableVolume(
                f"a structure set has a slice in which contours overlap more than {MOST_OVERLAPS}"
                " times",
                expected="outlines of structures",
                remedy="export it again",
            )
        yield from ((n, smaller) for smaller in overlapping.tolist())


def _groups_of_crossing(
    contours: Sequence[int], crossing: Sequence[tuple[int, int]]
) -> list[list[int]]:
    """The contours, by number, in groups: contours that cross are in one group."""
    group_of = {n: [n] for n in contours}
    for first, second in crossing:
        if first not in group_of or second not in group_of or group_of[first] is group_of[second]:
            continue
        # The smaller group joins the larger one: each contour moves only a few times.
        larger, smaller = sorted((group_of[first], group_of[second]), key=len, reverse=True)
        larger += smaller
        group_of |= dict.fromkeys(smaller, larger)
    return [*{id(group): group for group in group_of.values()}.values()]


def _key(contour: Contour) -> bytes:
    """Bytes that are equal for contours with the same corners, in any order around the contour."""
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
