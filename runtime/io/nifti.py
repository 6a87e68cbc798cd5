"""Volumes in: NIfTI, NRRD and MHA are read by SimpleITK behind `headers.check_header`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contract import LabelTable
from ..errors import GeometryError, MissingComponent, UnreadableVolume, reading
from ..labels import to_indices
from ..volume import Geometry, LabelVolume, Volume
from .headers import EXPECTED, check_header

_IMAGE_IO = {
    ".gz": "NiftiImageIO",
    ".nii": "NiftiImageIO",
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
}


def simpleitk() -> Any:
    """The SimpleITK module. Raises `MissingComponent` when it is not installed."""
    try:
        import SimpleITK
    except ImportError as exc:
        raise MissingComponent(
            f"SimpleITK cannot be imported: {exc}", expected="SimpleITK, which reads volumes", remedy="pip install SimpleITK"
        ) from exc
    return SimpleITK


def read_volume(path: Path) -> Volume:
    """Read one 3-D scalar volume: values (D, H, W) in the file's dtype (scaled ones as float), geometry LPS in mm.

    Raises `UnreadableVolume` or `GeometryError`, naming the file, for anything else.
    """
    path = Path(path)
    header = check_header(path)
    sitk = simpleitk()
    with reading(path, EXPECTED):
        image = sitk.ReadImage(str(path), imageIO=_IMAGE_IO[path.suffix.lower()])  # by name: nothing else is tried on the file
    while image.GetDimension() > 3:  # only dimensions of 1 are left
        image = image[(slice(None),) * (image.GetDimension() - 1) + (0,)]
    return from_sitk(image, header, path)


def from_sitk(image: Any, nifti_header: bytes | None = None, file: Path | None = None) -> Volume:
    """A SimpleITK image as a `Volume`; the values are copied, so that the image may go. Raises `InputError`s."""
    name = "the image" if file is None else file.name
    pixel = image.GetPixelIDTypeAsString()
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1 or pixel.startswith(("label", "complex")):
        raise UnreadableVolume(f"{name} is {image.GetDimension()}-D with {image.GetNumberOfComponentsPerPixel()} values a voxel ({pixel})",
                               expected=EXPECTED, remedy="save the labels as one integer per voxel of a 3-D volume", file=file)  # fmt: skip
    try:
        geometry = Geometry.from_parts(image.GetOrigin(), image.GetSpacing(), image.GetDirection())
    except GeometryError as exc:
        exc.file = file
        raise
    return Volume(simpleitk().GetArrayFromImage(image), geometry, nifti_header)


def read_labels(path: Path, table: LabelTable, label_map: Mapping[int | None, int] | None = None) -> LabelVolume:
    """Read a mask and map its values to the model's indices. Raises `InputError`s that name the file."""
    volume = read_volume(path)
    indices = to_indices(as_integers(volume.values, path), table, label_map, file=path)
    return LabelVolume(indices, volume.geometry, volume.nifti_header)


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
