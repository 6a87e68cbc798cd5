"""Synthetic volumes, the class table and other real patients, each against the same real ones.

Three columns of one measure (train/metrics/distribution.py): what the generator gives, what costs
no network, and the value between real and real that nothing should beat. With them the memory of
training patients (train/metrics/memory.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.core.manifest import Intensity

from .class_table import coloured_tissues
from .distribution import PLANES, Samples, distribution
from .memory import memory
from .scores import HU, as_hu, plain_tree
from .volume_metrics import Places

# The most training slices that the class table and the real-vs-real baseline are made of; at least
# `LEAST_PATIENTS` patients are.
MOST_SLICES, LEAST_PATIENTS = 512, 2


def quality(
    synthetic: Samples,
    real: Samples,
    train: Samples,
    names: Sequence[str],
    *,
    intensity: Intensity = HU,
    places: Places | None = None,
    planes: Sequence[str] = PLANES,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure synthetic samples beside the class table and other real patients.

    Args:
        synthetic: Synthetic samples of the held-out masks.
        real: The held-out real samples.
        train: The training patients' samples, whole volumes.
        names: The names of the indices 1, 2, ...
        intensity: The images' unit and range.
        places: The slices' numbers of the synthetic and the real samples; None: whole volumes.
        planes: The planes whose features are compared.
        seed: The seed of the class table's noise.

    Returns:
        JSON data: `distribution` for each of `COLUMNS`, and "memory".
    """
    few = some_of(train)
    table = coloured_tissues(few, intensity, seed, (0,))

    def measured(samples: Samples, numbers: Places | None) -> dict[str, Any]:
        return distribution(
            samples, real, names, intensity=intensity, places=(numbers, places), planes=planes
        )

    images = [
        as_hu([image for image, _, _ in group], intensity) for group in (synthetic, train, real)
    ]
    return {
        "synthetic": measured(synthetic, places),
        "table": measured(table, None),
        "real": measured(few, None),
        "memory": plain_tree(memory(*images)),
    }


def some_of(samples: Samples) -> Samples:
    """Choose whole samples of at most `MOST_SLICES` slices, but at least `LEAST_PATIENTS`.

    Args:
        samples: The samples.

    Returns:
        The first ones.
    """
    total, count = 0, 0
    for image, _, _ in samples:
        total += len(image)
        if count >= LEAST_PATIENTS and total > MOST_SLICES:
            break
        count += 1
    return samples[:count]
