"""Files beside DICOM files that cannot be read as DICOM: which of them may be slices or masks, and
why they cannot be read.

No message names them: they are counted by what is wrong with them, and `mask2ct synth --list` shows
on the screen which they are.
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
_START = 512  # bytes of a file that tell what it is
_WEB_PAGE = (b"<!doctype html", b"<html")
_TEXT = "text"


def damaged_beside(instances: Sequence[Instance], others: Iterable[Path]) -> list[Instance]:
    """Those of the files `others` that pass for DICOM by their name and are none, each with its
    reason.

    A name passes by a DICOM suffix, by the pattern of a DICOM file's name in the same folder
    (digits count as one), and by the suffix of one (or the want of any), unless the file is plain
    text as licences are.
    """
    others = list(others)
    patterns, suffixes = defaultdict(set), defaultdict(set)
    for instance in instances if others else ():
        patterns[instance.path.parent].add(_pattern(instance.path.name))
        suffixes[instance.path.parent].add(_pattern(instance.path.suffix))
    damaged = []
    for path in others:
        name = _without(path.name)
        certain = name.lower().endswith(SUFFIXES) or _pattern(name) in patterns[path.parent]
        if certain or _pattern(Path(name).suffix) in suffixes[path.parent]:
            reason = UNFINISHED_COPY if name != path.name else what_is_wrong(path)
            if certain or reason != _TEXT:
                damaged.append(damaged_instance(path, reason))
    return damaged


def what_is_wrong(path: Path) -> str:
    """Why a file is no DICOM file (PS3.10, 7.1), in two or three words."""
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


def _without(name: str) -> str:
    """A file's name without the ending of an unfinished copy."""
    ending = next((ending for ending in UNFINISHED if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)]


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name.lower())
