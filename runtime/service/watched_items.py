"""Items of a watched folder: what they are called, and whether somebody still writes to them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.atomic_files import filename_fits
from ..core.errors import Mask2CTError, UsageError, printable
from ..io.archive import is_zip
from ..io.dicom.files import UNFINISHED, pseudonym
from ..io.volume_files import SUFFIXES

# What macOS leaves in folders begins with one of these.
IGNORED = (".ds_store", "._")

# Name, size in bytes and time of change in ns of every file of an item.
Fingerprint = tuple[tuple[str, int, int], ...]


@dataclass
class Observation:
    """An item at the last look. Its times are of this machine's clock alone, never of files."""

    fingerprint: Fingerprint
    since: float  # s, when this fingerprint was first seen
    age: float = 0.0  # s, for how long it has not changed
    complete: bool | None = None  # None: it has not been opened yet


def check_folders(folder: Path, output: Path, own: Sequence[str]) -> None:
    """Check a watched folder and the folder of its results.

    Args:
        folder: The folder to watch.
        output: The folder of the results.
        own: Names of the folders that the watcher makes in it.

    Raises:
        UsageError: When there is no such folder, or its use would mix with the output.
    """
    if not folder.is_dir():
        raise UsageError(
            f"there is no folder {folder} to watch",
            expected="a folder that receives masks",
            remedy="make it, or check the path",
            file=folder,
        )
    if output.absolute().resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            "the output folder lies in the watched one",
            expected="results beside it, not in it",
            remedy="choose another --output",
            file=output,
        )
    for name in own:
        if (folder / name).is_symlink():
            raise UsageError(
                f"{name} in the watched folder is a link",
                expected="a folder of its own, or none",
                remedy="remove the link; masks are moved there, not copied",
                file=folder / name,
            )


def fingerprint(path: Path) -> Fingerprint:
    """Take the fingerprint of an item, which changes whenever a file of it does.

    A link counts itself, and not what it leads to.

    Args:
        path: A file or a folder.

    Returns:
        Relative path, size in bytes and time of change in ns of every file; empty where there is
        none, or one that is still being copied.
    """
    try:
        if path.is_symlink() or not path.is_dir():
            state = path.lstat()
            return (("", state.st_size, state.st_mtime_ns),)
        files = [*_files_in(path)]
        if any(unfinished(file.name) for file in files):
            return ()
        states = ((file.relative_to(path).as_posix(), file.lstat()) for file in files)
        return tuple(sorted((name, state.st_size, state.st_mtime_ns) for name, state in states))
    except OSError:  # it went away, or cannot be read yet
        return ()


def _files_in(folder: Path) -> Iterator[Path]:
    """Every file and link in a folder, at any depth, but what macOS leaves there."""
    for parent, folders, files in os.walk(folder):
        # A linked folder is not entered, but counts as a link.
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in (*files, *links):
            if not name.lower().startswith(IGNORED):
                yield Path(parent) / name


def may_be_dicom(item: Path) -> bool:
    """Whether an item may hold a patient's data besides a mask.

    Args:
        item: A file or folder; only its name counts.

    Returns:
        False for the name of a volume file, else True.
    """
    return not item.name.lower().endswith(SUFFIXES)


def display_name(item: Path) -> str:
    """Return the name of an item for messages.

    Args:
        item: A file or folder.

    Returns:
        The name of a volume file. Anything else may be DICOM and named after a patient: then a
        pseudonym, made of a digest.
    """
    if not may_be_dicom(item):
        return printable(item.name)
    return pseudonym("zip" if is_zip(item) else "item", item.name)


def reason(item: Path, exc: Mask2CTError) -> str:
    """Return an error as text, without its working folder and names that may be a patient's.

    Args:
        item: The path of the item that the error is about.
        exc: The error.

    Returns:
        The text, with the display name in place of the item's path and name.
    """
    text = str(exc).replace(printable(item), display_name(item))
    name = printable(item.name)
    # A name of a few letters may be a part of any word.
    return text.replace(name, display_name(item)) if len(name) > 3 else text


def reasons_file(item: Path) -> Path:
    """Return the file beside an item that says why it failed.

    Args:
        item: The path of the item in failed/.
    """
    file = item.with_name(f"{item.name}.reason.txt")
    return (
        file
        if filename_fits(file)
        else file.with_name(f"{pseudonym('item', item.name)}.reason.txt")
    )


def free_name(path: Path) -> Path:
    """Return `path`, or the first free one with -2, -3 … before its suffixes.

    Args:
        path: A path that may be taken.
    """
    name, ending = path.name, "" if path.is_dir() else path.suffix
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            ending = suffix
            break
    base, ending = name[: len(name) - len(ending)], name[len(name) - len(ending) :]
    number, place = 1, path
    while os.path.lexists(place):
        number += 1
        place = path.with_name(f"{base}-{number}{ending}")
    return place


def unfinished(name: str) -> bool:
    """Whether a name is one of a copy that is not finished.

    Args:
        name: The name of a file or folder.
    """
    return name.startswith(".") or name.lower().endswith(UNFINISHED)
