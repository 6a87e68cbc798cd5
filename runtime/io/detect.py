"""What lies at the given paths: which masks, of which kind, under which case names. Nothing is read but what tells the kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..contract import LabelTable
from ..errors import InputError, UsageError, reading
from ..volume import LabelVolume
from .headers import SUFFIXES, is_synthetic, stem


@dataclass(frozen=True)
class Case:
    """One mask that was found. Plain data: it may cross to another process.

    `name`: of its results; `path`: the file or folder it came from; `kind`: "volume" for a NIfTI, NRRD or MHA file; `files`: what it is read from.
    """

    name: str
    path: Path
    kind: str
    files: tuple[Path, ...]


def find_cases(arguments: Sequence[Path], skipped: list[Path] | None = None) -> list[Case]:
    """Files as given, and for a folder the volumes directly in it, sorted, each file once.

    What mask2ct itself wrote into such a folder is no mask: it is passed over and appended to `skipped`. Raises `UsageError`
    for an empty folder and for two masks of one case name. A file that does not exist stays in the list: it is that case's
    failure, not the run's.
    """
    cases: dict[str, Case] = {}
    for argument in arguments:
        for case in _in_folder(argument, skipped) if _is_folder(argument) else [_volume(argument)]:
            other = cases.setdefault(case.name, case)
            if other.path.absolute() != case.path.absolute():
                raise UsageError(f"{other.path} and {case.path} would both be written as {case.name}", expected="each case name once",
                                 remedy="rename one, or run them into two output folders", file=case.path)  # fmt: skip
    return list(cases.values())


def read_case(case: Case, table: LabelTable, label_map: Mapping[int | None, int] | None = None) -> LabelVolume:
    """The case's labels in the model's indices. Raises `InputError`s that name the file."""
    from .nifti import read_labels

    try:
        return read_labels(case.path, table, label_map)
    except InputError as exc:
        exc.file = exc.file or case.path
        raise


def _in_folder(folder: Path, skipped: list[Path] | None) -> list[Case]:
    with reading(folder, "a folder that can be listed", UsageError):
        found = sorted(p for p in folder.iterdir() if p.name.lower().endswith(SUFFIXES) and not p.name.startswith("."))
    own = [path for path in found if is_synthetic(path)]
    if skipped is not None:
        skipped += own
    if len(found) == len(own):
        raise UsageError(f"the folder {folder} holds no masks", expected=f"files ending in {', '.join(SUFFIXES)}",
                         remedy="check the path", file=folder)  # fmt: skip
    return [_volume(path) for path in found if path not in own]


def _volume(path: Path) -> Case:
    return Case(stem(path), path, "volume", (path,))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that no file system takes
        return False
