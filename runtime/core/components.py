"""How many parts each label has, counted plane by plane: a deformed mask must have as many as
the mask it came from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_COMPONENT_FRACTION = 0.01  # of its label's voxels: what holds less is no part of its own

Index = NDArray[np.intp]


def parts(labels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """int64 (256,): for each value, how many 26-connected parts of `labels` (D, H, W) hold at least
    SPECK of its voxels; 0 for 0.

    Runs of equal voxels along each row are joined with those they touch in the rows and the plane
    before. Held at a time: the runs of two planes, and a size and a value for each part.
    """
    sizes, values = np.zeros(0, np.int64), np.zeros(0, np.uint8)
    before, of_before = (
        _runs(labels[0, :0]),
        np.zeros(0, np.intp),
    )  # the plane before: its runs, and which part each is of
    for plane in labels:
        runs = _runs(plane)
        start, stop, value = runs
        if not len(start):
            before, of_before = runs, np.zeros(0, np.intp)
            continue
        known, width = len(of_before), plane.shape[1] + 2
        touching = [_touching(runs, before, shift, 0) for shift in (-width, 0, width)] + [
            _touching(runs, runs, width, known)
        ]
        _, first, same = np.unique(of_before, return_index=True, return_inverse=True)
        joins = [(a + known, b) for a, b in touching] + [
            (np.arange(known), first[same])
        ]  # nodes: the runs before, then these
        roots = _join(
            known + len(start),
            np.concatenate([a for a, _ in joins]),
            np.concatenate([b for _, b in joins]),
        )

        oldest = np.full(len(roots), len(sizes), np.intp)
        np.minimum.at(oldest, roots[:known], of_before)
        merged, into = of_before[first], oldest[roots[first]]
        np.add.at(sizes, into[merged != into], sizes[merged[merged != into]])
        sizes[merged[merged != into]] = 0
        fresh = np.flatnonzero((oldest == len(sizes)) & (roots == np.arange(len(roots))))
        oldest[fresh] = len(sizes) + np.arange(len(fresh))
        sizes, values = (
            np.append(sizes, np.zeros(len(fresh), np.int64)),
            np.append(values, value[fresh - known]),
        )
        part = oldest[roots[known:]]
        np.add.at(sizes, part, stop - start)
        before, of_before = runs, part
    total = np.bincount(values, sizes, 256)
    return np.bincount(
        values[(sizes > 0) & (sizes >= MIN_COMPONENT_FRACTION * total[values])], minlength=256
    )


def _runs(plane: NDArray[np.uint8]) -> tuple[Index, Index, NDArray[np.uint8]]:
    """First, one past the last, and value of each run of a value other than 0, as places in rows
    with a 0 at either end.
    """
    padded = np.zeros((len(plane), plane.shape[1] + 2), np.uint8)
    padded[:, 1:-1] = plane
    flat = padded.ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    value = flat[edges]
    inside = np.flatnonzero(value)  # a row ends in 0, so every run is followed by an edge
    return edges[inside], edges[inside + 1], value[inside]


def _touching(
    runs: tuple[Any, ...], others: tuple[Any, ...], shift: int, offset: int
) -> tuple[Index, Index]:
    """Pairs (n of runs, n + offset of others) of equal value that touch, corners included, when
    `others` move by `shift`.
    """
    (start, stop, value), (first, last, other) = runs, others
    begin = np.searchsorted(last + shift, start - 1, "right")
    count = np.maximum(np.searchsorted(first + shift, stop + 1, "left") - begin, 0)
    a = np.repeat(np.arange(len(start)), count)
    b = np.arange(len(a)) - np.repeat(np.cumsum(count) - count - begin, count)
    equal = value[a] == other[b]
    return a[equal], b[equal] + offset


def _join(count: int, a: Index, b: Index) -> Index:
    """The smallest node that each of `count` nodes is connected to by the edges (a, b)."""
    roots = np.arange(count)
    while True:
        low, high = np.minimum(roots[a], roots[b]), np.maximum(roots[a], roots[b])
        apart = low != high
        if not apart.any():
            return roots
        a, b = a[apart], b[apart]
        np.minimum.at(roots, high[apart], low[apart])
        while not np.array_equal(roots, higher := roots[roots]):
            roots = higher
