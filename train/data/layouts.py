"""Recognise how a dataset is stored on disk; a folder with two layouts at once is an error.

    MM-WHS    DIR/CASE_image.nii.gz + DIR/CASE_label.nii.gz
    original  DIR/training/PATIENT/PATIENT_NAME.dcm, DIR/testing/...: one DICOM slice each for the
              image and the labels
    nnU-Net   DIR/imagesTr/CASE_0000.nii.gz + DIR/labelsTr/CASE.nii.gz + DIR/dataset.json
    table     a CSV file (or a folder with one): columns image,label[,patient[,split]]; paths are
              relative to the file

This module reads names, dataset.json and the table; it opens no image.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from runtime.core.errors import UsageError, reading
from runtime.io.volume_files import stem

from ..config import DataConfig

SUFFIXES = (".nii.gz", ".nii")
SPLITS = ("train", "valid", "test")
# One to train on, one to validate with, one to test on.
LEAST_PATIENTS = 3
LAYOUT = (
    "CASE_image.nii.gz + CASE_label.nii.gz (MM-WHS), training/PATIENT/PATIENT_NAME.dcm, nnU-Net's"
    " imagesTr + labelsTr + dataset.json, or a CSV table image,label[,patient[,split]]"
)


@dataclass(frozen=True)
class Pair:
    """Image and label map of one patient, or of a part of one.

    Attributes:
        name: Its name in messages.
        image: The image file.
        label: The label map.
        patient: What parts of one patient share, so that they are in one split; "": the name.
        split: "train", "valid" or "test" where the layout states it.
    """

    name: str
    image: Path
    label: Path
    patient: str = ""
    split: str | None = None

    @property
    def who(self) -> str:
        """The patient's name, or the pair's."""
        return self.patient or self.name


@dataclass(frozen=True)
class Layout:
    """A recognised dataset.

    Attributes:
        pairs: The pairs by name.
        says: One line about them for a person.
        labels: The labels that the layout states, as `data.labels` has them, or None.
    """

    pairs: list[Pair]
    says: str
    labels: Any = None


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
        {"table": (path.suffix.lower() == ".csv", _table)}
        if path.is_file()
        else {
            "MM-WHS": (
                any(path.glob("[!.]*_image.nii*")) or any(path.glob("[!.]*_label.nii*")),
                _mm_whs,
            ),
            "single slices": ((path / "training").is_dir(), _original),
            "nnU-Net": ((path / "imagesTr").is_dir(), _nnunet),
            "table": (bool(_tables(path)), _folder_table),
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
    layout = kinds[matching[0]][1](path, data)
    patients = {pair.who for pair in layout.pairs}
    if len(patients) < LEAST_PATIENTS and data.split_by == "patients":
        raise UsageError(
            f"{path.name} holds {len(patients)} patient(s)",
            expected=f"at least {LEAST_PATIENTS}: patients are split, not slices",
            remedy="add patients; to try things out, data.split_by=slices splits each volume",
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
            raise _lacks(name, f"{name}_{missing}.nii.gz", next(iter(files.values())))
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


def _nnunet(folder: Path, data: DataConfig) -> Layout:
    """Read nnU-Net's raw layout."""
    path = folder / "dataset.json"
    expected = 'nnU-Net\'s {"channel_names": {"0": "CT"}, "labels": {"background": 0, ...}, ...}'
    with reading(path, expected, UsageError):
        stated = json.loads(path.read_text(encoding="utf-8-sig"))
    try:
        channels = stated.get("channel_names") or stated.get("modality") or {"0": ""}
        names = _stated_labels(stated["labels"], path)
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise UsageError(
            f"{path.name} states no usable labels: {exc}",
            expected=expected,
            remedy="correct the file",
            file=path,
        ) from exc
    if len(channels) != 1:
        raise UsageError(
            f"{path.name} states {len(channels)} channels:"
            f" {', '.join(map(str, channels.values()))}",
            expected="one image a case",
            remedy="make a table of pairs (CSV) that names one image a case",
            file=path,
        )
    ending = str(stated.get("file_ending", ".nii.gz"))
    pairs = []
    for image in sorted((folder / "imagesTr").glob(f"[!.]*_0000{ending}")):
        name = image.name.removesuffix(f"_0000{ending}")
        label = folder / "labelsTr" / f"{name}{ending}"
        if not label.is_file():
            raise _lacks(name, f"labelsTr/{label.name}", image)
        pairs.append(Pair(name, image, label))
    if not pairs:
        raise UsageError(
            f"imagesTr holds no CASE_0000{ending}",
            expected=LAYOUT,
            remedy="check --dataset-path",
            file=folder,
        )
    # "ignore" marks voxels that nobody labelled: it is not a tissue.
    ignored = [value for value, name in names.items() if name.casefold() == "ignore"]
    labels = [
        {"name": names[value], "value": value} for value in sorted(names) if value not in ignored
    ]
    says = (
        f"{len(pairs)} patients in nnU-Net's raw layout, {len(labels) - 1} labels, channel"
        f" {next(iter(channels.values()))}"
    )
    says += "".join(
        f"; ignore ({value}) is not a label: a label map that holds it is refused"
        for value in ignored
    )
    return Layout(pairs, says, labels)


def _stated_labels(stated: dict[str, Any], path: Path) -> dict[int, str]:
    """Read nnU-Net's labels as value → name, with a background.

    Version 2 has {name: value}, also as text or as a list of one, version 1 {"value": name}.

    Raises:
        UsageError: There are regions.
        ValueError: The labels have neither form.
    """
    flat = {}
    for key, value in stated.items():
        if isinstance(value, list) and len(value) != 1:
            regions = [f"{k} {v}" for k, v in stated.items() if isinstance(v, list) and len(v) != 1]
            raise UsageError(
                f"{path.name} states no usable labels but regions, several labels together:"
                f" {', '.join(regions)[:300]}",
                expected="labels that exclude each other, one value each",
                file=path,
                remedy=(
                    "list the values themselves as labels, each with its name, and leave the"
                    " regions out"
                ),
            )
        flat[key] = value[0] if isinstance(value, list) else value
    version_1 = all(
        str(key).strip().isdecimal() and isinstance(value, str) for key, value in flat.items()
    )
    names: dict[int, str] = {}
    for key, value in flat.items():
        number, name = (key, value) if version_1 else (value, key)
        if isinstance(number, (bool, float)) or int(number) in names:
            raise ValueError(f"{name} is {number!r}, which is not a number of one label")
        names[int(number)] = str(name)
    return {0: "background", **names}


def _folder_table(folder: Path, data: DataConfig) -> Layout:
    """Read the only CSV table of a folder."""
    tables = _tables(folder)
    if len(tables) > 1:
        raise UsageError(
            f"{folder.name} holds {len(tables)} tables: {', '.join(t.name for t in tables[:4])}",
            expected="one CSV file",
            remedy="give --dataset-path the CSV file itself",
            file=folder,
        )
    return _table(tables[0], data)


def _tables(folder: Path) -> list[Path]:
    """The CSV files whose first line names both columns; a folder may hold other CSV files."""

    def head(path: Path) -> str:
        with (
            reading(path, "a CSV file", UsageError),
            open(path, encoding="utf-8-sig", errors="replace") as handle,
        ):
            return handle.readline(1000)

    return [
        path
        for path in sorted(folder.glob("[!.]*.csv"))
        if {"image", "label"} <= {c.strip() for c in head(path).split(",")}
    ]


def _table(path: Path, data: DataConfig) -> Layout:
    """Read a CSV table of pairs."""
    expected = "a CSV file with the columns image,label[,patient[,split]]"
    with (
        reading(path, expected, UsageError),
        open(path, newline="", encoding="utf-8-sig") as handle,
    ):
        reader = csv.DictReader(handle, strict=True, skipinitialspace=True)
        try:
            columns, rows = list(reader.fieldnames or []), list(reader)
        except csv.Error as exc:
            raise UsageError(
                f"{path.name} is not a CSV table: {exc}",
                expected=expected,
                remedy="write it with commas",
                file=path,
            ) from exc
    if not {"image", "label"} <= set(columns) <= {"image", "label", "patient", "split"}:
        raise UsageError(
            f"{path.name} has the columns {', '.join(columns) or 'of an empty file'}",
            expected=expected,
            remedy="name the columns in the first line",
            file=path,
        )
    pairs = [_row(path, number, row) for number, row in enumerate(rows, 2)]
    repeated = [pair for n, pair in enumerate(pairs) if pair.image in {p.image for p in pairs[:n]}]
    if repeated:
        raise UsageError(
            f"{path.name} lists {repeated[0].image.name} twice",
            expected="every image once",
            remedy="drop a line",
            file=path,
        )
    stated: dict[str, set[str | None]] = {}
    for pair in pairs:
        stated.setdefault(pair.who, set()).add(pair.split)
    if in_two_splits := [who for who, splits in stated.items() if len(splits) > 1]:
        raise UsageError(
            f"patient {in_two_splits[0]} is in more than one split",
            expected="a patient's images in one split: patients are split, never slices",
            remedy="correct the column split",
            file=path,
        )
    split_names = {pair.split for pair in pairs}
    complete = None not in split_names and {"train", "valid"} <= split_names
    if split_names != {None} and not complete:
        listed = ", ".join(sorted(name or "none" for name in split_names))
        raise UsageError(
            f"{path.name} states a split for {sum(p.split is not None for p in pairs)} of"
            f" {len(pairs)} rows: {listed}",
            expected="train, valid and perhaps test, for every row, or no column split",
            remedy="complete the column",
            file=path,
        )
    how = "its own split" if split_names != {None} else "split by patient"
    return Layout(
        pairs, f"{len(stated)} patients, {len(pairs)} pairs in the table {path.name}, {how}"
    )


def _row(path: Path, number: int, row: dict[str, Any]) -> Pair:
    """Check one line of a table."""
    split = (row.get("split") or "").strip() or None
    if (
        None in row
        or not (row["image"] or "").strip()
        or not (row["label"] or "").strip()
        or split not in (None, *SPLITS)
    ):
        raise UsageError(
            f"line {number} of {path.name} cannot be used:"
            f" {', '.join(str(v) for v in row.values() if v)}",
            expected=f"image,label[,patient[,split]] with a split of {', '.join(SPLITS)}",
            remedy="correct the line",
            file=path,
        )
    image, label = (path.parent / row[key].strip() for key in ("image", "label"))
    for file in (image, label):
        if not file.is_file():
            raise UsageError(
                f"line {number} of {path.name} names {file.name}, which does not exist",
                expected="paths relative to the table",
                remedy="correct the line",
                file=file,
            )
    return Pair(stem(image), image, label, (row.get("patient") or "").strip(), split)


def _lacks(name: str, file: str, partner: Path) -> UsageError:
    """The error for a patient with only one of the two files."""
    return UsageError(
        f"patient {name} has no {file}",
        expected="an image and a label map for every patient",
        remedy="add the file, or take the patient out",
        file=partner,
    )
