"""Nested rings: which contours of a region lie in which, as pixels of a canvas that holds all of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .polygons import Contour, contains, distance

BORDER = 0.1  # pixels: a contour that leaves a ring by no more, as rounding and short edges make it, is inside
MOST_PAIRS = 1 << 24  # of corners and edges that are compared to tell whether a contour leaves a ring
Place = tuple[slice, slice]  # rows and columns of a canvas


@dataclass
class Rings:
    """Nested rings as a tree, ring 0 around all.

    Attributes:
        innermost: Int (H, W), of each pixel the innermost ring, 0 outside of all.
        parents: Of each ring the one around it.
        children: Of each ring those directly in it.
        places: Of each ring a window that holds it.
        outlines: Of each ring the contours that were united to it, in pixels of the canvas.
        united: How many contours were united with a ring.
    """

    innermost: NDArray[np.int32]
    parents: list[int] = field(default_factory=lambda: [0])
    children: list[set[int]] = field(default_factory=lambda: [set()])
    places: list[Place] = field(default_factory=lambda: [(slice(0, 0), slice(0, 0))])
    outlines: list[list[Contour]] = field(default_factory=lambda: [[]])
    united: int = 0

    def add(self, contour: Contour, place: Place, pixels: NDArray[np.bool_]) -> None:
        """Add a contour.

        Args:
            contour: Its corners (n, 2), in pixels of the canvas.
            place: A window of the canvas that holds the contour.
            pixels: Bool, of the window's shape: those inside the contour.
        """
        view = self.innermost[place]
        ids = view[pixels]
        if not ids.size:
            return
        if ids.min() == ids.max():  # in one ring, or outside of all
            self._new(contour, place, pixels, int(ids[0]))
            return
        base, touched = self._branches(np.unique(ids).tolist())
        core = _core(pixels)
        core_size = np.count_nonzero(core)
        held: list[int] = []
        crossed: list[int] = []
        for ring in touched:
            whole = self._within(ring)
            here, there = _shared(place, self.places[ring])
            overlap = pixels[here] & whole[there]
            if np.count_nonzero(overlap) == np.count_nonzero(whole):
                held.append(ring)  # the ring is inside the contour
                continue
            if core_size and np.count_nonzero(core[here] & whole[there]) == core_size:
                ring_core = _core(whole)
                larger = np.count_nonzero(ring_core[there] & pixels[here]) < np.count_nonzero(ring_core)
                if larger and not _leaves(contour, self.outlines[ring]):
                    inner = np.zeros_like(pixels)
                    inner[here] = overlap
                    self.add(contour, place, inner)  # inside but for border pixels
                    return
            crossed.append(ring)
        if crossed:
            self.united += 1
            target = crossed[0]
            for ring in crossed[1:]:
                self._merge(ring, target)
            view[pixels & (view == base)] = target
            self.places[target] = _hull(self.places[target], place)
            self.outlines[target].append(contour)
        else:
            target = self._new(contour, place, pixels & (view == base), base)
        for ring in held:
            self._move(ring, target)

    def inside(self) -> NDArray[np.bool_]:
        """The pixels of the canvas in an odd number of rings."""
        odd = np.zeros(len(self.parents), bool)
        level, depth = [0], 0
        while level:
            odd[level] = depth % 2 == 1
            level, depth = [child for ring in level for child in self.children[ring]], depth + 1
        return odd[self.innermost]

    def _new(self, contour: Contour, place: Place, pixels: NDArray[np.bool_], parent: int) -> int:
        ring = len(self.parents)
        self.parents.append(parent)
        self.children.append(set())
        self.children[parent].add(ring)
        self.places.append(place)
        self.outlines.append([contour])
        self.innermost[place][pixels] = ring
        return ring

    def _move(self, ring: int, parent: int) -> None:
        """Put a ring, with what is in it, directly into another."""
        self.children[self.parents[ring]].discard(ring)
        self.children[parent].add(ring)
        self.parents[ring] = parent

    def _merge(self, ring: int, into: int) -> None:
        view = self.innermost[self.places[ring]]
        view[view == ring] = into
        for child in [*self.children[ring]]:
            self._move(child, into)
        self.children[self.parents[ring]].discard(ring)
        self.places[into] = _hull(self.places[into], self.places[ring])
        self.outlines[into] += self.outlines[ring]

    def _branches(self, ids: list[int]) -> tuple[int, list[int]]:
        """The innermost ring around all of `ids`, and the rings directly in it that hold some of them."""
        chains = [self._chain(ring) for ring in ids]
        depth = 0
        while all(len(c) > depth + 1 for c in chains) and len({c[depth + 1] for c in chains}) == 1:
            depth += 1
        return chains[0][depth], sorted({c[depth + 1] for c in chains if len(c) > depth + 1})

    def _chain(self, ring: int) -> list[int]:
        """The ring and all around it, 0 first."""
        chain = [ring]
        while chain[-1]:
            chain.append(self.parents[chain[-1]])
        return chain[::-1]

    def _within(self, ring: int) -> NDArray[np.bool_]:
        """The pixels inside the outline of a ring, with those of the rings in it, of the ring's window."""
        family = [ring]
        for member in family:
            family.extend(self.children[member])
        belongs = np.zeros(len(self.parents), bool)
        belongs[family] = True
        result: NDArray[np.bool_] = belongs[self.innermost[self.places[ring]]]
        return result


def _leaves(contour: Contour, outlines: list[Contour]) -> bool:
    """Whether a corner lies outside of all outlines by more than `BORDER`, or there are too many to tell."""
    if len(contour) * sum(map(len, outlines)) > MOST_PAIRS:
        return True
    outside = contour
    for outline in outlines:
        blocks = np.array_split(outside, -(-len(outside) // 64))
        outside = np.concatenate([b[~contains(outline, b) & (distance(b, outline) > BORDER)] for b in blocks])
        if not len(outside):
            return False
    return True


def _core(pixels: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels whose four neighbours are set as well."""
    padded = np.pad(pixels, 1)
    across = padded[1:-1, :-2] & padded[1:-1, 2:]
    return padded[1:-1, 1:-1] & padded[:-2, 1:-1] & padded[2:, 1:-1] & across


def _shared(one: Place, other: Place) -> tuple[Place, Place]:
    """What two windows share, as a part of the one and as a part of the other."""
    common = [(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True)]
    here, there = (
        tuple(slice(lo - w.start, max(lo, hi) - w.start) for (lo, hi), w in zip(common, place, strict=True)) for place in (one, other)
    )
    return (here[0], here[1]), (there[0], there[1])


def _hull(one: Place, other: Place) -> Place:
    """The window around two windows."""
    rows, columns = (slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
    return rows, columns
