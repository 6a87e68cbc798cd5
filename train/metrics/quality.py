"""Synthetic volumes, the class table and other real patients, each against the same real ones.

Three columns of one measure (train/metrics/distribution.py): what the generator gives, what costs
no network, and the value between real and real that nothing should beat. With them the memory of
training patients (train/metrics/memory.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
COLUMNS = {"synthetic": "synthetic", "table": "class table", "real": "real-vs-real"}
LEGEND = (
    "Each figure compares a set of images with the held-out real ones. 'Class table' is the control"
    " without a network: training patients' tissue maps, coloured by class medians, with noise. A"
    " generator that does not beat it is not needed. 'Real-vs-real' compares training patients with"
    " held-out ones: no synthesis should be expected to do better."
)
SENTENCES = {
    "frechet": "Fréchet distance of random-convolution features: differs in look and texture.",
    "kernel": "Kernel distance of the same features, without the bias of small sets.",
    "gradient": "W1 between gradient magnitudes inside the body: blurred or too noisy.",
    "outside": "Share of the body outside the labels (vessels: of the lung), true in brackets.",
    "outline_step": "Outline that jumps from slice to slice, in pixels, true in brackets.",
    "memory": "Distance to training slices over that to held-out ones: about 1 is right.",
}


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


def rows(result: Mapping[str, Any], unit: str = "HU") -> list[tuple[str, ...]]:
    """List the figures for a person.

    Args:
        result: `quality`.
        unit: The images' unit.

    Returns:
        A row per measure: its name, then the columns of `COLUMNS`.
    """
    table: list[tuple[str, ...]] = []
    columns = [result[key] for key in COLUMNS if key in result]
    for measure, title in (("frechet", "Fréchet"), ("kernel", "kernel distance")):
        for plane in columns[0][measure]:
            table.append((f"{title}, {plane}", *(_cell(c[measure][plane]) for c in columns)))
    table.append((f"gradient W1, {unit}", *(_cell(c["gradient"]) for c in columns)))
    titles = ("bone", "gas", "vessels") if unit == "HU" else ("bright", "dark")
    for name, title in zip(("bone", "gas", "vessels"), titles, strict=False):
        cells = [(c["outside"][name], c["outside"][f"{name}_true"]) for c in columns]
        table.append((f"{title} outside labels, %", *(_beside(*cell) for cell in cells)))
    steps = [(c["outline_step"], c["outline_step_true"]) for c in columns]
    table.append(("outline step, px", *(_beside(*cell) for cell in steps)))
    if "memory" in result:
        copying = result["memory"]
        copies = f"{copying['copies']} of {copying['slices']} slices are copies"
        table.append(
            ("memory ratio", f"{_cell(copying['ratio'])}; {copies}", *[""] * (len(columns) - 1))
        )
    for name, value in result.get("prdc", {}).items():
        table.append((name, _cell(value), *[""] * (len(columns) - 1)))
    for name, organ in columns[0]["organs"].items():
        if organ is not None:
            organs = [c["organs"].get(name) or {} for c in columns]
            table.append(
                (f"{name}: IQR ratio", *(_cell(values.get("iqr_ratio")) for values in organs))
            )
    return table


def _beside(value: float | None, true: float | None) -> str:
    return f"{_cell(value)} ({_cell(true)})"


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
