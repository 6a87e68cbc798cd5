"""The table of `quality` for people: names, legend and rows. It needs no library.

The model card and the report print it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
