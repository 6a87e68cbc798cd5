"""Drop whole classes of a condition, so that the network learns any subset of them.

A dropped label becomes its tissue class, a dropped tissue "unknown". A dropped layout leaves the
labels alone: everything else is "unknown", the air around the body too. A mask without a layout
looks the same when it is synthesized.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..config import AugmentConfig


def drop_classes(
    condition: NDArray[np.uint8],
    tissues: NDArray[np.uint8],
    labels: int,
    classes: int,
    settings: AugmentConfig,
    rng: np.random.Generator,
    count: int | None = None,
    part: slice = slice(None),
) -> NDArray[np.uint8]:
    """Drop classes of each slice at random.

    Args:
        condition: uint8 (N, Z, H, W), labels and tissues.
        tissues: The tissues alone, of the same shape.
        labels: The number of rows of the label table, with the background.
        classes: The number of all classes; the last one is "unknown".
        settings: How often.
        rng: The random numbers.
        count: The slices of the batch over all ranks; None: N.
        part: The part of that batch which `condition` is.

    Returns:
        uint8 (N, Z, H, W).
    """
    total = len(condition) if count is None else count
    chance = np.full(classes, settings.drop_class)
    chance[labels:] /= 2
    # Air and "unknown" stay.
    chance[[0, classes - 1]] = 0
    dropped = (rng.random((total, classes)) < chance)[part]
    without_layout = (rng.random(total) < settings.drop_layout)[part]
    out = np.empty_like(condition)
    for n, (is_dropped, is_bare) in enumerate(zip(dropped, without_layout, strict=True)):
        tissue_of = np.where(is_dropped, classes - 1, np.arange(classes)).astype(np.uint8)
        if is_bare:
            tissue_of[:] = classes - 1
        is_label = ~is_dropped & (np.arange(classes) < labels)
        is_label[0] = False
        out[n] = np.where(is_label[condition[n]], condition[n], tissue_of[tissues[n]])
    return out
