"""Recognise how a dataset is stored on disk; a folder with two layouts at once is an error.

    MM-WHS    DIR/CASE_image.nii.gz + DIR/CASE_label.nii.gz
    original  DIR/training/PATIENT/PATIENT_NAME.dcm, DIR/testing/...: one DICOM slice each for the
              image and the labels
    nnU-Net   DIR/imagesTr/CASE_0000.nii.gz + DIR/labelsTr/CASE.nii.gz + DIR/dataset.json
    MSD       DIR/imagesTr/CASE.nii.gz + DIR/labelsTr/CASE.nii.gz + DIR/dataset.json
    pictures  DIR/images/NAME.png + DIR/labels/NAME.png, or TIFF
    classes   DIR/PATIENT/ct.nii.gz + DIR/PATIENT/segmentations/CLASS.nii.gz (TotalSegmentator)
    table     a CSV file (or a folder with one): columns image,label[,patient[,split]]; paths are
              relative to the file

This module and those of the layouts read names, dataset.json and the table; they open no image but
for its first bytes, which state whether mask2ct wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

from runtime.core.errors import UsageError

from ..config import DataConfig
from .class_folders import class_folders, is_class_folder
from .dataset_json import dataset_json
from .pairs import LAYOUT, LEAST_PATIENTS, SPLITS, SUFFIXES, Layout, Pair, lacks
from .pictures import is_picture_folder, pictures
from .synthetic_cases import mark_synthetic
from .tables import folder_table, table, tables

__all__ = ["LAYOUT", "LEAST_PATIENTS", "SPLITS", "Layout", "Pair", "find", "find_pairs"]


def find(path: Path, data: DataConfig) -> Layout:
    """Recognise the layout of a dataset.

    Args:
        path: A folder or a CSV table.
        data: The section of the config.

    Returns:
        The layout.

    Raises:
        UsageError: There is no layout, or two of them; a file is missing; there are too few
            patients.
    """
    remedy = "check --dataset-path"
    if not path.exists():
        raise UsageError(
            f"the dataset {path} does not exist", expected=LAYOUT, remedy=remedy, file=path
        )
    kinds: dict[str, tuple[bool, Callable[[Path, DataConfig], Layout]]] = (
        {"table": (path.suffix.lower() == ".csv", table)}
        if path.is_file()
        else {
            "MM-WHS": (
                any(path.glob("[!.]*_image.nii*")) or any(path.glob("[!.]*_label.nii*")),
                _mm_whs,
            ),
            "single slices": ((path / "training").is_dir(), _original),
            "nnU-Net": ((path / "imagesTr").is_dir(), dataset_json),
            "images and labels": (is_picture_folder(path), pictures),
            "patients with one file per class": (is_class_folder(path), class_folders),
            "table": (bool(tables(path)), folder_table),
        }
    )
    matching = [kind for kind, (matches, _) in kinds.items() if matches]
    if not matching:
        raise UsageError(
            f"{path.name or path} holds no pair of image and label map",
            expected=LAYOUT,
            remedy=remedy,
            file=path,
        )
    if len(matching) > 1:
        raise UsageError(
            f"{path.name or path} can be read as {' and as '.join(matching)}",
            expected="one layout",
            remedy="give --dataset-path the folder (or CSV file) of one of them alone",
            file=path,
        )
    layout = mark_synthetic(kinds[matching[0]][1](path, data), path)
    if data.normalize == "volume":
        layout = replace(layout, pairs=[replace(pair, normalize=True) for pair in layout.pairs])
    patients = {pair.who for pair in layout.pairs if not pair.synthetic}
    synthetic = any(pair.synthetic for pair in layout.pairs)
    if synthetic and not patients:
        raise UsageError(
            f"{path.name} holds synthetic images alone",
            expected="real patients: what a network made cannot say how good the next one is",
            remedy="add the real images that they were made from",
            file=path,
        )
    if len(patients) < LEAST_PATIENTS and data.split_by == "patients":
        raise UsageError(
            f"{path.name} holds {len(patients)} patient(s)"
            + (" besides synthetic cases" if synthetic else ""),
            expected=f"at least {LEAST_PATIENTS}: patients are split, not slices",
            remedy=(
                "add patients; to try things out, --set data.split_by=slices splits each volume"
            ),
            file=path,
        )
    return layout


def find_pairs(folder: Path) -> list[Pair]:
    """List the pairs of a dataset with the default names.

    Args:
        folder: A folder or a CSV table.

    Returns:
        The pairs.

    Raises:
        UsageError: As in `find`.
    """
    return find(folder, DataConfig()).pairs


def _mm_whs(folder: Path, data: DataConfig) -> Layout:
    """Read CASE_image and CASE_label volumes."""
    files_of: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        for suffix in SUFFIXES:
            for kind in ("image", "label"):
                if path.name.endswith(f"_{kind}{suffix}") and not path.name.startswith("."):
                    files_of.setdefault(path.name.removesuffix(f"_{kind}{suffix}"), {})[kind] = path
    if not any(len(files) == 2 for files in files_of.values()):
        raise UsageError(
            f"{folder.name or folder} holds no pair of image and label map",
            expected=LAYOUT,
            remedy="check --dataset-path",
            file=folder,
        )
    for name, files in files_of.items():
        if len(files) < 2:
            missing = "image" if "label" in files else "label"
            raise lacks(name, f"{name}_{missing}.nii.gz", next(iter(files.values())))
    pairs = [Pair(name, files["image"], files["label"]) for name, files in sorted(files_of.items())]
    return Layout(
        pairs, f"{len(pairs)} patients as MM-WHS volumes (CASE_image + CASE_label)", "mm-whs"
    )


def _original(folder: Path, data: DataConfig) -> Layout:
    """Read `training`; with a train_ratio of 1, the patients of `testing` are the test set."""
    pairs = _slices(folder / "training", data, None)
    testing = folder / "testing"
    tested = _slices(testing, data, "test") if data.train_ratio == 1 and testing.is_dir() else []
    rest = (
        f", {len(tested)} of testing/ to test on"
        if tested
        else ", testing/ is not used (train_ratio < 1)"
        if testing.is_dir()
        else ""
    )
    says = (
        f"{len(pairs)} patients as single DICOM slices in training/{rest}: images"
        f" {data.image_name}, labels {data.label_name}"
    )
    return Layout(pairs + tested, says, "mm-whs-indices")


def _slices(folder: Path, data: DataConfig, split: str | None) -> list[Pair]:
    """The pairs of single DICOM slices in PATIENT folders."""
    pairs = []
    for patient in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        image, label = (
            patient / f"{patient.name}_{name}.dcm" for name in (data.image_name, data.label_name)
        )
        for path in (image, label):
            if not path.is_file():
                names = ", ".join(p.name for p in islice(sorted(patient.iterdir()), 4)) or "nothing"
                raise UsageError(
                    f"patient {patient.name} has no {path.name}; there is {names}",
                    expected="PATIENT/PATIENT_NAME.dcm for both names",
                    remedy=(
                        "set data.image_name and data.label_name (TARGET_NAME, INPUT_NAME) to the"
                        " files' names"
                    ),
                    file=patient,
                )
        pairs.append(Pair(f"{folder.name}/{patient.name}", image, label, split=split))
    return pairs
