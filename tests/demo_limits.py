"""The demo's limits, measured by code of its own on (mask, true CT, synthetic CT) of each case."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from samples import MM_WHS_VALUES
from scipy import ndimage

Case = tuple[np.ndarray, np.ndarray, np.ndarray]
STRUCTURES = MM_WHS_VALUES[1:]
MOST_MEDIAN_ERROR, MOST_BODY_RATIO, TEXTURE_RATIOS = 40, 0.5, (0.5, 2)


def medians(cases: Sequence[Case], value: int) -> tuple[float, float]:
    """The true and the synthetic median of a structure, pooled, in HU."""
    true, synthetic = (
        float(np.median(np.concatenate([case[n][case[0] == value] for case in cases])))
        for n in (1, 2)
    )
    return true, synthetic


def body(ct: np.ndarray) -> np.ndarray:
    """Each slice's outline, filled: the largest part above -500 HU, without the thin table."""
    filled = np.zeros(ct.shape, bool)
    for k, plane in enumerate(ct):
        parts, count = ndimage.label(ndimage.binary_opening(plane > -500, iterations=2))
        if count:
            filled[k] = ndimage.binary_fill_holes(
                parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
            )
    return filled


def body_ratio(cases: Sequence[Case]) -> float:
    """The error in the body, as a share of that of an image of each label's mean."""
    insides = [body(true) for _, true, _ in cases]
    labels, true, synthetic = (
        np.concatenate(
            [case[n][inside] for case, inside in zip(cases, insides, strict=True)]
        ).astype(float)
        for n in range(3)
    )
    flat = np.empty_like(true)
    for value in MM_WHS_VALUES:  # the rest of the body is 0
        flat[labels == value] = true[labels == value].mean()
    return float(np.abs(synthetic - true).mean() / np.abs(flat - true).mean())


def texture_ratio(cases: Sequence[Case], value: int) -> float:
    """The standard deviation of the fine texture in a structure's core, synthetic over true."""

    def texture(n: int) -> float:
        rest = []
        for case in cases:
            core = np.stack([ndimage.binary_erosion(plane == value) for plane in case[0]])
            smooth = ndimage.gaussian_filter(case[n].astype(float), (0, 2, 2))
            rest.append((case[n] - smooth)[core])
        return float(np.concatenate(rest).std())

    return texture(2) / texture(1)
