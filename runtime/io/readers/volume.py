"""Read volumes (NIfTI, NRRD and MHA) from what `volume_files.check_header` states of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import GeometryError, UnreadableVolume, importing
from ...core.labels import LabelMap, index_planes, overlay, to_indices
from ...core.manifest import LabelTable
from ...core.memory_limit import memory_limit
from ...core.threads import prefetch
from ...core.volume import Geometry, LabelVolume, Layers, Segment, Volume
from ..volume_files import EXPECTED, Header, Voxels, check_header
from .nifti_names import embedded_names
from .voxels import planes

# Bytes of planes that one thread passes to the next: they stay in the core's cache.
READ_AT_ONCE = 2 << 20

_DEFAULT_ORIENTATION = dict.fromkeys(
    (".gz", ".nii"), "it is taken to run right to left, front to back, feet to head"
) | dict.fromkeys(
    (".nrrd", ".nhdr", ".mha", ".mhd"),
    "its axes are taken to run to the left, to the back and to the head",
)


def simpleitk() -> Any:
    """The SimpleITK module.

    Raises:
        MissingComponent: It is not installed.
    """
    with importing("SimpleITK", "SimpleITK, which reads volumes", "pip install SimpleITK"):
        import SimpleITK
    return SimpleITK


def read_volume(path: Path) -> Volume:
    """Read one 3-D scalar volume.

    Args:
        path: The file.

    Returns:
        Values (D, H, W) in the file's dtype, scaled ones as floats; geometry LPS in mm.

    Raises:
        UnreadableVolume: The file is not one scalar volume.
        GeometryError: Its header does not state the grid.
    """
    volume = read_mask(path)
    if isinstance(volume, Layers):
        raise UnreadableVolume(
            f"{Path(path).name} holds several layers",
            expected=EXPECTED,
            remedy="save it as one layer",
            file=path,
        )
    return volume


def read_mask(path: Path) -> Volume | Layers:
    """Read a mask, which may have several layers.

    Args:
        path: The file.

    Returns:
        As `read_volume`; `Layers` for a Slicer segmentation in several layers.

    Raises:
        UnreadableVolume: The file is not a volume.
        GeometryError: Its header does not state the grid.
    """
    path = Path(path)
    header = check_header(path, voxels=False)
    with _in_memory(header.voxels, header.voxels.size, path):
        (values,) = planes(path, header.voxels, header.voxels.shape[0])
    segments = _segments_of(header, path)
    if len({s.number for s in segments}) < len(segments) or header.layers > 1:
        return _layers(values, header, path)
    return Volume(values, header.geometry, header.nifti, segments, notes=_notes(header, path))


def _segments_of(header: Header, path: Path) -> tuple[Segment, ...]:
    """The names of values: a Slicer segmentation's segments, or those embedded in a NIfTI."""
    if path.suffix.lower() in (".gz", ".nii"):
        return embedded_names(path)
    return tuple(segment for segment, _ in header.segments)


def _notes(header: Header, path: Path) -> tuple[str, ...]:
    if header.oriented:
        return header.notes
    return (
        f"{path.name} states no orientation: {_DEFAULT_ORIENTATION[path.suffix.lower()]}",
        *header.notes,
    )


def _layers(values: NDArray[Any], header: Header, path: Path) -> Layers:
    """A layered .seg.nrrd: the components of a voxel are its layers.

    A value has a meaning only in its own layer.
    """
    if any(not 0 <= layer < header.layers for _, layer in header.segments):
        raise UnreadableVolume(
            f"{path.name} has {header.layers} layers, and its segments name others",
            expected=EXPECTED,
            remedy="save it again from Slicer",
            file=path,
        )
    depth, height, width = header.voxels.shape
    values = as_integers(values, path).reshape(depth, height, width, header.layers)
    renumbered = tuple(
        Segment(n + 1, segment.name, segment.code) for n, (segment, _) in enumerate(header.segments)
    )

    def pieces() -> Iterator[tuple[int, int, NDArray[np.bool_]]]:
        for k, plane in enumerate(values):
            for named, (segment, layer) in zip(renumbered, header.segments, strict=True):
                yield named.number, k, plane[..., layer] == segment.number

    return Layers(
        renumbered, header.voxels.shape, header.geometry, pieces, notes=_notes(header, path)
    )


def from_sitk(image: Any, nifti_header: bytes | None = None, file: Path | None = None) -> Volume:
    """A SimpleITK image as a `Volume`.

    Args:
        image: A 3-D scalar image.
        nifti_header: The NIfTI-1 header that a result shall carry; 348 bytes.
        file: The file that errors name.

    Returns:
        Values (D, H, W) as a read-only view, which keeps the image alive.

    Raises:
        UnreadableVolume: The image is not 3-D, or has several values per voxel.
        GeometryError: Its grid is not valid.
    """
    name = "the image" if file is None else file.name
    pixel = image.GetPixelIDTypeAsString()
    if (
        image.GetDimension() != 3
        or image.GetNumberOfComponentsPerPixel() != 1
        or pixel.startswith(("label", "complex"))
    ):
        raise UnreadableVolume(
            f"{name} is {image.GetDimension()}-D with {image.GetNumberOfComponentsPerPixel()}"
            f" values a voxel ({pixel})",
            expected=EXPECTED,
            remedy="save a 3-D volume with one integer label per voxel",
            file=file,
        )
    return Volume(np.asarray(_ArrayOwner(image)), from_sitk_geometry(image, file), nifti_header)


def from_sitk_geometry(image: Any, file: Path | None = None) -> Geometry:
    """The grid of a 3-D SimpleITK image, or of its file reader.

    Args:
        image: The image or reader.
        file: The file that errors name.

    Raises:
        GeometryError: The grid is not valid.
    """
    try:
        return Geometry.from_parts(image.GetOrigin(), image.GetSpacing(), image.GetDirection())
    except GeometryError as exc:
        exc.file = file
        raise


class _ArrayOwner:
    """The voxels (D, H, W) of an image for numpy.

    An array that views them keeps this object, and with it the image, alive.
    """

    def __init__(self, image: Any):
        self._image = image
        self.__array_interface__ = simpleitk().GetArrayViewFromImage(image).__array_interface__


def read_labels(
    path: Path,
    table: LabelTable,
    label_map: LabelMap | None = None,
    *,
    order: Sequence[str] = (),
    force: bool = False,
    file: Path | None = None,
) -> LabelVolume:
    """Read a mask and map its values to the model's indices.

    Of a volume in one layer only the indices are in memory: one thread decompresses it, and another
    one maps and digests it, a few planes behind.

    Args:
        path: The file.
        table: The model's label table.
        label_map: The user's map from values, codes or names to indices.
        order: Which segment wins where segments overlap (`runtime.core.labels.overlay`).
        force: Whether a mask that looks like an image is read.
        file: The file that errors name; by default `path`.

    Returns:
        Indices (D, H, W), uint8.

    Raises:
        InputError: The file cannot be read, is not a mask, or has labels that the model does not
            know.
    """
    path = Path(path)
    file, header = file or path, check_header(path, voxels=False)
    segments = _segments_of(header, path)
    if header.layers > 1 or len({s.number for s in segments}) < len(segments):
        return labels_of(read_mask(path), table, label_map, order=order, force=force, file=file)
    at_once = max(1, READ_AT_ONCE * header.voxels.shape[0] // header.voxels.size)
    blocks = prefetch(planes(path, header.voxels, at_once))
    values = (plane for block in blocks for plane in as_integers(block, file))
    indices = index_planes(values, table, label_map, segments=segments, force=force, file=file)
    with _in_memory(header.voxels, math.prod(header.voxels.shape), file):
        return LabelVolume.gathered(
            indices, header.voxels.shape, header.geometry, header.nifti, notes=_notes(header, path)
        )


@contextmanager
def _in_memory(voxels: Voxels, size: int, file: Path) -> Iterator[None]:
    """Refuse a mask that does not fit into memory, if possible before it is read.

    A few MB of gzip can hold GBs.

    Args:
        voxels: From the checked header.
        size: Bytes of memory that the mask needs.
        file: The file that errors name.
    """
    _check_memory(voxels, size, file)
    try:
        yield
    except MemoryError as exc:
        raise _too_large(voxels, size, memory_limit(), file) from exc


def _check_memory(voxels: Voxels, size: int, file: Path) -> None:
    """Refuse a mask that takes more memory (`size` bytes) than this run may have."""
    limit = memory_limit()
    if limit is not None and size > limit:
        raise _too_large(voxels, size, limit, file)


def check_before_reading(path: Path, file: Path) -> None:
    """Refuse a volume for what its header states, and a mask that does not fit into memory.

    Args:
        path: The file, which is not read beyond its header.
        file: The file that errors name.

    Raises:
        InputError: It is refused.
    """
    voxels = check_header(path, voxels=False).voxels
    _check_memory(voxels, math.prod(voxels.shape), file)


def _too_large(voxels: Voxels, size: int, limit: int | None, file: Path) -> UnreadableVolume:
    shape = " x ".join(map(str, voxels.shape[::-1]))
    expected = "a mask that fits into memory"
    if limit is not None:
        expected += f": machine and limits of the process leave {limit} bytes at most"
    return UnreadableVolume(
        f"{file.name} holds {shape} voxels, more than this run has memory for: they take {size}"
        " bytes",
        expected=expected,
        remedy="cut it, raise the limit, or use a larger machine",
        file=file,
    )


def labels_of(
    mask: Volume | Layers,
    table: LabelTable,
    label_map: LabelMap | None = None,
    *,
    order: Sequence[str] = (),
    force: bool = False,
    file: Path,
) -> LabelVolume:
    """Map what a reader returned to the model's indices.

    Args:
        mask: Values or segments.
        table: The model's label table.
        label_map: The user's map from values, codes or names to indices.
        order: Which segment wins where segments overlap (`runtime.core.labels.overlay`).
        force: Whether a mask that looks like an image is mapped.
        file: The file that errors name.

    Returns:
        Indices (D, H, W), uint8.

    Raises:
        InputError: It is not a mask, or has labels that the model does not know.
    """
    if isinstance(mask, Layers):
        labels = overlay(mask, table, label_map, order=order, file=file)
        return LabelVolume(labels, mask.geometry, dicom=mask.dicom, notes=mask.notes)
    labels = to_indices(
        as_integers(mask.values, file),
        table,
        label_map,
        segments=mask.segments,
        force=force,
        file=file,
    )
    return LabelVolume(labels, mask.geometry, mask.nifti_header, mask.dicom, mask.notes)


def as_integers(values: NDArray[Any], file: Path | None = None) -> NDArray[Any]:
    """Label values as integers.

    Args:
        values: Integers, or floats (D, H, W) that are all whole numbers.
        file: The file that errors name.

    Returns:
        Integers as they are; floats as int32.

    Raises:
        UnreadableVolume: A value is not a whole number.
    """
    if values.dtype.kind in "iu":
        return values
    for plane in values:
        is_integer = np.isfinite(plane) & (plane == np.rint(plane)) & (np.abs(plane) < 1 << 31)
        if not is_integer.all():
            example = plane[~is_integer].flat[0]
            name = "the mask" if file is None else file.name
            raise UnreadableVolume(
                f"{name} holds {example}, which is not a label",
                expected="integers: a label map, not an image or a probability",
                remedy="give the label map itself, and resample labels with nearest neighbour",
                file=file,
            )
    return values.astype(np.int32)
