"""Which cases of an nnU-Net data set are synthetic, and folds that keep each patient on one side.

`synthetic.csv` names the source of every case that mask2ct wrote. `splits_final.json` is nnU-Net's
own file of folds: nnU-Net reads it from the data set's folder in `nnUNet_preprocessed`, so it is
copied there. No patient is in `train` and in `val` of one fold, with all variants; where the folder
holds real cases, these alone are validated on.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.atomic_files import read_text, write_json, write_text
from ...core.errors import UsageError

SYNTHETIC_CASES = "synthetic.csv"
SPLITS = "splits_final.json"
FOLDS = 5  # as nnU-Net asks for
MAX_BYTES = 256 << 20  # of either file, enough for a million cases
_COLUMNS = ["case", "source"]
_VARIANT = re.compile(r"_v\d+$")


def source_of(case: str) -> str:
    """The name of the case whose mask a synthetic case was made from.

    Variants are named CASE_v0, CASE_v1 …; a name without a variant is its own source.

    Args:
        case: The name of a synthetic case.
    """
    return _VARIANT.sub("", case) or case


def check_files(folder: Path) -> None:
    """Check before any work that both files can be brought up to date, where they exist.

    Args:
        folder: The folder of the data set.

    Raises:
        UsageError: One of them is something else.
    """
    read_sources(folder)
    _read_splits(folder)


def read_sources(folder: Path) -> dict[str, str]:
    """Read `synthetic.csv`.

    Args:
        folder: The folder of the data set.

    Returns:
        The source of each synthetic case by the case's name; empty without the file.

    Raises:
        UsageError: The file cannot be read as such a table.
    """
    path = folder / SYNTHETIC_CASES
    try:
        rows = list(csv.reader(io.StringIO(read_text(path, most=MAX_BYTES)), strict=True))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, csv.Error) as exc:
        raise _unreadable(path, str(exc)) from exc
    if rows and (rows[0] != _COLUMNS or any(len(row) != len(_COLUMNS) for row in rows)):
        raise _unreadable(path, f"its columns are not {', '.join(_COLUMNS)}")
    return dict(rows[1:])


def write_sources(folder: Path, sources: Mapping[str, str]) -> None:
    """Write `synthetic.csv`, unless it holds the same.

    Args:
        folder: The folder of the data set.
        sources: The source of each synthetic case.

    Raises:
        OutputError: The file cannot be written.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(sorted(sources.items()))
    if read_sources(folder) != dict(sources) or not (folder / SYNTHETIC_CASES).exists():
        write_text(folder / SYNTHETIC_CASES, out.getvalue())


def write_splits(folder: Path, cases: Sequence[str], sources: Mapping[str, str]) -> None:
    """Write `splits_final.json`, or bring it up to date.

    The sides of real cases that the file states are kept: it may be the user's.

    Args:
        folder: The folder of the data set.
        cases: All complete cases.
        sources: The source of each synthetic case among them.

    Raises:
        UsageError: The file is there and holds no folds.
        OutputError: The file cannot be written.
    """
    stated = _read_splits(folder)
    real = [case for case in cases if case not in sources]
    folds = (
        _extended(stated, real, sources)
        if stated and {case for fold in stated for case in fold["val"]} & {*real}
        else _new_splits(real, sources)
    )
    if folds and folds != stated:
        write_json(folder / SPLITS, folds)


def _new_splits(real: Sequence[str], sources: Mapping[str, str]) -> list[dict[str, list[str]]]:
    """Folds by patient; none where there is one patient alone.

    With fewer patients than folds some folds are equal, so that nnU-Net finds all of them.
    """
    # without a real case, synthetic ones are all that a fold can validate on
    patients = sorted({*real} or {*sources.values()})
    if len(patients) < 2:
        return []
    folds = []
    for number in range(FOLDS):
        held_out = {
            patient
            for n, patient in enumerate(patients)
            if n % min(FOLDS, len(patients)) == number % len(patients)
        }
        folds.append(_fold(held_out, real, sources))
    return folds


def _extended(
    stated: Sequence[Mapping[str, list[str]]], real: Sequence[str], sources: Mapping[str, str]
) -> list[dict[str, list[str]]]:
    """The stated folds with today's cases; a real case that no fold names is trained on."""
    return [_fold({*fold["val"]} & {*real}, real, sources) for fold in stated]


def _fold(
    held_out: Collection[str], real: Sequence[str], sources: Mapping[str, str]
) -> dict[str, list[str]]:
    """One fold that validates on the real cases `held_out`, or on the cases of these sources."""
    validated = [case for case in real if case in held_out] or [
        case for case, source in sources.items() if source in held_out
    ]
    trained = [case for case in real if case not in held_out]
    trained += [case for case, source in sources.items() if source not in held_out]
    return {"train": sorted(trained), "val": sorted(validated)}


def _read_splits(folder: Path) -> list[dict[str, list[str]]] | None:
    """The folds of `splits_final.json`; None without the file."""
    path = folder / SPLITS
    try:
        folds: Any = json.loads(read_text(path, most=MAX_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as exc:
        raise _unreadable(path, str(exc)) from exc
    if not isinstance(folds, list) or not all(map(_is_fold, folds)):
        raise _unreadable(path, 'it is not a list of {"train": [...], "val": [...]}')
    return folds


def _is_fold(fold: Any) -> bool:
    """Whether a value of JSON names the cases of both sides."""
    return isinstance(fold, dict) and all(
        isinstance(fold.get(side), list) and all(isinstance(case, str) for case in fold[side])
        for side in ("train", "val")
    )


def _unreadable(path: Path, reason: str) -> UsageError:
    return UsageError(
        f"{path.name} cannot be read: {reason}",
        expected="the file as mask2ct or nnU-Net writes it, or none",
        remedy="move it away; it is then written anew",
        file=path,
    )
