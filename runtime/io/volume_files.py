"""Volume files: which suffixes are read, and what headers state.

Every header is parsed once, by `nifti_header`, `nrrd_header` or `meta_header`, and the voxels are
read as it states (`voxels`). No other reader opens a file of the user.
"""

from __future__ import annotations

import os
import re
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
    "EXPECTED",
    "SUFFIXES",
    "Header",
    "Voxels",
    "bad",
    "check_header",
    "stem",
    "volume_files",
]

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
_TEXT_HEADERS = (".nrrd", ".nhdr", ".mha", ".mhd")


def stem(path: Path) -> str:
    """The case name: the file name without the format's suffix (`.nii.gz` counts as one)."""
    name = path.name
    return next((name[: -len(s)] for s in SUFFIXES if name.lower().endswith(s)), path.stem)


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
