"""CTs and masks as one file each: NIfTI-1, NRRD and MetaImage on the mask's own grid, written plane
by plane.

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
from ..volume_files import is_synthetic, notice
from .base import FormatOptions, OutputRecord, refuse_dicom_options, result_name, table_values
from .nifti_header import nifti_header

GZIP_LEVEL = 1  # isal: 150 MB/s a core at 7 % more bytes than level 3
GZIP_THREADS = 2  # the bytes are the same for any number: 1 MiB blocks are compressed on their own
SPOOLED = 32 << 20  # bytes of planes gathered at once from slabs that run along another axis
_TYPES = {  # numpy → NRRD, MetaImage
    np.dtype(np.uint8): ("uint8", "MET_UCHAR"),
    np.dtype(np.int16): ("int16", "MET_SHORT"),
    np.dtype(np.uint16): ("uint16", "MET_USHORT"),
    np.dtype(np.int32): ("int32", "MET_INT"),
}


@dataclass(frozen=True)
class VolumeFormat:
    """CASE_ct and, with variants, CASE_v0_ct and CASE_v0_mask, the mask in the model's own values.

    `suffix`: what kind of file.
    """

    suffix: str
    options: FormatOptions

    def check(self, manifest: Manifest, output: Path) -> None:
        refuse_dicom_options(self.options)
        if self.suffix != ".nii":
            isal_threaded()

    def check_mask(self, mask: LabelVolume) -> None:
        pass

    def files(self, output: Path, case: str, variant: int | None) -> tuple[Path, ...]:
        name = result_name(case, variant)
        return tuple(
            output / f"{name}_{what}{self.suffix}"
            for what in (("ct",) if variant is None else ("ct", "mask"))
        )

    def is_ours(self, path: Path) -> bool:
        return is_synthetic(path)

    def write(
        self, output: Path, record: OutputRecord, slabs: Iterable[CTSlab]
    ) -> Mapping[Path, str]:
        files = self.files(output, record.case, record.variant)
        text = notice(derived=record.manifest.derived)
        written = {files[0]: write_ct(files[0], slabs, record.mask, description=text)}
        for file in files[1:]:
            values = table_values(record.manifest.labels)
            written[file] = write_labels(file, record.mask, values, description="mask of a " + text)
        return written

    def finish(self, output: Path, manifest: Manifest) -> None:
        pass


def write_ct(
    path: Path, slabs: Iterable[CTSlab], mask: LabelVolume, *, description: str = ""
) -> str:
    """Write int16 slabs that together fill the grid of `mask`, as `write_volume` does."""
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
    """Write a mask with `values[index]` for each of its indices, as `write_volume` does."""
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
    """Write the D planes (H, W) of a uint8, uint16, int16 or int32 volume as the kind of file that
    the suffix of `path` names, atomically.

    .nii is raw; .nii.gz, .nrrd and .mha are compressed by isal. With `nifti_source` (the mask's own
    header) a NIfTI has its very bits for the grid; its free text is dropped, for it may name a
    patient. The same input gives the same bytes. Returns their SHA-256. Raises `OutputError`.
    """
    nifti, raw = path.name.endswith((".nii", ".nii.gz")), path.name.endswith(".nii")
    with atomic_path(path) as part, HashingWriter(part) as whole:
        if not nifti:
            header = _meta_header if path.name.endswith(".mha") else _nrrd_header
            whole.write(header(shape, dtype, geometry, description))
        start = whole.tell()
        with (
            nullcontext(whole)
            if raw
            else isal_threaded().open(whole, "wb", compresslevel=GZIP_LEVEL, threads=GZIP_THREADS)
        ) as file:
            if nifti:
                file.write(nifti_header(shape, dtype, geometry, nifti_source, description))
            # one write a plane: how the input is cut into blocks must not depend on how slabs were
            # cut
            for plane in planes:
                file.write(np.ascontiguousarray(plane, dtype.newbyteorder("<")).data.cast("B"))
        if path.name.endswith(".mha"):
            whole.overwrite(_meta_header(shape, dtype, geometry, description, whole.tell() - start))
        return whole.finish()


def planes_of(
    slabs: Iterable[CTSlab], shape: tuple[int, int, int], folder: Path
) -> Iterator[NDArray[np.int16]]:
    """The D planes (H, W) of a volume whose slabs come in order along any one axis.

    Along the first axis they pass through. Along another the first plane needs the last slab: slabs
    then go to a nameless file in `folder` as they come, each plane by plane, and are gathered from
    there some `SPOOLED` bytes at a time: no volume is held in memory.
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
        kept = []
        for slab in slabs:
            kept.append((slab.index, slab.hu.shape[1:], spool.tell()))
            for plane in slab.hu:
                spool.write(np.ascontiguousarray(plane).data.cast("B"))
        for start in range(0, depth, step):
            block = np.empty((min(step, depth - start), height, width), np.int16)
            for index, (rows, columns), offset in kept:
                spool.seek(offset + start * 2 * rows * columns)
                part = np.frombuffer(spool.read(len(block) * 2 * rows * columns), np.int16)
                block[index] = part.reshape(len(block), rows, columns)
            yield from block


def isal_threaded() -> Any:
    """isal's threaded gzip. Raises `MissingComponent` when it is not installed."""
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
    """`size`: of the compressed voxels in bytes, without which ITK does not read them; whatever
    it is, the header is as long.
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
