"""Read DICOM files with pydicom: headers, and the instances in a folder.

A message never contains a file name, a UID or the name of a person. It names a DICOM source by a
digest (`seg-1a2b3c4d`), and `mask2ct synth --list` shows on the screen which file that is.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.atomic_files import belongs_to, sha256_of
from ...core.errors import Mask2CTError, UnreadableVolume, UsageError
from ...core.volume import DicomSource
from .. import archive
from ..marks import DICOM_KEYWORDS, dicom_written_by_mask2ct
from .header import opened
from .inflate import skip_meta

# Segmentation Storage, Label Map Segmentation Storage
SEGMENTATION = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
MAX_FILES = 200_000
LINKED, OUTSIDE = "linked folder", "pipe, device or outward link"  # `walk` leaves these out
_HEADER = [
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "Modality",
    "SeriesNumber",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "FrameOfReferenceUID",
    "InstanceNumber",
    "ImagesInAcquisition",
    "NumberOfSlices",
    *DICOM_KEYWORDS,
]
_DICOMDIR = "1.2.840.10008.1.3.10"
CUT_SHORT, UNFINISHED_COPY = "cut short", "unfinished copy"
# the suffixes of copies in progress
UNFINISHED = (".part", ".partial", ".tmp", ".filepart", ".crdownload", "~")
# The attributes that an attached series takes over from a mask.
IDENTITY = [
    "SpecificCharacterSet",
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "PatientAge",
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "StudyDescription",
    "AccessionNumber",
    "ReferringPhysicianName",
]


@dataclass(frozen=True)
class Instance:
    """One DICOM file, described by its header.

    Attributes:
        path: the file.
        kind: "seg", "rtstruct" or "image"; "damaged" for a file that cannot be read; None for an
            object without regions and pixels.
        uid: the SOP Instance UID.
        series: the Series Instance UID.
        number: the Series Number.
        frame_of_reference: the Frame of Reference UID.
        title: the Series Description, for the screen alone.
        size: (columns, rows, frames).
        written_by_mask2ct: whether mask2ct wrote the file (see `runtime.io.marks`).
        damage: why the file cannot be read completely, in two or three words; empty for a complete
            file.
        instance_number: the Instance Number, where there is one.
        images: the number of images in the series or its acquisition, as the file states it
            (ImagesInAcquisition, NumberOfSlices); 0 where it does not.
    """

    path: Path
    kind: str | None
    uid: str
    series: str
    number: str
    frame_of_reference: str
    title: str
    size: tuple[int, int, int]
    written_by_mask2ct: bool
    damage: str = ""
    instance_number: int | None = None
    images: int = 0


@contextmanager
def map_dicom_errors(name: str) -> Iterator[None]:
    """Raise the errors of reading a damaged DICOM file as `UnreadableVolume`, without its content.

    Args:
        name: the pseudonym of the source, for the message.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom quotes values
            yield
    except (Mask2CTError, MemoryError):
        raise
    except Exception as exc:  # damage may make pydicom raise nearly every class
        raise UnreadableVolume(
            f"{name} cannot be read as DICOM ({type(exc).__name__})",
            expected="a complete DICOM file",
            remedy="export it again, or check it with dciodvfy",
            file=Path(name),
        ) from exc


def pseudonym(kind: str, uid: str) -> str:
    """Name a DICOM source in messages and results.

    Args:
        kind: the kind of the source, such as "seg".
        uid: its UID, or the name of a damaged file.

    Returns:
        The kind and 32 bits of a digest of the UID.
    """
    # a file name may be any bytes
    digest = hashlib.sha256(uid.encode("utf-8", "surrogateescape"))
    return f"{kind}-{digest.hexdigest()[:8]}"


def is_dicom(path: Path) -> bool:
    """Return whether a file begins with the preamble of DICOM (PS3.10 7.1)."""
    try:
        with archive.opened(path, 132) as handle:
            return handle.read(132)[128:] == b"DICM"
    except (OSError, UnreadableVolume):
        return False


def scan(paths: Iterable[Path], not_dicom: list[Path] | None = None) -> list[Instance]:
    """Read the headers of DICOM files.

    Args:
        paths: files of any kind.
        not_dicom: a list that receives the paths of other files.

    Returns:
        The instances in the order of `paths`, those of one SOP Instance UID together. Copies of one
        file are one instance; different files that share a UID are all returned.
    """
    by_uid: dict[str, list[Instance]] = {}
    for path in paths:
        if is_dicom(path):
            instance = _instance(path)
            by_uid.setdefault(instance.uid, []).append(instance)
        elif not_dicom is not None:
            not_dicom.append(path)
    return [
        instance
        for sharing in by_uid.values()
        for instance in (_distinct(sharing) if len(sharing) > 1 else sharing)
    ]


def _distinct(sharing: Sequence[Instance]) -> list[Instance]:
    """The different files among those with one SOP Instance UID.

    The reader of a series compares images further, when it places them.
    """
    by_bytes: dict[str, Instance] = {}
    for instance in sharing:
        with archive.opened(instance.path) as handle:
            by_bytes.setdefault(sha256_of(handle), instance)
    distinct = [*by_bytes.values()]
    if len(distinct) == 1 or distinct[0].kind == "image":
        return distinct
    # files that differ in their meta information alone are one
    by_content: dict[str, Instance] = {}
    for instance in distinct:
        with archive.opened(instance.path) as handle:
            skip_meta(handle)
            by_content.setdefault(sha256_of(handle), instance)
    return [*by_content.values()]


def walk(folder: Path, unread: dict[str, list[Path]] | None = None) -> list[Path]:
    """List the files below a folder.

    Args:
        folder: the folder, which may itself be a link.
        unread: a dictionary that receives the paths that are left out, by the reason.

    Returns:
        The files, sorted, without hidden files, linked folders and paths that are not files of the
        folder (`OUTSIDE`). Broken links are in the list, because their files may be missing.

    Raises:
        UsageError: there are more than `MAX_FILES` files.
    """
    unread = {} if unread is None else unread
    files: list[Path] = []
    closed = unread.setdefault("folder that cannot be listed", [])
    for where, folders, names in os.walk(
        folder, onerror=lambda exc: closed.append(Path(exc.filename))
    ):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        unread.setdefault(LINKED, []).extend(
            Path(where) / name for name in folders if os.path.islink(Path(where) / name)
        )
        for path in (Path(where) / name for name in sorted(names) if not name.startswith(".")):
            if belongs_to(folder, path) or is_broken_link(path):
                files.append(path)
            else:
                unread.setdefault(OUTSIDE, []).append(path)
        if len(files) > MAX_FILES:
            raise UsageError(
                f"{folder} holds more than {MAX_FILES} files",
                expected="the masks and their images",
                remedy="give the folders in it one by one",
                file=folder,
            )
    return files


def is_broken_link(path: Path) -> bool:
    """Return whether a path is a link whose target does not exist, or a circle of links."""
    return path.is_symlink() and not os.path.exists(path)


def _instance(path: Path) -> Instance:
    """Read the header of a file; a damaged one is an instance too, which reports the damage."""
    # before the size is checked: a copy in progress may have its full size already
    if path.name.lower().endswith(UNFINISHED):
        return damaged_instance(path, UNFINISHED_COPY)
    try:
        with map_dicom_errors("header"), opened(path, _HEADER) as file:
            ds = file.header
            sop = str(ds.get("SOPClassUID", ""))
            uid = str(ds.get("SOPInstanceUID", "")) or str(path)
            columns, rows, frames = (
                int(ds.get(key) or default)
                for key, default in (("Columns", 0), ("Rows", 0), ("NumberOfFrames", 1))
            )
            kind = _kind(sop, has_pixels=bool(columns and rows))
            lacks_pixels = kind in ("seg", "image") and not file.has_pixels
            cut = file.ends_early or lacks_pixels
            if kind is None and (cut or _lacks_header(ds, sop)):
                return damaged_instance(path, CUT_SHORT if cut else "with an incomplete header")
            return Instance(
                path,
                kind,
                uid,
                str(ds.get("SeriesInstanceUID", "")) or uid,
                str(ds.get("SeriesNumber") or ""),
                str(ds.get("FrameOfReferenceUID", "")),
                str(ds.get("SeriesDescription", "")),
                (columns, rows, frames),
                dicom_written_by_mask2ct(ds),
                CUT_SHORT if cut else "",
                _integer(ds, "InstanceNumber"),
                max(_integer(ds, "ImagesInAcquisition") or 0, _integer(ds, "NumberOfSlices") or 0),
            )
    except UnreadableVolume:
        return damaged_instance(path, "with a damaged header")


def _kind(sop_class: str, *, has_pixels: bool) -> str | None:
    """The kind of an instance; see `Instance`."""
    if sop_class in SEGMENTATION:
        return "seg"
    if sop_class == RTSTRUCT:
        return "rtstruct"
    return "image" if has_pixels else None


def damaged_instance(path: Path, damage: str) -> Instance:
    """Return the instance for a file that cannot be read as DICOM.

    Args:
        path: the file.
        damage: the reason, in two or three words.
    """
    return Instance(path, "damaged", str(path), str(path), "", "", "", (0, 0, 0), False, damage)


def _integer(ds: Any, keyword: str) -> int | None:
    try:
        return int(ds[keyword].value) if keyword in ds else None
    except (TypeError, ValueError):
        return None


def _lacks_header(ds: Any, sop: str) -> bool:
    """Whether a header without pixels lacks its SOP class (PS3.3 C.12.1), or is an image's."""
    from pydicom.uid import UID

    stored_as = str(getattr(ds, "file_meta", {}).get("MediaStorageSOPClassUID", ""))
    if not sop:
        return stored_as != _DICOMDIR
    return (bool(stored_as) and sop != stored_as) or "Image Storage" in UID(sop).name


def dicom_source(ds: Any, uids: Sequence[str], frame_of_reference: str = "") -> DicomSource:
    """Collect what an attached series takes over from a mask. Call this in `map_dicom_errors`.

    Args:
        ds: an instance of the mask.
        uids: the SOP Instance UIDs of the mask.
        frame_of_reference: its Frame of Reference UID; empty for that of `ds`.

    Returns:
        The SOP class, the UIDs, and the attributes of patient and study.
    """
    attributes = {
        key: _text(ds[key].value) for key in IDENTITY if key in ds and ds[key].value is not None
    }
    return DicomSource(
        str(ds.get("SOPClassUID", "")),
        tuple(uids),
        frame_of_reference or str(ds.get("FrameOfReferenceUID", "")),
        attributes,
    )


def _text(value: Any) -> str:
    """The text of an attribute, several values separated by backslashes."""
    if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue":
        return "\\".join(map(str, value))
    return str(value)
