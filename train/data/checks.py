"""Check the data before the first step: a table for a person, an error where it cannot work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.core.errors import (
    GeometryError,
    InputError,
    UnknownLabels,
    UnreadableVolume,
    UsageError,
    reading,
)
from runtime.core.labels import overlay, to_indices
from runtime.core.manifest import Intensity, LabelTable
from runtime.core.volume import Geometry, LabelVolume, Volume
from runtime.io.readers.volume import as_integers, from_sitk, read_volume, simpleitk

from .class_folders import read_class_folder
from .intensities import normalized, refuse_unused_range, suggested_setting
from .pairs import Pair
from .pictures import is_picture, read_picture

# Every CT of a body contains values below this.
AIR_HU = -200
# Metal, in scanners with an extended range.
HIGHEST_HU = 32767
# Between the corners of an image's grid and those of its label map's.
GRID_TOLERANCE_MM = 1e-3
# The most unusable patients that one error lists.
SHOWN = 8
# DICOM PixelSpacing and ImagePositionPatient.
_SPACING, _POSITION = "0028|0030", "0020|0032"


@dataclass(frozen=True)
class Facts:
    """What the files of one patient hold.

    Attributes:
        spacing: In mm along i, j, k.
        low: The lowest intensity.
        high: The highest intensity.
        below: Voxels below the intensity range, which training clips.
        above: Voxels above it.
        voxels: The number of voxels by label value, as in the file.
    """

    spacing: tuple[float, float, float]
    low: float
    high: float
    below: int
    above: int
    voxels: Mapping[int, int]

    def to_json(self) -> dict[str, Any]:
        """Write the facts as JSON data.

        `voxels` becomes a list of pairs, since JSON's keys are strings.

        Returns:
            JSON data.
        """
        return {**vars(self), "voxels": [*self.voxels.items()]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Facts:
        """Read what `to_json` returned.

        Args:
            data: JSON data.

        Returns:
            The facts.
        """
        return cls(**{**data, "spacing": tuple(data["spacing"]), "voxels": dict(data["voxels"])})


def read_pair(
    pair: Pair, table: LabelTable, intensity: Intensity, *, spaced: bool = False
) -> tuple[LabelVolume, Volume, Facts]:
    """Read and check one pair.

    Args:
        pair: The files.
        table: The label table.
        intensity: The intensity range.
        spaced: Whether the grid is needed in mm, so that a DICOM slice must state its pixel
            spacing.

    Returns:
        Labels in model indices, the image, and the facts.

    Raises:
        InputError: A file cannot be used for training.
    """
    image = read_image(pair.image, spaced=spaced)
    _refuse_not_finite(pair.image, image.values)
    if pair.normalize:
        image = replace(image, values=normalized(image.values, intensity))
    check_intensity(pair.image, image.values, intensity)
    labels, geometry, voxels = _read_labels(pair, table, image, spaced=spaced)
    placed = all(
        path.suffix.lower() != ".dcm" or _states(path, _POSITION)
        for path in (pair.image, pair.label)
    )
    _check_same_grid(pair, labels.shape, geometry, image, placed=placed)
    facts = Facts(
        image.geometry.spacing,
        float(image.values.min()),
        float(image.values.max()),
        int((image.values < intensity.low).sum()),
        int((image.values > intensity.high).sum()),
        voxels,
    )
    return LabelVolume(labels, image.geometry), image, facts


def _read_labels(
    pair: Pair, table: LabelTable, image: Volume, *, spaced: bool
) -> tuple[NDArray[np.uint8], Geometry, dict[int, int]]:
    """The label map in model indices, its grid, and its voxels by label value in the file."""
    if pair.label.is_dir():
        layers = read_class_folder(pair.label, table)
        if layers is None:
            # None of its classes is in the table: everything is background.
            empty = np.zeros(image.values.shape, np.uint8)
            return empty, image.geometry, {table.labels[0].value: empty.size}
        order = [label.name for label in table.labels[1:]]
        indices = overlay(layers, table, order=order, file=pair.label)
        values = {n: label.value for n, label in enumerate(table.labels)}
        return indices, layers.geometry, {values[n]: c for n, c in _count(indices).items()}
    raw = read_image(pair.label, spaced=spaced, labels=True)
    numbers = as_integers(raw.values, pair.label)
    _check_same_grid(pair, numbers.shape, raw.geometry, image, placed=False)
    try:
        # `force` skips the check for grey values: they are not in a table of labels anyway.
        indices = to_indices(numbers, table, force=True, file=pair.label)
    except UnknownLabels as exc:
        exc.remedy = (
            "add the value to data.labels (as a label, or among the aliases of one), or correct the"
            " label map; where the value is nnU-Net's ignore, complete the label map or take the"
            " patient out"
        )
        raise
    return indices, raw.geometry, _count(numbers)


def read_image(path: Path, *, spaced: bool = False, labels: bool = False) -> Volume:
    """Read a volume, a picture, or one DICOM slice as (1, H, W), rescaled by its header.

    Args:
        path: The file.
        spaced: Whether a DICOM slice must state its pixel spacing; a picture cannot.
        labels: Whether the file is a label map.

    Returns:
        The volume.

    Raises:
        InputError: The file cannot be read, or is not one slice.
    """
    if is_picture(path):
        if spaced:
            raise GeometryError(
                f"{path.name} is a picture, which states no pixel spacing",
                expected="volumes or DICOM, since data.pixel_spacing is set",
                remedy="--set data.pixel_spacing=null: each slice is then fitted to the canvas",
                file=path,
            )
        return read_picture(path, labels=labels)
    if path.suffix.lower() != ".dcm":
        return read_volume(path)
    expected = "one DICOM slice of one channel"
    with reading(path, expected):
        image = simpleitk().ReadImage(str(path), imageIO="GDCMImageIO")
    if image.GetDimension() != 3 or image.GetSize()[2] != 1:
        raise UnreadableVolume(
            f"{path.name} holds {image.GetSize()} voxels",
            expected=expected,
            remedy="split it into slices",
            file=path,
        )
    if spaced and not image.HasMetaDataKey(_SPACING):
        raise GeometryError(
            f"{path.name} states no pixel spacing",
            expected="PixelSpacing, since data.pixel_spacing is set",
            remedy="--set data.pixel_spacing=null: each slice is then fitted to the canvas",
            file=path,
        )
    return from_sitk(image, file=path)


def require_labels(
    pairs: Sequence[Pair], facts: Sequence[Facts], slices: Sequence[int], table: LabelTable
) -> None:
    """Refuse volumes without any label: they would teach that a body has none of these organs.

    A single slice may have no label.

    Args:
        pairs: The pairs of files.
        facts: Their facts.
        slices: Their numbers of slices.
        table: The label table.

    Raises:
        UsageError: No patient has a label.
        InputError: A volume has no label.
    """
    by_value = table.by_value
    if not any(by_value[v] for f in facts for v in f.voxels):
        raise UsageError(
            "no patient has a labelled voxel",
            expected=f"label maps with some of {table}",
            remedy="check the label maps and data.keep",
        )
    refuse(
        [
            InputError(
                f"{pair.label.name} holds no label at all",
                expected=f"some of {table}",
                remedy="take the patient out, or give it its labels",
                file=pair.label,
            )
            for pair, f, count in zip(pairs, facts, slices, strict=True)
            if count > 1 and set(f.voxels) == {table.labels[0].value}
        ],
        len(pairs),
    )


def refuse(errors: Sequence[InputError], count: int) -> None:
    """Raise the errors of some patients as one error, so that one look at the data is enough.

    Args:
        errors: The errors; none: nothing happens.
        count: The number of all patients.

    Raises:
        InputError: There are errors.
    """
    if len(errors) == 1:
        raise errors[0]
    if errors:
        more = [f"... and {len(errors) - SHOWN} more"] if len(errors) > SHOWN else []
        lines = [
            (
                exc.fact
                if exc.file and exc.file.name in exc.fact
                else f"{exc.file and exc.file.name}: {exc.fact}"
            )
            for exc in errors[:SHOWN]
        ]
        rows = [f"    {line}" for line in [*lines, *more]]
        remedies = list(dict.fromkeys(exc.remedy for exc in errors))
        raise InputError(
            f"{len(errors)} of {count} patients cannot be trained on:",
            rows=rows,
            expected=errors[0].expected,
            remedy="; ".join(remedies[:3]),
            file=errors[0].file and errors[0].file.parent,
        )


def facts_table(facts: Sequence[Facts], labels: LabelTable, intensity: Intensity) -> str:
    """Describe the patients for a person: ranges, clipped voxels, voxels by label, aliases.

    Args:
        facts: The patients' facts.
        labels: The label table.
        intensity: The intensity range.

    Returns:
        Lines of text.
    """
    unit = intensity.unit
    spacing = " x ".join(_range(f.spacing[axis] for f in facts) for axis in range(3))
    outside = (
        (sum(f.below for f in facts), f"below {intensity.low}"),
        (sum(f.above for f in facts), f"above {intensity.high}"),
    )
    clipped = [f"{n} voxels {where}" for n, where in outside if n]
    rows = [
        f"spacing        {spacing} mm",
        f"intensity      {min(f.low for f in facts):g} to {max(f.high for f in facts):g} {unit},"
        f" trained on {intensity.low} to {intensity.high}"
        + (f"; clipped: {', '.join(clipped)}" if clipped else ""),
        f"{'label':<26} {'patients':>8} {'voxels':>12}",
    ]
    notes, absent = [], []
    for position, label in enumerate(labels.labels):
        values = (label.value, *label.aliases)
        counts = [sum(f.voxels.get(v, 0) for v in values) for f in facts]
        rows.append(
            f"{label.value:>6} {label.name:<19} {sum(n > 0 for n in counts):>8} {sum(counts):>12}"
        )
        # Aliases of the background are no surprise, so only the other labels' get a note.
        aliases = label.aliases if position else ()
        alias_counts = {v: sum(f.voxels.get(v, 0) for f in facts) for v in aliases}
        notes += [
            f"note           {n} voxels hold {v}, which is read as {label.value} {label.name}"
            for v, n in alias_counts.items()
            if n
        ]
        if not sum(counts):
            absent.append(label.name)
    if absent:
        notes.append(f"note           no patient has {', '.join(absent)}")
    by_value = labels.by_value
    empty = sum(not any(n for v, n in f.voxels.items() if by_value[v]) for f in facts)
    if empty:
        notes.append(f"note           {empty} patient(s) without any of these labels")
    return "\n".join(rows + notes)


def check_leakage(splits: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse an image that is in two splits.

    Args:
        splits: For each split, the SHA-256 of the image by the pair's name.

    Raises:
        InputError: An image is in two splits.
    """
    first_use: dict[str, tuple[str, str]] = {}
    for split, digests in splits.items():
        for name, digest in digests.items():
            first_split, first_name = first_use.setdefault(digest, (split, name))
            if first_split != split:
                raise InputError(
                    f"{first_name} ({first_split}) and {name} ({split}) hold the same image",
                    expected="every patient in one split",
                    remedy=(
                        "take one of the two out, or name them as one patient (column patient of a"
                        " CSV table)"
                    ),
                )


def _count(values: NDArray[Any]) -> dict[int, int]:
    """Voxels by value, counted plane by plane."""
    counts: Counter[int] = Counter()
    for plane in values:
        unique_values, voxels = np.unique(plane, return_counts=True)
        counts.update(dict(zip(unique_values.tolist(), voxels.tolist(), strict=True)))
    return dict(sorted(counts.items()))


def _range(values: Iterable[float]) -> str:
    """Numbers for a person: one of them, or lowest..highest."""
    numbers = sorted(values)
    low, high = f"{numbers[0]:.4g}", f"{numbers[-1]:.4g}"
    return low if low == high else f"{low}..{high}"


def _states(path: Path, tag: str) -> bool:
    """Whether a DICOM file has an attribute."""
    reader = simpleitk().ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return bool(reader.HasMetaDataKey(tag))


def _check_same_grid(
    pair: Pair, shape: tuple[int, ...], geometry: Geometry, image: Volume, *, placed: bool
) -> None:
    """Raise `InputError` unless label map and image have one grid."""
    remedy = "resample the label map onto its image"
    if shape != image.values.shape:
        raise InputError(
            f"{pair.label.name} has {shape} voxels, its image {image.values.shape}",
            expected="one grid",
            remedy=remedy,
            file=pair.label,
        )
    distance = _apart(geometry, image.geometry, image.values.shape)
    # Slices that state no position match by their pixels.
    if placed and distance > GRID_TOLERANCE_MM:
        raise InputError(
            f"{pair.label.name} lies {distance:.3g} mm off its image",
            expected=f"one grid, within {GRID_TOLERANCE_MM} mm",
            remedy=remedy,
            file=pair.label,
        )


def _apart(first: Geometry, second: Geometry, shape: tuple[int, ...]) -> float:
    """The largest distance in mm, along an axis, of matching corners of two (D, H, W) grids."""
    d, h, w = shape
    corners = np.array(
        [[i, j, k, 1] for i in (0, w - 1) for j in (0, h - 1) for k in (0, d - 1)], float
    ).T
    return float(np.abs((first.affine - second.affine) @ corners).max())


def _refuse_not_finite(file: Path, values: NDArray[Any]) -> None:
    """Raise `InputError` for NaN and infinite values."""
    if not np.isfinite([float(values.min()), float(values.max())]).all():
        raise InputError(
            f"{file.name} holds NaN or infinite values",
            expected="finite intensities",
            remedy="check how it was written",
            file=file,
        )


def check_intensity(file: Path, values: NDArray[Any], intensity: Intensity) -> None:
    """Check that the intensities of an image are varied, and in unit and range.

    Args:
        file: The image.
        values: Its finite intensities (D, H, W).
        intensity: The intensity range.

    Raises:
        InputError: They are not; the remedy is a setting that works.
    """
    low, high = float(values.min()), float(values.max())
    if intensity.unit == "HU" and not (low <= AIR_HU and high <= HIGHEST_HU and low >= -HIGHEST_HU):
        greys = low >= 0 and high <= 255
        remedy = (
            "these look like 8-bit greys: give the images in HU"
            if greys
            else "apply the rescale intercept (often -1024)"
        )
        raise InputError(
            f"{file.name} holds values from {low:g} to {high:g}, which are not HU",
            expected=f"air below {AIR_HU} HU, nothing above {HIGHEST_HU}",
            remedy=f"{remedy}, or {suggested_setting(low, high)}",
            file=file,
        )
    if low == high and len(values) > 1:
        raise InputError(
            f"{file.name} holds {low:g} everywhere",
            expected="an image",
            remedy="take the patient out, or write the file again",
            file=file,
        )
    if low >= intensity.high or high <= intensity.low:
        raise InputError(
            f"{file.name} holds values from {low:g} to {high:g} {intensity.unit}, all outside the"
            " range that is trained on",
            expected=f"values between {intensity.low} and {intensity.high}",
            remedy=suggested_setting(low, high),
            file=file,
        )
    if len(values) > 1:
        # A single slice may be dark.
        refuse_unused_range(file, low, high, intensity)
