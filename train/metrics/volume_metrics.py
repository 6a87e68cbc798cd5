"""Distances between synthetic and real CTs beyond medians and errors.

They compare distributions, structure, neighbouring slices and diversity. Cases are volumes
(D, H, W) of axial slices in integer HU, as in train/metrics/scores.py, which combines these
metrics. A distance has a meaning beside the same distance between two groups of real patients:
`real_baseline`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wasserstein_distance

from runtime.core.errors import importing

# The side in pixels of the Gaussian window (sigma 1.5) of Wang et al.
KERNEL = 11
# The weights of the scales of MS-SSIM (Wang, Simoncelli, Bovik 2003).
BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# SSIM clips images to these values, and their difference is its data range.
LIMITS_HU = (-1024.0, 1024.0)
# Slices that SSIM compares at a time.
AT_ONCE = 8
# The most slices of two volumes, and the most pairs of patients, whose similarity is measured.
ALIKE_SLICES = 8
ALIKE_PAIRS = 16
# A region with fewer voxels has no median.
LEAST_VOXELS = 50

Volumes = Sequence[NDArray[Any]]
# Of each case, (D,): the number of each slice in its volume.
Places = Sequence[NDArray[np.intp]]


def wasserstein(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Compute the Wasserstein-1 distance between two samples of integers.

    Args:
        a: HU, any shape.
        b: HU, any shape.

    Returns:
        The distance in HU, NaN when a sample is empty.
    """
    if not a.size or not b.size:
        return float("nan")
    (x, u), (y, v) = (np.unique(values, return_counts=True) for values in (a, b))
    return float(wasserstein_distance(x, y, u, v))


def steps_along_z(
    volume: NDArray[Any], inside: NDArray[np.bool_], place: NDArray[np.intp]
) -> NDArray[np.int32]:
    """Compute |I(z+1) - I(z)| of all voxels that are inside in both slices.

    The distribution of these steps shows whether neighbouring slices agree.

    Args:
        volume: (D, H, W) in HU.
        inside: bool (D, H, W).
        place: (D,), the number of each slice in its volume; only neighbours are compared.

    Returns:
        The steps in HU, (n,).
    """
    both = inside[1:] & inside[:-1] & (np.diff(place) == 1)[:, None, None]
    steps: NDArray[np.int32] = np.abs(np.diff(volume.astype(np.int32), axis=0))[both]
    return steps


def z_difference(
    volumes: Sequence[Volumes],
    insides: Sequence[Volumes],
    places: Sequence[Places | None] = (None, None),
) -> float:
    """Compare the distributions of |I(z+1) - I(z)| of two groups of volumes, all voxels pooled.

    Texture counts: white noise on every slice makes the steps too large, slices that share too much
    make them too small.

    Args:
        volumes: The two groups.
        insides: The region of each volume.
        places: The slices' numbers in their volumes, for each group.

    Returns:
        Their Wasserstein-1 distance in HU.
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
    """Compute the mean absolute difference between synthetic and true steps I(z+1) - I(z).

    In `z_difference`, a step that is too large in one place makes up for a missing one in another;
    here it does not.

    Args:
        generated: Synthetic volumes.
        true: True volumes.
        insides: The region of each volume.
        places: The slices' numbers in their volumes.

    Returns:
        The difference in HU, NaN without neighbours.
    """
    total, count = 0, 0
    for n, (fake, real, inside) in enumerate(zip(generated, true, insides, strict=True)):
        both = inside[1:] & inside[:-1]
        if places is not None:
            both &= (np.diff(places[n]) == 1)[:, None, None]
        fake_steps = np.diff(fake.astype(np.int32), axis=0)
        real_steps = np.diff(real.astype(np.int32), axis=0)
        total += int(np.abs(fake_steps - real_steps)[both].sum())
        count += int(both.sum())
    return total / count if count else float("nan")


def outline_step(bodies: Sequence[NDArray[np.bool_]], places: Places | None = None) -> float:
    """Count the pixels that are body in one of two neighbouring slices alone.

    Bodies change little from slice to slice; an outline without any tie to its neighbours flickers.

    Args:
        bodies: The body masks, bool (D, H, W).
        places: The slices' numbers in their volumes.

    Returns:
        The mean count, NaN without neighbours.
    """
    numbers = [np.arange(len(body)) for body in bodies] if places is None else places
    per_case = [
        (body[1:] ^ body[:-1]).sum((1, 2))[np.diff(place) == 1]
        for body, place in zip(bodies, numbers, strict=True)
    ]
    counts = np.concatenate(per_case)
    return float(counts.mean()) if counts.size else float("nan")


def similarity(a: Volumes, b: Volumes) -> dict[str, float]:
    """Compute mean SSIM and MS-SSIM (torchmetrics) over the slices of all pairs.

    HU are clipped to `LIMITS_HU`. MS-SSIM takes as many of the five scales as the side of the
    slices allows with the usual window, with weights that sum to 1 (128 pixels: 4 scales).

    Args:
        a: Volumes.
        b: Volumes of the same shapes.

    Returns:
        `ssim`, `ms_ssim` (NaN without any scale) and the number of `scales`.
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
            options: dict[str, Any] = {"data_range": high - low, "kernel_size": KERNEL}
            one_scale: Any = ssim(x, y, **options)
            many_scales: Any = (
                ms_ssim(x, y, betas=betas, normalize="relu", **options) if scales else np.nan
            )
            sums += len(x) * np.array([float(one_scale), float(many_scales)])
            count += len(x)
    return {"ssim": float(sums[0] / count), "ms_ssim": float(sums[1] / count), "scales": scales}


def scales_of(side: int) -> int:
    """Count the scales of MS-SSIM that slices allow.

    The window must fit into the coarsest; torchmetrics asks that it fits into `side` / n² as well.

    Args:
        side: The shorter side of the slices in pixels.

    Returns:
        0 to 5.
    """
    return sum(side // max(2**n, n**2) > KERNEL - 1 for n in range(len(BETAS)))


def medians(volume: NDArray[Any], mask: NDArray[Any], classes: int) -> NDArray[np.float64]:
    """Compute the median of the labels 1, 2, ...

    Args:
        volume: (D, H, W) in HU.
        mask: (D, H, W) model indices.
        classes: The number of labels, with the background.

    Returns:
        (classes - 1,) in HU; NaN for a label with (almost) no voxels.
    """
    regions = [volume[mask == index] for index in range(1, classes)]
    return np.array(
        [np.median(region) if region.size >= LEAST_VOXELS else np.nan for region in regions]
    )


def spread(per_case: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Compute the standard deviation of each organ over cases.

    Args:
        per_case: The medians of each case, (organs,), NaN where unknown.

    Returns:
        (organs,), NaN for fewer than two cases.
    """
    table = np.stack(per_case)
    valid = ~np.isnan(table)
    count = valid.sum(0)
    mean = np.where(valid, table, 0).sum(0) / np.maximum(count, 1)
    centred = np.where(valid, table - mean, 0)
    return np.where(count > 1, np.sqrt((centred**2).sum(0) / np.maximum(count - 1, 1)), np.nan)


def diversity(
    variants: Sequence[Volumes],
    masks: Volumes,
    real: Sequence[NDArray[np.float64]],
    names: Sequence[str],
) -> dict[str, Any]:
    """Measure how much the variants of one mask differ.

    Args:
        variants: The synthetic variants of each mask.
        masks: Model indices.
        real: The medians of each real patient, (organs,).
        names: The names of the indices 1, 2, ...

    Returns:
        "organs": for each, the spread of its median over the variants of one mask (root mean square
        over masks), the spread between the real patients, their ratio (1: as diverse as patients),
        and the difference of the median of all variants' voxels from the mean of the real medians.
        `similarity` between each variant and the next, on slices with labels. "variants": the least
        number of variants of a mask.
    """
    classes = len(names) + 1
    each = np.stack(
        [
            spread([medians(v, mask, classes) for v in generated])
            for generated, mask in zip(variants, masks, strict=True)
        ]
    )
    valid = ~np.isnan(each)
    squares = (np.where(valid, each, 0) ** 2).sum(0)
    over_variants = np.sqrt(squares / np.where(valid.any(0), valid.sum(0), np.nan))
    true, table = spread(real), np.stack(real)
    organs = {}
    for index, (name, s, t) in enumerate(zip(names, over_variants, true, strict=True), 1):
        voxels = np.concatenate(
            [
                v[mask == index]
                for generated, mask in zip(variants, masks, strict=True)
                for v in generated
            ]
        )
        real_medians = table[~np.isnan(table[:, index - 1]), index - 1]
        comparable = voxels.size and real_medians.size
        error = np.median(voxels) - real_medians.mean() if comparable else np.nan
        organs[name] = {
            "spread": float(s),
            "spread_true": float(t),
            "ratio": float(s / t) if t > 0 else np.nan,
            "median_error": float(error),
        }
    pairs = []
    for generated, mask in zip(variants, masks, strict=True):
        chosen = _labelled(mask, ALIKE_SLICES)
        ring = [*generated, generated[0]] if len(generated) > 2 else generated
        pairs += [(first[chosen], second[chosen]) for first, second in pairwise(ring)]
    return {
        "variants": min(map(len, variants)),
        "organs": organs,
        **similarity(*zip(*pairs, strict=True)),
    }


def _labelled(mask: NDArray[Any], most: int) -> NDArray[np.intp]:
    """At most `most` slices of `mask` (D, H, W), evenly spaced; with labels, if any has some."""
    labelled = np.flatnonzero(mask.any((1, 2)))
    labelled = labelled if len(labelled) else np.arange(len(mask))
    return labelled[np.linspace(0, len(labelled) - 1, min(len(labelled), most)).round().astype(int)]


def between_patients(
    one: Volumes, one_masks: Volumes, reference: Volumes, reference_masks: Volumes
) -> dict[str, float]:
    """Compute the `similarity` of real patients of two groups, who share no mask.

    It compares slices at the same height among those with labels.

    Args:
        one: CTs of one group.
        one_masks: Their model indices.
        reference: CTs of the other group.
        reference_masks: Their model indices.

    Returns:
        The similarity, NaN where no two patients' slices have one size.
    """
    numbers = [
        (i, j)
        for j in range(len(reference))
        for i in range(len(one))
        if one[i].shape[1:] == reference[j].shape[1:] == one[0].shape[1:]
    ]
    pairs = []
    for i, j in numbers[:: -(-len(numbers) // ALIKE_PAIRS) or 1]:
        count = min(
            ALIKE_SLICES,
            *(len(_labelled(mask, ALIKE_SLICES)) for mask in (one_masks[i], reference_masks[j])),
        )
        pairs.append(
            (
                one[i][_labelled(one_masks[i], count)],
                reference[j][_labelled(reference_masks[j], count)],
            )
        )
    return (
        similarity(*zip(*pairs, strict=True))
        if pairs
        else {"ssim": float("nan"), "ms_ssim": float("nan"), "scales": 0}
    )


def real_baseline(
    one: Volumes,
    one_masks: Volumes,
    reference: Volumes,
    reference_masks: Volumes,
    insides: Sequence[Volumes],
    names: Sequence[str],
    places: Sequence[Places | None] = (None, None),
) -> Any:
    """Measure the distances between two groups of real patients, which no synthesis should beat.

    Args:
        one: CTs of one group.
        one_masks: Their model indices.
        reference: CTs of the other group.
        reference_masks: Their model indices.
        insides: The body of each case, for each group.
        names: The names of the indices 1, 2, ...
        places: The slices' numbers in their volumes, for each group.

    Returns:
        {"organs": {name: {"wasserstein", "z_difference"}}, "body": {"z_difference"}, "similarity":
        `between_patients`}.
    """
    groups = (one, reference)
    organs = {}
    for index, name in enumerate(names, 1):
        regions = [[mask == index for mask in masks] for masks in (one_masks, reference_masks)]
        pooled = (
            np.concatenate([v[m] for v, m in zip(*group, strict=True)])
            for group in zip(groups, regions, strict=True)
        )
        organs[name] = {
            "wasserstein": wasserstein(*pooled),
            "z_difference": z_difference(groups, regions, places),
        }
    alike = between_patients(one, one_masks, reference, reference_masks)
    return {
        "organs": organs,
        "body": {"z_difference": z_difference(groups, insides, places)},
        "similarity": alike,
    }
