"""The contours of one region in one slice → its area: holes stay holes, what is there twice counts once, overlaps are united.

DICOM says of CLOSED_PLANAR contours only that an inner one may be a hole (PS3.3, C.8.8.6.3), and nothing of two that cross.
Decision 17 says why they are united.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from numpy.typing import NDArray

from .polygons import Contour, fill, window

SAME = 0.05  # pixels: contours that lie this close to each other all around are one that was written twice
CANDIDATES = 8  # of those of equal area and extent, how many a contour is compared with
CORNERS = 1 << 11  # corners that are compared at once


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
    united with it. A contour that leaves a ring by no more than its own border pixels, as rounding makes it, is inside.

    Args:
        contours: `distinct` ones, each (n, 2), in pixels.
        shape: Rows and columns of the image (H, W).

    Returns:
        Bool (H, W), and how many contours were united with others.
    """
    rings = _Rings(np.zeros(shape, np.int32))
    for contour in sorted(contours, key=_size, reverse=True):
        if (place := window(contour, shape)) is not None:
            shift = (place[1].start, place[0].start)
            size = (place[0].stop - place[0].start, place[1].stop - place[1].start)
            rings.add(place, fill([contour - shift], size))
    return rings.inside(), rings.united


@dataclass
class _Rings:
    """Nested rings as a tree. `innermost` (H, W): of each pixel the innermost ring, 0 outside of all; `parents`: of each ring."""

    innermost: NDArray[np.int32]
    parents: list[int] = field(default_factory=lambda: [0])
    united: int = 0

    def add(self, place: tuple[slice, slice], pixels: NDArray[np.bool_]) -> None:
        """Add a contour that holds `pixels` of the window at `place`."""
        view = self.innermost[place]
        ids = view[pixels]
        if not ids.size:
            return
        if ids.min() == ids.max():  # in one ring, or outside of all
            self._new(view, pixels, int(ids[0]))
            return
        base, crossed = self._branches(np.unique(ids).tolist())
        held: list[int] = []
        for ring in crossed:
            whole = self._within(ring)
            inner, overlap = whole[place], whole[place] & pixels
            if np.count_nonzero(overlap) == np.count_nonzero(whole):
                held.append(ring)  # the ring is inside the contour
                continue
            core = _core(pixels)
            if core.any() and not (core & ~inner).any() and (_core(whole)[place] & ~pixels).any():
                self.add(place, pixels & inner)  # inside but for border pixels
                return
        crossed = [ring for ring in crossed if ring not in held]
        if not crossed:
            ring = self._new(view, pixels & (view == base), base)
            for inner_ring in held:
                self.parents[inner_ring] = ring
            return
        self.united += 1
        first = crossed[0]
        for ring in crossed[1:]:
            self._merge(ring, first)
        view[pixels & (view == base)] = first
        for inner_ring in held:
            self.parents[inner_ring] = first

    def inside(self) -> NDArray[np.bool_]:
        """The pixels in an odd number of rings."""
        odd = np.zeros(len(self.parents), bool)
        for ring in range(1, len(self.parents)):
            odd[ring] = len(self._chain(ring)) % 2 == 0  # the chain ends with 0
        return odd[self.innermost]

    def _new(self, view: NDArray[np.int32], pixels: NDArray[np.bool_], parent: int) -> int:
        self.parents.append(parent)
        view[pixels] = len(self.parents) - 1
        return len(self.parents) - 1

    def _chain(self, ring: int) -> list[int]:
        """The ring and all around it, the outermost last, then 0."""
        chain = [ring]
        while chain[-1]:
            chain.append(self.parents[chain[-1]])
        return chain

    def _branches(self, ids: list[int]) -> tuple[int, list[int]]:
        """The innermost ring around all of `ids`, and the rings directly in it that hold some of them."""
        chains = [self._chain(ring)[::-1] for ring in ids]
        depth = 0
        while all(len(c) > depth + 1 for c in chains) and len({c[depth + 1] for c in chains}) == 1:
            depth += 1
        return chains[0][depth], sorted({c[depth + 1] for c in chains if len(c) > depth + 1})

    def _within(self, ring: int) -> NDArray[np.bool_]:
        """The pixels inside the outline of a ring (H, W), with those of the rings in it."""
        belongs = np.array([ring in self._chain(other) for other in range(len(self.parents))])
        result: NDArray[np.bool_] = belongs[self.innermost]
        return result

    def _merge(self, ring: int, into: int) -> None:
        self.innermost[self.innermost == ring] = into
        self.parents = [into if parent == ring else parent for parent in self.parents]


def _core(pixels: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels whose four neighbours are set as well."""
    padded = np.pad(pixels, 1)
    return padded[1:-1, 1:-1] & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


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
    start, edge = outline, np.roll(outline, -1, axis=0) - outline
    squared = np.maximum((edge**2).sum(axis=1), 1e-12)
    for block in np.array_split(corners, -(-len(corners) // 64)):
        offset = block[:, None] - start
        along = np.clip((offset * edge).sum(axis=2) / squared, 0, 1)
        distance = np.linalg.norm(offset - along[..., None] * edge, axis=2).min(axis=1)
        if distance.max() > SAME:
            return False
    return True
