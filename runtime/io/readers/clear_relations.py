"""Relations of many pairs of small contours at once, where no outline runs near the other's.

`relation` decides a pair in some 0.4 ms, most of it for the calls of its small arrays. A structure
set may have thousands of pairs, and nearly all of them are clear.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .crossings import BLOCK, TOLERANCE, Outline, Relation, Work, relation

# Edges that a small contour has: its edges are one run for `relation`.
SMALL = BLOCK
# Contours are compared with others of as many edges, rounded up to this.
STEP = 8
# Pairs of edges that are in memory together.
EDGE_PAIRS = 1 << 18
# Pixels by which a corner must be further away than the tolerance.
ROUNDING_ERROR = 1e-6

# Units of `Work` for one pair.
_ONE_PAIR = 4000

_Numbers = NDArray[np.float64]


class _Edges:
    """The edges of several contours, all of one number: short contours repeat their first edge.

    Attributes:
        x: Columns of the corners (k, n).
        y: Rows of the corners (k, n).
        across: Columns from a corner to the next one (k, n).
        down: Rows from a corner to the next one (k, n).
        is_own: Whether the edge is not a repetition (k, n).
    """

    def __init__(self, outlines: Sequence[Outline], size: int) -> None:
        counts = np.array([len(outline.corners) for outline in outlines])
        places = np.arange(size)
        self.is_own = places < counts[:, None]
        starts = np.cumsum(counts) - counts
        chosen = starts[:, None] + np.where(self.is_own, places, 0)
        self.x, self.y = np.concatenate([outline.corners for outline in outlines]).T[:, chosen]
        vectors = np.concatenate([outline.edges for outline in outlines])
        self.across, self.down = vectors.T[:, chosen]


def relations(
    outlines: Sequence[Outline], pairs: Sequence[tuple[int, int]], work: Work
) -> Iterator[tuple[Relation, bool]]:
    """How the second contour of each pair lies to the first one, as `relation` states it.

    Args:
        outlines: The contours.
        pairs: Pairs of their numbers.
        work: What it may take.

    Yields:
        The result of `relation` for each pair.

    Raises:
        UnreadableVolume: It takes more than `work`.
    """
    work.spend(_ONE_PAIR * len(pairs))
    clear = _clear(outlines, pairs)
    for n, (first, second) in enumerate(pairs):
        lies = clear.get(n)
        if lies is None:
            yield relation(outlines[second], outlines[first], work)
        else:
            yield lies, False


def _clear(outlines: Sequence[Outline], pairs: Sequence[tuple[int, int]]) -> dict[int, Relation]:
    """The relation of each pair, by its number, that corners alone decide."""
    sizes = [-(-len(outline.corners) // STEP) * STEP for outline in outlines]
    by_size: dict[tuple[int, int], list[int]] = {}
    for n, (first, second) in enumerate(pairs):
        size = sizes[second], sizes[first]
        if min(size) > 0 and max(size) <= SMALL:
            by_size.setdefault(size, []).append(n)
    result: dict[int, Relation] = {}
    for (edges, edges_of_second), numbers in by_size.items():
        at_once = max(1, EDGE_PAIRS // (edges * edges_of_second))
        for start in range(0, len(numbers), at_once):
            part = numbers[start : start + at_once]
            contours = _Edges([outlines[pairs[n][1]] for n in part], edges)
            seconds = _Edges([outlines[pairs[n][0]] for n in part], edges_of_second)
            for n, lies in zip(part, _relations(contours, seconds), strict=True):
                if lies is not None:
                    result[n] = lies
    return result


def _relations(contours: _Edges, seconds: _Edges) -> Iterator[Relation | None]:
    """The relation of each pair; None where corners alone do not decide."""
    inside, is_far, turns = _corners_to(contours, seconds)
    second_inside, second_is_far, second_turns = _corners_to(seconds, contours)
    crossing = _on_both_sides(inside, is_far) & _on_both_sides(second_inside, second_is_far)
    # Two edges are near each other if they cross, or if an end of one is near the other.
    turn = (
        contours.across[..., None] * seconds.down[:, None]
        - contours.down[..., None] * seconds.across[:, None]
    )
    second_turns = second_turns.transpose(0, 2, 1)
    edges_cross = (turns > 0) != (turns + turn > 0)
    edges_cross &= (second_turns > 0) != (second_turns - turn > 0)
    apart = ~edges_cross.any(axis=(1, 2)) & is_far.all(axis=1) & second_is_far.all(axis=1)
    for crosses, is_apart, is_inside in zip(
        crossing.tolist(), apart.tolist(), inside[:, 0].tolist(), strict=True
    ):
        if crosses:
            yield Relation.CROSSING
        elif is_apart:
            yield Relation.INSIDE if is_inside else Relation.APART
        else:
            yield None


def _on_both_sides(inside: NDArray[np.bool_], is_far: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether corners of a contour lie inside and outside of the second one, far from it (k,)."""
    return np.asarray((inside & is_far).any(axis=1) & (~inside & is_far).any(axis=1))


def _corners_to(
    contours: _Edges, seconds: _Edges
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], _Numbers]:
    """Where the corners of contours lie to the edges of second ones.

    Returns:
        Which corners lie inside the second contour (k, m), which are further than the tolerance
        from its outline (k, m), and on which side of each edge they lie, by the sign (k, m, n).
    """
    across, down = seconds.across[:, None], seconds.down[:, None]
    right = contours.x[..., None] - seconds.x[:, None]
    below = contours.y[..., None] - seconds.y[:, None]
    # The even-odd rule, as in `polygons.contains`.
    crossed = (below >= 0) != (below >= down)
    crossed &= seconds.is_own[:, None]
    crossed &= right < below * across / np.where(down == 0, 1, down)
    inside: NDArray[np.bool_] = np.count_nonzero(crossed, axis=2) % 2 == 1
    along = (right * across + below * down) / (across**2 + down**2)
    np.clip(along, 0, 1, out=along)
    squared = (right - along * across) ** 2 + (below - along * down) ** 2
    is_far: NDArray[np.bool_] = squared.min(axis=2) > (TOLERANCE + ROUNDING_ERROR) ** 2
    return inside, is_far, right * down - below * across
