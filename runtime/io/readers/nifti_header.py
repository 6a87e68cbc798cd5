"""NIfTI-1 (nifti1.h) and NIfTI-2 (nifti2.h) headers, parsed once.

A header states the grid up to twice: by a quaternion with voxel sizes (qform) and by a matrix
(sform). As in nibabel, the sform counts if its code is above 0, else the qform.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ...core.volume import LARGEST_MM, Geometry
from .volume_header import (
    UNSHEARED,
    Header,
    Voxels,
    bad,
    bad_grid,
    check_shape,
    check_voxels,
    geometry_of,
    shear_of,
    slice_note,
    third_axis,
)

# nifti1.h, from sizeof_hdr to magic: the 348 bytes of a header
NIFTI_1 = "i10s18sihcB8h3f4h8f3fhcB4f2i80s24s2h6f4f4f4f16s4s"
_TYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
_NOT_LABELS = {
    1: "bits",
    32: "complex numbers",
    128: "RGB colours",
    1536: "128-bit floats",
    1792: "complex numbers",
    2304: "RGBA colours",
}
# xyzt_units: unknown, metre, millimetre, micrometre.
_MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
# Distance of a corner by qform and by sform, in the smallest spacing.
TWO_PLACES = 0.25
# Distance of a corner by a matrix and by its voxel sizes, in the smallest spacing.
SAME_PLACE = 0.01
# Error of 1 - b^2 - c^2 - d^2 of a quaternion in float32: half a unit in the last place of each
# term, and some that the writer lost while it computed the terms.
_QUATERNION_LOSS = 8 * 2.0**-24
_LONGEST_QUATERNION = 1 + 1e-5


@dataclass(frozen=True)
class _RawHeader:
    """The numbers of a header of either version, as they are stored.

    Attributes:
        size: Bytes of the header: 348 or 540.
        order: "<" or ">".
        dim: Number of dimensions and their sizes.
        datatype: Code of the type of a value.
        offset: Byte of the file where the voxels begin.
        pixdim: qfac and the voxel size along i, j, k, in the header's unit.
        scale: Slope and intercept.
        unit: xyzt_units.
        codes: qform_code and sform_code.
        qform: b, c, d and the offset.
        sform: 12 numbers, row by row.
    """

    size: int
    order: str
    dim: tuple[int, ...]
    datatype: int
    offset: float
    pixdim: tuple[float, ...]
    scale: tuple[float, float]
    unit: int
    codes: tuple[int, int]
    qform: tuple[float, ...]
    sform: tuple[float, ...]


# Format and byte offset of each number of `_RawHeader` from `dim` on, for each header size.
_PLACES: dict[int, tuple[tuple[str, int], ...]] = {
    348: (
        ("8h", 40),
        ("h", 70),
        ("f", 108),
        ("4f", 76),
        ("2f", 112),
        ("B", 123),
        ("2h", 252),
        ("6f", 256),
        ("12f", 280),
    ),
    540: (
        ("8q", 16),
        ("h", 12),
        ("q", 168),
        ("4d", 104),
        ("2d", 176),
        ("i", 500),
        ("2i", 344),
        ("6d", 352),
        ("12d", 400),
    ),
}


def read_header(path: Path, content: BinaryIO) -> Header:
    """Read the header of a NIfTI.

    Args:
        path: The file.
        content: The decompressed file, at its first byte.

    Raises:
        UnreadableVolume: It is not one scalar volume, or its voxels cannot be in the file.
        GeometryError: The header states no grid, or two different ones.
    """
    head = content.read(348)
    raw, head = _parse(path, head, content)
    if not 1 <= raw.dim[0] <= 7:
        raise bad(path, f"claims {raw.dim[0]} dimensions")
    sizes = raw.dim[1 : raw.dim[0] + 1]
    shape = check_shape(path, sizes)
    if raw.datatype not in _TYPES:
        what = _NOT_LABELS.get(raw.datatype, f"values of the unknown type {raw.datatype}")
        raise bad(path, f"holds {what}", "save the labels as integers")
    if raw.unit & 7 not in _MILLIMETRES:
        raise bad_grid(
            path,
            f"states its grid in the unit {raw.unit & 7}, which NIfTI does not have",
            "metres, mm or micrometres (xyzt_units 1, 2 or 3)",
            "write a valid header",
        )
    geometry, is_consistent, notes = _place(path, raw, shape)
    dtype = np.dtype(_TYPES[raw.datatype]).newbyteorder(">" if raw.order == ">" else "<")
    if not math.isfinite(raw.offset) or not raw.size <= raw.offset < 1 << 40:
        raise bad(path, f"puts its voxels at byte {raw.offset}")
    encoding = "gzip" if path.name.lower().endswith(".gz") else "raw"
    voxels = Voxels(path, 0, int(raw.offset), encoding, dtype, shape, scale=_scale(path, raw))
    little_endian = None
    if len(head) == 348 and is_consistent:
        little_endian = struct.pack("<" + NIFTI_1, *struct.unpack(raw.order + NIFTI_1, head))
    return Header(
        geometry,
        check_voxels(path, voxels),
        nifti=little_endian,
        oriented=any(code > 0 for code in raw.codes),
        notes=notes,
    )


def _parse(path: Path, head: bytes, content: BinaryIO) -> tuple[_RawHeader, bytes]:
    """The numbers of the header that begins with `head`, and all bytes of the header."""
    if len(head) < 348:
        raise bad(path, f"ends after {len(head)} bytes, inside its header")
    sizes = {order: struct.unpack_from(order + "i", head)[0] for order in "<>"}
    order = next((order for order, size in sizes.items() if size in _PLACES), None)
    if order is None:
        raise bad(path, "is not a NIfTI file (its first number is neither 348 nor 540)")
    size = sizes[order]
    head += content.read(size - 348)
    if len(head) < size:
        raise bad(path, f"ends after {len(head)} bytes, inside its header")
    magic = head[344:348] == b"n+1\0" if size == 348 else head[4:12] == b"n+2\0\r\n\x1a\n"
    if not magic:
        raise bad(
            path,
            f"is not a single-file NIfTI (its magic is not n+{1 if size == 348 else 2})",
            "save header and voxels in one .nii file",
        )
    values = [struct.unpack_from(order + code, head, at) for code, at in _PLACES[size]]
    dim, (datatype,), (offset,), pixdim, scale, (unit,), codes, qform, sform = values
    return (
        _RawHeader(size, order, dim, datatype, offset, pixdim, scale, unit, codes, qform, sform),
        head,
    )


def _scale(path: Path, raw: _RawHeader) -> tuple[float, float] | None:
    """Slope and intercept; None if values are not scaled, as a slope of 0 or NaN states."""
    slope, intercept = raw.scale
    if math.isnan(slope) or slope == 0 or (slope, intercept) == (1, 0):
        return None
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise bad(path, f"scales its values by {slope} and {intercept}", "write a valid header")
    return slope, intercept


def _place(
    path: Path, raw: _RawHeader, shape: tuple[int, int, int]
) -> tuple[Geometry, bool, tuple[str, ...]]:
    """The grid; whether all parts of the header agree on it; and notes."""
    (qfac, *voxel_size), notes, is_consistent = raw.pixdim, [], True
    if shape[0] == 1 and not (math.isfinite(voxel_size[2]) and voxel_size[2] > 0):
        voxel_size[2], is_consistent = 1.0 / _MILLIMETRES[raw.unit & 7], False
        notes.append(slice_note(path))
    if not all(math.isfinite(side) and side != 0 for side in voxel_size):
        raise bad_grid(
            path,
            f"states the voxel spacing {tuple(voxel_size)}",
            "three numbers of mm other than 0",
            "write the true spacing into the header",
        )
    if min(voxel_size) < 0:
        is_consistent = False
        notes.append(
            f"{path.name} states a negative voxel size (pixdim {_text(voxel_size)}): its sign is"
            " ignored"
        )
    steps = np.abs(voxel_size)
    qform, sform = _qform(path, raw, qfac, steps), _sform(path, raw, shape)
    mm = _MILLIMETRES[raw.unit & 7]
    matrix = sform if sform is not None else qform
    if matrix is None:
        geometry, _ = geometry_of(path, np.diag(steps * mm), np.zeros(3))
        return geometry, is_consistent, tuple(notes)
    corners = _corners(shape)
    if qform is not None and sform is not None:
        _check_one_place(path, raw, qform, sform, steps, corners)
    directions, columns = matrix[:, :3] / np.linalg.norm(matrix[:, :3], axis=0), matrix[:, :3] * mm
    # Voxel sizes come from pixdim if they agree with the matrix, as in ITK: results keep their
    # bytes.
    by_pixdim = np.column_stack([directions * steps, matrix[:, 3]])
    if _largest_distance(by_pixdim, matrix, corners) <= SAME_PLACE * steps.min():
        columns = directions * (steps * mm)
    else:
        is_consistent = False
        if sform is not None and min(voxel_size) > 0:
            by_sform = _text(np.linalg.norm(matrix[:, :3], axis=0))
            notes.append(
                f"{path.name} states voxels of {by_sform} by its sform and of {_text(steps)} by its"
                " pixdim: the sform counts"
            )
    lps = np.array([-1.0, -1.0, 1.0])
    geometry, sheared = geometry_of(path, columns * lps[:, None], matrix[:, 3] * lps * mm)
    return geometry, is_consistent and shear_of(geometry.affine) <= UNSHEARED, (*notes, *sheared)


def _qform(
    path: Path, raw: _RawHeader, qfac: float, steps: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """The matrix (3, 4) of the quaternion, RAS in the header's unit; None if there is none.

    For NIfTI-1 it is computed in float32, as in the NIfTI library.
    """
    if raw.codes[0] <= 0:
        return None
    b, c, d, *offset = _check_range(path, "qform", raw.qform)
    if math.sqrt(b * b + c * c + d * d) > _LONGEST_QUATERNION:
        raise bad_grid(
            path,
            f"states the quaternion {_text((b, c, d))} in its qform, which is not a rotation",
            "a unit quaternion",
            "set qform_code to 0, or write a valid qform",
        )
    columns = rotation(*_unit_quaternion(b, c, d)) * (steps * [1, 1, -1 if qfac < 0 else 1])
    if raw.size == 348:
        columns = columns.astype(np.float32).astype(np.float64)
    return np.column_stack([columns, offset])


def _sform(path: Path, raw: _RawHeader, shape: tuple[int, int, int]) -> NDArray[np.float64] | None:
    """The matrix (3, 4), RAS in the header's unit; None if there is none."""
    if raw.codes[1] <= 0:
        return None
    matrix = np.array(_check_range(path, "sform", raw.sform)).reshape(3, 4)
    if shape[0] == 1 and not matrix[:, 2].any():
        matrix[:, :3] = third_axis(matrix[:, :3])
    if not np.abs(matrix[:, :3]).any(axis=0).all():
        raise bad_grid(
            path,
            f"states an sform with an empty column ({_text(raw.sform)})",
            "three axes",
            "set sform_code to 0, or write a valid sform",
        )
    return matrix


def _check_range(path: Path, name: str, numbers: Sequence[float]) -> list[float]:
    """The numbers, if none is beyond the largest coordinate."""
    # NaN fails the comparison, too.
    if not all(abs(number) <= LARGEST_MM for number in numbers):
        raise bad_grid(
            path,
            f"states a place beyond {LARGEST_MM:g} mm, or none ({name})",
            "a grid in mm",
            "write a valid header",
        )
    return [*numbers]


def _check_one_place(
    path: Path,
    raw: _RawHeader,
    qform: NDArray[np.float64],
    sform: NDArray[np.float64],
    steps: NDArray[np.float64],
    corners: NDArray[np.float64],
) -> None:
    """Refuse a qform and an sform that disagree at a corner by more than a qform can express.

    Near a half turn, a = sqrt(1 - b^2 - c^2 - d^2) has lost most of its digits, and the angle with
    it. A quaternion cannot express a shear.
    """
    b, c, d = raw.qform[:3]
    squared = max(0.0, 1 - b * b - c * c - d * d)
    loss = _QUATERNION_LOSS if raw.size == 348 else 0.0
    angle = 2 * max(
        math.sqrt(squared + loss) - math.sqrt(squared),
        math.sqrt(squared) - math.sqrt(max(0.0, squared - loss)),
    )
    extent = float(np.linalg.norm(corners.max(axis=0)[:3] * steps))
    slack = (angle + min(shear_of(sform), 1e-3)) * extent
    distance = _largest_distance(qform, sform, corners)
    if distance > TWO_PLACES * steps.min() + slack:
        raise bad_grid(
            path,
            f"lies in two places: its qform (code {raw.codes[0]}) and its sform (code"
            f" {raw.codes[1]}) are {distance:.3g} mm apart",
            "one place",
            "set the code of the wrong one to 0, or make them equal (fslorient, nibabel)",
        )


def _corners(shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """(8, 4): the indices (i, j, k, 1) of a grid's corners."""
    depth, height, width = shape
    return np.array(
        [[i, j, k, 1] for i in (0, width - 1) for j in (0, height - 1) for k in (0, depth - 1)],
        float,
    )


def _largest_distance(
    first: NDArray[np.float64], second: NDArray[np.float64], corners: NDArray[np.float64]
) -> float:
    """The largest distance of a corner under two matrices (3, 4)."""
    return float(np.linalg.norm(corners @ (first - second).T, axis=1).max())


def _unit_quaternion(b: float, c: float, d: float) -> tuple[float, float, float, float]:
    """(a, b, c, d) as in nifti1_io.c: a is 0 so near to a half turn that it has no digits left."""
    squared = 1 - (b * b + c * c + d * d)
    if squared >= 1e-7:
        return math.sqrt(squared), b, c, d
    scale = 1 / math.sqrt(b * b + c * c + d * d)
    return 0.0, b * scale, c * scale, d * scale


def rotation(a: float, b: float, c: float, d: float) -> NDArray[np.float64]:
    """The 3x3 rotation of the unit quaternion (a, b, c, d) (nifti1.h, method 2)."""
    return np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
        ]
    )


def _text(numbers: Sequence[float] | NDArray[np.float64]) -> str:
    return ", ".join(f"{number:.6g}" for number in numbers)
