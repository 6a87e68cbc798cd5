"""Volume files (NIfTI-1, NRRD and MetaImage) on the grid of the mask, written plane by plane.

Formats: nifti1.h; NRRD 5 (teem.sourceforge.net/nrrd/format.html); MetaImage
(itk.org/Wiki/ITK/MetaIO/Documentation).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.atomic_files import HashingWriter, atomic_path
from ...core.errors import importing
from ...core.manifest import Manifest
from ...core.volume import CTSlab, Geometry, LabelVolume
from ..marks import MASK_OF, notice, written_by_mask2ct
from .base import FormatOptions, OutputRecord, refuse_dicom_options, result_name, table_values
from .nifti_header import nifti_header

GZIP_LEVEL = 1  # isal: 150 MB/s per core at 7 % more bytes than level 3
GZIP_THREADS = (
    2  # any number gives the same bytes, because each 1 MiB block is compressed by itself
)
# modality → what the names of images end with; a model that states none has those of CTs
CONTENTS = {"CT": "ct", "MR": "mr", "other": "image"}
SPOOLED = 32 << 20  # bytes of planes that are collected at once from slabs along another axis
_TYPES = {  # numpy → NRRD, MetaImage
    np.dtype(np.uint8): ("uint8", "MET_UCHAR"),
    np.dtype(np.int16): ("int16", "MET_SHORT"),
    np.dtype(np.uint16): ("uint16", "MET_USHORT"),
    np.dtype(np.int32): ("int32", "MET_INT"),
}


@dataclass(frozen=True)
class VolumeFormat:
    """Writes CASE_ct or, with variants, CASE_v0_ct and CASE_v0_mask, in label values; see `Format`.

    An MR image is CASE_mr, and one of another modality CASE_image (`CONTENTS`).

    Attributes:
        suffix: the suffix of the files, which chooses the file format.
        options: the options of the run.
    """

    suffix: str
    options: FormatOptions

    def check(self, manifest: Manifest, output: Path) -> None:
        """Check the options and the compression library."""
        refuse_dicom_options(self.options)
        if self.suffix != ".nii":
            isal_threaded()

    def check_mask(self, mask: LabelVolume) -> None:
        """Do nothing: the format holds every grid."""

    def files(
        self, output: Path, case: str, variant: int | None, modality: str = ""
    ) -> tuple[Path, ...]:
        """Return the file of the image and, with variants, of the mask."""
        name = result_name(case, variant)
        content = CONTENTS.get(modality, "ct")
        contents = (content,) if variant is None else (content, "mask")
        return tuple(output / f"{name}_{content}{self.suffix}" for content in contents)

    def written_by_mask2ct(self, path: Path) -> bool:
        """Return whether the file has mask2ct's mark."""
        return written_by_mask2ct(path)

    def write(
        self, output: Path, record: OutputRecord, slabs: Iterable[CTSlab]
    ) -> Mapping[Path, str]:
        """Write the CT as its slabs come and, with variants, the mask."""
        modality = record.manifest.modality
        files = self.files(output, record.case, record.variant, modality)
        text = notice(derived=record.manifest.derived, modality=modality)
        written = {files[0]: write_ct(files[0], slabs, record.mask, description=text)}
        for file in files[1:]:
            values = table_values(record.manifest.labels)
            written[file] = write_labels(file, record.mask, values, description=MASK_OF + text)
        return written

    def finish(self, output: Path, manifest: Manifest) -> None:
        """Do nothing: each file is complete by itself."""


def write_ct(
    path: Path, slabs: Iterable[CTSlab], mask: LabelVolume, *, description: str = ""
) -> str:
    """Write a CT; see `write_volume`.

    Args:
        path: the file.
        slabs: the CT, int16 HU, in order along one axis; together they fill the grid of `mask`.
        mask: the mask, which gives the grid.
        description: the text for the header.

    Returns:
        The SHA-256 of the file.

    Raises:
        OutputError: the file cannot be written.
    """
    depth, height, width = mask.labels.shape
    shape = (depth, height, width)
    planes = planes_of(slabs, shape, path.parent)
    return write_volume(
        path,
        planes,
        shape,
        np.dtype(np.int16),
        mask.geometry,
        nifti_source=mask.nifti_header,
        description=description,
    )


def write_labels(
    path: Path, mask: LabelVolume, values: NDArray[Any], *, description: str = ""
) -> str:
    """Write a mask; see `write_volume`.

    Args:
        path: the file.
        mask: the mask, in model indices.
        values: the value in the file of each model index, (K + 1,).
        description: the text for the header.

    Returns:
        The SHA-256 of the file.

    Raises:
        OutputError: the file cannot be written.
    """
    depth, height, width = mask.labels.shape
    return write_volume(
        path,
        (values[plane] for plane in mask.labels),
        (depth, height, width),
        values.dtype,
        mask.geometry,
        nifti_source=mask.nifti_header,
        description=description,
    )


def write_volume(
    path: Path,
    planes: Iterable[NDArray[Any]],
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    geometry: Geometry,
    *,
    nifti_source: bytes | None = None,
    description: str = "",
) -> str:
    """Write a volume atomically, in the file format that the suffix of `path` names.

    .nii is raw, .nii.gz, .nrrd and .mha are compressed. The same input gives the same bytes.

    Args:
        path: the file.
        planes: the D planes (H, W).
        shape: (D, H, W).
        dtype: uint8, uint16, int16 or int32.
        geometry: the grid.
        nifti_source: the header of a NIfTI mask, whose bits for the grid a NIfTI file copies. Its
            free text is dropped, because it may name a patient.
        description: the text for the header.

    Returns:
        The SHA-256 of the file.

    Raises:
        OutputError: the file cannot be written.
    """
    nifti, raw = path.name.endswith((".nii", ".nii.gz")), path.name.endswith(".nii")
    with atomic_path(path) as part, HashingWriter(part) as file:
        if not nifti:
            header = _meta_header if path.name.endswith(".mha") else _nrrd_header
            file.write(header(shape, dtype, geometry, description))
        start = file.tell()
        with nullcontext(file) if raw else _compressed(file) as voxels:
            if nifti:
                voxels.write(nifti_header(shape, dtype, geometry, nifti_source, description))
            # one write per plane, so that the compressed blocks do not depend on the slabs
            for plane in planes:
                voxels.write(np.ascontiguousarray(plane, dtype.newbyteorder("<")).data.cast("B"))
        if path.name.endswith(".mha"):
            size = file.tell() - start
            file.overwrite(_meta_header(shape, dtype, geometry, description, size))
        return file.finish()


def _compressed(file: HashingWriter) -> Any:
    """A gzip stream into `file`."""
    return isal_threaded().open(file, "wb", compresslevel=GZIP_LEVEL, threads=GZIP_THREADS)


def planes_of(
    slabs: Iterable[CTSlab], shape: tuple[int, int, int], folder: Path
) -> Iterator[NDArray[np.int16]]:
    """Cut slabs along any axis into planes along the first.

    Slabs along the first axis pass through. Along another axis the first plane needs the last slab,
    so the slabs go to a temporary file first, and the planes are collected from there, `SPOOLED`
    bytes at a time. Memory never holds the volume.

    Args:
        slabs: int16 HU, in order along one axis.
        shape: (D, H, W) of the volume.
        folder: the folder for the temporary file, which has no name.

    Yields:
        The D planes, int16 (H, W).
    """
    depth, height, width = shape
    slabs = iter(slabs)
    first = next(slabs)
    slabs = chain([first], slabs)
    if first.axis == 0:
        for slab in slabs:
            yield from slab.hu
        return
    step = max(1, SPOOLED // (2 * height * width))
    with tempfile.TemporaryFile(dir=folder) as spool:
        spooled = []
        for slab in slabs:
            spooled.append((slab.index, slab.hu.shape[1:], spool.tell()))
            for plane in slab.hu:
                spool.write(np.ascontiguousarray(plane).data.cast("B"))
        for start in range(0, depth, step):
            block = np.empty((min(step, depth - start), height, width), np.int16)
            for index, (rows, columns), offset in spooled:
                spool.seek(offset + start * 2 * rows * columns)
                part = np.frombuffer(spool.read(len(block) * 2 * rows * columns), np.int16)
                block[index] = part.reshape(len(block), rows, columns)
            yield from block


def isal_threaded() -> Any:
    """Import isal's threaded gzip.

    Returns:
        The module isal.igzip_threaded.

    Raises:
        MissingComponent: isal is not installed.
    """
    with importing("isal", "isal, which compresses volumes", "pip install isal"):
        from isal import igzip_threaded
    return igzip_threaded


def _nrrd_header(
    shape: tuple[int, int, int], dtype: np.dtype[Any], geometry: Geometry, description: str
) -> bytes:
    directions = " ".join(f"({_numbers(geometry.affine[:3, n], ',')})" for n in range(3))
    return (
        f"NRRD0004\n# {description}\ntype: {_TYPES[dtype][0]}\ndimension: 3\nspace:"
        f" left-posterior-superior\nsizes: {shape[2]} {shape[1]} {shape[0]}\nspace directions:"
        f" {directions}\nkinds: domain domain domain\nendian: little\nencoding: gzip\nspace origin:"
        f" ({_numbers(geometry.origin, ',')})\ncontent: {description}\n\n"
    ).encode("ascii", "replace")


def _meta_header(
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    geometry: Geometry,
    description: str,
    size: int = 0,
) -> bytes:
    """The header, whose length does not depend on `size`, the bytes of the compressed voxels.

    ITK does not read the voxels without their size.
    """
    return (
        f"ObjectType = Image\nNDims = 3\nComment = {description}\nBinaryData ="
        " True\nBinaryDataByteOrderMSB = False\nCompressedData = True\nCompressedDataSize ="
        f" {size:<16}\nTransformMatrix = {_numbers(geometry.direction.T.ravel())}\nOffset ="
        f" {_numbers(geometry.origin)}\nCenterOfRotation = 0 0 0\nElementSpacing ="
        f" {_numbers(geometry.spacing)}\nDimSize = {shape[2]} {shape[1]} {shape[0]}\nElementType ="
        f" {_TYPES[dtype][1]}\nElementDataFile = LOCAL\n"
    ).encode("ascii", "replace")


def _numbers(values: Iterable[float], separator: str = " ") -> str:
    return separator.join(repr(float(v) + 0.0) for v in values)
