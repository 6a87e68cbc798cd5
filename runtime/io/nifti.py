"""Volumes in and out: NIfTI, NRRD and MHA are read by SimpleITK behind `headers.check_header`; NIfTI-1 is written in slabs."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..contract import LabelTable
from ..errors import GeometryError, MissingComponent, UnreadableVolume, reading
from ..files import atomic_path
from ..labels import LabelMap, to_indices
from ..volume import CTSlab, Geometry, LabelVolume, Layers, Segment, Volume
from .headers import EXPECTED, Header, check_header, rotation

GZIP_LEVEL = 1  # isal: 150 MB/s a core at 7 % more bytes than level 3
_IMAGE_IO = {
    ".gz": "NiftiImageIO",
    ".nii": "NiftiImageIO",
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
}
_DEFAULT_ORIENTATION = dict.fromkeys((".gz", ".nii"), "it is taken to run right to left, front to back, feet to head") | dict.fromkeys(
    (".nrrd", ".nhdr", ".mha", ".mhd"), "its axes are taken to run to the left, to the back and to the head"
)
_CODES = {
    np.dtype(np.uint8): (2, 8),
    np.dtype(np.int16): (4, 16),
    np.dtype(np.uint16): (512, 16),
    np.dtype(np.int32): (8, 32),
}  # datatype, bitpix
_MM = 2  # xyzt_units
QFORM_TOLERANCE_MM = 1e-4  # how far qform and sform may disagree


def simpleitk() -> Any:
    """The SimpleITK module. Raises `MissingComponent` when it is not installed."""
    try:
        import SimpleITK
    except ImportError as exc:
        raise MissingComponent(
            f"SimpleITK cannot be imported: {exc}", expected="SimpleITK, which reads volumes", remedy="pip install SimpleITK"
        ) from exc
    return SimpleITK


def isal_threaded() -> Any:
    """isal's threaded gzip. Raises `MissingComponent` when it is not installed."""
    try:
        from isal import igzip_threaded
    except ImportError as exc:
        raise MissingComponent(
            f"isal cannot be imported: {exc}", expected="isal, which compresses .nii.gz", remedy="pip install isal"
        ) from exc
    return igzip_threaded


def read_volume(path: Path) -> Volume:
    """Read one 3-D scalar volume: values (D, H, W) in the file's dtype (scaled ones as float), geometry LPS in mm.

    Raises `UnreadableVolume` or `GeometryError`, naming the file, for anything else.
    """
    volume = read_mask(path)
    if isinstance(volume, Layers):
        raise UnreadableVolume(f"{Path(path).name} holds several layers", expected=EXPECTED, remedy="save it as one layer", file=path)
    return volume


def read_mask(path: Path) -> Volume | Layers:
    """As `read_volume`; a Slicer segmentation in several layers comes as `Layers`."""
    path = Path(path)
    header = check_header(path)
    sitk = simpleitk()
    with reading(path, EXPECTED):
        image = sitk.ReadImage(str(path), imageIO=_IMAGE_IO[path.suffix.lower()])  # by name: nothing else is tried on the file
    while image.GetDimension() > 3:  # only dimensions of 1 are left
        image = image[(slice(None),) * (image.GetDimension() - 1) + (0,)]
    notes = () if header.oriented else (f"{path.name} states no orientation: {_DEFAULT_ORIENTATION[path.suffix.lower()]}",)
    segments = tuple(segment for segment, _ in header.segments)
    if len({s.number for s in segments}) < len(segments) or header.layers > 1:
        return _layers(image, header, notes, path)
    return replace(from_sitk(image, header.nifti, path), segments=segments, notes=notes)


def _layers(image: Any, header: Header, notes: tuple[str, ...], path: Path) -> Layers:
    """A layered .seg.nrrd: the components of a voxel are its layers, and a value means something in its own layer only."""
    if image.GetNumberOfComponentsPerPixel() != header.layers or any(not 0 <= layer < header.layers for _, layer in header.segments):
        raise UnreadableVolume(f"{path.name} has {image.GetNumberOfComponentsPerPixel()} layers, not those its segments name",
                               expected=EXPECTED, remedy="save it again from Slicer", file=path)  # fmt: skip
    values = as_integers(simpleitk().GetArrayFromImage(image), path).reshape(*image.GetSize()[::-1], header.layers)
    renumbered = tuple(Segment(n + 1, segment.name, segment.code) for n, (segment, _) in enumerate(header.segments))

    def pieces() -> Iterator[tuple[int, int, NDArray[np.bool_]]]:
        for k, plane in enumerate(values):
            for named, (segment, layer) in zip(renumbered, header.segments, strict=True):
                yield named.number, k, plane[..., layer] == segment.number

    depth, height, width = values.shape[:3]
    return Layers(renumbered, (depth, height, width), from_sitk_geometry(image, path), pieces, notes=notes)


def from_sitk(image: Any, nifti_header: bytes | None = None, file: Path | None = None) -> Volume:
    """A SimpleITK image as a `Volume`; the values are copied, so that the image may go. Raises `InputError`s."""
    name = "the image" if file is None else file.name
    pixel = image.GetPixelIDTypeAsString()
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1 or pixel.startswith(("label", "complex")):
        raise UnreadableVolume(f"{name} is {image.GetDimension()}-D with {image.GetNumberOfComponentsPerPixel()} values a voxel ({pixel})",
                               expected=EXPECTED, remedy="save the labels as one integer per voxel of a 3-D volume", file=file)  # fmt: skip
    return Volume(simpleitk().GetArrayFromImage(image), from_sitk_geometry(image, file), nifti_header)


def from_sitk_geometry(image: Any, file: Path | None = None) -> Geometry:
    """Where a 3-D SimpleITK image lies. Raises `GeometryError`, naming the file."""
    try:
        return Geometry.from_parts(image.GetOrigin(), image.GetSpacing(), image.GetDirection())
    except GeometryError as exc:
        exc.file = file
        raise


def read_labels(path: Path, table: LabelTable, label_map: LabelMap | None = None) -> LabelVolume:
    """Read a mask and map its values to the model's indices. Raises `InputError`s that name the file."""
    volume = read_volume(path)
    indices = to_indices(as_integers(volume.values, path), table, label_map, segments=volume.segments, file=path)
    return LabelVolume(indices, volume.geometry, volume.nifti_header, notes=volume.notes)


def as_integers(values: NDArray[Any], file: Path | None = None) -> NDArray[Any]:
    """Label values as integers. Floats are taken when every one of them is whole. Raises `UnreadableVolume`."""
    if values.dtype.kind in "iu":
        return values
    for plane in values:
        whole = np.isfinite(plane) & (plane == np.rint(plane)) & (np.abs(plane) < 1 << 31)
        if not whole.all():
            example = plane[~whole].flat[0]
            raise UnreadableVolume(
                f"{'the mask' if file is None else file.name} holds {example}, which is no label",
                expected="whole numbers: a label map, not an image or a probability",
                remedy="give the label map itself, and resample labels with nearest neighbour",
                file=file,
            )
    return values.astype(np.int32)


def write_nifti(
    path: Path,
    slabs: Iterable[CTSlab],
    shape: tuple[int, int, int],
    geometry: Geometry,
    *,
    nifti_header: bytes | None = None,
    description: str = "",
) -> None:
    """Write int16 slabs that together fill `shape` (D, H, W) as NIfTI-1, atomically; `.gz` names are compressed by isal.

    With `nifti_header` (of the mask) the grid is its own bits; its free text is dropped, for it may name a patient. The
    same input gives the same bytes. Raises `OutputError`.
    """
    with atomic_path(path) as part, _open(part) as file:
        file.write(_header(shape, np.dtype(np.int16), geometry, nifti_header, description))
        whole: NDArray[np.int16] | None = None
        for slab in slabs:
            if slab.axis == 0:
                _write_planes(file, slab.hu)
            else:  # the slices are not the file's slowest axis: it must be complete before it can be written
                whole = np.empty(shape, np.int16) if whole is None else whole
                whole[slab.index] = slab.hu
        if whole is not None:
            _write_planes(file, whole)


def write_values(path: Path, values: NDArray[Any], geometry: Geometry, *, nifti_header: bytes | None = None, description: str = "") -> None:
    """Write a uint8, uint16 or int16 volume (D, H, W) as NIfTI-1, as `write_nifti` does."""
    with atomic_path(path) as part, _open(part) as file:
        depth, height, width = values.shape
        file.write(_header((depth, height, width), values.dtype, geometry, nifti_header, description))
        _write_planes(file, values)


def _open(path: Path) -> BinaryIO:
    if path.name.endswith(".gz"):
        igzip_threaded = isal_threaded()
        file: BinaryIO = igzip_threaded.open(str(path), "wb", compresslevel=GZIP_LEVEL, threads=1)
        return file
    return open(path, "wb")


def _write_planes(file: BinaryIO, values: NDArray[Any]) -> None:
    """One write a plane: how the compressor cuts its input, and so its output, must not depend on how slabs were cut."""
    for plane in values:
        file.write(np.ascontiguousarray(plane, values.dtype.newbyteorder("<")).data.cast("B"))


def _header(shape: tuple[int, int, int], dtype: np.dtype[Any], geometry: Geometry, source: bytes | None, description: str) -> bytes:
    """352 bytes: a NIfTI-1 header (nifti1.h; numbers are its byte offsets) with the grid of `source`, else of `geometry`."""
    out = bytearray(352)
    code, bits = _CODES[dtype]
    struct.pack_into("<i", out, 0, 348)
    struct.pack_into("<8h", out, 40, 3, shape[2], shape[1], shape[0], 1, 1, 1, 1)
    struct.pack_into("<2h", out, 70, code, bits)
    struct.pack_into("<3f", out, 108, 352.0, 1.0, 0.0)  # vox_offset, scl_slope, scl_inter
    out[148:228] = description.encode("ascii", "replace")[:79].ljust(80, b"\0")
    out[344:348] = b"n+1\0"
    if source is not None:
        out[76:92], out[123:124], out[252:328] = source[76:92], source[123:124], source[252:328]
        return bytes(out)
    ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ geometry.affine  # NIfTI is RAS+, we are LPS
    struct.pack_into("<4f", out, 76, _handedness(ras), *geometry.spacing)
    out[123] = _MM
    quaternion = _quaternion(ras)
    struct.pack_into("<2h", out, 252, int(_qform_holds(quaternion, ras, shape)), 1)  # both in scanner coordinates
    struct.pack_into("<3f", out, 256, *quaternion)
    struct.pack_into("<3f", out, 268, *ras[:3, 3])
    struct.pack_into("<12f", out, 280, *ras[:3].ravel())
    return bytes(out)


def _handedness(ras: NDArray[np.float64]) -> float:
    """NIfTI's qfac: -1 for a left-handed grid."""
    return -1.0 if np.linalg.det(ras[:3, :3]) < 0 else 1.0


def _qform_holds(quaternion: tuple[float, float, float], ras: NDArray[np.float64], shape: tuple[int, int, int]) -> bool:
    """Whether the three float32 numbers place the far corner within QFORM_TOLERANCE_MM. Near half turns they do not:
    a = sqrt(1 - b^2 - c^2 - d^2) loses its digits. Then only the sform is stated."""
    turn = rotation(*(float(np.float32(q)) for q in quaternion))
    columns = turn * np.linalg.norm(ras[:3, :3], axis=0) * [1, 1, _handedness(ras)]
    far = np.abs(columns - ras[:3, :3]) @ np.array(shape[::-1], float)
    return bool(far.max() <= QFORM_TOLERANCE_MM)


def _quaternion(ras: NDArray[np.float64]) -> tuple[float, float, float]:
    """b, c, d of the unit quaternion (a >= 0) of the grid's rotation (nifti1.h, method 2).

    The rotation's quaternion is the eigenvector of the largest eigenvalue of Bar-Itzhack's 4x4 matrix (J. Guidance 23(6),
    2000), which is well conditioned for every rotation.
    """
    r = ras[:3, :3] / np.linalg.norm(ras[:3, :3], axis=0)
    r[:, 2] *= _handedness(ras)
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = r
    k = np.array(
        [
            [xx - yy - zz, yx + xy, zx + xz, zy - yz],
            [yx + xy, yy - xx - zz, zy + yz, xz - zx],
            [zx + xz, zy + yz, zz - xx - yy, yx - xy],
            [zy - yz, xz - zx, yx - xy, xx + yy + zz],
        ]
    )
    b, c, d, a = np.linalg.eigh(k)[1][:, -1]
    return (b, c, d) if a >= 0 else (-b, -c, -d)
