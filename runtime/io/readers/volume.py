"""Volumes in: NIfTI, NRRD and MHA, from what `headers.check_header` says of them."""

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

READ_AT_ONCE = 2 << 20  # bytes of planes from thread to thread: they stay in the core's cache

_DEFAULT_ORIENTATION = dict.fromkeys(
    (".gz", ".nii"), "it is taken to run right to left, front to back, feet to head"
) | dict.fromkeys(
    (".nrrd", ".nhdr", ".mha", ".mhd"),
    "its axes are taken to run to the left, to the back and to the head",
)


def simpleitk() -> Any:
    """The SimpleITK module. Raises `MissingComponent` when it is not installed."""
    with importing("SimpleITK", "SimpleITK, which reads volumes", "pip install SimpleITK"):
        import SimpleITK
    return SimpleITK


def read_volume(path: Path) -> Volume:
    """Read one 3-D scalar volume: values (D, H, W) in the file's dtype (scaled ones as float),
    geometry LPS in mm.

    Raises `UnreadableVolume` or `GeometryError`, naming the file, for anything else.
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
    """As `read_volume`; a Slicer segmentation in several layers comes as `Layers`."""
    path = Path(path)
    header = check_header(path, voxels=False)
    with _in_memory(header.voxels, header.voxels.size, path):
        (values,) = planes(path, header.voxels, header.voxels.shape[0])
    segments = _segments_of(header, path)
    if len({s.number for s in segments}) < len(segments) or header.layers > 1:
        return _layers(values, header, path)
    return Volume(values, header.geometry, header.nifti, segments, notes=_notes(header, path))


def _segments_of(header: Header, path: Path) -> tuple[Segment, ...]:
    """What the file calls its values: a Slicer segmentation's segments, or the names embedded in
    a NIfTI.
    """
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
    """A layered .seg.nrrd: the components of a voxel are its layers, and a value means something
    in its own layer only.
    """
    if any(not 0 <= layer < header.layers for _, layer in header.segments):
        raise UnreadableVolume(
            f"{path.name} has {header.layers} layers, not those its segments name",
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
    """A SimpleITK image as a `Volume`; the values are a read-only view that keeps the image.

    Raises `InputError`s.
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
            remedy="save the labels as one integer per voxel of a 3-D volume",
            file=file,
        )
    return Volume(np.asarray(_Kept(image)), from_sitk_geometry(image, file), nifti_header)


def from_sitk_geometry(image: Any, file: Path | None = None) -> Geometry:
    """Where a 3-D SimpleITK image lies, or what its reader says of it.

    Raises `GeometryError`, naming the file.
    """
    try:
        return Geometry.from_parts(image.GetOrigin(), image.GetSpacing(), image.GetDirection())
    except GeometryError as exc:
        exc.file = file
        raise


class _Kept:
    """An image's voxels (D, H, W) for numpy, which keeps this, and so the image, as long as an
    array looks at them.
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

    Raises `InputError`s that name `file`, by default the path.

    `order`: what wins where segments overlap (`runtime.core.labels.overlay`); `force`: what looks
    like an image is read, too. Of a volume in one layer only the indices are ever held: it is
    decompressed in one thread, and mapped and digested in another, a few planes behind.
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
    """Refuse a mask for which there is no room, before it is read where that shows by its header: a
    few MB of gzip can hold GBs.

    Args:
        voxels: From the checked header.
        size: Bytes of what is held of them.
        file: What the error is about.
    """
    limit = memory_limit()
    if limit is not None and size > limit:
        raise _too_large(voxels, size, limit, file)
    try:
        yield
    except MemoryError as exc:
        raise _too_large(voxels, size, limit, file) from exc


def _too_large(voxels: Voxels, size: int, limit: int | None, file: Path) -> UnreadableVolume:
    shape = " x ".join(map(str, voxels.shape[::-1]))
    return UnreadableVolume(
        f"{file.name} holds {shape} voxels, more than this run has memory for: they take {size}"
        " bytes",
        expected="a mask that fits into memory"
        + (
            ""
            if limit is None
            else f": machine and limits of the process leave {limit} bytes at most"
        ),
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
    """What a reader returned, in the model's indices. Raises `InputError`s that name `file`."""
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

    Floats are taken when every one of them is whole. Raises `UnreadableVolume`.
    """
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
