"""How two contours of a plane lie to each other, by their edges: no grid of pixels decides it."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from ...core.errors import UnreadableVolume
from .polygons import Contour, contains

TOLERANCE = (
    0.1  # pixels: an outline that runs this close to another touches it and does not cross it
)
ROUNDING = (
    0.01  # pixels: what rounding in a file moves a corner by, of which nothing needs to be said
)
BLOCK = 64  # edges that are looked at together
MOST_NEAR_EDGES = 1 << 24  # pairs of edges of two contours that lie near each other

_Numbers = NDArray[np.float64]
_NONE: _Numbers = np.zeros(0)


class Outline:
    """A contour as its edges, prepared to be compared with others.

    Attributes:
        contour: Its corners (n, 2), in pixels.
        corners: Where its edges that have a length start (m, 2).
        edges: Their vectors (m, 2).
        low: The least column and row of each edge (m, 2).
        high: The largest ones.
        length: Of the whole outline, in pixels; at least a millionth of one.
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
    """How a contour lies to another one."""

    APART = auto()  # beside the other one, or around it
    INSIDE = auto()
    TRACES = auto()  # it runs along the other one's outline all around
    TRACED = auto()  # the other one runs along its outline, which goes further
    CROSSING = auto()  # each outline runs both inside and outside of the other one


def relation(
    contour: Outline, other: Outline, tolerance: float = TOLERANCE
) -> tuple[Relation, bool]:
    """How a contour lies to another one.

    Args:
        contour: The one.
        other: The other.
        tolerance: Up to which distance, in pixels, an outline counts as lying on the other one.

    Returns:
        The relation; and whether it is not `CROSSING` by the tolerance alone, by more than
        `ROUNDING`.

    Raises:
        UnreadableVolume: when the two outlines run beside each other too often to be compared.
    """
    inside, outside, touches = _sides(contour, other, tolerance)
    if not inside and not outside:
        return Relation.TRACES, False
    within = Relation.APART if outside else Relation.INSIDE
    if not touches and not (inside and outside):
        return within, False
    other_inside, other_outside, _ = _sides(other, contour, tolerance)
    if not other_inside and not other_outside:
        return Relation.TRACED, False
    if inside and outside and other_inside and other_outside:
        return Relation.CROSSING, False
    if tolerance <= ROUNDING:
        return within, False
    return within, relation(contour, other, ROUNDING)[0] is Relation.CROSSING


def _sides(contour: Outline, other: Outline, tolerance: float) -> tuple[bool, bool, bool]:
    """Whether parts of an outline lie inside, outside and on the outline of another contour."""
    inside = outside = touches = False
    for corners, edges, starts, ends in _covered(contour, other, tolerance):
        touches |= bool(len(starts))
        within = contains(other.contour, _between(corners, edges, starts, ends))
        inside |= bool(within.any())
        outside |= not within.all()
        if inside and outside:
            break
    return inside, outside, touches


def _between(corners: Contour, edges: _Numbers, starts: _Numbers, ends: _Numbers) -> _Numbers:
    """A point in each gap between covered parts of a run of edges, which are numbered from 0."""
    if not len(starts):
        return corners[:1]
    order = np.argsort(starts)
    covered = np.maximum.accumulate(np.concatenate([[0.0], ends[order]]))
    following = np.concatenate([starts[order], [float(len(edges))]])
    middle = (covered + following)[following > covered + 1e-9] / 2
    edge = np.minimum(middle.astype(int), len(edges) - 1)
    return corners[edge] + (middle - edge)[:, None] * edges[edge]


def _covered(
    contour: Outline, other: Outline, tolerance: float
) -> Iterator[tuple[Contour, _Numbers, _Numbers, _Numbers]]:
    """Which parts of an outline lie on another one.

    Yields:
        Of each run of edges its corners, its edges as vectors, and where covered parts start and
        end: 2.5 is the middle of the edge that follows the third corner.
    """
    low, high = other.low - tolerance, other.high + tolerance
    most = MOST_NEAR_EDGES
    for start in range(0, len(contour.corners), BLOCK):
        run = slice(start, start + BLOCK)
        corners, edges = contour.corners[run], contour.edges[run]
        least, largest = contour.low[run], contour.high[run]
        reached = (low <= largest.max(axis=0)) & (high >= least.min(axis=0))
        near = np.flatnonzero(reached[:, 0] & reached[:, 1])
        overlap = (low[near] <= largest[:, None]) & (high[near] >= least[:, None])
        one, two = np.nonzero(overlap[..., 0] & overlap[..., 1])
        if not len(one):
            yield corners, edges, _NONE, _NONE
            continue
        most -= len(one)
        if most < 0:
            raise UnreadableVolume(
                "a structure set has contours that run beside each other too often for outlines",
                expected="outlines of structures",
                remedy="export it again",
            )
        two = near[two]
        first, last = _along(
            corners[one], edges[one], other.corners[two], other.edges[two], tolerance
        )
        met = first <= last
        yield corners, edges, one[met] + first[met], one[met] + last[met]


def _along(
    start: _Numbers, edge: _Numbers, corner: _Numbers, other: _Numbers, tolerance: float
) -> tuple[_Numbers, _Numbers]:
    """Which part of each edge lies within a tolerance of another edge.

    Args:
        start: Where each edge starts (k, 2).
        edge: Its vector (k, 2).
        corner: Where the other edge starts (k, 2).
        other: Its vector (k, 2).
        tolerance: In pixels.

    Returns:
        From where to where, as fractions of the edge (k,); the end lies before the start where no
        part does. It is one part, since the distance to an edge is convex along a line.
    """
    length = np.linalg.norm(other, axis=1)
    unit = other / length[:, None]
    offset = start - corner
    along = _line(_dot(offset, unit), _dot(edge, unit), np.zeros_like(length), length)
    across = _line(_cross(offset, unit), _cross(edge, unit), -tolerance, tolerance)
    beside = np.maximum(along[0], across[0]), np.minimum(along[1], across[1])
    parts = [beside, _disc(offset, edge, tolerance), _disc(offset - other, edge, tolerance)]
    first = np.min([np.where(a <= b, a, np.inf) for a, b in parts], axis=0)
    last = np.max([np.where(a <= b, b, -np.inf) for a, b in parts], axis=0)
    return np.maximum(first, 0), np.minimum(last, 1)


def _line(
    value: _Numbers, slope: _Numbers, low: _Numbers | float, high: _Numbers | float
) -> tuple[_Numbers, _Numbers]:
    """Where low <= value + t * slope <= high: from which t to which."""
    level = slope == 0
    divisor = np.where(level, 1, slope)
    one, two = (low - value) / divisor, (high - value) / divisor
    holds = (low <= value) & (value <= high)
    first = np.where(level, np.where(holds, -np.inf, np.inf), np.minimum(one, two))
    last = np.where(level, np.where(holds, np.inf, -np.inf), np.maximum(one, two))
    return first, last


def _disc(offset: _Numbers, edge: _Numbers, radius: float) -> tuple[_Numbers, _Numbers]:
    """Where offset + t * edge lies within a radius of 0: from which t to which."""
    squared = _dot(edge, edge)
    half = -_dot(offset, edge) / squared
    rest = radius**2 - _cross(offset, edge) ** 2 / squared
    reach = np.sqrt(np.maximum(rest, 0) / squared)
    return np.where(rest < 0, np.inf, half - reach), np.where(rest < 0, -np.inf, half + reach)


def _dot(one: _Numbers, other: _Numbers) -> _Numbers:
    return np.einsum("ij,ij->i", one, other)


def _cross(one: _Numbers, other: _Numbers) -> _Numbers:
    return one[:, 0] * other[:, 1] - one[:, 1] * other[:, 0]
