"""Write the report of a training: its course, its images now, and its metrics beside real ones."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import METRICS, RUN
from ..metrics.quality_table import COLUMNS, LEGEND, SENTENCES
from ..metrics.quality_table import rows as quality_rows
from .html import curves, page, picture, read_metrics, table

REPORT = "report.html"
# The number of validation figures in the report, with the first and the last one.
FIGURES_SHOWN = 4


def write(folder: Path) -> Path:
    """Write RUN/report.html from run.json, metrics.jsonl and figures/ of a finished run.

    Args:
        folder: The run folder.

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
        (
            "Condition | generated | original, as training went",
            "".join(_image(path) for path in reversed(chosen)),
        ),
        ("Verdict", _verdict(run, folder)),
        ("Beside the class table and real patients", quality_section(run)),
        ("Training", picture(curves(lines), "training curves")),
        ("Held-out patients", _organs(metrics) + _images(metrics)),
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


def _organs(metrics: Mapping[str, Any]) -> str:
    """The table of each organ's metrics."""
    keys = (
        "median",
        "median_true",
        "median_error",
        "iqr",
        "iqr_true",
        "texture_ratio",
        "wasserstein",
    )
    between = metrics.get("ceiling", {}).get("organs", {})
    styles = metrics.get("diversity", {}).get("organs", {})
    rows = []
    for name, organ in metrics["organs"].items():
        if organ is not None:
            real_baseline, spread = between.get(name, {}).get("wasserstein"), styles.get(name, {})
            more = (real_baseline, spread.get("spread"), spread.get("spread_true"))
            rows.append((name, *(_number(organ[key]) for key in keys), *map(_number, more)))
    head = (
        "pooled",
        "median",
        "true",
        "error",
        "IQR",
        "true",
        "texture ratio",
        "W1",
        "W1 real-real",
        "spread over styles",
        "between patients",
    )
    return table(head, rows)


def _images(metrics: Mapping[str, Any]) -> str:
    """The table of the metrics of whole images."""
    rows = [
        (f"body: {key.replace('_', ' ')}", _number(value))
        for key, value in (metrics["body"] or {}).items()
    ]
    rows += [
        (key.replace("_", "-").upper(), _number(value))
        for key, value in metrics["similarity"].items()
    ]
    for what, alike in (
        ("over styles", metrics.get("diversity")),
        ("between patients", metrics.get("ceiling", {}).get("similarity")),
    ):
        if alike:
            rows.append((f"MS-SSIM {what}", _number(alike["ms_ssim"])))
    if real := metrics.get("ceiling"):
        rows.append(("body: z difference, real-real", _number(real["body"]["z_difference"])))
    return table(("", ""), rows)


def _number(value: float | None) -> str:
    """A metric for a person, "–" for None."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 20 else f"{value:.2f}"


def _image(path: Path) -> str:
    """An image file as an <img>."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'
