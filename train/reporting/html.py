"""The parts of a report: pictures as data URIs, tables, plots.

`runtime.viewer.page` writes the page around them.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.core.append_log import AppendLog

from ..figures import WINDOW_HU

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What the columns of `organ_table` mean; only a CT has the demo's limit of the medians.
ORGAN_SENTENCES = (
    "Of all voxels of an organ together; in brackets that of the true images.",
    "Median and its error: is the organ as bright as it should be?{limit}",
    "IQR, the range of the middle half of the values: does the organ vary as it should?",
    "Texture: the standard deviation of what a Gaussian of 2 pixels takes away, in an organ's core;"
    " ratio: synthetic over true. 1 is right; the demo's limits are 0.5 and 2.",
)
# Between air and fat.
TISSUE_HU = -300


def figure(width: float, height: float) -> Figure:
    """Make an empty figure that needs no display and no global state.

    Args:
        width: In inches.
        height: In inches.

    Returns:
        The figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    empty = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(empty)
    return empty


def picture(drawn: Figure, alt: str, dpi: int = 110) -> str:
    """Write a figure as an <img> that holds its own PNG.

    Args:
        drawn: The figure.
        alt: Its description.
        dpi: Pixels per inch.

    Returns:
        HTML.
    """
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=dpi)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], texts: Collection[int] = (0,)) -> str:
    """Write an HTML table, which scrolls where the screen is too narrow for it.

    Args:
        head: The titles of the columns.
        rows: The cells, row by row.
        texts: The columns of words, which begin at the left; numbers end at the right.

    Returns:
        HTML.
    """

    def line(cells: Sequence[Any], tag: str) -> str:
        return (
            "<tr>"
            + "".join(
                f"<{tag}{' class=text' if n in texts else ''}>{html.escape(str(cell))}</{tag}>"
                for n, cell in enumerate(cells)
            )
            + "</tr>"
        )

    body = "".join(line(row, "td") for row in rows)
    return f"<div class=scroll><table>{line(head, 'th')}{body}</table></div>"


def organ_table(organs: Mapping[str, Mapping[str, Any] | None], unit: str) -> str:
    """Write the metrics of each organ, with what they mean.

    Args:
        organs: "organs" of the metrics.
        unit: The images' unit.

    Returns:
        HTML: a table, in which the true value stands in brackets, and a sentence for each column.
    """
    head = ("", f"median, {unit}", f"error, {unit}", f"IQR, {unit}", f"texture, {unit}", "ratio")
    rows = [
        (name, *(["absent"] + [""] * 4 if organ is None else _organ_cells(organ)))
        for name, organ in organs.items()
    ]
    limit = " The demo's limit is 40 HU." if unit == "HU" else ""
    sentences = [sentence.format(limit=limit) for sentence in ORGAN_SENTENCES]
    notes = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return table(head, rows) + f"<ul class=note>{notes}</ul>"


def _organ_cells(organ: Mapping[str, Any]) -> list[str]:
    """The cells of one organ."""

    def beside(key: str, digits: int) -> str:
        value, true = organ.get(key), organ.get(f"{key}_true")
        return f"{number(value, digits)} ({number(true, digits)})"

    return [
        beside("median", 0),
        number(organ.get("median_error"), 0, signed=True),
        beside("iqr", 0),
        beside("texture", 0),
        number(organ.get("texture_ratio"), 2),
    ]


def number(value: float | None, digits: int, *, signed: bool = False) -> str:
    """Write a metric for a person.

    Args:
        value: The metric; None or NaN where it was not measured.
        digits: Digits after the point.
        signed: Whether a plus is written.

    Returns:
        Text, "–" for None.
    """
    if value is None or value != value:
        return "–"
    return f"{value:{'+' if signed else ''}.{digits}f}"


def planes(
    labels: NDArray[Any],
    synthetic: NDArray[Any],
    truth: NDArray[Any],
    spacing: tuple[float, float, float],
    classes: int,
) -> Figure:
    """Draw axial, coronal and sagittal planes through the labels' centre.

    Each is drawn as condition | synthetic | true. Volumes are (D, H, W) with slices from inferior,
    rows from anterior, columns from the patient's right.

    Args:
        labels: Model indices.
        synthetic: HU.
        truth: HU.
        spacing: (x, y, z) in mm.
        classes: The number of labels, with the background.

    Returns:
        The figure.
    """
    view = _body_box(truth)
    volumes = [volume[view] for volume in (labels, synthetic, truth)]
    (depth, height, width), (x, y, z) = volumes[0].shape, spacing
    at = [
        round(float(np.median(axis))) if len(axis) else n // 2
        for axis, n in zip(np.nonzero(volumes[0]), (depth, height, width), strict=True)
    ]
    # The width of a column in inches.
    across = 3.6
    heights = [
        across * height * y / (width * x),
        across * depth * z / (width * x),
        across * depth * z / (height * y),
    ]
    drawn = figure(3 * across + 0.3, sum(heights) + 0.5)
    axes = drawn.subplots(3, 3, gridspec_kw={"height_ratios": heights})
    cuts = (("axial", 0, y / x), ("coronal", 1, z / x), ("sagittal", 2, z / y))
    looks: list[dict[str, Any]] = [
        {"cmap": "nipy_spectral", "vmin": 0, "vmax": classes - 1},
        *[{"cmap": "gray", "vmin": WINDOW_HU[0], "vmax": WINDOW_HU[1]}] * 2,
    ]
    for row, (name, axis, aspect) in zip(axes, cuts, strict=True):
        for panel, volume, look, title in zip(
            row, volumes, looks, ("condition", "synthetic", "true"), strict=True
        ):
            cut = np.take(volume, at[axis], axis)
            # The head is up.
            cut = cut if axis == 0 else cut[::-1]
            panel.imshow(cut, aspect=aspect, interpolation="nearest", **look)
            panel.set(xticks=[], yticks=[], title=title if axis == 0 else "")
        row[0].set_ylabel(name)
    return drawn


def _body_box(ct: NDArray[Any], margin: int = 4) -> tuple[slice, slice, slice]:
    """The part of a CT with tissue: all slices, and rows and columns with a margin in pixels."""
    # The table is in fewer than a fifth of the slices at any place, tissue is in more.
    tissue = (ct > TISSUE_HU).mean(0) > 0.2
    rows, columns = (np.flatnonzero(tissue.any(axis)) for axis in (1, 0))
    if not len(rows):
        return slice(None), slice(None), slice(None)
    return (
        slice(None),
        slice(max(0, rows[0] - margin), rows[-1] + margin + 1),
        slice(max(0, columns[0] - margin), columns[-1] + margin + 1),
    )


def curves(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the losses by step, and the held-out body error where it was measured.

    Args:
        lines: The lines of metrics.jsonl.

    Returns:
        The figure.
    """
    drawn = figure(11, 3.6)
    losses, held_out = drawn.subplots(1, 2)
    names = sorted({name for line in lines for name in line.get("losses", {})})
    for name in names:
        points = [
            (line["step"], line["losses"][name]) for line in lines if name in line.get("losses", {})
        ]
        losses.plot(*zip(*points, strict=True), label=name, linewidth=1)
    losses.set(title="training losses", xlabel="step", yscale="log")
    losses.legend(fontsize=8)
    bodies = [
        (line["step"], line["metrics"]["body"]["mae_ratio"])
        for line in lines
        if line.get("metrics", {}).get("body")
    ]
    held_out.plot(
        [s for s, _ in bodies],
        [ratio for _, ratio in bodies],
        "o-",
        color="black",
        label="body error / label means",
    )
    held_out.set(title="held-out patients", xlabel="step", ylim=(0, None))
    held_out.legend(fontsize=8)
    for axis in (losses, held_out):
        axis.grid(alpha=0.3)
    return drawn


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl.

    Args:
        path: The file.

    Returns:
        Its lines as JSON objects, without one that a kill cut short.
    """
    return AppendLog(path, checksums=False).read()
