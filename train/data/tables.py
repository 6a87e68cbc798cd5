"""Tables of pairs: a CSV file with the columns image,label[,patient[,split]]."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from runtime.core.errors import UsageError, reading
from runtime.io.volume_files import stem

from ..config import DataConfig
from .pairs import SPLITS, Layout, Pair


def folder_table(folder: Path, data: DataConfig) -> Layout:
    """Read the only CSV table of a folder.

    Args:
        folder: The folder.
        data: The section of the config.

    Returns:
        The layout.

    Raises:
        UsageError: There are several tables, or the table is not one of pairs.
    """
    csv_files = tables(folder)
    if len(csv_files) > 1:
        names = ", ".join(file.name for file in csv_files[:4])
        raise UsageError(
            f"{folder.name} holds {len(csv_files)} tables: {names}",
            expected="one CSV file",
            remedy="give --dataset-path the CSV file itself",
            file=folder,
        )
    return table(csv_files[0], data)


def tables(folder: Path) -> list[Path]:
    """List the CSV files of a folder whose first line names both columns.

    Args:
        folder: The folder, which may hold other CSV files.

    Returns:
        The tables by name.
    """

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


def table(path: Path, data: DataConfig) -> Layout:
    """Read a CSV table of pairs.

    Args:
        path: The CSV file.
        data: The section of the config.

    Returns:
        The layout.

    Raises:
        UsageError: A line cannot be used, or a patient is in two splits.
    """
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
        # A label map may be a folder with one file per class.
        if not (file.is_file() or (file is label and file.is_dir())):
            raise UsageError(
                f"line {number} of {path.name} names {file.name}, which does not exist",
                expected="paths relative to the table",
                remedy="correct the line",
                file=file,
            )
    return Pair(stem(image), image, label, (row.get("patient") or "").strip(), split)
