"""The marks of files that mask2ct writes, and the one rule that recognises such files.

Every output states in its header what it is and who wrote it. A reader takes no marked file for a
mask or a real CT, and a writer replaces no file without a mark. A new format is recognised where
it writes `notice` within the first `MARKS_WITHIN` bytes, and in DICOM also the attributes of
`MARKS`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.atomic_files import open_input

PROGRAM = "mask2ct"
# What the description of a result's mask begins with.
MASK_OF = "mask of a "
# Bytes of a file, unpacked, that hold its marks.
MARKS_WITHIN = 8192
# Bytes of the header of a NIfTI, with the four that state whether extensions follow.
NIFTI_HEADER = 352


@dataclass(frozen=True)
class Mark:
    """What states that mask2ct wrote a file of one kind.

    Attributes:
        text: The text in every header, beside `PROGRAM`.
        dicom_text: The part of `text` that the Series Description must hold. Files of all versions
            hold it.
        dicom_attribute: The keyword of a DICOM attribute, and the value that it must have.
    """

    text: str
    dicom_text: str
    dicom_attribute: tuple[str, str]


SYNTHETIC = Mark("SYNTHETIC CT - NOT FOR DIAGNOSIS", "NOT FOR DIAGNOSIS", ("SyntheticData", "YES"))
# A real CT that was deformed with its mask.
DERIVED = Mark(
    "DERIVED CT - NOT FOR DIAGNOSIS", "DERIVED CT - NOT FOR DIAGNOSIS", ("Manufacturer", PROGRAM)
)
MARKS = (SYNTHETIC, DERIVED)
# By modality, what a synthetic image that is no CT states in a volume file. DICOM holds CTs alone.
_SYNTHETIC_TEXTS = {
    "MR": "SYNTHETIC MR - NOT FOR DIAGNOSIS",
    "other": "SYNTHETIC IMAGE - NOT FOR DIAGNOSIS",
}
_TEXTS = tuple(
    text.encode() for text in (*(mark.text for mark in MARKS), *_SYNTHETIC_TEXTS.values())
)
# The attributes that `dicom_written_by_mask2ct` reads.
DICOM_KEYWORDS = ("SeriesDescription", *(mark.dicom_attribute[0] for mark in MARKS))
# First bytes of the files that mask2ct writes.
_BEGINNINGS = {
    ".nii": b"\x5c\x01\0\0",
    ".nrrd": b"NRRD0004\n",
    ".mha": b"ObjectType = Image\n",
    ".dcm": bytes(128) + b"DICM",
}


def mark_text(*, derived: bool, modality: str = "") -> str:
    """The text in every header of a result.

    Args:
        derived: Whether the result is a deformed real CT, not a synthetic CT.
        modality: Of the result, as in `Manifest.modality`.
    """
    return DERIVED.text if derived else _SYNTHETIC_TEXTS.get(modality, SYNTHETIC.text)


def notice(*, derived: bool, modality: str = "") -> str:
    """The description of a volume file: `mark_text`, with the program's name.

    It has at most 79 characters, for the description of a NIfTI.

    Args:
        derived: Whether the result is a deformed real CT, not a synthetic CT.
        modality: Of the result, as in `Manifest.modality`.
    """
    return f"{mark_text(derived=derived, modality=modality)} ({PROGRAM})"


def written_by_mask2ct(path: Path) -> bool:
    """Whether the first bytes of a file, of any format, state that mask2ct wrote it.

    It holds for synthetic and for derived CTs, and for their masks; False for a file that cannot
    be read.
    """
    return _are_marked(_first_bytes(path))


def is_marked_mask(path: Path) -> bool:
    """Whether a volume file states that it is the mask of a result.

    Args:
        path: A file for which `written_by_mask2ct` holds.
    """
    return MASK_OF.encode() in (_first_bytes(path) or b"")


def is_marked_derived(path: Path) -> bool:
    """Whether a volume file states that it is a deformed real CT.

    Args:
        path: A file for which `written_by_mask2ct` holds.
    """
    return DERIVED.text.encode() in (_first_bytes(path) or b"")


def dicom_written_by_mask2ct(attributes: Any) -> bool:
    """Whether the attributes of a DICOM instance state that mask2ct wrote it.

    Args:
        attributes: A dataset with at least `DICOM_KEYWORDS`, as far as the file has them.
    """
    description = str(attributes.get("SeriesDescription", ""))
    return any(
        str(attributes.get(mark.dicom_attribute[0], "")) == mark.dicom_attribute[1]
        and mark.dicom_text in description
        for mark in MARKS
    )


def is_cut(path: Path) -> bool:
    """Whether a file was cut so early that it cannot state who wrote it.

    What mask2ct writes states it within the header of a NIfTI, or within `MARKS_WITHIN` bytes of
    DICOM. The remaining bytes must be the beginning of such a file: other short files belong to the
    user.
    """
    head = _first_bytes(path)
    name = path.name.lower().removesuffix(".gz")
    suffix = next((suffix for suffix in _BEGINNINGS if name.endswith(suffix)), None)
    if head is None or suffix is None or _are_marked(head):
        return False
    least = MARKS_WITHIN if suffix == ".dcm" else NIFTI_HEADER
    beginning = _BEGINNINGS[suffix]
    return len(head) < least and head[: len(beginning)] == beginning[: len(head)]


def _are_marked(head: bytes | None) -> bool:
    """Whether the first bytes of a file hold the marks; False where they cannot be read."""
    return head is not None and PROGRAM.encode() in head and any(text in head for text in _TEXTS)


def _first_bytes(path: Path) -> bytes | None:
    """The first unpacked bytes of a file, at most `MARKS_WITHIN`; None if they cannot be read."""
    try:
        with open_input(path) as handle:
            if not path.name.lower().endswith(".gz"):
                return handle.read(MARKS_WITHIN)
            inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)
            return inflater.decompress(handle.read(MARKS_WITHIN), MARKS_WITHIN)
    except (OSError, zlib.error):
        return None
