"""Does a generator repeat its training patients?

Slices are compared at 32 x 32 blocks, where noise no longer counts. Two figures: the distance of
synthetic slices to the nearest training slice over that to the nearest held-out slice, of as many
(about 1: the training patients are no nearer than others), and the number of slices that are
copies: nearer to a training slice than real patients are to each other.

A copy that is shifted by several pixels or deformed is not found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

# Blocks a side.
SIDE = 32
# HU beyond these limits count as the limits.
LIMITS_HU = (-1024.0, 1024.0)
# A copy is nearer to a training slice than this share of the distance which 99 % of the held-out
# slices keep from all training slices.
COPY_SHARE, COPY_QUANTILE = 0.5, 0.01
# Slices compared at a time, and the most training slices.
AT_ONCE, MOST_SLICES = 256, 20_000

Volumes = Sequence[NDArray[Any]]


def blocks(volumes: Volumes) -> NDArray[np.float32]:
    """Average each slice over 32 x 32 blocks.

    Args:
        volumes: (D, H, W) each, in HU.

    Returns:
        float32 (slices, 1024).
    """
    rows = []
    for volume in volumes:
        clipped = np.clip(volume, *LIMITS_HU).astype(np.float32)
        pooled = functional.adaptive_avg_pool2d(torch.from_numpy(clipped)[:, None], SIDE)
        rows.append(pooled.flatten(1).numpy())
    return np.concatenate(rows)


def nearest(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Find how far each row of `a` is from the nearest row of `b`.

    Args:
        a: (n, K).
        b: (m, K).

    Returns:
        Root mean square differences, (n,).
    """
    # Differences of squares lose the last digits where values are far from 0.
    centre = b.mean(0)
    b = b - centre
    squares = np.square(b, dtype=np.float64).sum(1)
    distances = []
    for start in range(0, len(a), AT_ONCE):
        rows = a[start : start + AT_ONCE] - centre
        norms = np.square(rows, dtype=np.float64).sum(1)
        squared = norms[:, None] + squares - 2.0 * (rows @ b.T)
        distances.append(np.sqrt(np.maximum(squared.min(1), 0) / a.shape[1]))
    return np.concatenate(distances)


def spread_rows(rows: NDArray[Any], most: int) -> NDArray[Any]:
    """Choose at most `most` rows, evenly spaced.

    Args:
        rows: Any array.
        most: How many rows at most.

    Returns:
        The rows.
    """
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).round().astype(int)]


def memory(synthetic: Volumes, train: Volumes, held_out: Volumes) -> dict[str, Any]:
    """Compare synthetic slices with the training patients' and with held-out ones.

    Args:
        synthetic: Synthetic volumes (D, H, W) in HU. Their masks should be no training patient's.
        train: The training patients' images.
        held_out: Real images that no training saw, on the same canvas.

    Returns:
        "ratio": the median over the slices of (distance to the nearest training slice / distance to
        the nearest held-out slice), from as many of each; "copies": the number of slices that are
        copies, of "slices"; "copied": for each volume, the number of its copied slices; "limit_hu":
        the distance below which a slice is a copy; "nearest_hu" and "nearest_hu_true": the median
        distance to the nearest training slice of synthetic and of held-out slices.
    """
    generated = [blocks([volume]) for volume in synthetic]
    generated_rows, real = np.concatenate(generated), blocks(held_out)
    trained = spread_rows(blocks(train), MOST_SLICES)
    count = min(len(trained), len(real))
    to_equal = nearest(generated_rows, spread_rows(trained, count))
    to_held_out = nearest(generated_rows, spread_rows(real, count))
    to_train, between_real = nearest(generated_rows, trained), nearest(real, trained)
    limit = COPY_SHARE * float(np.quantile(between_real, COPY_QUANTILE))
    is_copy = to_train < limit
    lengths = np.cumsum([len(rows) for rows in generated])[:-1]
    return {
        "ratio": float(np.median(to_equal / np.maximum(to_held_out, 1e-9))),
        "copies": int(is_copy.sum()),
        "slices": len(generated_rows),
        "copied": [int(part.sum()) for part in np.split(is_copy, lengths)],
        "limit_hu": limit,
        "nearest_hu": float(np.median(to_train)),
        "nearest_hu_true": float(np.median(between_real)),
    }
