"""What a comparison says: JSON, a table, one sentence and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.core.atomic_files import atomic_path

from .arms import ALL_REAL, REAL, SYNTHETIC, TABLE, WARP_JITTER, Arm
from .experiment import MEASURES, Results
from .statistics import Interval, Scores, difference, table_of

COMPARISONS = ((SYNTHETIC, TABLE), (SYNTHETIC, WARP_JITTER), ("real+both", WARP_JITTER))
MEASURE_TITLES = {"dice": "Dice", "surface_dice": "surface Dice"}
UNCHECKED = "; no more real patients: that the segmenters were trained enough was not checked"


def summarise(
    results: Results,
    arms: Mapping[str, Arm],
    seeds: Sequence[int],
    patients: Sequence[int],
    names: Sequence[str],
) -> dict[str, Any]:
    """Means and paired differences of every finished arm, and the verdict.

    Args:
        results: what was measured.
        arms: what was compared.
        seeds: that count.
        patients: numbers of the test patients.
        names: of the labels from 1.

    Returns:
        JSON data: `arms` by name, `comparisons` between two of them, `verdict`.
    """
    scores = {name: results.of(name, seeds, patients) for name in arms}
    scores = {name: rows for name, rows in scores.items() if rows}
    summary = {name: _arm_summary(name, arms[name].title, scores, names) for name in scores}
    comparisons = [
        {"arm": one, "minus": other, **_differences(scores[one], scores[other])}
        for one, other in COMPARISONS
        if one in scores and other in scores
    ]
    return {"arms": summary, "comparisons": comparisons, "verdict": verdict(scores)}


def _arm_summary(
    name: str,
    title: str,
    scores: Mapping[str, Scores],
    names: Sequence[str],
) -> dict[str, Any]:
    rows = scores[name]
    labels: dict[str, Any] = {label: {} for label in names}
    summary: dict[str, Any] = {"title": title, "seeds": len({seed for seed, _ in rows})}
    for measure in MEASURES:
        summary[measure] = _mean_of(rows, measure)
        for index, label in enumerate(names, 1):
            labels[label][measure] = _mean_of(rows, measure, index)
    if name != REAL and REAL in scores:
        summary["minus_real"] = _differences(rows, scores[REAL])
        for index, label in enumerate(names, 1):
            labels[label]["minus_real"] = _differences(rows, scores[REAL], index)
    return {**summary, "labels": labels}


def _mean_of(rows: Scores, measure: str, label: int | None = None) -> float | None:
    values = table_of(rows, measure, label)
    return None if np.isnan(values).all() else round(float(np.nanmean(values)), 4)


def _differences(one: Scores, other: Scores, label: int | None = None) -> dict[str, Any]:
    intervals = {measure: difference(one, other, measure, label) for measure in MEASURES}
    return {measure: value and value.to_json() for measure, value in intervals.items()}


def verdict(scores: Mapping[str, Scores], arm: str = SYNTHETIC) -> str:
    """One sentence on what the images of `arm` do for the segmenter's Dice.

    Args:
        scores: of every arm.
        arm: real images and what is added to them.
    """
    if REAL not in scores or arm not in scores:
        return f"Nothing can be said: the arms {REAL} and {arm} are not both finished."
    gain = difference(scores[arm], scores[REAL], "dice")
    if gain is None:
        return f"Nothing can be said: {REAL} and {arm} share no finished seed."
    if problem := _undertrained(scores):
        return problem
    doubt = "" if ALL_REAL in scores else UNCHECKED
    return f"{_effect(gain)}{_control(scores, arm)}{_one_seed(gain)}{doubt}."


def _undertrained(scores: Mapping[str, Scores]) -> str:
    """Why nothing can be concluded, or nothing: more real patients must make a segmenter better."""
    if ALL_REAL not in scores:
        return ""
    more = difference(scores[ALL_REAL], scores[REAL], "dice", these_seeds=True)
    if more is not None and more.low > 0:
        return ""
    result = "was not compared with" if more is None else f"adds {_spell(more)} over"
    return (
        f"Nothing can be concluded: training on all real patients {result} training on few, "
        "so the segmenters are undertrained, or more images cannot help here; "
        "raise --budget (or --steps), or add test patients and seeds."
    )


def _effect(gain: Interval) -> str:
    if gain.low > 0:
        return f"The synthetic images add {_spell(gain)} Dice: worth it"
    if gain.high < 0:
        return f"The synthetic images change Dice by {_spell(gain)}: leave them out"
    possible = f"{gain.low:+.3f} to {gain.high:+.3f} could have been"
    return f"No difference seen ({gain.mean:+.3f} Dice); {possible}"


def _control(scores: Mapping[str, Scores], arm: str) -> str:
    """What does as well without a network."""
    if arm != SYNTHETIC or WARP_JITTER not in scores:
        return ""
    free = difference(scores[WARP_JITTER], scores[REAL], "dice")
    ahead = difference(scores[arm], scores[WARP_JITTER], "dice")
    if free is None or ahead is None or free.low <= 0 or ahead.low > 0:
        return ""
    return f"; deforming the real images, without a network, adds {_spell(free)}"


def _one_seed(gain: Interval) -> str:
    if len(gain.by_seed) > 1:
        return ""
    return "; one seed alone: another draw of training patients may say otherwise"


def _spell(value: Interval) -> str:
    return f"{value.mean:+.3f} ({value.low:+.3f} to {value.high:+.3f})"


def text_table(summary: Mapping[str, Any], names: Sequence[str]) -> str:
    """A Markdown table of all arms: means, differences with intervals, and each label's Dice."""
    rows = [
        ["trained on", "Dice", "minus real", "surface Dice", "minus real", *names],
        ["---"] * (5 + len(names)),
    ]
    for arm in summary["arms"].values():
        cells = [arm["title"]]
        for measure in MEASURES:
            cells += [_number(arm[measure]), _cell(arm.get("minus_real", {}).get(measure))]
        rows.append([*cells, *(_number(arm["labels"][name]["dice"]) for name in names)])
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    padded = ([c.ljust(width) for c, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _cell(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:+.3f} ({value['low']:+.3f} to {value['high']:+.3f})"


def draw(path: Path, summary: Mapping[str, Any], title: str) -> None:
    """Write a PNG: every arm's difference to the real images, its interval and its seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = [arm for arm in summary["arms"].values() if "minus_real" in arm]
    figure = Figure(figsize=(10, 1.4 + 0.45 * max(len(arms), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(MEASURE_TITLES), sharey=True, squeeze=False)[0]
    for axis, (measure, measure_title) in zip(axes, MEASURE_TITLES.items(), strict=True):
        axis.axvline(0, color="grey", linewidth=1)
        for place, arm in enumerate(arms):
            value = arm["minus_real"][measure]
            if value is None:
                continue
            axis.plot([value["low"], value["high"]], [place, place], color="tab:blue", linewidth=2)
            axis.plot(value["mean"], place, "o", color="tab:blue")
            seeds = value["by_seed"]
            axis.plot(seeds, [place] * len(seeds), "|", color="black", markersize=9)
        axis.set_xlabel(
            f"{measure_title}, difference to real",
        )
        axis.grid(axis="x", alpha=0.3)
        axis.locator_params(axis="x", nbins=6)
    axes[0].set_yticks(range(len(arms)), [arm["title"] for arm in arms])
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=10)
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=110)
