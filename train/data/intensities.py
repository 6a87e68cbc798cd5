"""Intensities against the range that is trained on: mapped to it per volume, and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.core.errors import InputError, UsageError
from runtime.core.manifest import Intensity

from .pairs import Pair

if TYPE_CHECKING:
    from .checks import Facts

# What `normalized` maps to the ends of the range, in percent of an image's voxels.
PERCENTILES = (0.1, 99.9)
# Images that fill less of the range lose their contrast to rounding and to the network's noise.
LEAST_USED = 0.05
# Integers between the lowest and the highest intensity that a range without normalisation needs.
LEAST_STEPS = 64
# The range of normalised images.
NORMALIZED = (0, 1000)
# The most patients that an error lists.
SHOWN = 8


def normalized(values: NDArray[Any], intensity: Intensity) -> NDArray[np.float32]:
    """Map the percentiles of one image linearly to the ends of the intensity range.

    Args:
        values: Finite intensities, any shape.
        intensity: The intensity range.

    Returns:
        float32 of the same shape; values beyond the percentiles are beyond the range.
    """
    low, high = np.percentile(values, PERCENTILES)
    if low == high:
        # Nearly all voxels are alike, such as around a small object.
        low, high = float(values.min()), float(values.max())
    scale = (intensity.high - intensity.low) / (high - low) if high > low else 0.0
    mapped: NDArray[np.float32] = (values.astype(np.float32) - np.float32(low)) * np.float32(scale)
    mapped += np.float32(intensity.low)
    return mapped


def suggested_setting(low: float, high: float) -> str:
    """Write the option that trains on images which hold intensities from `low` to `high`.

    Args:
        low: The lowest intensity.
        high: The highest one.

    Returns:
        `--set` with values in quotes for a shell.
    """
    ends = math.floor(low), math.ceil(high)
    if high - low >= LEAST_STEPS and ends[0] >= -32768 and ends[1] <= 32767:
        return f"--set 'intensity={_section(*ends)}'"
    # Floats, or counts beyond int16: a range of their own has no integers to state it.
    return f"--set 'intensity={_section(*NORMALIZED)}' data.normalize=volume"


def refuse_unused_range(file: Path | None, low: float, high: float, intensity: Intensity) -> None:
    """Refuse images that fill a small part of the range, such as floats of 0 to 3.6 in 0 to 1000.

    Args:
        file: The image; None for all of them.
        low: The lowest intensity.
        high: The highest one.
        intensity: The intensity range.

    Raises:
        InputError: The images fill less than `LEAST_USED` of the range.
    """
    share = (high - low) / (intensity.high - intensity.low)
    if intensity.unit == "HU" or low == high or share >= LEAST_USED:
        return
    raise InputError(
        f"{file.name if file else 'the images'} hold{'s' if file else ''} values from {low:g} to"
        f" {high:g} {intensity.unit}, {share:.1%} of the range that is trained on",
        expected=f"values that fill {intensity.low} to {intensity.high}",
        remedy=suggested_setting(low, high),
        file=file,
    )


def check_range(
    pairs: Sequence[Pair], facts: Sequence[Facts], intensity: Intensity, max_clipped: float
) -> None:
    """Refuse a range that clips too many voxels, or that all images together hardly use.

    Args:
        pairs: The pairs of files.
        facts: Their facts.
        intensity: The intensity range.
        max_clipped: The largest accepted share of clipped voxels.

    Raises:
        UsageError: More voxels are clipped.
        InputError: The images fill too little of the range.
    """
    if not facts:
        return
    low, high = min(f.low for f in facts), max(f.high for f in facts)
    refuse_unused_range(None, low, high, intensity)
    counts = [sum(f.voxels.values()) for f in facts]
    # In HU, air and padding below the range are background in any case.
    is_hu = intensity.unit == "HU"
    clipped = [f.above + (0 if is_hu else f.below) for f in facts]
    share = sum(clipped) / sum(counts)
    if share <= max_clipped:
        return
    worst = sorted(zip(clipped, counts, pairs, strict=True), key=lambda row: -row[0] / row[1])
    rows = [
        f"    {pair.image.name}: {n / count:.1%} clipped" for n, count, pair in worst[:SHOWN] if n
    ]
    if is_hu:
        setting = f"--set intensity.high={min(32767, math.ceil(high))}"
    else:
        section = _section(*NORMALIZED)
        setting = (
            f"{suggested_setting(low, high)}, or, where intensities differ by scanner as in MR,"
            f" --set 'intensity={section}' data.normalize=volume"
        )
    raise UsageError(
        f"{share:.1%} of all voxels lie outside the range that is trained on,"
        f" {intensity.low} to {intensity.high} {intensity.unit}:",
        rows=rows,
        expected=f"at most {max_clipped:.1%}; the images hold {low:g} to {high:g}",
        remedy=f"{setting}; if it is meant, --set data.max_clipped=1",
    )


def _section(low: int, high: int) -> str:
    """The section `intensity` of a config, as JSON."""
    return json.dumps({"unit": "a.u.", "low": low, "high": high})
