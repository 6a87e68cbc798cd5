"""Plan from a survey: labels, modality, intensity range, canvas, neighbours and split."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.core.labels import PRESETS
from runtime.core.manifest import Intensity

from ..data.checks import check_intensity, read_image
from ..data.intensities import NORMALIZED
from ..data.pairs import Pair
from .survey import Intensities, Survey, label_values, labels_of_classes

# The key → its value, and why. Keys are written as for --set.
Choices = dict[str, tuple[Any, str]]

# The least and the most that the upper end of a range in HU is, and its step.
HU_LOW, HU_HIGH, HU_HIGHEST, HU_STEP = -1024, 1024, 3071, 128
# Images whose brightest percentiles differ by more than this factor have no unit in common.
SAME_UNIT = 1.5
# The longest side of a canvas, in pixels, without and with a CUDA device.
LONGEST_SIDE, LONGEST_SIDE_CUDA = 192, 320
# Neighbouring slices, how many of them an image must have, and their largest distance in mm.
NEIGHBOURS, LEAST_SLICES, MOST_APART = 5, 10, 24.0
# With data.context: the noise's share from each neighbouring slice, as thick slices of a scanner
# have it, and the most directions in which the contrast moves.
NOISE_ALONG_Z, MOST_DIRECTIONS = 0.3, 6
# Patients from which on some are kept to test on.
ENOUGH_TO_TEST = 10


def plan_data(survey: Survey, path: Path, stated: Mapping[str, Any], *, cuda: bool) -> Choices:
    """Plan everything that the data decide.

    Args:
        survey: The survey of the dataset.
        path: The dataset.
        stated: Overrides of the command line by key, which need no plan.
        cuda: Whether the network is trained on a CUDA device.

    Returns:
        The choices.

    Raises:
        InputError: A label map cannot be read; the dataset states CT, and its images are not in HU.
    """
    dense = stated.get("data.context") == "auto"
    return {
        **_name(survey, path),
        **({} if "data.labels" in stated else _labels(survey)),
        **_intensity(survey, stated),
        **_grid(survey, LONGEST_SIDE_CUDA if cuda else LONGEST_SIDE),
        **(_dense(survey) if dense else _neighbours(survey)),
        **_split(survey),
    }


def _name(survey: Survey, path: Path) -> Choices:
    """A plain name, as of a folder."""
    stated = survey.layout.name
    text = stated or (path.parent.name if path.is_file() else path.resolve().name)
    name = re.sub(r"[^\w.-]+", "-", text).strip("-.") or "model"
    return {"name": (name, "dataset.json states it" if stated else "the dataset's folder")}


def _labels(survey: Survey) -> Choices:
    """The labels that the dataset states, or the values of its label maps."""
    pairs, labels = survey.layout.pairs, survey.layout.labels
    if isinstance(labels, list):
        return {"data.labels": (labels, f"{len(labels) - 1} labels, as the dataset states")}
    if classes := labels_of_classes(pairs):
        return {"data.labels": (classes, "the names of the files of the classes")}
    values = label_values([pair for pair in pairs if not pair.label.is_dir()])
    preset = labels or "mm-whs"
    preset_values = PRESETS[preset].by_value
    # 0 and 1 are in many tables: only a value of its own shows a preset's.
    if {*values} <= {*preset_values} and (labels or max(values) > 200):
        return {"data.labels": (preset, f"the label maps hold values of {preset} alone")}
    rows = [{"name": "background", "value": 0}]
    rows += [{"name": f"label {value}", "value": value} for value in values if value]
    return {"data.labels": (rows, f"the values in {len(pairs)} label maps; give the names")}


def _intensity(survey: Survey, stated: Mapping[str, Any]) -> Choices:
    """Modality, unit, range and normalisation."""
    modality: str = survey.layout.modality
    own_intensity = any(key.split(".")[0] == "intensity" for key in stated)
    if modality == "CT" and not own_intensity:
        for pair in _not_in_hu(survey):
            check_intensity(pair.image, read_image(pair.image).values, Intensity("HU", -1024, 1024))
    if modality != "MR" and all(image.in_hu for image in survey.intensities):
        return _hounsfield(survey, modality)
    modality = modality or "other"
    says_modality = "the dataset states it" if survey.layout.modality else "no HU, none stated"
    lowest = min(image.low for image in survey.intensities)
    highest = max(image.high for image in survey.intensities)
    if modality == "MR" or not survey.integers or not _one_unit(survey.intensities):
        why = (
            "MR means something else in every image"
            if modality == "MR"
            else f"the images have no unit in common: {lowest:g} to {highest:g}"
        )
        ends, normalize = NORMALIZED, ("volume", why)
        why_range = "the 0.1 and 99.9 percentile of each image"
    else:
        if lowest >= 0 and highest <= 255:
            ends, why_range = (0, 255), f"8-bit greys: {lowest:g} to {highest:g}"
        else:
            ends = _pooled(survey.intensities)
            why_range = f"percentiles; the images hold {lowest:g} to {highest:g}"
        normalize = ("none", "all images have one unit")
    return {
        "data.modality": (modality, says_modality),
        "data.normalize": normalize,
        "intensity.unit": ("a.u.", "not Hounsfield units"),
        "intensity.low": (ends[0], why_range),
        "intensity.high": (ends[1], why_range),
    }


def _hounsfield(survey: Survey, modality: str) -> Choices:
    # Metal makes some images brighter than bone and contrast: they do not set the range of all.
    bright = float(np.percentile([image.bright for image in survey.intensities], 75))
    high = min(HU_HIGHEST, max(HU_HIGH, HU_STEP * math.ceil(bright / HU_STEP)))
    return {
        "data.modality": (
            "CT",
            "the dataset states it" if modality else "all images contain air in HU",
        ),
        "intensity.unit": ("HU", f"{len(survey.intensities)} images were read"),
        "intensity.low": (HU_LOW, "air and padding"),
        "intensity.high": (high, f"in 3 of 4 images 99.9 % of the body is below {bright:.0f} HU"),
    }


def _not_in_hu(survey: Survey) -> list[Pair]:
    """Real pairs of a CT dataset, if one of the images that were read is not in HU."""
    if all(image.in_hu for image in survey.intensities):
        return []
    return [pair for pair in survey.layout.pairs if not pair.synthetic]


def _one_unit(images: tuple[Intensities, ...]) -> bool:
    """Whether whole numbers of the same meaning are likely, within int16."""
    lows, highs = zip(*(image.percentiles for image in images), strict=True)
    spans = [high - low for low, high in zip(lows, highs, strict=True)]
    fits = min(lows) >= -32768 and max(highs) <= 32767
    byte = min(image.low for image in images) >= 0 and max(image.high for image in images) <= 255
    return byte or (fits and min(spans) > 0 and max(spans) / min(spans) <= SAME_UNIT)


def _pooled(images: tuple[Intensities, ...]) -> tuple[int, int]:
    """A range between the percentiles of all images."""
    return (
        math.floor(min(image.percentiles[0] for image in images)),
        math.ceil(max(image.percentiles[1] for image in images)),
    )


def _grid(survey: Survey, longest: int) -> Choices:
    """Spacing, canvas, depth of the network, and neighbouring slices."""
    spacings = [grid.spacing for grid in survey.grids if grid.spacing is not None]
    if not survey.spaced:
        sides = np.array([grid.sides for grid in survey.grids])
        extents = np.median(sides, axis=0) * min(1.0, longest / sides.max())
        spacing, why = None, "the images state none: each slice is fitted to the canvas"
        why_canvas = f"the median image has {' x '.join(f'{n:g}' for n in np.median(sides, 0))}"
    else:
        fields = np.array(
            [
                [side * mm for side, mm in zip(grid.sides, grid.spacing[1:], strict=True)]
                for grid in survey.grids
                if grid.spacing is not None
            ]
        )
        in_plane = np.array([spacing[1:] for spacing in spacings])
        median = float(np.median(in_plane))
        coarsest = float(fields.max()) / longest
        chosen = round(max(median, coarsest), 2)
        spacing = [chosen, chosen]
        why = f"median of {in_plane.min():.3g} to {in_plane.max():.3g} mm"
        if coarsest > median:
            why = f"coarser than the median {median:.3g} mm, for a canvas of {longest} pixels"
        extents = fields.max(axis=0) / chosen
        why_canvas = f"fields of view up to {fields.max():.0f} mm"
    step = 64 if max(extents) > 96 else 32
    canvas = [max(64, step * math.ceil(side / step)) for side in extents]
    depth = int(math.log2(step))
    return {
        "data.pixel_spacing": (spacing, why),
        "data.canvas": (canvas, why_canvas),
        "generator.depth": (depth, f"the canvas is halved {depth} times"),
    }


def _neighbours(survey: Survey) -> Choices:
    """How many slices the network sees, and their distance."""
    counts = [grid.slices for grid in survey.grids]
    if min(counts) < LEAST_SLICES or not survey.spaced:
        return {
            "data.slices": (1, f"images of {min(counts)} to {max(counts)} slices"),
            "data.slice_spacing": (None, "one slice"),
        }
    thickness = np.array([grid.spacing[0] for grid in survey.grids if grid.spacing is not None])
    height = float(np.median(np.array(counts) * thickness))
    apart = min(MOST_APART, max(float(np.median(thickness)), height / (2 * NEIGHBOURS)))
    return {
        "data.slices": (NEIGHBOURS, f"images of {min(counts)} to {max(counts)} slices"),
        "data.slice_spacing": (round(apart, 1), f"the median image is {height:.0f} mm high"),
    }


def _dense(survey: Survey) -> Choices:
    """What changes where every voxel has a class (data.context)."""
    trained = int(survey.patients * 0.8)
    directions = max(0, min(MOST_DIRECTIONS, trained - 1))
    return {
        "data.slices": (1, "the tissues around the labels say where a slice lies"),
        "data.slice_spacing": (None, "one slice"),
        "generator.style": (directions, "directions in which the contrast moves"),
        "generator.noise_along_z": (NOISE_ALONG_Z, "neighbouring slices share noise"),
    }


def _split(survey: Survey) -> Choices:
    """Shares of the patients, where the dataset states no split."""
    if any(pair.split for pair in survey.layout.pairs):
        return {}
    patients = survey.patients
    if patients < ENOUGH_TO_TEST:
        return {
            "data.train_ratio": (0.9, f"{patients} patients: one validates, nobody tests"),
            "data.valid_ratio": (0.1, "at least one patient"),
        }
    return {
        "data.train_ratio": (0.8, f"{patients} patients"),
        "data.valid_ratio": (0.1, "as many are kept to test on"),
    }
