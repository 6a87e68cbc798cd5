"""Write the report of a training: its course, its images now, and its metrics beside real ones."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.viewer.page import page

from ..checkpoint import METRICS, RUN
from ..metrics.quality_table import COLUMNS, LEGEND, SENTENCES
from ..metrics.quality_table import rows as quality_rows
from .html import curves, number, organ_table, picture, read_metrics, table

REPORT = "report.html"
# The number of validation figures in the report, with the first and the last one.
FIGURES_SHOWN = 4


def write(folder: Path, viewer: str = "") -> Path:
    """Write RUN/report.html from run.json, metrics.jsonl and figures/ of a finished run.

    Args:
        folder: The run folder.
        viewer: HTML that shows the held-out slices.

    Returns:
        The report.

    Raises:
        OutputError: The report cannot be written.
    """
    run = json.loads((folder / RUN).read_text(encoding="utf-8"))
    lines, figures = read_metrics(folder / METRICS), sorted((folder / "figures").glob("step-*.png"))
    last = len(figures) - 1
    numbers = sorted({round(last * n / (FIGURES_SHOWN - 1)) for n in range(FIGURES_SHOWN)})
    chosen = [figures[n] for n in numbers] if figures else []
    metrics = run["metrics"]
    sections = [
        *([("Held-out slices", viewer)] if viewer else []),
        (
            "Condition | generated | original, as training went",
            "".join(_image(path) for path in reversed(chosen)),
        ),
        ("Verdict", _verdict(run, folder)),
        ("Beside the class table and real patients", quality_section(run)),
        ("Training", picture(curves(lines), "training curves")),
        ("Held-out patients", _organs(run) + _images(metrics)),
        (
            "Data",
            table(
                ("split", "patients", "slices"),
                [(s, n, run["data"]["slices"][s]) for s, n in run["data"]["patients"].items()],
            ),
        ),
        ("Config", f"<pre>{html.escape(json.dumps(run['config'], indent=1))}</pre>"),
    ]
    path = folder / REPORT
    page(
        path,
        f"Training {run['name']}",
        f"{run['step']} steps. Synthetic images, not for diagnosis.",
        sections,
    )
    return path


def _verdict(run: Mapping[str, Any], folder: Path) -> str:
    """The verdict with what it rests on, and the worst slice of a broken training."""
    verdict = run.get("verdict")
    if verdict is None:
        return ""
    texts = "".join(f"<li>{html.escape(finding['text'])}</li>" for finding in verdict["findings"])
    worst = folder / "figures" / "worst.png"
    worst_image = _image(worst) if verdict["verdict"] == "broken" and worst.is_file() else ""
    return f"<p><b>{html.escape(verdict['verdict'])}</b></p><ul>{texts}</ul>{worst_image}"


def quality_section(result: Mapping[str, Any], unit: str | None = None) -> str:
    """Write the figures of train/metrics/quality.py as a table with its legend.

    Args:
        result: JSON data with "quality".
        unit: The images' unit; None: that of "intensity" in `result`.

    Returns:
        HTML.
    """
    quality = result.get("quality")
    if quality is None:
        return "<p class=note>Not measured.</p>"
    unit = unit or str(result.get("intensity", {}).get("unit", "HU"))
    head = ("", *(title for key, title in COLUMNS.items() if key in quality))
    notes = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in SENTENCES.values())
    legend = f"<p class=note>{html.escape(LEGEND)}</p><ul class=note>{notes}</ul>"
    return legend + table(head, quality_rows(quality, unit))


def _organs(run: Mapping[str, Any]) -> str:
    """The metrics of each organ, and how much they differ between patients and styles."""
    metrics = run["metrics"]
    between = metrics.get("ceiling", {}).get("organs", {})
    styles = metrics.get("diversity", {}).get("organs", {})
    rows = []
    for name, organ in metrics["organs"].items():
        if organ is not None:
            spread = styles.get(name, {})
            values = (
                organ["wasserstein"],
                between.get(name, {}).get("wasserstein"),
                spread.get("spread"),
                spread.get("spread_true"),
            )
            rows.append((name, *map(_number, values)))
    head = ("", "W1", "W1 real-real", "spread over styles", "between patients")
    notes = (
        "W1, the Wasserstein distance of an organ's values to the true ones; real-real: that"
        " between training and held-out patients, which no synthesis should be expected to beat."
        " Spread: the standard deviation of the organ's median, over a model's styles and between"
        " patients; only a model with styles has one."
    )
    unit = str(run.get("intensity", {}).get("unit", "HU"))
    return (
        organ_table(metrics["organs"], unit)
        + table(head, rows)
        + f"<p class=note>{html.escape(notes)}</p>"
    )


# Of a whole image: the key in the metrics, its name for people, what it tells.
_BODY = (
    ("mae", "error in the body", "Mean absolute error."),
    ("mae_label_mean", "error of label means", "That of an image of each label's true mean."),
    ("mae_ratio", "their ratio", "Below 1 it beats the label means; the demo's limit is 0.5."),
    ("z_difference", "step between slices", "W1 to the true steps: do slices join as they should?"),
    ("z_error", "step in its place", "Mean error of the step from slice to slice, voxel by voxel."),
    ("outline_step", "outline step, px", "How far the body's outline jumps between slices (true)."),
)
_SIMILARITY = (
    ("ssim", "SSIM", "Likeness to the true image; 1 is equal."),
    ("ms_ssim", "MS-SSIM", "The same on several scales."),
)


def _images(metrics: Mapping[str, Any]) -> str:
    """The metrics of whole images, with a sentence each."""
    body, similar = metrics["body"] or {}, metrics["similarity"]
    rows = [(name, _number(body[key]), what) for key, name, what in _BODY if key in body]
    if "outline_step" in body:
        name, value, what = rows[-1]
        rows[-1] = (name, f"{value} ({_number(body['outline_step_true'])})", what)
    rows += [
        (name, _number(similar[key]), what) for key, name, what in _SIMILARITY if key in similar
    ]
    for where, alike in (
        ("over styles", metrics.get("diversity")),
        ("between patients", metrics.get("ceiling", {}).get("similarity")),
    ):
        if alike:
            what = "How alike images are that should differ."
            rows.append((f"MS-SSIM {where}", _number(alike["ms_ssim"]), what))
    if real := metrics.get("ceiling"):
        value = _number(real["body"]["z_difference"])
        rows.append(("step between slices, real-real", value, "Between real patients."))
    return table(("whole images", "", "what it tells"), rows, texts=(0, 2))


def _number(value: float | None) -> str:
    """A metric for a person, "–" for None."""
    return number(value, 0 if value is not None and abs(value) >= 20 else 2)


def _image(path: Path) -> str:
    """An image file as an <img>."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'
