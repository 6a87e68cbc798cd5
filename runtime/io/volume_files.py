"""Volume files: which suffixes are read, which files mask2ct wrote, and what headers state.

Every header is parsed once, by `nifti_header`, `nrrd_header` or `meta_header`, and the voxels are
read as it states (`voxels`). No other reader opens a file of the user.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from ..core.atomic_files import open_input
from ..core.errors import UnreadableVolume, reading
from ..core.label_codes import concept, modified
from ..core.volume import Segment
from .archive import opened
from .readers import meta_header, nifti_header, nrrd_header
from .readers.volume_header import EXPECTED, MAX_HEADER, Header, Voxels, bad, integers, voxel_name
from .readers.voxels import check_complete, unpacked

__all__ = [
    "DERIVED_MARK",
    "EXPECTED",
    "MARKS",
    "NOTICE",
    "SUFFIXES",
    "Header",
    "Voxels",
    "bad",
    "check_header",
    "is_synthetic",
    "mark",
    "notice",
    "stem",
    "volume_files",
]

# Every header that mask2ct writes holds these two texts within its first bytes.
MARKS = ("SYNTHETIC CT - NOT FOR DIAGNOSIS", "mask2ct")
MARKS_WITHIN = 8192
# Bytes, with the four that state whether extensions follow.
NIFTI_HEADER = 352
# At most 79 characters, for the description of a NIfTI.
NOTICE = f"{MARKS[0]} ({MARKS[1]})"
# Replaces the first of MARKS for a deformed real CT.
DERIVED_MARK = "DERIVED CT - NOT FOR DIAGNOSIS"
# First bytes of the files that mask2ct writes.
_BEGINNINGS = {
    ".nii": b"\x5c\x01\0\0",
    ".nrrd": b"NRRD0004\n",
    ".mha": b"ObjectType = Image\n",
    ".dcm": bytes(128) + b"DICM",
}
SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
_TEXT_HEADERS = (".nrrd", ".nhdr", ".mha", ".mhd")


def stem(path: Path) -> str:
    """The case name: the file name without the format's suffix (`.nii.gz` counts as one)."""
    name = path.name
    return next((name[: -len(s)] for s in SUFFIXES if name.lower().endswith(s)), path.stem)


def mark(*, derived: bool) -> str:
    """The text in every header of a result.

    Args:
        derived: Whether the result is a deformed real CT, not a synthetic CT.
    """
    return DERIVED_MARK if derived else MARKS[0]


def notice(*, derived: bool) -> str:
    """The description of a volume file: `mark`, with the program's name.

    Args:
        derived: Whether the result is a deformed real CT, not a synthetic CT.
    """
    return f"{mark(derived=derived)} ({MARKS[1]})"


def is_synthetic(path: Path) -> bool:
    """Whether the header of a file, of any format, states that mask2ct wrote it.

    It holds for synthetic and for derived CTs; False for a file that cannot be read.
    """
    return _is_marked(_first_bytes(path))


def is_cut(path: Path) -> bool:
    """Whether a file was cut so early that it cannot state who wrote it.

    What mask2ct writes states it within the header of a NIfTI, or within `MARKS_WITHIN` bytes of
    DICOM. The remaining bytes must be the beginning of such a file: other short files belong to the
    user.
    """
    head = _first_bytes(path)
    name = path.name.lower().removesuffix(".gz")
    suffix = next((suffix for suffix in _BEGINNINGS if name.endswith(suffix)), None)
    if head is None or suffix is None or _is_marked(head):
        return False
    least = MARKS_WITHIN if suffix == ".dcm" else NIFTI_HEADER
    beginning = _BEGINNINGS[suffix]
    return len(head) < least and head[: len(beginning)] == beginning[: len(head)]


def _is_marked(head: bytes | None) -> bool:
    return (
        head is not None
        and MARKS[1].encode() in head
        and any(text.encode() in head for text in (MARKS[0], DERIVED_MARK))
    )


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


def volume_files(path: Path) -> tuple[Path, ...]:
    """The files that the volume at `path` is read from, also in a zip.

    A detached header (.mhd, .nhdr) comes with the file of its voxels; digests of a mask cover both.
    Nothing is raised for a bad header or a missing file: reading it raises.
    """
    if not path.name.lower().endswith(_TEXT_HEADERS) or (path.exists() and not path.is_file()):
        return (path,)
    module = nrrd_header if path.name.lower().endswith((".nrrd", ".nhdr")) else meta_header
    try:
        with reading(path, EXPECTED), opened(path, MAX_HEADER) as handle:
            name = module.voxel_file_of(path, handle)
        return (path,) if name is None else (path, path.parent / voxel_name(path, name))
    except UnreadableVolume:
        return (path,)


def check_header(path: Path, *, voxels: bool = True) -> Header:
    """Read the header of a volume file, and check that the file can hold what it claims.

    Args:
        path: A file with one of `SUFFIXES`.
        voxels: Whether compressed voxels and voxels in text are decoded, to check that they are
            complete; they are not kept. A caller that reads the voxels need not set it.

    Raises:
        UnreadableVolume: The file is not one scalar volume or a layered .seg.nrrd.
        GeometryError: The header states no grid, or more than one.
    """
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        # A file that cannot be read is refused for that, not for its format.
        with reading(path, EXPECTED):
            path.stat()
            if not os.access(path, os.R_OK):
                raise PermissionError
        raise UnreadableVolume(
            f"{path.name} does not have a supported format",
            expected=f"{EXPECTED} ({', '.join(SUFFIXES)}), or DICOM with its prefix",
            remedy="convert it to one of these",
            file=path,
        )
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as exc:
        # Few programs open a result of such a name, and ITK aborts the process on it.
        raise UnreadableVolume(
            f"the file name {path.name!r} is not valid UTF-8",
            expected="a name in UTF-8",
            remedy="rename the file",
        ) from exc
    with reading(path, EXPECTED), open_input(path) as handle:
        header = _read_header(path, name, handle)
    if voxels:
        check_complete(path, header.voxels)
    return header


def _read_header(path: Path, name: str, handle: BinaryIO) -> Header:
    if name.endswith(".nii.gz"):
        if handle.read(2) != b"\x1f\x8b":
            raise bad(path, "is not gzip-compressed though it is named .gz")
        handle.seek(0)
    if name.endswith((".nii", ".nii.gz")):
        with unpacked(path, handle) if name.endswith(".gz") else nullcontext(handle) as content:
            return nifti_header.read_header(path, content)
    if name.endswith((".mha", ".mhd")):
        return meta_header.read_header(path, handle)
    header = nrrd_header.read_header(path, handle)
    segments = tuple(_segments(path, header.keys, header.layers))
    if header.layers > 1 and not segments:
        raise bad(
            path,
            f"is 4-D ({header.layers} values per voxel)",
            "save one 3-D volume per file: one channel, one time point",
        )
    if segments and header.layers > len(segments):
        raise bad(path, f"claims {header.layers} layers for {len(segments)} segments")
    return replace(header, segments=segments)


def _segments(path: Path, fields: Mapping[str, str], layers: int) -> Iterator[tuple[Segment, int]]:
    """The segments that Slicer writes into a .seg.nrrd, each with its layer.

    They are Segment0_LabelValue, _Layer, _Name and, in _Tags, a terminology entry. Before version
    4.11 Slicer wrote neither value nor layer: each segment is 1 in a layer of its own. Without
    values, several segments of one layer cannot be told apart: then none is returned.
    """
    matches = (re.fullmatch(r"segment(\d{1,6})_(?:id|name)", key) for key in fields)
    numbers = sorted({match[1] for match in matches if match}, key=int)
    matches = (re.fullmatch(r"segment(\d{1,6})_labelvalue", key) for key in fields)
    valued = [match[1] for match in matches if match]
    if not valued and len(numbers) > 1 and layers == 1:
        return
    for n, number in enumerate(valued or numbers):
        prefix = f"segment{number}_"
        value = integers(path, fields, prefix + "labelvalue")[0] if valued else 1
        layer = 0 if valued else n
        if prefix + "layer" in fields:
            layer = integers(path, fields, prefix + "layer")[0]
        yield Segment(value, fields.get(prefix + "name", ""), _terminology(fields, prefix)), layer


def _terminology(fields: Mapping[str, str], prefix: str) -> str:
    """The code of a segment, from its terminology entry.

    Its tags are KEY:VALUE|KEY:VALUE|. TerminologyEntry has seven parts with "~" between them:
    context, category, type, type modifier, anatomic context, region, region modifier. Each code is
    SCHEME^VALUE^MEANING (vtkSlicerTerminologiesModuleLogic).
    """
    tags = dict(
        tag.strip().split(":", 1)
        for tag in fields.get(prefix + "tags", "").split("|")
        if ":" in tag
    )
    entry = tags.get("TerminologyEntry") or fields.get(prefix + "terminologyentry", "")
    codes = [concept(*(part + "^^").split("^")[:2]) for part in (entry + "~" * 6).split("~")[:7]]
    return modified(codes[2], (codes[3], codes[5], codes[6]))
