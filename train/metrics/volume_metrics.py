"""Distances between synthesized and real CTs beyond medians and errors: distributions, structure,
slices that agree, diversity.

Cases are volumes (D, H, W) of axial slices in integer HU, as in train/metrics/scores.py, which puts
these figures together. A distance means something beside the same distance between two groups of
real patients: `ceiling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wasserstein_distance

from runtime.core.errors import importing

KERNEL = 11  # px, of the Gaussian window (sigma 1.5) of Wang et al.
BETAS = (
    0.0448,
    0.2856,
    0.3001,
    0.2363,
    0.1333,
)  # of the scales of MS-SSIM (Wang, Simoncelli, Bovik 2003)
LIMITS_HU = (-1024.0, 1024.0)  # images are clipped to them, and their range is SSIM's
AT_ONCE = 8  # slices
ALIKE_SLICES = 8  # of two volumes, at most, whose likeness is measured
ALIKE_PAIRS = 16  # of patients, at most
LEAST_VOXELS = 50  # a region with fewer has no median

Volumes = Sequence[NDArray[Any]]
Places = Sequence[NDArray[np.intp]]  # of each case, (D,): the number of each slice in its volume


def wasserstein(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Wasserstein-1 distance in HU between two samples of integers, of any sizes; NaN when one
    is empty.
    """
    if not a.size or not b.size:
        return float("nan")
    (x, u), (y, v) = (np.unique(values, return_counts=True) for values in (a, b))
    return float(wasserstein_distance(x, y, u, v))


def steps_along_z(
    volume: NDArray[Any], inside: NDArray[np.bool_], place: NDArray[np.intp]
) -> NDArray[np.int32]:
    """|I(z+1) - I(z)| of all voxels that are inside in both slices, in HU: their distribution tells
    slices that do not agree.

    `place` (D,): the number of each slice in its volume. Only slices that follow each other there
    are compared.
    """
    both = inside[1:] & inside[:-1] & (np.diff(place) == 1)[:, None, None]
    steps: NDArray[np.int32] = np.abs(np.diff(volume.astype(np.int32), axis=0))[both]
    return steps


def z_difference(
    volumes: Sequence[Volumes],
    insides: Sequence[Volumes],
    places: Sequence[Places | None] = (None, None),
) -> float:
    """Wasserstein-1 distance in HU between the distributions of |I(z+1) - I(z)| of two groups of
    volumes, all voxels pooled.

    Grain counts: white noise on every slice makes steps too large, slices that share too much make
    them too small.
    """
    steps = []
    for group, inside, place in zip(volumes, insides, places, strict=True):
        numbers = [np.arange(len(v)) for v in group] if place is None else place
        steps.append(
            np.concatenate(
                [steps_along_z(*case) for case in zip(group, inside, numbers, strict=True)]
            )
        )
    return wasserstein(*steps)


def z_error(
    generated: Volumes, true: Volumes, insides: Volumes, places: Places | None = None
) -> float:
    """Mean absolute difference in HU between a synthesized step I(z+1) - I(z) and the true one in
    its place; NaN without neighbours.

    Where `z_difference` lets a step that is too large in one place stand in for one that is missing
    in another, this does not.
    """
    total, count = 0, 0
    for n, (ours, theirs, inside) in enumerate(zip(generated, true, insides, strict=True)):
        both = inside[1:] & inside[:-1]
        if places is not None:
            both &= (np.diff(places[n]) == 1)[:, None, None]
        total += int(
            np.abs(
                np.diff(ours.astype(np.int32), axis=0) - np.diff(theirs.astype(np.int32), axis=0)
            )[both].sum()
        )
        count += int(both.sum())
    return total / count if count else float("nan")


def outline_step(bodies: Sequence[NDArray[np.bool_]], places: Places | None = None) -> float:
    """Mean number of pixels that are body in one of two neighbouring slices and not in the other;
    NaN without neighbours.

    Bodies change little from slice to slice: an outline that is guessed anew for each flickers.
    """
    numbers = [np.arange(len(body)) for body in bodies] if places is None else places
    moved = [
        (body[1:] ^ body[:-1]).sum((1, 2))[np.diff(place) == 1]
        for body, place in zip(bodies, numbers, strict=True)
    ]
    counts = np.concatenate(moved)
    return float(counts.mean()) if counts.size else float("nan")


def similarity(a: Volumes, b: Volumes) -> dict[str, float]:
    """Mean SSIM and MS-SSIM (torchmetrics) over the slices of all pairs, HU clipped to `LIMITS_HU`,
    and the number of `scales`.

    MS-SSIM takes as many of the five scales as the side of the slices allows with the usual window,
    their weights summing to 1 (128 pixels: 4). Without any, it is NaN.
    """
    import torch

    with importing(
        "torchmetrics",
        "torchmetrics, which measures SSIM",
        "pip install torchmetrics lightning-utilities",
    ):
        from torchmetrics.functional.image import (
            multiscale_structural_similarity_index_measure as ms_ssim,
        )
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim
    low, high = LIMITS_HU
    sums, count, scales = np.zeros(2), 0, scales_of(min(a[0].shape[1:]))
    betas = tuple(beta / sum(BETAS[:scales]) for beta in BETAS[:scales])
    for volumes in zip(a, b, strict=True):
        for at in range(0, len(volumes[0]), AT_ONCE):
            x, y = (
                torch.from_numpy(v[at : at + AT_ONCE].astype(np.float32)[:, None]).clamp(low, high)
                for v in volumes
            )
            found: Any = ssim(x, y, data_range=high - low, kernel_size=KERNEL)
            many = (
                ms_ssim(
                    x, y, data_range=high - low, kernel_size=KERNEL, betas=betas, normalize="relu"
                )
                if scales
                else np.nan
            )
            sums += len(x) * np.array([float(found), float(many)])
            count += len(x)
    return {"ssim": float(sums[0] / count), "ms_ssim": float(sums[1] / count), "scales": scales}


def scales_of(side: int) -> int:
    """How many scales of MS-SSIM slices of `side` pixels allow.

    The window must fit into the coarsest; torchmetrics asks that it fits into `side` / n² as well.
    """
    return sum(side // max(2**n, n**2) > KERNEL - 1 for n in range(len(BETAS)))


def medians(volume: NDArray[Any], mask: NDArray[Any], classes: int) -> NDArray[np.float64]:
    """Median HU of the labels 1, 2, ... (classes - 1,); NaN where there is (almost) nothing."""
    regions = [volume[mask == index] for index in range(1, classes)]
    return np.array(
        [np.median(region) if region.size >= LEAST_VOXELS else np.nan for region in regions]
    )


def spread(per_case: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Standard deviation of each organ over cases (rows of medians), NaN of fewer than two."""
    table = np.stack(per_case)
    known = ~np.isnan(table)
    count = known.sum(0)
    centred = np.where(known, table - np.where(known, table, 0).sum(0) / np.maximum(count, 1), 0)
    return np.where(count > 1, np.sqrt((centred**2).sum(0) / np.maximum(count - 1, 1)), np.nan)


def diversity(
    variants: Sequence[Volumes],
    masks: Volumes,
    real: Sequence[NDArray[np.float64]],
    names: Sequence[str],
) -> dict[str, Any]:
    """How much the paintings of one mask differ.

    `variants`: per mask its paintings; `real`: medians of real patients.

    Per organ the spread of its median over the paintings of one mask (root mean square over masks),
    the spread between the real patients, and their ratio (1: as diverse as patients are); how far
    the median of all paintings' voxels lies from the mean of the real patients' medians; SSIM and
    MS-SSIM between each synthetic image and the next, on slices with labels.
    """
    classes = len(names) + 1
    each = np.stack(
        [
            spread([medians(v, mask, classes) for v in generated])
            for generated, mask in zip(variants, masks, strict=True)
        ]
    )
    known = ~np.isnan(each)
    ours = np.sqrt(
        (np.where(known, each, 0) ** 2).sum(0) / np.where(known.any(0), known.sum(0), np.nan)
    )
    true, table = spread(real), np.stack(real)
    organs = {}
    for index, (name, s, t) in enumerate(zip(names, ours, true, strict=True), 1):
        voxels = np.concatenate(
            [
                v[mask == index]
                for generated, mask in zip(variants, masks, strict=True)
                for v in generated
            ]
        )
        seen = table[~np.isnan(table[:, index - 1]), index - 1]
        away = np.median(voxels) - seen.mean() if voxels.size and seen.size else np.nan
        organs[name] = {
            "spread": float(s),
            "spread_true": float(t),
            "ratio": float(s / t) if t > 0 else np.nan,
            "median_error": float(away),
        }
    pairs = []
    for generated, mask in zip(variants, masks, strict=True):
        chosen = _labelled(mask, ALIKE_SLICES)
        ring = [*generated, generated[0]] if len(generated) > 2 else generated
        pairs += [(one[chosen], other[chosen]) for one, other in pairwise(ring)]
    return {
        "variants": min(map(len, variants)),
        "organs": organs,
        **similarity(*zip(*pairs, strict=True)),
    }


def _labelled(mask: NDArray[Any], most: int) -> NDArray[np.intp]:
    """At most so many slices of `mask` (D, H, W) with labels, evenly spaced among them (among
    all, where none has any).
    """
    found = np.flatnonzero(mask.any((1, 2)))
    found = found if len(found) else np.arange(len(mask))
    return found[np.linspace(0, len(found) - 1, min(len(found), most)).round().astype(int)]


def between_patients(
    one: Volumes, one_masks: Volumes, other: Volumes, other_masks: Volumes
) -> dict[str, float]:
    """`similarity` of real patients of two groups: how alike CTs are that share no mask.

    Slices are compared that lie at the same height among those with labels; NaN where no two
    patients' slices have one size.
    """
    numbers = [
        (i, j)
        for j in range(len(other))
        for i in range(len(one))
        if one[i].shape[1:] == other[j].shape[1:] == one[0].shape[1:]
    ]
    pairs = []
    for i, j in numbers[:: -(-len(numbers) // ALIKE_PAIRS) or 1]:
        count = min(
            ALIKE_SLICES,
            *(len(_labelled(mask, ALIKE_SLICES)) for mask in (one_masks[i], other_masks[j])),
        )
        pairs.append(
            (one[i][_labelled(one_masks[i], count)], other[j][_labelled(other_masks[j], count)])
        )
    return (
        similarity(*zip(*pairs, strict=True))
        if pairs
        else {"ssim": float("nan"), "ms_ssim": float("nan"), "scales": 0}
    )


def real_baseline(
    one: Volumes,
    one_masks: Volumes,
    other: Volumes,
    other_masks: Volumes,
    insides: Sequence[Volumes],
    names: Sequence[str],
    places: Sequence[Places | None] = (None, None),
) -> Any:
    """What two groups of real patients have between them: the distances no synthesis can be
    expected to beat.

    `insides`: the body of each case, of the two groups. `places`: the slices' numbers in their
    volumes, where slices are left out. {"organs": {name: {"wasserstein", "z_difference"}}, "body":
    {"z_difference"}, "similarity": `between_patients`}.
    """
    groups = (one, other)
    organs = {}
    for index, name in enumerate(names, 1):
        regions = [[mask == index for mask in masks] for masks in (one_masks, other_masks)]
        pooled = (
            np.concatenate([v[m] for v, m in zip(*group, strict=True)])
            for group in zip(groups, regions, strict=True)
        )
        organs[name] = {
            "wasserstein": wasserstein(*pooled),
            "z_difference": z_difference(groups, regions, places),
        }
    alike = between_patients(one, one_masks, other, other_masks)
    return {
        "organs": organs,
        "body": {"z_difference": z_difference(groups, insides, places)},
        "similarity": alike,
    }
