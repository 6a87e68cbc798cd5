"""Volumes and their geometry: arrays are (D, H, W), the geometry is LPS in mm.

The classes refuse an invalid state.
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

# Beyond these a header is damaged, and NIfTI's float32 has no digits left.
SMALLEST_MM, LARGEST_MM = 1e-6, 1e7
# A grid is not sheared up to this |cosine| between two of its axes.
ORTHOGONAL_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Geometry:
    """Where the voxels lie, in LPS (DICOM's patient coordinates, PS3.3 C.7.6.2.1.1).

    Args:
        affine: 4x4, voxel index (i, j, k, 1) → (x, y, z, 1) in mm. i counts columns, j rows, k
            slices: the reverse of the array's (D, H, W). Kept as float64.

    Raises:
        GeometryError: The grid is sheared, or has no positive spacing.
    """

    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        # -0 becomes 0: equal grids have equal bytes, and so the same digest.
        affine = np.array(self.affine, np.float64) + 0.0
        expected = "a finite 4x4 affine with orthogonal axes, LPS, mm"
        if (
            affine.shape != (4, 4)
            or not np.isfinite(affine).all()
            or not np.array_equal(affine[3], [0, 0, 0, 1])
        ):
            raise GeometryError(
                f"the affine {affine.tolist()} is not valid",
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
        """The geometry of an ITK or SimpleITK image.

        Args:
            origin: Centre of voxel (0, 0, 0), (x, y, z) in mm, LPS.
            spacing: Distance of neighbouring voxels along i, j, k in mm.
            direction: 9 direction cosines, row by row, LPS.

        Raises:
            GeometryError: The grid is sheared, or has no positive spacing.
        """
        affine = np.eye(4)
        affine[:3, :3] = np.asarray(direction, float).reshape(3, 3) * np.asarray(spacing, float)
        affine[:3, 3] = origin
        return cls(affine)

    @classmethod
    def from_ras(cls, affine: Any) -> Geometry:
        """The geometry of an image of NiBabel, MONAI or TorchIO.

        Args:
            affine: 4x4, voxel index (i, j, k, 1) → (x, y, z, 1) in mm, RAS+.

        Raises:
            GeometryError: The grid is sheared, or has no positive spacing.
        """
        return cls(np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(affine, float))

    @classmethod
    def from_spacing(cls, spacing: Any) -> Geometry:
        """The geometry of an array in the order of axial CT, from its spacing alone.

        Slices run from feet to head, rows from anterior to posterior, columns from the patient's
        right to the left.

        Args:
            spacing: Distance of neighbouring voxels (x, y, z) in mm.

        Raises:
            GeometryError: A spacing is not positive.
        """
        return cls(np.diag([*np.asarray(spacing, float), 1.0]))

    @cached_property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along i, j, k, in mm."""
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

    def __eq__(self, geometry: object) -> bool:
        return isinstance(geometry, Geometry) and np.array_equal(self.affine, geometry.affine)

    def __hash__(self) -> int:
        return hash(self.affine.tobytes())


@dataclass(frozen=True)
class DicomSource:
    """The DICOM instances that a mask was read from.

    All of this identifies a patient. It reaches an output only in attached mode.

    Attributes:
        sop_class_uid: SOP Class UID of the instances.
        sop_instance_uids: Their SOP Instance UIDs.
        frame_of_reference_uid: The frame of reference of the grid.
        attributes: Attributes of patient and study by keyword (PatientID, StudyInstanceUID …), as
            text.
    """

    sop_class_uid: str
    sop_instance_uids: tuple[str, ...]
    frame_of_reference_uid: str
    attributes: Mapping[str, str]


@dataclass(frozen=True)
class Segment:
    """One structure as a file describes it.

    Attributes:
        number: Its label value, segment number or ROI number. Negative for a structure that the
            file identifies by its name alone.
        name: Its name in the file; may be empty.
        code: Its property type with the coding scheme, "SCT:80891009"
            (`runtime.core.label_codes`); may be empty.
        strict: The file's own table names its numbers: under another table the number alone says
            nothing.
        private: From a DICOM source, whose words may identify a patient. Messages describe it
            with `runtime.core.labels.describe`.
    """

    number: int
    name: str = ""
    code: str = ""
    strict: bool = False
    private: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Volume:
    """The voxels of a file and their geometry, as a reader returns them.

    Attributes:
        values: (D, H, W), in the file's dtype.
        geometry: Where the voxels lie.
        nifti_header: The 348 header bytes of a little-endian NIfTI-1 source, so that a NIfTI result
            can carry its grid bit for bit; else None.
        segments: The structures that the file names, if it names any.
        dicom: The DICOM instances of the source; else None.
        notes: Warnings for a person.
    """

    values: NDArray[Any]
    geometry: Geometry
    nifti_header: bytes | None = None
    segments: tuple[Segment, ...] = ()
    dicom: DicomSource | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layers:
    """A mask whose segments may overlap, as a reader returns it.

    Attributes:
        segments: The structures of the file.
        shape: (D, H, W).
        geometry: Where the voxels lie.
        pieces: Yields (segment number, slice k, bool (H, W) of its pixels there), the slices in any
            order. A piece may be missing, but must not come twice.
        dicom: The DICOM instances of the source; else None.
        notes: Warnings for a person.
    """

    segments: tuple[Segment, ...]
    shape: tuple[int, int, int]
    geometry: Geometry
    pieces: Callable[[], Iterator[tuple[int, int, NDArray[np.bool_]]]]
    dicom: DicomSource | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelVolume:
    """A mask in the model's indices 0..K, and its geometry.

    Attributes:
        labels: uint8 (D, H, W).
        geometry: Where the voxels lie.
        nifti_header: As in `Volume`; the NIfTI writer may take it over.
        dicom: As in `Volume`; the DICOM writer may take it over.
        notes: Warnings of the reader for a person.

    Raises:
        UnreadableVolume: The labels are not uint8 of three axes.
    """

    labels: NDArray[np.uint8]
    geometry: Geometry
    nifti_header: bytes | None = field(default=None, compare=False)
    dicom: DicomSource | None = field(default=None, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    # Set once the digest is computed. `dataclasses.replace` does not copy it to other labels.
    _known_digest: bytes | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.labels.ndim != 3 or self.labels.dtype != np.uint8 or 0 in self.labels.shape:
            raise UnreadableVolume(
                f"the mask is {self.labels.dtype} of shape {self.labels.shape}",
                expected="uint8 model indices of shape (D, H, W), without an empty axis",
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
        """Gather a volume from its planes and compute its digest as they come.

        Args:
            planes: D planes (H, W), uint8 model indices.
            shape: (D, H, W).
            geometry: Where the voxels lie.
            nifti_header: As in `Volume`.
            notes: Warnings of the reader for a person.
        """
        labels, digest = np.empty(shape, np.uint8), _start_digest(shape, geometry)
        for n, plane in enumerate(planes):
            labels[n] = plane
            _add_plane(digest, plane)
        volume = cls(labels, geometry, nifti_header, notes=notes)
        # The labels are not read a second time.
        volume._keep_digest(digest.digest())
        return volume

    @property
    def digest(self) -> bytes:
        """SHA-256 (32 bytes) of the geometry and the runs of the labels.

        It identifies the case whatever its file is called. It is computed at the first use, unless
        `compute_digest` did so before.
        """
        return self.compute_digest()

    def compute_digest(self) -> bytes:
        """Compute `digest` in this thread and keep it, so that no other thread waits for it.

        Returns:
            The digest (32 bytes).
        """
        if self._known_digest is not None:
            return self._known_digest
        digest = _start_digest(self.labels.shape, self.geometry)
        for plane in self.labels:
            _add_plane(digest, plane)
        return self._keep_digest(digest.digest())

    def _keep_digest(self, digest: bytes) -> bytes:
        # The class is frozen: this is the one attribute that is set later.
        object.__setattr__(self, "_known_digest", digest)
        return digest


def runs(plane: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """Split a slice (H, W) into runs of equal values, line after line.

    Args:
        plane: (H, W), any dtype.

    Returns:
        The value of each run, in the slice's dtype, and its length in voxels.
    """
    line = plane.ravel()
    # An empty slice has no run: the cut to its size drops the end that does not exist.
    ends = np.append(np.flatnonzero(line[1:] != line[:-1]), line.size - 1)[: line.size]
    return line[ends], np.diff(ends, prepend=-1)


def _start_digest(shape: tuple[int, ...], geometry: Geometry) -> Any:
    """The running SHA-256 of a `LabelVolume`, still without its labels."""
    digest = hashlib.sha256(np.asarray(shape, "<i8").tobytes())
    digest.update(geometry.affine.astype("<f8").tobytes())
    return digest


def _add_plane(digest: Any, plane: NDArray[np.uint8]) -> None:
    """Add a slice to a running digest.

    Its runs have a hundredth of its voxels and identify it as well: the lengths add up to the
    slice's size, so no other sequence of slices gives the same bytes.
    """
    run_values, lengths = runs(plane)
    digest.update(lengths.astype("<i8").tobytes())
    digest.update(run_values.tobytes())


@dataclass(frozen=True)
class CTSlab:
    """A few neighbouring slices of the CT: `volume[slab.index] = slab.hu`.

    The receiver owns the array.

    Attributes:
        hu: int16 HU, the mask's full extent along two array axes.
        axis: The array axis that counts the slices.
        start: Index of the first slice along `axis`.
    """

    hu: NDArray[np.int16]
    axis: int
    start: int

    @property
    def index(self) -> tuple[slice, ...]:
        """Where the slab lies in the (D, H, W) volume."""
        region = [slice(None)] * 3
        region[self.axis] = slice(self.start, self.start + self.hu.shape[self.axis])
        return tuple(region)
