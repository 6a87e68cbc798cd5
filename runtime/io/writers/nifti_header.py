"""The 352 bytes before a NIfTI-1 file's voxels (nifti1.h)."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.volume import Geometry
from ..readers.nifti_header import rotation
from ..readers.volume_header import UNSHEARED, shear_of

_CODES = {  # numpy → datatype, bitpix
    np.dtype(np.uint8): (2, 8),
    np.dtype(np.int16): (4, 16),
    np.dtype(np.uint16): (512, 16),
    np.dtype(np.int32): (8, 32),
}
_MM = 2  # xyzt_units
QFORM_TOLERANCE_MM = 1e-4  # how far qform and sform may disagree


def nifti_header(
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    geometry: Geometry,
    source: bytes | None,
    description: str,
) -> bytes:
    """Encode a NIfTI-1 header (nifti1.h; the numbers below are its byte offsets).

    Args:
        shape: (D, H, W) of the volume.
        dtype: uint8, int16, uint16 or int32.
        geometry: the grid.
        source: the header of the mask, whose bits for the grid are copied; None to encode
            `geometry`.
        description: the text of `descrip`, at most 79 ASCII characters of it.

    Returns:
        352 bytes.
    """
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
    ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ geometry.affine  # NIfTI is RAS+, `Geometry` is LPS
    struct.pack_into("<4f", out, 76, _handedness(ras), *geometry.spacing)
    out[123] = _MM
    quaternion = _quaternion(ras)
    # qform_code and sform_code: 1 for scanner coordinates, 0 for none
    struct.pack_into("<2h", out, 252, int(_qform_holds(quaternion, ras, shape)), 1)
    struct.pack_into("<3f", out, 256, *quaternion)
    struct.pack_into("<3f", out, 268, *ras[:3, 3])
    struct.pack_into("<12f", out, 280, *ras[:3].ravel())
    return bytes(out)


def _handedness(ras: NDArray[np.float64]) -> float:
    """NIfTI's qfac: -1 for a left-handed grid."""
    return -1.0 if np.linalg.det(ras[:3, :3]) < 0 else 1.0


def _qform_holds(
    quaternion: tuple[float, float, float], ras: NDArray[np.float64], shape: tuple[int, int, int]
) -> bool:
    """Whether the three float32 numbers place the far corner within QFORM_TOLERANCE_MM.

    Near half turns they do not, because a = sqrt(1 - b^2 - c^2 - d^2) loses its digits. The header
    then has the sform alone. For a sheared grid the qform is the nearest rotation, for readers that
    refuse the sform (ITK).
    """
    b, c, d = (float(np.float32(q)) for q in quaternion)
    turn = rotation(math.sqrt(max(0.0, 1 - b * b - c * c - d * d)), b, c, d)
    columns = turn * np.linalg.norm(ras[:3, :3], axis=0) * [1, 1, _handedness(ras)]
    far = np.abs(columns - ras[:3, :3]) @ np.array(shape[::-1], float)
    shear = shear_of(ras)
    slack = shear * float(np.linalg.norm(shape[::-1] * np.linalg.norm(ras[:3, :3], axis=0)))
    return bool(far.max() <= QFORM_TOLERANCE_MM + (slack if shear > UNSHEARED else 0.0))


def _quaternion(ras: NDArray[np.float64]) -> tuple[float, float, float]:
    """b, c, d of the unit quaternion (a >= 0) of the grid's rotation (nifti1.h, method 2).

    The rotation's quaternion is the eigenvector of the largest eigenvalue of Bar-Itzhack's 4x4
    matrix (J. Guidance 23(6), 2000), which is well conditioned for every rotation.
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
