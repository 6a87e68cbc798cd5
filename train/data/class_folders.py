"""Folders of patients with one binary file per class, as TotalSegmentator's data set has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from runtime.core.labels import plain
from runtime.core.manifest import LabelTable
from runtime.core.totalsegmentator import TOTAL_V2
from runtime.io.readers.class_files import read_classes
from runtime.io.volume_files import stem

from ..config import DataConfig
from .pairs import SUFFIXES, Layout, Pair, lacks

CLASSES = "segmentations"
# The name of the image beside it → its modality.
IMAGES: dict[str, Literal["", "CT", "MR"]] = {"ct": "CT", "mri": "MR", "mr": "MR", "image": ""}


def is_class_folder(folder: Path) -> bool:
    """Say whether folders of patients have a folder of classes.

    Args:
        folder: The folder of the data set.
    """
    return folder.is_dir() and any(folder.glob(f"[!.]*/{CLASSES}/*.nii*"))


def class_folders(folder: Path, data: DataConfig) -> Layout:
    """Read PATIENT/ct.nii.gz, or mri.nii.gz, with PATIENT/segmentations/CLASS.nii.gz.

    Args:
        folder: The folder of the data set.
        data: The section of the config.

    Returns:
        The layout, whose labels have TotalSegmentator's values where it has all the classes.

    Raises:
        UsageError: A patient has no image or no classes.
    """
    pairs: list[Pair] = []
    modalities: set[Literal["", "CT", "MR"]] = set()
    files: list[Path] = []
    for patient in sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != "."):
        image = next(_images(patient), None)
        classes = class_files(patient / CLASSES)
        if image is None and not classes:
            continue
        if image is None:
            raise lacks(patient.name, "ct.nii.gz", classes[0])
        if not classes:
            raise lacks(patient.name, f"{CLASSES}/CLASS.nii.gz", image)
        pairs.append(Pair(patient.name, image, patient / CLASSES))
        modalities.add(IMAGES[stem(image)])
        files += classes
    labels = class_labels(files)
    says = (
        f"{len(pairs)} patients with one file for each of {len(labels) - 1} classes; where classes"
        " overlap, the first one in data.labels counts"
    )
    return Layout(pairs, says, labels, modalities.pop() if len(modalities) == 1 else "")


def class_files(folder: Path) -> list[Path]:
    """List the files of the classes of one patient.

    Args:
        folder: The folder.

    Returns:
        The volume files by name.
    """
    if not folder.is_dir():
        return []
    return [p for p in sorted(folder.iterdir()) if p.name[0] != "." and p.name.endswith(SUFFIXES)]


def read_class_folder(folder: Path, table: LabelTable) -> Any:
    """Read the classes of one patient that a label table has, and leave out the others.

    Args:
        folder: The folder.
        table: The label table.

    Returns:
        The classes as `Layers`.

    Raises:
        InputError: A file cannot be read or is not binary, or no file is of the table.
    """
    names = {plain(label.name) for label in table.labels}
    files = [file for file in class_files(folder) if plain(stem(file)) in names]
    return read_classes(files, folder) if files else None


def _images(patient: Path) -> Iterator[Path]:
    """The image of a patient."""
    for name in IMAGES:
        for suffix in SUFFIXES:
            if (path := patient / f"{name}{suffix}").is_file():
                yield path


def class_labels(files: Sequence[Path]) -> list[dict[str, Any]]:
    """List the labels of files with one class each.

    Args:
        files: Files named after their class.

    Returns:
        The classes as `data.labels` has them, with TotalSegmentator's values if all are its.
    """
    names = {stem(file) for file in files}
    values = {name: value for value, name in TOTAL_V2.items()}
    if not names <= {*values}:
        values = {name: value for value, name in enumerate(sorted(names), 1)}
    rows = sorted(names, key=lambda name: values[name])
    return [
        {"name": "background", "value": 0},
        *({"name": name, "value": values[name]} for name in rows),
    ]
