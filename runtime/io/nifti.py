"""Volumes in: NIfTI, NRRD and MHA are read by SimpleITK behind `headers.check_header`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contract import LabelTable
from ..errors import GeometryError, UnreadableVolume, importing, reading
from ..files import open_input
from ..labels import LabelMap, index_planes, overlay, to_indices
from ..pipeline import ahead
from ..volume import Geometry, LabelVolume, Layers, Segment, Volume
from .headers import EXPECTED, Header, Plain, bad, check_header, unpacked

READ_AT_ONCE = 2 << 20  # bytes of planes from thread to thread: they stay in the core's cache

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


def simpleitk() -> Any:
    """The SimpleITK module. Raises `MissingComponent` when it is not installed."""
    with importing("SimpleITK", "SimpleITK, which reads volumes", "pip install SimpleITK"):
        import SimpleITK
    return SimpleITK


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
    header, sitk = _checked(path), simpleitk()
    if header.plain is not None:  # SimpleITK would hold a second copy while it reads, and take three times as long to decompress
        (values,) = _planes(path, header.plain, header.plain.shape[0])
        return Volume(values, _geometry_of(path), header.nifti, notes=_notes(header, path))
    with reading(path, EXPECTED):
        image = sitk.ReadImage(str(path), imageIO=_IMAGE_IO[path.suffix.lower()])  # by name: nothing else is tried on the file
    while image.GetDimension() > 3:  # only dimensions of 1 are left
        image = image[(slice(None),) * (image.GetDimension() - 1) + (0,)]
    notes = _notes(header, path)
    segments = tuple(segment for segment, _ in header.segments)
    if len({s.number for s in segments}) < len(segments) or header.layers > 1:
        return _layers(image, header, notes, path)
    return replace(from_sitk(image, header.nifti, path), segments=segments, notes=notes)


def _checked(path: Path) -> Header:
    """The header, of a file whose voxels are there, or `plain` and counted when they are read."""
    header = check_header(path, voxels=False)
    return header if header.plain is not None else check_header(path)


def _geometry_of(path: Path) -> Geometry:
    """Where a NIfTI lies, as SimpleITK reads its header."""
    with reading(path, EXPECTED):
        about = simpleitk().ImageFileReader()
        about.SetImageIO("NiftiImageIO")
        about.SetFileName(str(path))
        about.ReadImageInformation()
    return from_sitk_geometry(about, path)


def _notes(header: Header, path: Path) -> tuple[str, ...]:
    return () if header.oriented else (f"{path.name} states no orientation: {_DEFAULT_ORIENTATION[path.suffix.lower()]}",)


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
    """A SimpleITK image as a `Volume`; the values are a read-only view that keeps the image. Raises `InputError`s."""
    name = "the image" if file is None else file.name
    pixel = image.GetPixelIDTypeAsString()
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1 or pixel.startswith(("label", "complex")):
        raise UnreadableVolume(f"{name} is {image.GetDimension()}-D with {image.GetNumberOfComponentsPerPixel()} values a voxel ({pixel})",
                               expected=EXPECTED, remedy="save the labels as one integer per voxel of a 3-D volume", file=file)  # fmt: skip
    return Volume(np.asarray(_Kept(image)), from_sitk_geometry(image, file), nifti_header)


def from_sitk_geometry(image: Any, file: Path | None = None) -> Geometry:
    """Where a 3-D SimpleITK image lies, or what its reader says of it. Raises `GeometryError`, naming the file."""
    try:
        return Geometry.from_parts(image.GetOrigin(), image.GetSpacing(), image.GetDirection())
    except GeometryError as exc:
        exc.file = file
        raise


def _planes(path: Path, plain: Plain, at_once: int) -> Iterator[NDArray[Any]]:
    """The voxels of a NIfTI, `at_once` planes (n, H, W) at a time, in the machine's byte order; for gzip the checksum is verified before the
    last of them. Raises `UnreadableVolume` where they end too early.
    """
    depth, row = plain.shape[0], math.prod(plain.shape[1:]) * plain.dtype.itemsize
    packed = path.name.lower().endswith(".gz")
    with reading(path, EXPECTED), open_input(path) as handle, unpacked(path, handle) if packed else nullcontext(handle) as content:
        content.seek(plain.offset)
        for start in range(0, depth, at_once):
            values = np.empty((min(at_once, depth - start), *plain.shape[1:]), plain.dtype)
            place, have = values.reshape(-1).view(np.uint8).data, 0
            while have < len(place) and (got := content.readinto(place[have : have + (1 << 20)])):  # type: ignore[attr-defined]
                have += got
            if have < len(place):
                raise bad(
                    path, f"is truncated: {start * row + have} of {depth * row} bytes of voxels are there", "copy or download it again"
                )
            if start + len(values) == depth:
                content.read(1)  # at the end of a gzip stream its checksum is compared
            yield values if plain.dtype.isnative else values.byteswap(inplace=True).view(plain.dtype.newbyteorder("="))


class _Kept:
    """An image's voxels (D, H, W) for numpy, which keeps this, and so the image, as long as an array looks at them."""

    def __init__(self, image: Any):
        self._image = image
        self.__array_interface__ = simpleitk().GetArrayViewFromImage(image).__array_interface__


def read_labels(
    path: Path, table: LabelTable, label_map: LabelMap | None = None, *, order: Sequence[str] = (), file: Path | None = None
) -> LabelVolume:
    """Read a mask and map its values to the model's indices. Raises `InputError`s that name `file`, by default the path.

    `order`: what wins where segments overlap (`runtime.labels.overlay`). Of a NIfTI of plain integers only the indices are ever held: it is
    decompressed in one thread, and mapped and digested in another, a few planes behind.
    """
    file, header = file or path, _checked(path)
    if header.plain is None:
        return labels_of(read_mask(path), table, label_map, order=order, file=file)
    geometry, at_once = (
        _geometry_of(path),
        max(1, READ_AT_ONCE // (header.plain.shape[1] * header.plain.shape[2] * header.plain.dtype.itemsize)),
    )
    planes = (plane for block in ahead(_planes(path, header.plain, at_once)) for plane in block)
    indices = index_planes(planes, table, label_map, file=file)
    return LabelVolume.gathered(indices, header.plain.shape, geometry, header.nifti, notes=_notes(header, path))


def labels_of(
    mask: Volume | Layers, table: LabelTable, label_map: LabelMap | None = None, *, order: Sequence[str] = (), file: Path
) -> LabelVolume:
    """What a reader returned, in the model's indices. Raises `InputError`s that name `file`."""
    if isinstance(mask, Layers):
        labels = overlay(mask, table, label_map, order=order, file=file)
        return LabelVolume(labels, mask.geometry, dicom=mask.dicom, notes=mask.notes)
    labels = to_indices(as_integers(mask.values, file), table, label_map, segments=mask.segments, file=file)
    return LabelVolume(labels, mask.geometry, mask.nifti_header, mask.dicom, mask.notes)


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
