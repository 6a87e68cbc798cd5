"""Read DICOM files with pydicom: headers, the instances in a folder, the stack of slices.

A message never contains a file name, a UID or the name of a person. It names a DICOM source by a
digest (`seg-1a2b3c4d`), and `mask2ct synth --list` shows on the screen which file that is.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.atomic_files import belongs_to, sha256_of
from ...core.errors import GeometryError, Mask2CTError, UnreadableVolume, UsageError, importing
from ...core.volume import DicomSource, Geometry
from .. import archive
from ..readers.cut_files import ends_early, last_element_is_cut
from ..volume_files import DERIVED_MARK, MARKS
from . import inflate

# Segmentation Storage, Label Map Segmentation Storage
SEGMENTATION = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
MAX_FILES = 200_000
LINKED, OUTSIDE = "linked folder", "pipe, device or outward link"  # `walk` leaves these out
SLICE_TOLERANCE = 0.01  # the distance of a slice from its even place, in slice spacings
# Up to the larger of these, in mm and in slice spacings, a stack is read with a note …
UNEVEN_MM, UNEVEN = 0.1, 0.05
# … but not beyond this, in slice spacings: a missing slice moves others by half a spacing.
UNEVEN_AT_MOST = 0.25
SHEAR_TOLERANCE = 1e-3  # the sideways drift of the slices, per mm of stack
ORIENTATION_TOLERANCE = 1e-4  # the difference of direction cosines within a series
MAX_SLICES = 4096
_HEADER = [
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "Modality",
    "SeriesNumber",
    "SeriesDescription",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "FrameOfReferenceUID",
    "SyntheticData",
    "PixelData",
    "InstanceNumber",
    "ImagesInAcquisition",
    "NumberOfSlices",
    "Manufacturer",
]
_DICOMDIR = "1.2.840.10008.1.3.10"
CUT_SHORT, UNFINISHED_COPY = "cut short", "unfinished copy"
# the suffixes of copies in progress
UNFINISHED = (".part", ".partial", ".tmp", ".filepart", ".crdownload", "~")
_IDENTITY = [
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
        ours: whether mask2ct wrote the file.
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
    ours: bool
    damage: str = ""
    instance_number: int | None = None
    images: int = 0


def pydicom() -> Any:
    """Import pydicom.

    Returns:
        The module.

    Raises:
        MissingComponent: pydicom is not installed.
    """
    with importing("pydicom", "pydicom, which reads DICOM masks", 'pip install "mask2ct[dicom]"'):
        import pydicom
    return pydicom


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


def dataset(path: Path, *, tags: Sequence[str] | None = None) -> Any:
    """Read a DICOM file. Call this within `map_dicom_errors`.

    Args:
        path: the file.
        tags: the elements to read, never the pixels; None for the complete file.

    Returns:
        The dataset.

    Raises:
        MissingComponent: pydicom is not installed.
        UnreadableVolume: the complete file is read, and it ends within an element.
    """
    reader = pydicom()
    with (
        archive.opened(path) as handle,
        closing(inflate.readable(handle, pixels=tags is None)) as plain,
    ):
        if tags is not None:
            return reader.dcmread(plain, specific_tags=[*tags], stop_before_pixels=True)
        ds = reader.dcmread(plain)
        if last_element_is_cut(ds, plain):
            raise UnreadableVolume(
                "a DICOM file is truncated: it ends within an element",
                expected="complete DICOM files",
                remedy="copy or export it again",
            )
        return ds


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
    with suppress(UnreadableVolume), map_dicom_errors("header"):
        first = dataset(distinct[0].path)
        different = [instance for instance in distinct[1:] if dataset(instance.path) != first]
        return [distinct[0], *different]
    return distinct


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
    reader = pydicom()
    try:
        with (
            map_dicom_errors("header"),
            archive.opened(path) as handle,
            closing(inflate.readable(handle, pixels=False)) as plain,
        ):
            ds = reader.dcmread(plain, specific_tags=[*_HEADER], stop_before_pixels=True)
            sop = str(ds.get("SOPClassUID", ""))
            uid = str(ds.get("SOPInstanceUID", "")) or str(path)
            columns, rows, frames = (
                int(ds.get(key) or default)
                for key, default in (("Columns", 0), ("Rows", 0), ("NumberOfFrames", 1))
            )
            kind = _kind(sop, has_pixels=bool(columns and rows))
            cut = ends_early(ds, plain, pixels=kind in ("seg", "image"))
            if kind is None and (cut or _lacks_header(ds, sop)):
                return damaged_instance(path, CUT_SHORT if cut else "with an incomplete header")
            description = str(ds.get("SeriesDescription", ""))
            return Instance(
                path,
                kind,
                uid,
                str(ds.get("SeriesInstanceUID", "")) or uid,
                str(ds.get("SeriesNumber") or ""),
                str(ds.get("FrameOfReferenceUID", "")),
                description,
                (columns, rows, frames),
                _is_ours(ds, description),
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


def _is_ours(ds: Any, description: str) -> bool:
    """Whether mask2ct wrote an instance, synthetic or derived."""
    is_synthetic = ds.get("SyntheticData") == "YES" and "NOT FOR DIAGNOSIS" in description
    return is_synthetic or (
        str(ds.get("Manufacturer", "")) == MARKS[1] and DERIVED_MARK in description
    )


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


def source(ds: Any, uids: Sequence[str], frame_of_reference: str = "") -> DicomSource:
    """Collect what an attached series takes over from a mask. Call this in `map_dicom_errors`.

    Args:
        ds: an instance of the mask.
        uids: the SOP Instance UIDs of the mask.
        frame_of_reference: its Frame of Reference UID; empty for that of `ds`.

    Returns:
        The SOP class, the UIDs, and the attributes of patient and study.
    """
    attributes = {
        key: _text(ds[key].value) for key in _IDENTITY if key in ds and ds[key].value is not None
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


def numbers(value: Any, count: int, name: str, what: str) -> NDArray[np.float64]:
    """Read the numbers of a geometric attribute.

    Args:
        value: the value of the attribute.
        count: how many numbers it must have.
        name: the pseudonym of the source, for the message.
        what: the name of the attribute, for the message.

    Returns:
        float64 (count,), all finite.

    Raises:
        GeometryError: the attribute is missing or wrong.
    """
    try:
        array = np.array([float(x) for x in value], float)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.shape != (count,) or not np.isfinite(array).all():
        raise GeometryError(
            f"{name} states no usable {what}",
            expected=f"{count} numbers; geometry is never guessed",
            remedy="export it with its geometry",
            file=Path(name),
        )
    return array


def stack(
    positions: NDArray[np.float64],
    orientation: NDArray[np.float64],
    pixel_spacing: NDArray[np.float64],
    name: str,
    *,
    step: float | None = None,
    thickness: float | None = None,
    gaps: bool = False,
    notes: list[str] | None = None,
) -> tuple[Geometry, NDArray[np.intp], int]:
    """Derive the grid of a stack of parallel planes (PS3.3 C.7.6.2.1.1).

    Slices count along the normal, so that the grid is right-handed whatever the order of the files.

    Args:
        positions: (N, 3), ImagePositionPatient of each plane in mm.
        orientation: (6,), the direction cosines of ImageOrientationPatient.
        pixel_spacing: (2,), the distance of rows and of columns in mm.
        name: the pseudonym of the source, for messages.
        step: the distance of slices as the file states it, in mm.
        thickness: the distance of slices where there is one slice and no `step`, in mm; 1 mm where
            it is missing too.
        gaps: whether planes may be missing and several may share a place, as in a SEG.
        notes: a list that receives notes for the user.

    Returns:
        The grid, the slice number of each plane (N,), and the number of slices.

    Raises:
        GeometryError: the stack is sheared (tilted) or uneven, or slices are missing or duplicate.
    """

    def wrong(fact: str, remedy: str) -> GeometryError:
        return GeometryError(
            f"{name} {fact}",
            expected="parallel slices at even distances, straight above each other",
            remedy=remedy,
            file=Path(name),
        )

    row, column = orientation[:3], orientation[3:]
    if (
        abs(np.linalg.norm(row) - 1) > 1e-3
        or abs(np.linalg.norm(column) - 1) > 1e-3
        or abs(row @ column) > 1e-3
    ):
        raise wrong(
            f"states the orientation {orientation.tolist()}, which is not orthonormal",
            "export it with its geometry",
        )
    if (pixel_spacing <= 0).any() or any(
        s is not None and not 0 < s < 1e4 for s in (step, thickness)
    ):
        raise wrong(
            f"states the spacing {[*pixel_spacing.tolist(), step]}", "export it with its geometry"
        )
    row, column = row / np.linalg.norm(row), column / np.linalg.norm(column)
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    height = positions @ normal
    order = np.argsort(height, kind="stable")
    lowest = positions[order[0]]
    drift = np.linalg.norm(
        (positions - lowest) - np.outer(height - height[order[0]], normal), axis=1
    )
    if (drift > 1e-2 + SHEAR_TOLERANCE * np.abs(height - height[order[0]])).any():
        raise wrong(
            f"is sheared: its slices drift {drift.max():.2f} mm sideways (gantry tilt, or planes of"
            " several stacks)",
            "resample it to an orthogonal grid first",
        )
    k, spacing, uneven = _places(height[order] - height[order[0]], step, gaps, wrong)
    if uneven and notes is not None:
        notes.append(
            f"{name} is uneven: slices lie up to {uneven:.2g} mm off even distances; their mean of"
            f" {spacing:.4g} mm is used"
        )
    slices = np.empty(len(positions), np.intp)
    slices[order] = k
    if not k[-1]:
        spacing = step or thickness or 1.0
    affine = np.eye(4)
    affine[:3, 0] = row * pixel_spacing[1]
    affine[:3, 1] = column * pixel_spacing[0]
    affine[:3, 2] = normal * spacing
    affine[:3, 3] = lowest
    return Geometry(affine), slices, int(k[-1]) + 1


def _places(
    height: NDArray[np.float64],
    step: float | None,
    gaps: bool,
    wrong: Callable[[str, str], GeometryError],
) -> tuple[NDArray[np.intp], float, float]:
    """Assign slices to the ascending heights of planes (mm, from 0).

    Returns:
        The slice of each height, the distance of slices in mm, and the largest error of a height in
        mm, 0 where it is within the tolerance.
    """
    apart = np.diff(height)
    if gaps and apart.size:
        apart = apart[apart > SLICE_TOLERANCE * (step or np.median(apart))]
    if not apart.size:
        return np.zeros(len(height), np.intp), 1.0, 0.0
    # positions decide; the stated distance is needed where no two slices are neighbors
    if gaps:
        ratio = apart.min() / step if step else 0.0
        stated = round(ratio) >= 1 and abs(ratio - round(ratio)) <= SLICE_TOLERANCE * round(ratio)
        unit = step if step and stated else float(apart.min())
        k = np.rint(height / unit)
        places = np.unique(k)
        if len(places) > 2 and (common := np.gcd.reduce(places[: 1 << 16].astype(int))) > 1:
            raise wrong(
                f"states slices {step:g} mm apart, but none of its {len(places)} lie closer than"
                f" {common * unit:g} mm",
                "correct SpacingBetweenSlices, or give every slice",
            )
    else:
        if (apart < SLICE_TOLERANCE * np.median(apart)).any() or not np.median(apart):
            raise wrong("has duplicate slices: two lie in one place", "take the duplicates out")
        k = np.arange(len(height), dtype=float)
    # the full stack gives the distance more exactly than two neighbors
    spacing, off = _off_even(height, k)
    # for uneven slices the smallest distance is a poor unit: try one slice per distinct height
    if gaps and off > SLICE_TOLERANCE * spacing + 1e-3:
        steps = np.r_[0, np.diff(height) > SLICE_TOLERANCE * (step or np.median(apart))]
        consecutive = np.cumsum(steps).astype(float)
        mean, error = _off_even(height, consecutive)
        if error <= _uneven(mean) and (step is None or abs(mean - step) <= _uneven(step)):
            k, spacing, off = consecutive, mean, error
    if k[-1] >= MAX_SLICES:
        raise wrong(
            f"spans {k[-1] + 1:.0f} slices", f"at most {MAX_SLICES} are read; check its positions"
        )
    if off > max(SLICE_TOLERANCE * spacing + 1e-3, _uneven(spacing)):
        distances = np.unique(np.round(apart, 3))
        listed = ", ".join(f"{d:g}" for d in distances[:6])
        multiples = distances / distances[0]
        if not gaps and np.allclose(multiples, np.rint(multiples), atol=SLICE_TOLERANCE):
            raise wrong(
                f"has slices {listed} mm apart (some are missing)",
                "give the whole series, at even distances",
            )
        raise wrong(
            f"is uneven: it has slices {listed} mm apart",
            "resample it to even distances, or export it so",
        )
    return k.astype(np.intp), spacing, off if off > SLICE_TOLERANCE * spacing + 1e-3 else 0.0


def _off_even(height: NDArray[np.float64], k: NDArray[np.float64]) -> tuple[float, float]:
    """The mean distance of slices `k` and the largest error of a height, both in mm."""
    spacing = float(height[-1] / k[-1])
    return spacing, float(np.abs(height - k * spacing).max())


def _uneven(spacing: float) -> float:
    """The largest error of a slice that is read with a note, in mm."""
    return min(max(UNEVEN_MM, UNEVEN * spacing), UNEVEN_AT_MOST * spacing)
