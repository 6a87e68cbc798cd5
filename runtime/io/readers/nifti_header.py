"""NIfTI-1 (nifti1.h) and NIfTI-2 (nifti2.h) headers, read once.

Where a NIfTI lies is stated up to twice, by a quaternion with voxel sizes (qform) and by a matrix
(sform). The sform counts where its code is above 0, else the qform, as nibabel has it.
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
_MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # xyzt_units: unknown, metre, mm, micron
TWO_PLACES = 0.25  # how far qform and sform may disagree at a corner, in the smallest spacing
SAME_PLACE = 0.01  # how far a matrix and its voxel sizes may disagree there, likewise
# Of 1 - b^2 - c^2 - d^2 of a quaternion in float32: half a unit in the last place of each term,
# and the few that its writer lost while it computed them.
_QUATERNION_LOSS = 8 * 2.0**-24
_LONGEST_QUATERNION = 1 + 1e-5


@dataclass(frozen=True)
class _Stated:
    """The numbers of a header as they stand there, of either version.

    Attributes:
        size: Bytes of the header: 348 or 540.
        order: "<" or ">".
        dim: Number of dimensions and their sizes.
        pixdim: qfac and the voxel size along i, j, k, in the header's unit.
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


# Of each version: (format, byte offset) of the numbers of `_Stated` from `dim` on.
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
    """The header of a NIfTI; `content` is the (decompressed) file at its first byte.

    Raises:
        UnreadableVolume: For what is not one scalar volume whose voxels can be there.
        GeometryError: When it does not state where it lies, or states two places.
    """
    head = content.read(348)
    stated, head = _numbers(path, head, content)
    if not 1 <= stated.dim[0] <= 7:
        raise bad(path, f"claims {stated.dim[0]} dimensions")
    sizes = stated.dim[1 : stated.dim[0] + 1]
    shape = check_shape(path, sizes)
    if stated.datatype not in _TYPES:
        what = _NOT_LABELS.get(stated.datatype, f"values of the unknown type {stated.datatype}")
        raise bad(path, f"holds {what}", "save the labels as integers")
    if stated.unit & 7 not in _MILLIMETRES:
        raise bad_grid(
            path,
            f"states its grid in the unit {stated.unit & 7}, which NIfTI does not have",
            "metres, mm or micrometres (xyzt_units 1, 2 or 3)",
            "write a valid header",
        )
    geometry, whole, notes = _place(path, stated, shape)
    dtype = np.dtype(_TYPES[stated.datatype]).newbyteorder(">" if stated.order == ">" else "<")
    if not math.isfinite(stated.offset) or not stated.size <= stated.offset < 1 << 40:
        raise bad(path, f"puts its voxels at byte {stated.offset}")
    encoding = "gzip" if path.name.lower().endswith(".gz") else "raw"
    voxels = Voxels(path, 0, int(stated.offset), encoding, dtype, shape, scale=_scale(path, stated))
    packed = (
        struct.pack("<" + NIFTI_1, *struct.unpack(stated.order + NIFTI_1, head))
        if len(head) == 348
        else None
    )
    return Header(
        geometry,
        check_voxels(path, voxels),
        packed if whole else None,
        any(code > 0 for code in stated.codes),
        notes,
    )


def _numbers(path: Path, head: bytes, content: BinaryIO) -> tuple[_Stated, bytes]:
    """The numbers of the header that begins with `head`, and all its bytes."""
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
        _Stated(size, order, dim, datatype, offset, pixdim, scale, unit, codes, qform, sform),
        head,
    )


def _scale(path: Path, stated: _Stated) -> tuple[float, float] | None:
    """Slope and intercept, None where values are as they are stored: a slope of 0 or NaN says
    so.
    """
    slope, intercept = stated.scale
    if math.isnan(slope) or slope == 0 or (slope, intercept) == (1, 0):
        return None
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise bad(path, f"scales its values by {slope} and {intercept}", "write a valid header")
    return slope, intercept


def _place(
    path: Path, stated: _Stated, shape: tuple[int, int, int]
) -> tuple[Geometry, bool, tuple[str, ...]]:
    """Where the grid lies; whether all parts of the header agree on it; and notes."""
    (qfac, *sides), notes, whole = stated.pixdim, [], True
    if shape[0] == 1 and not (math.isfinite(sides[2]) and sides[2] > 0):
        sides[2], whole = 1.0 / _MILLIMETRES[stated.unit & 7], False
        notes.append(slice_note(path))
    if not all(math.isfinite(side) and side != 0 for side in sides):
        raise bad_grid(
            path,
            f"states the voxel spacing {tuple(sides)}",
            "three numbers of mm other than 0",
            "write the true spacing into the header",
        )
    if min(sides) < 0:
        whole = False
        notes.append(
            f"{path.name} states a negative voxel size (pixdim {_text(sides)}): its size counts,"
            " not its sign"
        )
    steps = np.abs(sides)
    qform, sform = _qform(path, stated, qfac, steps), _sform(path, stated, shape)
    mm = _MILLIMETRES[stated.unit & 7]
    used = sform if sform is not None else qform
    if used is None:
        geometry, _ = geometry_of(path, np.diag(steps * mm), np.zeros(3))
        return geometry, whole, tuple(notes)
    corners = _corners(shape)
    if qform is not None and sform is not None:
        _check_one_place(path, stated, qform, sform, steps, corners)
    directions, columns = used[:, :3] / np.linalg.norm(used[:, :3], axis=0), used[:, :3] * mm
    # Sizes are pixdim's where they say what the matrix says, as in ITK: results keep their bytes.
    if (
        _apart(np.column_stack([directions * steps, used[:, 3]]), used, corners)
        <= SAME_PLACE * steps.min()
    ):
        columns = directions * (steps * mm)
    else:
        whole = False
        if sform is not None and min(sides) > 0:
            notes.append(
                f"{path.name} states voxels of {_text(np.linalg.norm(used[:, :3], axis=0))} by its"
                f" sform and of {_text(steps)} by its pixdim: the sform counts"
            )
    lps = np.array([-1.0, -1.0, 1.0])
    geometry, sheared = geometry_of(path, columns * lps[:, None], used[:, 3] * lps * mm)
    return geometry, whole and shear_of(geometry.affine) <= UNSHEARED, (*notes, *sheared)


def _qform(
    path: Path, stated: _Stated, qfac: float, steps: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """The matrix (3, 4), RAS in the header's unit, of the quaternion; None where there is none.

    In float32 for NIfTI-1, as the NIfTI library has it.
    """
    if stated.codes[0] <= 0:
        return None
    b, c, d, *offset = _within(path, "qform", stated.qform)
    if math.sqrt(b * b + c * c + d * d) > _LONGEST_QUATERNION:
        raise bad_grid(
            path,
            f"states the quaternion {_text((b, c, d))} in its qform, which is no rotation",
            "a unit quaternion",
            "set qform_code to 0, or write a valid qform",
        )
    columns = rotation(*_unit_quaternion(b, c, d)) * (steps * [1, 1, -1 if qfac < 0 else 1])
    if stated.size == 348:
        columns = columns.astype(np.float32).astype(np.float64)
    return np.column_stack([columns, offset])


def _sform(path: Path, stated: _Stated, shape: tuple[int, int, int]) -> NDArray[np.float64] | None:
    """The matrix (3, 4), RAS in the header's unit; None where there is none."""
    if stated.codes[1] <= 0:
        return None
    matrix = np.array(_within(path, "sform", stated.sform)).reshape(3, 4)
    if shape[0] == 1 and not matrix[:, 2].any():
        matrix[:, :3] = third_axis(matrix[:, :3])
    if not np.abs(matrix[:, :3]).any(axis=0).all():
        raise bad_grid(
            path,
            f"states an sform with an empty column ({_text(stated.sform)})",
            "three axes",
            "set sform_code to 0, or write a valid sform",
        )
    return matrix


def _within(path: Path, name: str, numbers: Sequence[float]) -> list[float]:
    if not all(abs(number) <= LARGEST_MM for number in numbers):  # NaN is not, either
        raise bad_grid(
            path,
            f"states a place beyond {LARGEST_MM:g} mm, or none ({name})",
            "a grid in mm",
            "write a valid header",
        )
    return [*numbers]


def _check_one_place(
    path: Path,
    stated: _Stated,
    qform: NDArray[np.float64],
    sform: NDArray[np.float64],
    steps: NDArray[np.float64],
    corners: NDArray[np.float64],
) -> None:
    """qform and sform must agree at every corner, as far as a qform can say what an sform says.

    Near a half turn a = sqrt(1 - b^2 - c^2 - d^2) has lost most of its digits, and with it the
    angle; and no quaternion says a shear.
    """
    b, c, d = stated.qform[:3]
    squared = max(0.0, 1 - b * b - c * c - d * d)
    loss = _QUATERNION_LOSS if stated.size == 348 else 0.0
    angle = 2 * max(
        math.sqrt(squared + loss) - math.sqrt(squared),
        math.sqrt(squared) - math.sqrt(max(0.0, squared - loss)),
    )
    extent = float(np.linalg.norm(corners.max(axis=0)[:3] * steps))
    slack = (angle + min(shear_of(sform), 1e-3)) * extent
    distance = _apart(qform, sform, corners)
    if distance > TWO_PLACES * steps.min() + slack:
        raise bad_grid(
            path,
            f"lies in two places: its qform (code {stated.codes[0]}) and its sform (code"
            f" {stated.codes[1]}) are {distance:.3g} mm apart",
            "one place",
            "set the one that is wrong to code 0, or make them equal (fslorient, nibabel)",
        )


def _corners(shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """(8, 4): the indices (i, j, k, 1) of a grid's corners."""
    depth, height, width = shape
    return np.array(
        [[i, j, k, 1] for i in (0, width - 1) for j in (0, height - 1) for k in (0, depth - 1)],
        float,
    )


def _apart(
    one: NDArray[np.float64], other: NDArray[np.float64], corners: NDArray[np.float64]
) -> float:
    """The largest distance of a corner under two matrices (3, 4)."""
    return float(np.linalg.norm(corners @ (one - other).T, axis=1).max())


def _unit_quaternion(b: float, c: float, d: float) -> tuple[float, float, float, float]:
    """(a, b, c, d) as nifti1_io.c has it: so near a half turn that a has no digits left, it is
    0.
    """
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
