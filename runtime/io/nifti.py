"""Volumes in: NIfTI, NRRD and MHA are read by SimpleITK behind `headers.check_header`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contract import LabelTable
from ..errors import GeometryError, UnreadableVolume, importing, reading
from ..labels import LabelMap, to_indices
from ..volume import Geometry, LabelVolume, Layers, Segment, Volume
from .headers import EXPECTED, Header, check_header

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
    sitk = simpleitk()
    header = check_header(path, voxels="kept")
    with reading(path, EXPECTED):
        if header.values is not None:  # SimpleITK would hold a second copy while it reads, and take three times as long to decompress
            about = sitk.ImageFileReader()
            about.SetImageIO("NiftiImageIO")
            about.SetFileName(str(path))
            about.ReadImageInformation()
            return Volume(header.values, from_sitk_geometry(about, path), header.nifti, notes=_notes(header, path))
        image = sitk.ReadImage(str(path), imageIO=_IMAGE_IO[path.suffix.lower()])  # by name: nothing else is tried on the file
    while image.GetDimension() > 3:  # only dimensions of 1 are left
        image = image[(slice(None),) * (image.GetDimension() - 1) + (0,)]
    notes = _notes(header, path)
    segments = tuple(segment for segment, _ in header.segments)
    if len({s.number for s in segments}) < len(segments) or header.layers > 1:
        return _layers(image, header, notes, path)
    return replace(from_sitk(image, header.nifti, path), segments=segments, notes=notes)


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


class _Kept:
    """An image's voxels (D, H, W) for numpy, which keeps this, and so the image, as long as an array looks at them."""

    def __init__(self, image: Any):
        self._image = image
        self.__array_interface__ = simpleitk().GetArrayViewFromImage(image).__array_interface__


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
