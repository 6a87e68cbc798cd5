"""One self-contained HTML page: pictures as data URIs, tables, plots; opens anywhere, needs no
network.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.core.atomic_files import write_text

from ..figures import WINDOW_HU

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TISSUE_HU = -300  # between air and fat
_STYLE = """
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #1a1a1a; background: #fff }
 h1 { font-size: 1.6em; margin-bottom: .2em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ccc }
 table { border-collapse: collapse; margin: .8em 0; font-variant-numeric: tabular-nums }
 th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #e3e3e3 } th:first-child, td:first-child { text-align: left }
 th { border-bottom: 2px solid #999 } img { max-width: 100%; display: block; margin: .8em 0 } .note { color: #555 }
"""


def figure(width: float, height: float) -> Figure:
    """An empty figure (inches) that needs no display and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def picture(drawn: Figure, alt: str, dpi: int = 110) -> str:
    """The figure as an <img> that holds its own PNG."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=dpi)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows
    )
    return (
        "<table><tr>"
        + "".join(f"<th>{html.escape(h)}</th>" for h in head)
        + f"</tr>{cells}</table>"
    )


def page(path: Path, title: str, lead: str, sections: Iterable[tuple[str, str]]) -> None:
    """Write the page: sections are (heading, HTML). Raises `OutputError`."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in sections)
    top = f"<h1>{html.escape(title)}</h1><p class=note>{html.escape(lead)}</p>"
    write_text(
        path,
        "<!doctype html><html lang=en><meta"
        f" charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>{top}{body}</html>\n",
    )


def planes(
    labels: NDArray[Any],
    synthetic: NDArray[Any],
    truth: NDArray[Any],
    spacing: tuple[float, float, float],
    classes: int,
) -> Figure:
    """Axial, coronal and sagittal cuts through the labels' centre, each as condition | synthetic |
    true.

    Volumes (D, H, W) with slices from inferior, rows from anterior, columns from the patient's
    right; `spacing` (x, y, z) mm.
    """
    view = _body_box(truth)
    volumes = [volume[view] for volume in (labels, synthetic, truth)]
    (depth, height, width), (x, y, z) = volumes[0].shape, spacing
    at = [
        round(float(np.median(axis))) if len(axis) else n // 2
        for axis, n in zip(np.nonzero(volumes[0]), (depth, height, width), strict=True)
    ]
    across = 3.6  # inches of a column
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
            panel.imshow(
                cut if axis == 0 else cut[::-1], aspect=aspect, interpolation="nearest", **look
            )  # the head is up
            panel.set(xticks=[], yticks=[], title=title if axis == 0 else "")
        row[0].set_ylabel(name)
    return drawn


def _body_box(ct: NDArray[Any], margin: int = 4) -> tuple[slice, slice, slice]:
    """All slices, and the rows and columns where tissue is, with a margin in pixels; air alone
    is not worth its place.
    """
    tissue = (ct > TISSUE_HU).mean(0) > 0.2  # of the slices: the table is thinner than that
    rows, columns = (np.flatnonzero(tissue.any(axis)) for axis in (1, 0))
    if not len(rows):
        return slice(None), slice(None), slice(None)
    return (
        slice(None),
        slice(max(0, rows[0] - margin), rows[-1] + margin + 1),
        slice(max(0, columns[0] - margin), columns[-1] + margin + 1),
    )


def curves(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss terms by step, and the held-out body error where it was measured; `lines` of
    metrics.jsonl.
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
    """The lines of metrics.jsonl."""
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
