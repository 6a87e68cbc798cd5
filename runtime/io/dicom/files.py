"""DICOM files: what an instance is, which lie in a folder, where the slices of a series lie.
pydicom reads, within bounds.

Nothing here lets a file name, a UID or a name of a person into a message: a DICOM source is called
by a digest (`seg-1a2b3c4d`), and `mask2ct synth --list` shows on the screen which file that is.
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

SEGMENTATION = (
    "1.2.840.10008.5.1.4.1.1.66.4",
    "1.2.840.10008.5.1.4.1.1.66.7",
)  # Segmentation, Label Map Segmentation Storage
RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
MAX_FILES = 200_000
LINKED, OUTSIDE = "linked folder", "pipe, device or outward link"  # what `walk` leaves out
SLICE_TOLERANCE = 0.01  # how far a slice may lie from its even place, in slice spacings
UNEVEN_MM, UNEVEN = (
    0.1,
    0.05,
)  # up to the larger of these, mm and slice spacings, it is read with a note …
# … but never beyond this, in slice spacings: a missing slice moves others by half a spacing
UNEVEN_AT_MOST = 0.25
SHEAR_TOLERANCE = 1e-3  # sideways drift of the slices per mm of stack that still counts as none
ORIENTATION_TOLERANCE = (
    1e-4  # largest difference of direction cosines that still counts as the same
)
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
UNFINISHED = (
    ".part",
    ".partial",
    ".tmp",
    ".filepart",
    ".crdownload",
    "~",
)  # what copies are called before they are whole
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
    """One DICOM file by its header.

    `kind`: "seg", "rtstruct" or "image"; "damaged" for what cannot be read; None for what holds
    neither regions nor pixels. `damage`: why it cannot be read whole, in two or three words; empty
    for a whole file. `instance_number`: InstanceNumber; None where there is none. `images`: how
    many images the series or its acquisition has, as the file states it (ImagesInAcquisition,
    NumberOfSlices); 0 where it does not.
    """

    path: Path
    kind: str | None
    uid: str
    series: str
    number: str
    frame_of_reference: str
    title: str  # for the screen alone
    size: tuple[int, int, int]  # columns, rows, frames
    ours: bool
    damage: str = ""
    instance_number: int | None = None
    images: int = 0


def pydicom() -> Any:
    """The pydicom module. Raises `MissingComponent` when it is not installed."""
    with importing("pydicom", "pydicom, which reads DICOM masks", 'pip install "mask2ct[dicom]"'):
        import pydicom
    return pydicom


@contextmanager
def map_dicom_errors(name: str) -> Iterator[None]:
    """Map whatever a damaged DICOM file makes its reader raise to `UnreadableVolume`, without
    quoting what the file says.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom quotes values
            yield
    except (Mask2CTError, MemoryError):
        raise
    except Exception as exc:  # pydicom lets nearly every exception through, by where the damage is
        raise UnreadableVolume(
            f"{name} cannot be read as DICOM ({type(exc).__name__})",
            expected="a complete DICOM file",
            remedy="export it again, or check it with dciodvfy",
            file=Path(name),
        ) from exc


def pseudonym(kind: str, uid: str) -> str:
    """What a DICOM source is called, in messages and in results: its kind and 32 bits of a
    digest of its UID.
    """
    digest = hashlib.sha256(
        uid.encode("utf-8", "surrogateescape")
    )  # also of a file name, which may be any bytes
    return f"{kind}-{digest.hexdigest()[:8]}"


def is_dicom(path: Path) -> bool:
    """Whether a file starts as DICOM files do (PS3.10, 7.1)."""
    try:
        with archive.opened(path, 132) as handle:
            return handle.read(132)[128:] == b"DICM"
    except (OSError, UnreadableVolume):
        return False


def dataset(path: Path, *, tags: Sequence[str] | None = None) -> Any:
    """The whole file, or with `tags` those alone, never the pixels then. Call it within `guarded`.

    Raises:
        UnreadableVolume: where the whole file is asked for and it ends within an element.
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


def scan(paths: Iterable[Path], others: list[Path] | None = None) -> list[Instance]:
    """The DICOM files among `paths`, in their order, those of one SOP Instance UID together; copies
    of one instance are one.

    Files that share a UID and differ are all returned. `others`: receives the paths that are no
    DICOM files.
    """
    by_uid: dict[str, list[Instance]] = {}
    for path in paths:
        if is_dicom(path):
            instance = _instance(path)
            by_uid.setdefault(instance.uid, []).append(instance)
        elif others is not None:
            others.append(path)
    return [
        instance
        for sharing in by_uid.values()
        for instance in (_distinct(sharing) if len(sharing) > 1 else sharing)
    ]


def _distinct(sharing: Sequence[Instance]) -> list[Instance]:
    """Of files that state one SOP Instance UID those whose bytes differ.

    Images are told apart further by whoever places them.
    """
    by_bytes: dict[str, Instance] = {}
    for instance in sharing:
        with archive.opened(instance.path) as handle:
            by_bytes.setdefault(sha256_of(handle), instance)
    distinct = [*by_bytes.values()]
    if len(distinct) == 1 or distinct[0].kind == "image":
        return distinct
    with (
        suppress(UnreadableVolume),
        map_dicom_errors("header"),
    ):  # what differs in the file's meta information alone is one
        first = dataset(distinct[0].path)
        return [distinct[0], *(other for other in distinct[1:] if dataset(other.path) != first)]
    return distinct


def walk(folder: Path, unread: dict[str, list[Path]] | None = None) -> list[Path]:
    """Every file below a folder, sorted; hidden ones, linked folders, and what is no file of the
    folder (`OUTSIDE`) are left out.

    A link that leads nowhere is in the list: what it stands for may be missing.

    Args:
        folder: where to begin; it may itself be a link.
        unread: receives, by what they are, the folders that are not read.

    Raises:
        UsageError: for more than `MAX_FILES` files.
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
            (
                files
                if belongs_to(folder, path) or is_broken_link(path)
                else unread.setdefault(OUTSIDE, [])
            ).append(path)
        if len(files) > MAX_FILES:
            raise UsageError(
                f"{folder} holds more than {MAX_FILES} files",
                expected="the masks and what they were drawn on",
                remedy="give the folders in it one by one",
                file=folder,
            )
    return files


def is_broken_link(path: Path) -> bool:
    """Whether a link leads nowhere, or in a circle."""
    return path.is_symlink() and not os.path.exists(path)


def _instance(path: Path) -> Instance:
    """A file's header. One that cannot be read is an instance, too: reading it as a mask will
    say what is wrong.
    """
    if path.name.lower().endswith(UNFINISHED):  # whose size may be that of the whole already
        return damaged_instance(path, UNFINISHED_COPY)
    reader = pydicom()
    try:
        with (
            map_dicom_errors("header"),
            archive.opened(path) as handle,
            closing(inflate.readable(handle, pixels=False)) as plain,
        ):
            ds = reader.dcmread(plain, specific_tags=[*_HEADER], stop_before_pixels=True)
            sop, uid = (
                str(ds.get("SOPClassUID", "")),
                str(ds.get("SOPInstanceUID", "")) or str(path),
            )
            size = tuple(
                int(ds.get(key) or default)
                for key, default in (("Columns", 0), ("Rows", 0), ("NumberOfFrames", 1))
            )
            kind = (
                "seg"
                if sop in SEGMENTATION
                else "rtstruct"
                if sop == RTSTRUCT
                else "image"
                if size[0] and size[1]
                else None
            )
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
                (size[0], size[1], size[2]),
                _is_ours(ds, description),
                CUT_SHORT if cut else "",
                _integer(ds, "InstanceNumber"),
                max(_integer(ds, "ImagesInAcquisition") or 0, _integer(ds, "NumberOfSlices") or 0),
            )
    except UnreadableVolume:
        return damaged_instance(path, "with a damaged header")


def _is_ours(ds: Any, description: str) -> bool:
    """Whether mask2ct wrote an instance, synthetic or derived."""
    is_synthetic = ds.get("SyntheticData") == "YES" and "NOT FOR DIAGNOSIS" in description
    return is_synthetic or (
        str(ds.get("Manufacturer", "")) == MARKS[1] and DERIVED_MARK in description
    )


def damaged_instance(path: Path, damage: str) -> Instance:
    """A file that cannot be read as DICOM, with the reason."""
    return Instance(path, "damaged", str(path), str(path), "", "", "", (0, 0, 0), False, damage)


def _integer(ds: Any, keyword: str) -> int | None:
    try:
        return int(ds[keyword].value) if keyword in ds else None
    except (TypeError, ValueError):
        return None


def _lacks_header(ds: Any, sop: str) -> bool:
    """Whether a header without pixels ended before what every instance states (PS3.3, C.12.1),
    or is that of an image.
    """
    from pydicom.uid import UID

    stored_as = str(getattr(ds, "file_meta", {}).get("MediaStorageSOPClassUID", ""))
    if not sop:
        return stored_as != _DICOMDIR
    return (bool(stored_as) and sop != stored_as) or "Image Storage" in UID(sop).name


def source(ds: Any, uids: Sequence[str], frame_of_reference: str = "") -> DicomSource:
    """What attached mode may take over from the instance `ds`. Call it within `guarded`."""
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
    return (
        "\\".join(map(str, value))
        if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue"
        else str(value)
    )


def numbers(value: Any, count: int, name: str, what: str) -> NDArray[np.float64]:
    """`count` finite numbers of an attribute.

    Raises `GeometryError` naming `what` is missing or wrong.
    """
    try:
        found = np.array([float(x) for x in value], float)
    except (TypeError, ValueError):
        found = np.zeros(0)
    if found.shape != (count,) or not np.isfinite(found).all():
        raise GeometryError(
            f"{name} states no usable {what}",
            expected=f"{count} numbers; geometry is never guessed",
            remedy="export it with its geometry",
            file=Path(name),
        )
    return found


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
    """Where planes lie that share an orientation: their grid, each plane's slice k in it, and how
    many slices it has.

    `positions` (N, 3): ImagePositionPatient, mm; `orientation`: the 6 cosines; `pixel_spacing`:
    (row, column) distance (PS3.3, C.7.6.2.1.1). k counts along the normal, so that the grid is
    right-handed whatever the order of the files. `step`: the distance of slices as the file states
    it; `thickness` stands for it where there is one slice alone (else 1 mm). With `gaps` planes may
    be missing and several may share a place, as in a SEG; else each place has one plane. `notes`:
    receives what a person should be told. Raises `GeometryError` for a sheared (tilted) stack,
    uneven gaps, missing or duplicate slices.
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
            f"states the orientation {orientation.tolist()}, which is none",
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
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = (
        row * pixel_spacing[1],
        column * pixel_spacing[0],
        normal * spacing,
    )
    affine[:3, 3] = lowest
    return Geometry(affine), slices, int(k[-1]) + 1


def _places(
    height: NDArray[np.float64],
    step: float | None,
    gaps: bool,
    wrong: Callable[[str, str], GeometryError],
) -> tuple[NDArray[np.intp], float, float]:
    """The slice of each ascending height (mm, from 0), the slices' distance, and how far one
    lies off its even place where that is told (mm).
    """
    apart = np.diff(height)
    apart = (
        apart[apart > SLICE_TOLERANCE * (step or np.median(apart))]
        if gaps and apart.size
        else apart
    )
    if not apart.size:
        return np.zeros(len(height), np.intp), 1.0, 0.0
    if gaps:  # positions count; the stated distance serves where none of the neighbours is there
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
    spacing, off = _off_even(height, k)  # the whole stack says it more exactly than two neighbours
    if (
        gaps and off > SLICE_TOLERANCE * spacing + 1e-3
    ):  # the smallest distance is no measure of uneven ones
        steps = np.r_[0, np.diff(height) > SLICE_TOLERANCE * (step or np.median(apart))]
        neighbours = np.cumsum(steps).astype(float)
        mean, lesser = _off_even(height, neighbours)
        if lesser <= _uneven(mean) and (step is None or abs(mean - step) <= _uneven(step)):
            k, spacing, off = neighbours, mean, lesser
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
    """The mean distance of slices `k`, and how far a height lies from its even place at most;
    both in mm.
    """
    spacing = float(height[-1] / k[-1])
    return spacing, float(np.abs(height - k * spacing).max())


def _uneven(spacing: float) -> float:
    """How far a slice may lie from its even place to be read with a note, in mm."""
    return min(max(UNEVEN_MM, UNEVEN * spacing), UNEVEN_AT_MOST * spacing)
