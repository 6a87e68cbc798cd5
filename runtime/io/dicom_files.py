"""DICOM files: what an instance is, which lie in a folder, where the slices of a series lie. pydicom reads, within bounds.

Nothing here lets a file name, a UID or a name of a person into a message: a DICOM source is called by a digest (`seg-1a2b3c4d`), and
`mask2ct synth --list` shows on the screen which file that is.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import GeometryError, Mask2CTError, UnreadableVolume, importing
from ..files import belongs_to
from ..volume import DicomSource, Geometry
from . import archive, deflated

SEGMENTATION = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # Segmentation, Label Map Segmentation Storage
RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
MAX_FILES = 200_000
SLICE_TOLERANCE = 0.01  # how far a slice may lie from its even place, in slice spacings
SHEAR_TOLERANCE = 1e-3  # sideways drift of the slices per mm of stack that still counts as none
ORIENTATION_TOLERANCE = 1e-4  # largest difference of direction cosines that still counts as the same
MAX_SLICES = 4096
_HEADER = ["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "Modality", "SeriesNumber", "SeriesDescription", "Rows", "Columns",
           "NumberOfFrames", "FrameOfReferenceUID", "SyntheticData", "PixelData", "InstanceNumber"]  # fmt: skip
_IDENTITY = ["SpecificCharacterSet", "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge", "StudyInstanceUID", "StudyDate", "StudyTime",
             "StudyID", "StudyDescription", "AccessionNumber", "ReferringPhysicianName"]  # fmt: skip


@dataclass(frozen=True)
class Instance:
    """One DICOM file by its header. `kind`: "seg", "rtstruct" or "image"; None for what holds neither regions nor pixels."""

    path: Path
    kind: str | None
    uid: str
    series: str
    number: str
    frame_of_reference: str
    title: str  # for the screen alone
    size: tuple[int, int, int]  # columns, rows, frames
    ours: bool


def pydicom() -> Any:
    """The pydicom module. Raises `MissingComponent` when it is not installed."""
    with importing("pydicom", "pydicom, which reads DICOM masks", 'pip install "mask2ct[dicom]"'):
        import pydicom
    return pydicom


@contextmanager
def guarded(name: str) -> Iterator[None]:
    """Map whatever a damaged DICOM file makes its reader raise to `UnreadableVolume`, without quoting what the file says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom quotes values
            yield
    except (Mask2CTError, MemoryError):
        raise
    except Exception as exc:  # pydicom lets nearly every exception through, by where the damage is
        raise UnreadableVolume(f"{name} cannot be read as DICOM ({type(exc).__name__})", expected="a complete DICOM file",
                               remedy="export it again, or check it with dciodvfy", file=Path(name)) from exc  # fmt: skip


def neutral(kind: str, uid: str) -> str:
    """What a DICOM source is called, in messages and in results: its kind and 32 bits of a digest of its UID."""
    digest = hashlib.sha256(uid.encode("utf-8", "surrogateescape"))  # also of a file name, which may be any bytes
    return f"{kind}-{digest.hexdigest()[:8]}"


def is_dicom(path: Path) -> bool:
    """Whether a file starts as DICOM files do (PS3.10, 7.1)."""
    try:
        with archive.opened(path, 132) as handle:
            return handle.read(132)[128:] == b"DICM"
    except (OSError, UnreadableVolume):
        return False


def dataset(path: Path, *, tags: Sequence[str] | None = None) -> Any:
    """The whole file, or with `tags` those alone, never the pixels then. Call it within `guarded`."""
    reader = pydicom()
    with archive.opened(path) as handle, closing(deflated.readable(handle, pixels=tags is None)) as plain:
        return reader.dcmread(plain, specific_tags=None if tags is None else [*tags], stop_before_pixels=tags is not None)


def scan(paths: Iterable[Path]) -> list[Instance]:
    """The DICOM files among `paths`, in their order; each once, since copies of one instance are one."""
    found: dict[str, Instance] = {}
    for path in paths:
        if is_dicom(path):
            instance = _instance(path)
            found.setdefault(instance.uid, instance)
    return [*found.values()]


def walk(folder: Path, foreign: list[Path] | None = None) -> list[Path]:
    """Every file below a folder, sorted, without hidden ones.

    Pipes, devices, linked folders and links that lead outside of `folder` are not opened: they are appended to `foreign`.
    """
    found: list[Path] = []
    foreign = [] if foreign is None else foreign
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(n for n in folders if not n.startswith("."))
        foreign += [link for n in folders if (link := Path(where) / n).is_symlink()]
        for path in (Path(where) / n for n in sorted(names) if not n.startswith(".")):
            (found if belongs_to(folder, path) else foreign).append(path)
        if len(found) > MAX_FILES:
            break
    return found[:MAX_FILES]


def _instance(path: Path) -> Instance:
    """A file's header. One that cannot be read is an instance, too: reading it as a mask will say what is wrong."""
    try:
        with guarded("header"):
            ds = dataset(path, tags=_HEADER)
            sop, uid = str(ds.get("SOPClassUID", "")), str(ds.get("SOPInstanceUID", "")) or str(path)
            size = tuple(int(ds.get(key) or default) for key, default in (("Columns", 0), ("Rows", 0), ("NumberOfFrames", 1)))
            kind = "seg" if sop in SEGMENTATION else "rtstruct" if sop == RTSTRUCT else "image" if size[0] and size[1] else None
            description = str(ds.get("SeriesDescription", ""))
            return Instance(path, kind, uid, str(ds.get("SeriesInstanceUID", "")) or uid, str(ds.get("SeriesNumber") or ""),
                            str(ds.get("FrameOfReferenceUID", "")), description, (size[0], size[1], size[2]),
                            ds.get("SyntheticData") == "YES" and "NOT FOR DIAGNOSIS" in description)  # fmt: skip
    except UnreadableVolume:
        return Instance(path, "damaged", str(path), str(path), "", "", "", (0, 0, 0), False)


def source(ds: Any, uids: Sequence[str], frame_of_reference: str = "") -> DicomSource:
    """What attached mode may take over from the instance `ds`. Call it within `guarded`."""
    attributes = {key: _text(ds[key].value) for key in _IDENTITY if key in ds and ds[key].value is not None}
    return DicomSource(
        str(ds.get("SOPClassUID", "")), tuple(uids), frame_of_reference or str(ds.get("FrameOfReferenceUID", "")), attributes
    )


def _text(value: Any) -> str:
    return "\\".join(map(str, value)) if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue" else str(value)


def numbers(value: Any, count: int, name: str, what: str) -> NDArray[np.float64]:
    """`count` finite numbers of an attribute. Raises `GeometryError` naming `what` is missing or wrong."""
    try:
        found = np.array([float(x) for x in value], float)
    except (TypeError, ValueError):
        found = np.zeros(0)
    if found.shape != (count,) or not np.isfinite(found).all():
        raise GeometryError(f"{name} states no usable {what}", expected=f"{count} numbers; geometry is never guessed",
                            remedy="export it with its geometry", file=Path(name))  # fmt: skip
    return found


def stack(
    positions: NDArray[np.float64], orientation: NDArray[np.float64], pixel_spacing: NDArray[np.float64], name: str, *,
    step: float | None = None, thickness: float | None = None, gaps: bool = False,
) -> tuple[Geometry, NDArray[np.intp], int]:  # fmt: skip
    """Where planes lie that share an orientation: their grid, each plane's slice k in it, and how many slices it has.

    `positions` (N, 3): ImagePositionPatient, mm; `orientation`: the 6 cosines; `pixel_spacing`: (row, column) distance (PS3.3, C.7.6.2.1.1).
    k counts along the normal, so that the grid is right-handed whatever the order of the files. `step`: the distance of slices as the
    file states it; `thickness` stands for it where there is one slice alone (else 1 mm). With `gaps` planes may
    be missing and several may share a place, as in a SEG; else each place has one plane.
    Raises `GeometryError` for a sheared (tilted) stack, uneven gaps, missing or duplicate slices.
    """

    def wrong(fact: str, remedy: str) -> GeometryError:
        return GeometryError(
            f"{name} {fact}", expected="parallel slices at even distances, straight above each other", remedy=remedy, file=Path(name)
        )

    row, column = orientation[:3], orientation[3:]
    if abs(np.linalg.norm(row) - 1) > 1e-3 or abs(np.linalg.norm(column) - 1) > 1e-3 or abs(row @ column) > 1e-3:
        raise wrong(f"states the orientation {orientation.tolist()}, which is none", "export it with its geometry")
    if (pixel_spacing <= 0).any() or any(s is not None and not 0 < s < 1e4 for s in (step, thickness)):
        raise wrong(f"states the spacing {[*pixel_spacing.tolist(), step]}", "export it with its geometry")
    row, column = row / np.linalg.norm(row), column / np.linalg.norm(column)
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    height = positions @ normal
    order = np.argsort(height, kind="stable")
    lowest = positions[order[0]]
    drift = np.linalg.norm((positions - lowest) - np.outer(height - height[order[0]], normal), axis=1)
    if (drift > 1e-2 + SHEAR_TOLERANCE * np.abs(height - height[order[0]])).any():
        raise wrong(f"is sheared: its slices drift {drift.max():.2f} mm sideways (gantry tilt, or planes of several stacks)",
                    "resample it to an orthogonal grid first")  # fmt: skip
    k, spacing = _places(height[order] - height[order[0]], step, gaps, wrong)
    slices = np.empty(len(positions), np.intp)
    slices[order] = k
    if not k[-1]:
        spacing = step or thickness or 1.0
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * pixel_spacing[1], column * pixel_spacing[0], normal * spacing
    affine[:3, 3] = lowest
    return Geometry(affine), slices, int(k[-1]) + 1


def _places(height: NDArray[np.float64], step: float | None, gaps: bool, wrong: Any) -> tuple[NDArray[np.intp], float]:
    """The slice of each ascending height (mm, from 0), and the slices' distance in mm."""
    apart = np.diff(height)
    apart = apart[apart > SLICE_TOLERANCE * (step or np.median(apart))] if gaps and apart.size else apart
    if not apart.size:
        return np.zeros(len(height), np.intp), 1.0
    if gaps:  # positions count; the stated distance serves where none of the neighbours is there
        ratio = apart.min() / step if step else 0.0
        stated = round(ratio) >= 1 and abs(ratio - round(ratio)) <= SLICE_TOLERANCE * round(ratio)
        unit = step if step and stated else float(apart.min())
        k = np.rint(height / unit)
        places = np.unique(k)
        if len(places) > 2 and (common := np.gcd.reduce(places[: 1 << 16].astype(int))) > 1:
            raise wrong(f"states slices {step:g} mm apart, but none of its {len(places)} lie closer than {common * unit:g} mm",
                        "correct SpacingBetweenSlices, or give every slice")  # fmt: skip
    else:
        if (apart < SLICE_TOLERANCE * np.median(apart)).any() or not np.median(apart):
            raise wrong("has duplicate slices: two lie in one place", "take the duplicates out")
        k = np.arange(len(height), dtype=float)
    if k[-1] >= MAX_SLICES:
        raise wrong(f"spans {k[-1] + 1:.0f} slices", f"at most {MAX_SLICES} are read; check its positions")
    spacing = float(height[-1] / k[-1])  # the whole stack says it more exactly than two neighbours
    if (np.abs(height - k * spacing) > SLICE_TOLERANCE * spacing + 1e-3).any():
        distances = np.unique(np.round(apart, 3))
        multiples = distances / distances[0]
        missing = " (some are missing)" if np.allclose(multiples, np.rint(multiples), atol=SLICE_TOLERANCE) and not gaps else ""
        raise wrong(
            f"has slices {', '.join(f'{d:g}' for d in distances[:6])} mm apart{missing}", "give the whole series, at even distances"
        )
    return k.astype(np.intp), spacing
