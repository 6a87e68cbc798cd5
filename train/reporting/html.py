"""Write one self-contained HTML page: pictures as data URIs, tables, plots.

The page opens anywhere and needs no network.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.core.append_log import AppendLog
from runtime.core.atomic_files import write_text

from ..figures import WINDOW_HU

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Between air and fat.
TISSUE_HU = -300
_STYLE = """
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em;
        color: #1a1a1a; background: #fff }
 h1 { font-size: 1.6em; margin-bottom: .2em }
 h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ccc }
 table { border-collapse: collapse; margin: .8em 0; font-variant-numeric: tabular-nums }
 th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #e3e3e3 }
 th:first-child, td:first-child { text-align: left }
 th { border-bottom: 2px solid #999 } img { max-width: 100%; display: block; margin: .8em 0 }
 .note { color: #555 }
"""


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


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write an HTML table.

    Args:
        head: The titles of the columns.
        rows: The cells, row by row.

    Returns:
        HTML.
    """
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows
    )
    titles = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    return f"<table><tr>{titles}</tr>{cells}</table>"


def page(path: Path, title: str, lead: str, sections: Iterable[tuple[str, str]]) -> None:
    """Write a page.

    Args:
        path: The file.
        title: The page's title.
        lead: A line below it.
        sections: (heading, HTML) of each section.

    Raises:
        OutputError: The file cannot be written.
    """
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in sections)
    top = f"<h1>{html.escape(title)}</h1><p class=note>{html.escape(lead)}</p>"
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    write_text(path, f"<!doctype html><html lang=en>{head}{top}{body}</html>\n")


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
