"""Files beside DICOM files that cannot be read as DICOM: which may be slices or masks, and why.

No message names them: messages count them by their reasons, and `mask2ct synth --list` shows them
on the screen.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...core.errors import UnreadableVolume
from .. import archive
from ..dicom.files import UNFINISHED, UNFINISHED_COPY, Instance, damaged_instance

SUFFIXES = (".dcm", ".dicom", ".dic", ".ima")
# Bytes from which the type of a file is told.
_START = 512
_WEB_PAGE = (b"<!doctype html", b"<html")
_TEXT = "text"


def damaged_beside(instances: Sequence[Instance], not_dicom: Iterable[Path]) -> list[Instance]:
    """The files that pass for DICOM by their name and are not readable as DICOM.

    A name passes if it has a DICOM suffix, or the pattern of a DICOM file's name in the same folder
    (all numbers count as equal). It also passes if its suffix, or the lack of one, is that of a
    DICOM file in the same folder, unless the file is plain text, as licences are.

    Args:
        instances: The readable DICOM files.
        not_dicom: The files that are not DICOM.

    Returns:
        An instance of the kind "damaged" for each, with its reason.
    """
    not_dicom = list(not_dicom)
    patterns, suffixes = defaultdict(set), defaultdict(set)
    for instance in instances if not_dicom else ():
        patterns[instance.path.parent].add(_pattern(instance.path.name))
        suffixes[instance.path.parent].add(_pattern(instance.path.suffix))
    damaged = []
    for path in not_dicom:
        name = _finished_name(path.name)
        certain = name.lower().endswith(SUFFIXES) or _pattern(name) in patterns[path.parent]
        if certain or _pattern(Path(name).suffix) in suffixes[path.parent]:
            reason = UNFINISHED_COPY if name != path.name else what_is_wrong(path)
            if certain or reason != _TEXT:
                damaged.append(damaged_instance(path, reason))
    return damaged


def what_is_wrong(path: Path) -> str:
    """Why a file is not a DICOM file (PS3.10, 7.1), in two or three words."""
    try:
        with archive.opened(path, _START) as handle:
            start = handle.read(_START)
    except FileNotFoundError:
        return "broken link"
    except PermissionError:
        return "unreadable (permission denied)"
    except (OSError, UnreadableVolume):
        return "unreadable"
    if not start:
        return "empty"
    if start.lstrip().lower().startswith(_WEB_PAGE):
        return "web page"
    if not any(byte < 9 or 13 < byte < 32 for byte in start):
        return _TEXT
    return "without the DICOM prefix"


def counted(reasons: Sequence[str]) -> str:
    """The reasons with their counts, most frequent first: `2 empty, 1 web page`."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).most_common())


def _finished_name(name: str) -> str:
    """A file's name without the suffix of an unfinished copy."""
    ending = next((ending for ending in UNFINISHED if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)]


def _pattern(name: str) -> str:
    """A file's name in lower case with `#` for each number."""
    return re.sub(r"\d+", "#", name.lower())
