"""Count the connected components of each label, plane by plane.

A deformed mask must have as many components as the mask it came from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_COMPONENT_FRACTION = 0.01  # of the label's voxels; a smaller component does not count

Index = NDArray[np.intp]


def parts(labels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Count the 26-connected components of each label.

    Runs of equal voxels in a row are joined with the runs they touch in the row and in the plane
    before. In memory are the runs of two planes, and a size and a value for each component.

    Args:
        labels: uint8 (D, H, W).

    Returns:
        int64 (256,): for each value the number of components that hold at least
        `MIN_COMPONENT_FRACTION` of its voxels; 0 for the value 0.
    """
    sizes, values = np.zeros(0, np.int64), np.zeros(0, np.uint8)
    # The runs of the plane before, and the component of each run.
    previous, previous_components = _runs(labels[0, :0]), np.zeros(0, np.intp)
    for plane in labels:
        runs = _runs(plane)
        start, stop, value = runs
        if not len(start):
            previous, previous_components = runs, np.zeros(0, np.intp)
            continue
        # The nodes of the graph are the runs of the plane before, then the runs of this plane.
        offset, width = len(previous_components), plane.shape[1] + 2
        touching = [_touching(runs, previous, shift, 0) for shift in (-width, 0, width)]
        touching.append(_touching(runs, runs, width, offset))
        _, first, same = np.unique(previous_components, return_index=True, return_inverse=True)
        edges = [(a + offset, b) for a, b in touching] + [(np.arange(offset), first[same])]
        roots = _join(
            offset + len(start),
            np.concatenate([a for a, _ in edges]),
            np.concatenate([b for _, b in edges]),
        )

        oldest = np.full(len(roots), len(sizes), np.intp)
        np.minimum.at(oldest, roots[:offset], previous_components)
        merged, into = previous_components[first], oldest[roots[first]]
        np.add.at(sizes, into[merged != into], sizes[merged[merged != into]])
        sizes[merged[merged != into]] = 0
        fresh = np.flatnonzero((oldest == len(sizes)) & (roots == np.arange(len(roots))))
        oldest[fresh] = len(sizes) + np.arange(len(fresh))
        sizes = np.append(sizes, np.zeros(len(fresh), np.int64))
        values = np.append(values, value[fresh - offset])
        component = oldest[roots[offset:]]
        np.add.at(sizes, component, stop - start)
        previous, previous_components = runs, component
    total = np.bincount(values, sizes, 256)
    counted = (sizes > 0) & (sizes >= MIN_COMPONENT_FRACTION * total[values])
    return np.bincount(values[counted], minlength=256)


def _runs(plane: NDArray[np.uint8]) -> tuple[Index, Index, NDArray[np.uint8]]:
    """The runs of labels in a plane (H, W): first voxel, one past the last voxel, value.

    Voxels are counted row by row in the plane padded with a column of 0 at either side.
    """
    padded = np.zeros((len(plane), plane.shape[1] + 2), np.uint8)
    padded[:, 1:-1] = plane
    flat = padded.ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    value = flat[edges]
    inside = np.flatnonzero(value)  # a row ends in 0, so every run is followed by an edge
    return edges[inside], edges[inside + 1], value[inside]


def _touching(
    runs: tuple[Any, ...], neighbours: tuple[Any, ...], shift: int, offset: int, reach: int = 1
) -> tuple[Index, Index]:
    """Pairs of runs with equal value that touch.

    Args:
        runs: Runs of `_runs`.
        neighbours: Runs of this plane or of the plane before.
        shift: Voxels by which the neighbours move first, to reach the row above or below.
        offset: Added to the index of a neighbour.
        reach: 1 where runs that touch at a corner count, else 0.

    Returns:
        The index of the run and the index of its neighbour, for each pair.
    """
    (start, stop, value), (first, last, neighbour_value) = runs, neighbours
    begin = np.searchsorted(last + shift, start - reach, "right")
    count = np.maximum(np.searchsorted(first + shift, stop + reach, "left") - begin, 0)
    a = np.repeat(np.arange(len(start)), count)
    b = np.arange(len(a)) - np.repeat(np.cumsum(count) - count - begin, count)
    equal = value[a] == neighbour_value[b]
    return a[equal], b[equal] + offset


def _join(count: int, a: Index, b: Index) -> Index:
    """For each of `count` nodes the smallest node that the edges (a, b) connect it to."""
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


def plane_components(mask: NDArray[np.bool_], *, corners: bool) -> NDArray[np.int32]:
    """Number the connected components of a plane.

    Args:
        mask: bool (H, W).
        corners: Whether pixels that touch at a corner are connected.

    Returns:
        int32 (H, W): 0 outside the mask, else the component, from 1 on.
    """
    runs = _runs(mask.view(np.uint8))
    start, stop, _ = runs
    numbers = np.zeros(len(mask) * (mask.shape[1] + 2), np.int32)
    if len(start):
        a, b = _touching(runs, runs, mask.shape[1] + 2, 0, reach=int(corners))
        component = np.unique(_join(len(start), a, b), return_inverse=True)[1]
        lengths = stop - start
        first = np.repeat(start - np.cumsum(lengths) + lengths, lengths)
        numbers[first + np.arange(len(first))] = np.repeat(component + 1, lengths)
    return numbers.reshape(len(mask), -1)[:, 1:-1]
