"""Volume files by name: which are read, which are ours, and what their headers state.

Every header is read once, by one of `nifti_header_in`, `nrrd_header` and `meta_header`, and the
voxels are read from what it said (`voxels`). No file of a user reaches another reader.
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
from .readers.volume_header import EXPECTED, MAX_HEADER, Header, Voxels, bad, voxel_name
from .readers.volume_header import integers as _numbers
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

MARKS = (
    "SYNTHETIC CT - NOT FOR DIAGNOSIS",
    "mask2ct",
)  # what every header written says of itself, within its first bytes
MARKS_WITHIN = 8192
NIFTI_HEADER = 352  # bytes, with the four behind it that say whether extensions follow
NOTICE = f"{MARKS[0]} ({MARKS[1]})"  # 79 characters fit into a NIfTI
# of a real CT that was deformed, in the place of the first of MARKS
DERIVED_MARK = "DERIVED CT - NOT FOR DIAGNOSIS"
_BEGINNINGS = {
    ".nii": b"\x5c\x01\0\0",
    ".nrrd": b"NRRD0004\n",
    ".mha": b"ObjectType = Image\n",
    ".dcm": bytes(128) + b"DICM",
}  # as written here
SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
_TEXT_HEADERS = (".nrrd", ".nhdr", ".mha", ".mhd")


def stem(path: Path) -> str:
    """The case name: the file name without the format's suffix (`.nii.gz` counts as one)."""
    name = path.name
    return next((name[: -len(s)] for s in SUFFIXES if name.lower().endswith(s)), path.stem)


def mark(*, derived: bool) -> str:
    """What a result is called in every header: a synthetic CT, or one derived from a real one."""
    return DERIVED_MARK if derived else MARKS[0]


def notice(*, derived: bool) -> str:
    """As `mark`, with who wrote it: the description of a volume file."""
    return f"{mark(derived=derived)} ({MARKS[1]})"


def is_synthetic(path: Path) -> bool:
    """Whether this is a file that mask2ct wrote, of whatever format, synthetic or derived: its
    header says so.
    """
    return _is_marked(_first_bytes(path))


def is_cut(path: Path) -> bool:
    """Whether so little of a file is left that it cannot say who wrote it: it was cut, to nothing
    or within its first bytes.

    What mask2ct writes says so within the header of a NIfTI, of which a whole volume has more, or
    within `MARKS_WITHIN` bytes of DICOM. What is left must begin as such a file does: other short
    files are somebody's own.
    """
    head = _first_bytes(path)
    suffix = next(
        (
            suffix
            for suffix in _BEGINNINGS
            if path.name.lower().removesuffix(".gz").endswith(suffix)
        ),
        None,
    )
    if head is None or suffix is None or _is_marked(head):
        return False
    least, beginning = (MARKS_WITHIN if suffix == ".dcm" else NIFTI_HEADER), _BEGINNINGS[suffix]
    return len(head) < least and head[: len(beginning)] == beginning[: len(head)]


def _is_marked(head: bytes | None) -> bool:
    return (
        head is not None
        and MARKS[1].encode() in head
        and any(text.encode() in head for text in (MARKS[0], DERIVED_MARK))
    )


def _first_bytes(path: Path) -> bytes | None:
    """The first `MARKS_WITHIN` bytes, or as many as there are, of what a file holds, unpacked.

    None: it cannot be opened, or is no gzip.
    """
    try:
        with open_input(path) as handle:
            if not path.name.lower().endswith(".gz"):
                return handle.read(MARKS_WITHIN)
            return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(
                handle.read(MARKS_WITHIN), MARKS_WITHIN
            )
    except (OSError, zlib.error):
        return None


def volume_files(path: Path) -> tuple[Path, ...]:
    """The files that the volume at `path` is read from, also in a zip.

    Whatever a digest of a mask is taken of is taken of all of them: of a detached header
    (.mhd, .nhdr) that is the header and the file with its voxels. Nothing is raised: of a header
    that is no good, or a file that is not there, reading will say so.
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
    """The header of a volume file, checked: what it claims can be there.

    Args:
        path: A file with one of `SUFFIXES`.
        voxels: Whether compressed and written-out voxels are decoded, too, to see that all of
            them are there; they are not kept. Whoever reads them finds out by itself.

    Raises:
        UnreadableVolume: For a file that is not one scalar volume; a layered .seg.nrrd is one.
        GeometryError: For a grid that is not stated, or not once.
    """
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        with reading(path, EXPECTED):  # what cannot be read is of no format
            path.stat()
            if not os.access(path, os.R_OK):
                raise PermissionError
        raise UnreadableVolume(
            f"{path.name} is not of a format that is read",
            expected=f"{EXPECTED} ({', '.join(SUFFIXES)}), or DICOM with its prefix",
            remedy="convert it to one of these",
            file=path,
        )
    try:
        str(path).encode("utf-8")
    except (
        UnicodeEncodeError
    ) as exc:  # a result of such a name opens in few programs; ITK ends the process on it
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
    """The segments that Slicer writes into a .seg.nrrd: Segment0_LabelValue, _Layer, _Name and,
    among its _Tags, a terminology entry.

    Before version 4.11 it wrote neither value nor layer: each segment is 1 in a layer of its own.
    Without a value several segments of one layer cannot be told apart, and none is returned.
    """
    names = sorted(
        {m[1] for key in fields if (m := re.fullmatch(r"segment(\d{1,6})_(?:id|name)", key))},
        key=int,
    )
    valued = [m[1] for key in fields if (m := re.fullmatch(r"segment(\d{1,6})_labelvalue", key))]
    if not valued and len(names) > 1 and layers == 1:
        return
    for n, number in enumerate(valued or names):
        prefix = f"segment{number}_"
        value = _numbers(path, fields, prefix + "labelvalue")[0] if valued else 1
        layer = (
            _numbers(path, fields, prefix + "layer")[0]
            if prefix + "layer" in fields
            else 0
            if valued
            else n
        )
        yield Segment(value, fields.get(prefix + "name", ""), _terminology(fields, prefix)), layer


def _terminology(fields: Mapping[str, str], prefix: str) -> str:
    """A segment's code.

    Its tags are KEY:VALUE|KEY:VALUE|; of these TerminologyEntry is seven parts, "~" between them:
    context, category, type, type modifier, anatomic context, region, region modifier; each code is
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
