"""How two contours of a plane lie to each other, computed from their edges without a pixel grid."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from ...core.errors import UnreadableVolume
from .polygons import Contour, contains

# Pixels: an outline that runs this close to another one touches it and does not cross it.
TOLERANCE = 0.1
# Pixels that rounding in a file moves a corner by; the user need not hear of it.
ROUNDING = 0.01
# Edges that are compared together.
BLOCK = 64
# What the contours of one structure set may take to be compared, in units of some 10 ns.
MOST_WORK = 1 << 33
# Units for a run of edges, and for two edges that are near each other.
_RUN, _NEAR_EDGES = 25_000, 50

_Numbers = NDArray[np.float64]
_NONE: _Numbers = np.zeros(0)


class Work:
    """What comparing contours may still take, so that a small file does not take hours."""

    def __init__(self, most: int = MOST_WORK) -> None:
        """Begin with all of it.

        Args:
            most: Units of some 10 ns.
        """
        self._remaining = most

    def spend(self, units: int) -> None:
        """Take a part of it.

        Raises:
            UnreadableVolume: So much does not remain.
        """
        self._remaining -= units
        if self._remaining < 0:
            raise UnreadableVolume(
                "a structure set has contours that overlap or run along each other too often for"
                " outlines",
                expected="outlines of structures",
                remedy="export it again",
            )


class Outline:
    """The edges of a contour, prepared for comparisons.

    Attributes:
        contour: Its corners (n, 2), in pixels.
        corners: Start of each edge that has a length (m, 2).
        edges: Vector of each edge (m, 2).
        low: Lowest column and row of each edge (m, 2).
        high: Highest column and row of each edge (m, 2).
        length: Length of the outline in pixels; at least a millionth of one.
    """

    def __init__(self, contour: Contour) -> None:
        self.contour = contour
        ends = np.concatenate([contour[1:], contour[:1]])
        vectors = ends - contour
        long = vectors.any(axis=1)
        self.corners, self.edges = contour[long], vectors[long]
        self.low, self.high = np.minimum(contour, ends)[long], np.maximum(contour, ends)[long]
        self.length = max(float(np.hypot(*self.edges.T).sum()), 1e-6)


class Relation(Enum):
    """How a contour lies to a second one."""

    # Beside the second contour, or around it.
    APART = auto()
    INSIDE = auto()
    # Its whole outline runs along the outline of the second contour.
    TRACES = auto()
    # The whole second outline runs along its own, which is longer.
    TRACED = auto()
    # Each outline runs both inside and outside of the other one.
    CROSSING = auto()


def relation(
    contour: Outline, second: Outline, work: Work, tolerance: float = TOLERANCE
) -> tuple[Relation, bool]:
    """How a contour lies to a second one.

    Args:
        contour: The contour.
        second: The second contour.
        work: What it may take.
        tolerance: Distance in pixels within which an outline counts as lying on the other one.

    Returns:
        The relation; and whether it would be `CROSSING` with the tolerance `ROUNDING`.

    Raises:
        UnreadableVolume: It takes more than `work`.
    """
    inside, outside, touches = _sides(contour, second, work, tolerance)
    if not inside and not outside:
        return Relation.TRACES, False
    no_crossing = Relation.APART if outside else Relation.INSIDE
    if not touches and not (inside and outside):
        return no_crossing, False
    second_inside, second_outside, _ = _sides(second, contour, work, tolerance)
    if not second_inside and not second_outside:
        return Relation.TRACED, False
    if inside and outside and second_inside and second_outside:
        return Relation.CROSSING, False
    if tolerance <= ROUNDING:
        return no_crossing, False
    return no_crossing, relation(contour, second, work, ROUNDING)[0] is Relation.CROSSING


def _sides(
    contour: Outline, second: Outline, work: Work, tolerance: float
) -> tuple[bool, bool, bool]:
    """Whether parts of an outline lie inside, outside and on the outline of a second contour."""
    inside = outside = touches = False
    for corners, edges, starts, ends in _covered(contour, second, work, tolerance):
        touches |= bool(len(starts))
        points = _between(corners, edges, starts, ends)
        work.spend(len(points) * len(second.contour))
        is_inside = contains(second.contour, points)
        inside |= bool(is_inside.any())
        outside |= not is_inside.all()
        if inside and outside:
            break
    return inside, outside, touches


def _between(corners: Contour, edges: _Numbers, starts: _Numbers, ends: _Numbers) -> _Numbers:
    """A point in each gap between the covered parts of a run of edges, numbered from 0."""
    if not len(starts):
        return corners[:1]
    order = np.argsort(starts)
    covered = np.maximum.accumulate(np.concatenate([[0.0], ends[order]]))
    following = np.concatenate([starts[order], [float(len(edges))]])
    middle = (covered + following)[following > covered + 1e-9] / 2
    edge = np.minimum(middle.astype(int), len(edges) - 1)
    return corners[edge] + (middle - edge)[:, None] * edges[edge]


def _covered(
    contour: Outline, second: Outline, work: Work, tolerance: float
) -> Iterator[tuple[Contour, _Numbers, _Numbers, _Numbers]]:
    """The parts of an outline that lie on a second one.

    Yields:
        For each run of edges its corners, its edges as vectors, and the start and end of each
        covered part: 2.5 is the middle of the edge that starts at the third corner.
    """
    low, high = second.low - tolerance, second.high + tolerance
    for start in range(0, len(contour.corners), BLOCK):
        run = slice(start, start + BLOCK)
        corners, edges = contour.corners[run], contour.edges[run]
        least, largest = contour.low[run], contour.high[run]
        reached = (low <= largest.max(axis=0)) & (high >= least.min(axis=0))
        near = np.flatnonzero(reached[:, 0] & reached[:, 1])
        work.spend(_RUN + len(low) + len(corners) * len(near))
        overlap = (low[near] <= largest[:, None]) & (high[near] >= least[:, None])
        first_edge, second_edge = np.nonzero(overlap[..., 0] & overlap[..., 1])
        if not len(first_edge):
            yield corners, edges, _NONE, _NONE
            continue
        work.spend(_NEAR_EDGES * len(first_edge))
        second_edge = near[second_edge]
        first, last = _along(
            corners[first_edge],
            edges[first_edge],
            second.corners[second_edge],
            second.edges[second_edge],
            tolerance,
        )
        covered = first <= last
        yield (
            corners,
            edges,
            first_edge[covered] + first[covered],
            first_edge[covered] + last[covered],
        )


def _along(
    start: _Numbers, edge: _Numbers, corner: _Numbers, second_edge: _Numbers, tolerance: float
) -> tuple[_Numbers, _Numbers]:
    """The part of each edge that lies within a tolerance of a second edge.

    Args:
        start: Start of each edge (k, 2).
        edge: Its vector (k, 2).
        corner: Start of the second edge (k, 2).
        second_edge: Its vector (k, 2).
        tolerance: Distance in pixels.

    Returns:
        Start and end of the part, as fractions of the edge (k,). The end is before the start where
        no part is near. There is only one part, since the distance to an edge is convex along a
        line.
    """
    length = np.linalg.norm(second_edge, axis=1)
    unit = second_edge / length[:, None]
    offset = start - corner
    along = _line(_dot(offset, unit), _dot(edge, unit), np.zeros_like(length), length)
    across = _line(_cross(offset, unit), _cross(edge, unit), -tolerance, tolerance)
    near_line = np.maximum(along[0], across[0]), np.minimum(along[1], across[1])
    near_start = _disc(offset, edge, tolerance)
    near_end = _disc(offset - second_edge, edge, tolerance)
    parts = [near_line, near_start, near_end]
    first = np.min([np.where(a <= b, a, np.inf) for a, b in parts], axis=0)
    last = np.max([np.where(a <= b, b, -np.inf) for a, b in parts], axis=0)
    return np.maximum(first, 0), np.minimum(last, 1)


def _line(
    value: _Numbers, slope: _Numbers, low: _Numbers | float, high: _Numbers | float
) -> tuple[_Numbers, _Numbers]:
    """First and last t with low <= value + t * slope <= high."""
    level = slope == 0
    divisor = np.where(level, 1, slope)
    at_low, at_high = (low - value) / divisor, (high - value) / divisor
    holds = (low <= value) & (value <= high)
    first = np.where(level, np.where(holds, -np.inf, np.inf), np.minimum(at_low, at_high))
    last = np.where(level, np.where(holds, np.inf, -np.inf), np.maximum(at_low, at_high))
    return first, last


def _disc(offset: _Numbers, edge: _Numbers, radius: float) -> tuple[_Numbers, _Numbers]:
    """First and last t for which offset + t * edge lies within a radius of 0."""
    squared = _dot(edge, edge)
    half = -_dot(offset, edge) / squared
    rest = radius**2 - _cross(offset, edge) ** 2 / squared
    reach = np.sqrt(np.maximum(rest, 0) / squared)
    return np.where(rest < 0, np.inf, half - reach), np.where(rest < 0, -np.inf, half + reach)


def _dot(first: _Numbers, second: _Numbers) -> _Numbers:
    return np.einsum("ij,ij->i", first, second)


def _cross(first: _Numbers, second: _Numbers) -> _Numbers:
    return first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
