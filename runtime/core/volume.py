"""Volumes and where they lie: arrays are (D, H, W), geometry is LPS in mm, invalid state is
refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import GeometryError, UnreadableVolume

SMALLEST_MM, LARGEST_MM = (
    1e-6,
    1e7,
)  # beyond these a header is damaged (and float32, which NIfTI holds, is at an end)
ORTHOGONAL_TOLERANCE = (
    1e-3  # largest |cosine| between two axes of a grid that still counts as not sheared
)


@dataclass(frozen=True)
class Geometry:
    """A 4x4 `affine` (float64): voxel index (i, j, k, 1) → (x, y, z) in mm, LPS (DICOM's patient
    coordinates).

    i counts columns, j rows, k slices: the reverse of the array's (D, H, W). Refuses
    (`GeometryError`) what is not a rigid, unsheared grid with positive spacing.
    """

    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        affine = (
            np.array(self.affine, np.float64) + 0.0
        )  # -0 becomes 0: equal grids are equal bytes, which digests are made of
        expected = "a finite 4x4 affine with orthogonal axes, LPS, mm"
        if (
            affine.shape != (4, 4)
            or not np.isfinite(affine).all()
            or not np.array_equal(affine[3], [0, 0, 0, 1])
        ):
            raise GeometryError(
                f"the affine {affine.tolist()} is not one",
                expected=expected,
                remedy="write the mask again with a valid header",
            )
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        if (lengths < SMALLEST_MM).any() or np.abs(affine).max() > LARGEST_MM:
            raise GeometryError(
                f"the voxel spacing is {lengths.tolist()} mm, the origin {affine[:3, 3].tolist()}",
                expected=f"positive spacings, within {LARGEST_MM:g} mm",
                remedy="correct the header",
            )
        unit = affine[:3, :3] / lengths
        cosines = np.abs(unit.T @ unit - np.eye(3))
        if cosines.max() > ORTHOGONAL_TOLERANCE:
            raise GeometryError(
                f"the grid is sheared: two of its axes have the cosine {cosines.max():.4f}",
                expected=f"orthogonal axes (tolerance {ORTHOGONAL_TOLERANCE})",
                remedy="resample the mask to an orthogonal grid first",
            )
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)

    @classmethod
    def from_parts(cls, origin: Any, spacing: Any, direction: Any) -> Geometry:
        """From SimpleITK's (or ITK's) origin and spacing (mm) and 9 direction cosines, row by
        row, all LPS.
        """
        affine = np.eye(4)
        affine[:3, :3] = np.asarray(direction, float).reshape(3, 3) * np.asarray(spacing, float)
        affine[:3, 3] = origin
        return cls(affine)

    @classmethod
    def from_ras(cls, affine: Any) -> Geometry:
        """From the 4x4 affine of nibabel, MONAI or TorchIO, which is RAS+, in mm, for indices
        (i, j, k).
        """
        return cls(np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(affine, float))

    @classmethod
    def from_spacing(cls, spacing: Any) -> Geometry:
        """From the spacing (x, y, z) in mm alone, of an array whose slices run from the feet to the
        head, rows from front to back and columns from the patient's right to the left, as axial CT
        is stored and shown.
        """
        return cls(np.diag([*np.asarray(spacing, float), 1.0]))

    @cached_property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels in mm along i, j, k."""
        x, y, z = (float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))
        return x, y, z

    @property
    def origin(self) -> tuple[float, float, float]:
        """Centre of voxel (0, 0, 0) in mm."""
        x, y, z = (float(v) for v in self.affine[:3, 3])
        return x, y, z

    @cached_property
    def direction(self) -> NDArray[np.float64]:
        """3x3 direction cosines: column n is the unit vector of axis n."""
        return self.affine[:3, :3] / np.asarray(self.spacing)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Geometry) and np.array_equal(self.affine, other.affine)

    def __hash__(self) -> int:
        return hash(self.affine.tobytes())


@dataclass(frozen=True)
class DicomSource:
    """The DICOM instances a mask was read from.

    All of this identifies a patient: it reaches an output only in attached mode.

    `attributes`: of the patient and the study by keyword (PatientID, StudyInstanceUID …), as text.
    """

    sop_class_uid: str
    sop_instance_uids: tuple[str, ...]
    frame_of_reference_uid: str
    attributes: Mapping[str, str]


@dataclass(frozen=True)
class Segment:
    """One structure as a file tells of it.

    `number`: what stands for it in the file (label value, segment or ROI number); `name`: its label
    there; `code`: of its property type, with the coding scheme ("SCT:80891009"; see
    `runtime.core.label_codes`). Both may be empty. `strict`: the file's own table names its
    numbers, so that under another table the number alone says nothing; of one that has a name alone
    it is negative. `private`: of a DICOM source, whose words may be a patient's: messages call it
    by `runtime.core.labels.describe`.
    """

    number: int
    name: str = ""
    code: str = ""
    strict: bool = False
    private: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Volume:
    """What a reader returns: the file's `values` (D, H, W) in its own dtype, and where they lie.

    `nifti_header`: the 348 header bytes of a little-endian NIfTI-1 source, so that a NIfTI result
    can carry its grid bit for bit; else None. `segments`: what the file says its values mean, if it
    does. `notes`: what a person should be told.
    """

    values: NDArray[Any]
    geometry: Geometry
    nifti_header: bytes | None = None
    segments: tuple[Segment, ...] = ()
    dicom: DicomSource | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layers:
    """What a reader returns of a mask whose segments may overlap: one piece at a time, on a grid of
    `shape` (D, H, W).

    `pieces()` yields (segment number, slice k, bool (H, W) of its pixels there), slices in any
    order; a piece may be missing, not twice.
    """

    segments: tuple[Segment, ...]
    shape: tuple[int, int, int]
    geometry: Geometry
    pieces: Callable[[], Iterator[tuple[int, int, NDArray[np.bool_]]]]
    dicom: DicomSource | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelVolume:
    """`labels` uint8 (D, H, W) in the model's own indices 0..K, and where they lie.

    `nifti_header`, `dicom`: what a writer of the source's own format may take over; see `Volume`
    and `DicomSource`. `notes`: what a person should be told of how it was read.
    """

    labels: NDArray[np.uint8]
    geometry: Geometry
    nifti_header: bytes | None = field(default=None, compare=False)
    dicom: DicomSource | None = field(default=None, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.labels.ndim != 3 or self.labels.dtype != np.uint8 or 0 in self.labels.shape:
            raise UnreadableVolume(
                f"the mask is {self.labels.dtype} of shape {self.labels.shape}",
                expected="uint8 model indices of shape (D, H, W), none of them 0",
                remedy="map its values with runtime.core.labels.to_indices",
            )

    @classmethod
    def gathered(
        cls,
        planes: Iterable[NDArray[np.uint8]],
        shape: tuple[int, int, int],
        geometry: Geometry,
        nifti_header: bytes | None = None,
        *,
        notes: tuple[str, ...] = (),
    ) -> LabelVolume:
        """Of the D planes (H, W) of its labels, digested as they come."""
        labels, digest = np.empty(shape, np.uint8), _digest(shape, geometry)
        for n, plane in enumerate(planes):
            labels[n] = plane
            _take(digest, plane)
        volume = cls(labels, geometry, nifti_header, notes=notes)
        volume.__dict__["digest"] = digest.digest()  # where the property keeps it
        return volume

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 (32 bytes) of labels, by their runs, and geometry: what this case *is*,
        whatever its file is called.
        """
        digest = _digest(self.labels.shape, self.geometry)
        for plane in self.labels:
            _take(digest, plane)
        return digest.digest()


def runs(plane: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """A slice as runs of one value, line after line: what each is, and how many voxels long."""
    line = plane.ravel()
    ends = np.append(np.flatnonzero(line[1:] != line[:-1]), line.size - 1)[
        : line.size
    ]  # of an empty slice none
    return line[ends], np.diff(ends, prepend=-1)


def _digest(shape: tuple[int, ...], geometry: Geometry) -> Any:
    """Of a `LabelVolume`, without its labels yet."""
    digest = hashlib.sha256(np.asarray(shape, "<i8").tobytes())
    digest.update(geometry.affine.astype("<f8").tobytes())
    return digest


def _take(digest: Any, plane: NDArray[np.uint8]) -> None:
    """By its runs, a hundredth of its voxels and as telling: their lengths add up to the plane's
    size, so that nothing else reads the same.
    """
    worth, lengths = runs(plane)
    digest.update(lengths.astype("<i8").tobytes())
    digest.update(worth.tobytes())


@dataclass(frozen=True)
class CTSlab:
    """A few neighbouring slices of the result, owned by the receiver: `volume[slab.index] =
    slab.hu`.

    `hu`: int16 HU, the mask's full extent in two array axes and `hu.shape[axis]` slices from
    `start` along `axis`.
    """

    hu: NDArray[np.int16]
    axis: int
    start: int

    @property
    def index(self) -> tuple[slice, ...]:
        """Where the slab lies in the (D, H, W) volume."""
        whole = [slice(None)] * 3
        whole[self.axis] = slice(self.start, self.start + self.hu.shape[self.axis])
        return tuple(whole)
