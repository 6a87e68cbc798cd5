"""The verdict on a training: good, weak or broken, by limits on measured figures.

A loss and an error share hardly move when one label's noise explodes or a label sticks to the end
of the range. The limits below look at each label. They are set between trainings that a person
called fine and two that broke (docs/decisions/0038-a-training-ends-with-a-verdict.md).

A training of fewer than `LEAST_STEPS` steps is a trial of the commands, not a model: it is not
assessed, and says so.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from runtime.core.errors import Mask2CTError

LEAST_STEPS = 200
GOOD, WEAK, BROKEN, NOT_ASSESSED = "good", "weak", "broken", "not assessed"


class BrokenModel(Mask2CTError):
    """A training ended with images that no one can use; they are measured, kept and named."""


class WeakModel(Mask2CTError):
    """A model has weaknesses that its user must accept before it is exported."""

    exit_code = 1


class Limit(NamedTuple):
    """The limits of one measure: at `weak` and at `broken`; None: it cannot be broken."""

    weak: float
    broken: float | None
    unit: str = ""


# Texture of a label over its real texture, and the same for too little of it.
TEXTURE, FLAT = Limit(1.5, 2.0), Limit(0.5, 0.1)
# A label's interquartile range over the real one. Partial volumes at blurred edges widen it.
IQR = Limit(2.0, 4.0)
# % of a label's voxels at the upper end of the range, beyond the real ones.
CLIPPED = Limit(0.1, 1.0, " %")
# W1 of gradients over that between real and real.
GRADIENT = Limit(5.0, 20.0)
# Fréchet distance over the class table's.
FRECHET = Limit(1.0, None)
# Distance to training slices over that to held-out ones (too small), and % of copied slices.
MEMORY, COPIES = Limit(0.7, None), Limit(0.5, 5.0, " %")


class Finding(NamedTuple):
    """One figure beyond a limit.

    Attributes:
        level: "weak" or "broken".
        text: A sentence with the figure and its limit.
        label: The label it concerns, or None.
    """

    level: str
    text: str
    label: str | None = None


def assess(quality: Mapping[str, Any] | None, steps: int) -> dict[str, Any]:
    """Compare the figures of `train.metrics.quality` with the limits.

    Args:
        quality: The figures; None where they were not measured.
        steps: Steps trained.

    Returns:
        JSON data: "verdict", "steps", and "findings" with "level", "text" and "label", the worst
        first.
    """
    if quality is None or steps < LEAST_STEPS:
        text = f"{steps} steps: fewer than {LEAST_STEPS} are a trial, whose images nobody assessed"
        finding = Finding(NOT_ASSESSED, text)
        return {"verdict": NOT_ASSESSED, "steps": steps, "findings": [finding._asdict()]}
    findings = sorted(_findings(quality), key=lambda finding: finding.level != BROKEN)
    verdict = findings[0].level if findings else GOOD
    return {
        "verdict": verdict,
        "steps": steps,
        "findings": [finding._asdict() for finding in findings],
    }


def _findings(quality: Mapping[str, Any]) -> Iterator[Finding]:
    synthetic, real, table = (quality[key] for key in ("synthetic", "real", "table"))
    for name, organ in synthetic["organs"].items():
        if organ is None:
            continue
        yield from _above("its noise over the real one", organ["texture_ratio"], TEXTURE, name)
        yield from _below("its noise over the real one", organ["texture_ratio"], FLAT, name)
        yield from _above("its IQR over the real one", organ["iqr_ratio"], IQR, name)
        excess = organ["clipped"] - organ["clipped_true"]
        yield from _above("voxels at the end of the range", excess, CLIPPED, name)
    between = real["gradient"]
    if between:
        ratio = synthetic["gradient"] / between
        yield from _above("W1 of gradients over real-vs-real", ratio, GRADIENT)
    if synthetic["frechet"]["axial"] is not None and table["frechet"]["axial"]:
        ratio = synthetic["frechet"]["axial"] / table["frechet"]["axial"]
        yield from _above("Fréchet distance over the class table's", ratio, FRECHET)
    memory = quality["memory"]
    yield from _below("distance to training slices over held-out", memory["ratio"], MEMORY)
    yield from _above("slices copied", 100 * memory["copies"] / memory["slices"], COPIES)


def _above(what: str, value: float | None, limit: Limit, label: str | None = None) -> Iterator[Any]:
    return _beyond(what, value, limit, label, operator.gt)


def _below(what: str, value: float | None, limit: Limit, label: str | None = None) -> Iterator[Any]:
    return _beyond(what, value, limit, label, operator.lt)


def _beyond(
    what: str, value: float | None, limit: Limit, label: str | None, beyond: Any
) -> Iterator[Finding]:
    """The finding of one measure, if it is beyond its limit."""
    if value is None:
        return
    is_broken = limit.broken is not None and beyond(value, limit.broken)
    if not is_broken and not beyond(value, limit.weak):
        return
    passed = limit.broken if is_broken else limit.weak
    where = f"{label}: " if label else ""
    text = f"{where}{what} is {value:.3g}{limit.unit} (limit {passed:g}{limit.unit})"
    yield Finding(BROKEN if is_broken else WEAK, text, label)


def summary(verdict: Mapping[str, Any]) -> str:
    """Write a verdict on one line.

    Args:
        verdict: `assess`.

    Returns:
        The line.
    """
    texts = "; ".join(finding["text"] for finding in verdict["findings"])
    return f"verdict: {verdict['verdict']}" + (f" ({texts})" if texts else "")
