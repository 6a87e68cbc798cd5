"""What a volume file claims to be, checked before a reader is trusted with it (some claims crash readers).

Each check reads the header alone, and for NIfTI counts the bytes behind it, so that no claim makes anyone allocate what
the file does not hold. Formats: NIfTI-1.1 (nifti1.h) and NIfTI-2, NRRD 5 (teem), MetaImage (ITK).
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import GeometryError, UnreadableVolume, reading
from ..files import belongs_to, open_input
from ..volume import LARGEST_MM, Segment

MARKS = ("SYNTHETIC CT - NOT FOR DIAGNOSIS", "mask2ct")  # what every header written says of itself, within its first bytes
MARKS_WITHIN = 8192
NIFTI_HEADER = 352  # bytes, with the four behind it that say whether extensions follow
NOTICE = f"{MARKS[0]} ({MARKS[1]})"  # 79 characters fit into a NIfTI
_BEGINNINGS = {
    ".nii": b"\x5c\x01\0\0",
    ".nrrd": b"NRRD0004\n",
    ".mha": b"ObjectType = Image\n",
    ".dcm": bytes(128) + b"DICM",
}  # as written here
SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
EXPECTED = "one 3-D volume of integers as NIfTI, NRRD or MHA"
MAX_EXTENT = 32767  # voxels along one axis that NIfTI-1 can say
AFFINES_TOLERANCE = 0.25  # how far qform and sform may disagree at a corner, in the smallest voxel spacing
MAX_VOXELS = 1 << 34  # 16 G voxels: past this a header is taken for damaged

# nifti1.h, from sizeof_hdr to magic: the 348 bytes of a header
NIFTI_1 = "i10s18sihcB8h3f4h8f3fhcB4f2i80s24s2h6f4f4f4f16s4s"
_BYTES = {2: 1, 4: 2, 8: 4, 16: 4, 64: 8, 256: 1, 512: 2, 768: 4, 1024: 8, 1280: 8}  # datatype code → bytes a voxel
_INTEGERS = {2: "u1", 4: "i2", 8: "i4", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}  # datatype code → numpy's
_FLOATS = {16: "f4", 64: "f8"}
_META_BYTES = {f"MET_{u}{name}": n for u in ("", "U") for name, n in (("CHAR", 1), ("SHORT", 2), ("INT", 4), ("LONG_LONG", 8))} | {
    "MET_FLOAT": 4,
    "MET_DOUBLE": 8,
}
_NRRD_BYTES = {"short": 2, "ushort": 2, "unsigned short": 2, "int16": 2, "uint16": 2, "int": 4, "uint": 4, "unsigned int": 4, "int32": 4,
               "uint32": 4, "float": 4, "double": 8, "int64": 8, "uint64": 8}  # fmt: skip
DEFLATE = 1032  # the most bytes that one byte of deflate can stand for (zlib's technical details)
_NRRD_EXPANSION = {"raw": 1.0, "gzip": DEFLATE, "gz": DEFLATE, "txt": 8.0, "text": 8.0, "ascii": 8.0, "hex": 1.0}
_NOT_LABELS = {1: "bits", 32: "complex numbers", 128: "RGB colours", 1536: "128-bit floats", 1792: "complex numbers", 2304: "RGBA colours"}


def stem(path: Path) -> str:
    """The case name: the file name without the format's suffix (`.nii.gz` counts as one)."""
    name = path.name
    return next((name[: -len(s)] for s in SUFFIXES if name.lower().endswith(s)), path.stem)


def is_synthetic(path: Path) -> bool:
    """Whether this is a file that mask2ct wrote, of whatever format: its header says so (MARKS)."""
    return _is_marked(_first_bytes(path))


def is_cut(path: Path) -> bool:
    """Whether so little of a file is left that it cannot say who wrote it: it was cut, to nothing or within its first bytes.

    What mask2ct writes says so within the header of a NIfTI, of which a whole volume has more, or within `MARKS_WITHIN` bytes of DICOM.
    What is left must begin as such a file does: other short files are somebody's own.
    """
    head = _first_bytes(path)
    suffix = next((suffix for suffix in _BEGINNINGS if path.name.lower().removesuffix(".gz").endswith(suffix)), None)
    if head is None or suffix is None or _is_marked(head):
        return False
    least, beginning = (MARKS_WITHIN if suffix == ".dcm" else NIFTI_HEADER), _BEGINNINGS[suffix]
    return len(head) < least and head[: len(beginning)] == beginning[: len(head)]


def _is_marked(head: bytes | None) -> bool:
    return head is not None and all(mark.encode() in head for mark in MARKS)


def _first_bytes(path: Path) -> bytes | None:
    """The first `MARKS_WITHIN` bytes, or as many as there are, of what a file holds, unpacked. None: it cannot be opened, or is no gzip."""
    try:
        with open_input(path) as handle:
            if not path.name.lower().endswith(".gz"):
                return handle.read(MARKS_WITHIN)
            return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(handle.read(MARKS_WITHIN), MARKS_WITHIN)
    except (OSError, zlib.error):
        return None


@dataclass(frozen=True)
class Plain:
    """Where the unscaled integers of a 3-D NIfTI-1 lie: from byte `offset` on, (D, H, W) = `shape`, as they lie in the file."""

    offset: int
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Header:
    """What a checked header says besides the grid.

    `nifti`: the header of a NIfTI-1 file as 348 little-endian bytes, None for other formats. `oriented`: whether it states how
    the axes lie in the patient. `segments`: of a Slicer .seg.nrrd, each with the layer that it lies in (`layers` of them; 1 for any
    other volume). `plain`: where a NIfTI's voxels can be read without a library.
    """

    nifti: bytes | None = None
    oriented: bool = True
    segments: tuple[tuple[Segment, int], ...] = ()
    layers: int = 1
    plain: Plain | None = None


def check_header(path: Path, *, voxels: bool = True) -> Header:
    """Refuse (`UnreadableVolume`, `GeometryError`) a file that is not one 3-D scalar volume with its voxels present.

    A layered .seg.nrrd passes, too. Without `voxels` those of a NIfTI are not counted, only their number is not out of reach: for looking at
    a header alone, and where a reader counts them itself.
    """
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise UnreadableVolume(f"{path.name} is not of a format that is read", expected=f"{EXPECTED} ({', '.join(SUFFIXES)}), or DICOM with its prefix",
                               remedy="convert it to one of these", file=path)  # fmt: skip
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as exc:  # SimpleITK ends the whole process on such a name
        raise UnreadableVolume(
            f"the file name {path.name!r} is not valid UTF-8", expected="a name in UTF-8", remedy="rename the file"
        ) from exc
    with reading(path, EXPECTED), open_input(path) as handle:
        if name.endswith(".nii.gz"):
            if handle.read(2) != b"\x1f\x8b":
                raise bad(path, "is not gzip-compressed though it is named .gz")
            handle.seek(0)
            with unpacked(path, handle) as content:
                return _nifti(path, content, voxels)
        if name.endswith(".nii"):
            return _nifti(path, handle, voxels)
        return (_nrrd if name.endswith((".nrrd", ".nhdr")) else _meta)(path, handle)


def bad(path: Path, fact: str, remedy: str = "check the file, or write it again") -> UnreadableVolume:
    """The file is not what a reader takes."""
    return UnreadableVolume(f"{path.name} {fact}", expected=EXPECTED, remedy=remedy, file=path)


def _check_shape(path: Path, shape: Sequence[int]) -> None:
    """Three dimensions (further ones of 1 are let pass), positive, no more than MAX_VOXELS together."""
    text = "x".join(str(n) for n in shape)
    if len(shape) < 3:
        raise bad(path, f"is {len(shape)}-D ({text})", "save it as a 3-D volume (one slice is enough) with its true slice spacing")
    if any(n != 1 for n in shape[3:]):
        raise bad(path, f"is {len(shape)}-D ({text})", "save one 3-D volume per file: one channel, one time point")
    if any(n < 1 for n in shape) or math.prod(shape) > MAX_VOXELS:
        raise bad(path, f"claims the size {text}")
    if max(shape) > MAX_EXTENT:
        raise bad(path, f"has {max(shape)} voxels along one axis", f"cut it: NIfTI-1, which is written, holds {MAX_EXTENT}")


@contextmanager
def unpacked(path: Path, handle: BinaryIO) -> Iterator[BinaryIO]:
    """What a gzip file holds, by isal: three times as fast as zlib, and every mask is read once to be checked."""
    from isal import igzip
    from isal.igzip_lib import IsalError

    try:
        with igzip.open(handle, "rb") as content:
            yield content
    except (EOFError, gzip.BadGzipFile, IsalError) as exc:  # type: ignore[misc]
        raise bad(path, f"is truncated or damaged: {exc}", "copy or download it again") from exc


def _nifti(path: Path, content: BinaryIO, voxels: bool) -> Header:
    head = content.read(348)
    if len(head) < 348:
        raise bad(path, f"ends after {len(head)} bytes, inside its header")
    order = next((o for o in "<>" if struct.unpack_from(o + "i", head)[0] in (348, 540)), None)
    if order is None:
        raise bad(path, "is not a NIfTI file (its first number is neither 348 nor 540)")
    if struct.unpack_from(order + "i", head)[0] == 348:
        header, first = struct.pack("<" + NIFTI_1, *struct.unpack(order + NIFTI_1, head)), 348
        codes = struct.unpack_from("<2h", header, 252)  # qform_code, sform_code
        magic, dim = head[344:348], struct.unpack_from(order + "8h", head, 40)
        (datatype,), (offset,) = struct.unpack_from(order + "h", head, 70), struct.unpack_from(order + "f", head, 108)
        spacing = struct.unpack_from(order + "3f", head, 80)
        if magic != b"n+1\0":
            raise bad(path, "is not a single-file NIfTI (its magic is not n+1)", "save header and voxels in one .nii file")
    else:
        head += content.read(540 - 348)
        if len(head) < 540:
            raise bad(path, f"ends after {len(head)} bytes, inside its header")
        header, first = None, 540
        codes = struct.unpack_from(order + "2i", head, 344)
        dim, spacing = struct.unpack_from(order + "8q", head, 16), struct.unpack_from(order + "3d", head, 112)
        (datatype,), (offset,) = struct.unpack_from(order + "h", head, 12), struct.unpack_from(order + "q", head, 168)
    if not 1 <= dim[0] <= 7:
        raise bad(path, f"claims {dim[0]} dimensions")
    _check_shape(path, dim[1 : dim[0] + 1])
    if datatype not in _BYTES:
        raise bad(path, f"holds {_NOT_LABELS.get(datatype, f'values of the unknown type {datatype}')}", "save the labels as integers")
    if not all(math.isfinite(s) and s != 0 for s in spacing):
        raise GeometryError(f"{path.name} states the voxel spacing {spacing}", expected="three numbers of mm other than 0",
                            remedy="write the true spacing into the header", file=path)  # fmt: skip
    _check_affines(path, head, order, dim, spacing)
    if not math.isfinite(offset) or not first <= offset < 1 << 31:
        raise bad(path, f"puts its voxels at byte {offset}")
    size, there = math.prod(dim[1 : dim[0] + 1]) * _BYTES[datatype], path.stat().st_size
    if there * (DEFLATE if path.name.lower().endswith(".gz") else 1) < size:
        raise bad(path, f"is truncated: {there} bytes are there for {size} bytes of voxels", "copy or download it again")
    if not voxels:
        plain = header is not None and dim[0] == 3 and datatype in _INTEGERS and _unscaled(header)
        dtype = np.dtype(order + _INTEGERS.get(datatype, "u1"))
        return Header(header, any(codes), plain=Plain(int(offset), (dim[3], dim[2], dim[1]), dtype) if plain else None)
    need = int(offset) - first + size
    content.read(int(offset) - first)
    have = int(offset) - first + _count(path, content, need, _FLOATS.get(datatype, ""), order)
    if have < need:
        raise bad(path, f"is truncated: {have} of {need} bytes are there behind its header", "copy or download it again")
    return Header(header, any(codes))


def _unscaled(header: bytes) -> bool:
    slope, intercept = struct.unpack_from("<2f", header, 112)
    return slope in (0, 1) and intercept == 0


def _check_affines(path: Path, head: bytes, order: str, dim: Sequence[int], spacing: Sequence[float]) -> None:
    """A NIfTI may say twice where it lies, by quaternion (qform) and by matrix (sform): the two must agree at every corner."""
    nifti2 = len(head) > 348
    number, at = ("d", (344, 352, 104, 400)) if nifti2 else ("f", (252, 256, 76, 280))
    qform_code, sform_code = struct.unpack_from(order + ("2i" if nifti2 else "2h"), head, at[0])
    placed = struct.unpack_from(order + "6" + number, head, at[1]), struct.unpack_from(order + "12" + number, head, at[3])
    for code, values in zip((qform_code, sform_code), placed, strict=True):
        if code > 0 and not all(abs(x) <= LARGEST_MM for x in values):  # NaN is not, either
            raise GeometryError(f"{path.name} states a place beyond {LARGEST_MM:g} mm, or none", expected="a grid in mm",
                                remedy="write a valid header", file=path)  # fmt: skip
    if qform_code <= 0 or sform_code <= 0:
        return
    (b, c, d, *offset), (qfac,) = placed[0], struct.unpack_from(order + number, head, at[2])
    sform = np.array(placed[1]).reshape(3, 4)
    qform = np.column_stack([rotation(b, c, d) * [1, 1, -1 if qfac < 0 else 1] * np.abs(spacing), offset])
    corners = np.array([[i, j, k, 1] for i in (0, dim[1] - 1) for j in (0, dim[2] - 1) for k in (0, dim[3] - 1)], float)
    apart = float(np.linalg.norm(corners @ (sform - qform).T, axis=1).max())
    if apart > AFFINES_TOLERANCE * float(np.min(np.abs(spacing))):
        raise GeometryError(f"{path.name} lies in two places: its qform (code {qform_code}) and its sform (code {sform_code}) are {apart:.3g} mm apart",
                            expected="one place", remedy="set the one that is wrong to code 0, or make them equal (fslorient, nibabel)", file=path)  # fmt: skip


def rotation(b: float, c: float, d: float) -> NDArray[np.float64]:
    """The 3x3 rotation of the unit quaternion (a, b, c, d), a >= 0 (nifti1.h, method 2)."""
    a = math.sqrt(max(0.0, 1 - b * b - c * c - d * d))
    return np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )


def _count(path: Path, content: BinaryIO, need: int, floats: str, order: str) -> int:
    """How many bytes follow, up to `need`; for gzip the trailing checksum is verified as well.

    `floats`: the numpy code of floating-point voxels, which are checked for NaN and infinity here, because the NIfTI
    library under SimpleITK turns those into 0 without a word (nifti1_io.c, nifti_read_buffer).
    """
    have, size = 0, np.dtype(floats).itemsize if floats else 1
    try:
        while have < need and (chunk := content.read(min(1 << 20, need - have))):
            have += len(chunk)
            if floats and not np.isfinite(values := np.frombuffer(chunk[: len(chunk) // size * size], order + floats)).all():
                raise bad(path, f"holds {values[~np.isfinite(values)][0]}, which is no label", "give a label map of whole numbers")
        content.read(1)  # at the end of a gzip stream its checksum is compared
        return have
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise bad(path, f"is truncated or damaged: {exc}", "copy or download it again") from exc


def _text_header(path: Path, handle: BinaryIO, separator: str, end: str) -> dict[str, str]:
    """`key<separator>value` lines up to (and with) the line that starts with `end`, keys in lower case without spaces."""
    fields: dict[str, str] = {}
    for _ in range(1024):
        line = handle.readline(4096).decode("latin-1").rstrip("\r\n")
        if not line and end == "":
            return fields
        key, found, value = line.partition(separator)
        if found:
            fields[key.strip().lower().replace(" ", "")] = value.lstrip("=").strip()
            if end and key.strip().lower() == end:
                return fields
        elif not line.startswith("#") and fields == {} and line:
            raise bad(path, "does not start as its suffix promises")
    raise bad(path, "has a header without an end")


def _numbers(path: Path, fields: Mapping[str, str], key: str) -> list[int]:
    try:
        return [int(n) for n in fields[key].split()][:16] or [int("")]
    except (KeyError, ValueError) as exc:
        raise bad(path, f"has no readable '{key}' in its header") from exc


def _nrrd(path: Path, handle: BinaryIO) -> Header:
    if not handle.readline(64).startswith(b"NRRD"):
        raise bad(path, "is not an NRRD file")
    fields = _text_header(path, handle, ":", "")
    shape = _numbers(path, fields, "sizes")
    if _numbers(path, fields, "dimension") != [len(shape)]:
        raise bad(path, f"states {len(shape)} sizes for {fields['dimension']} dimensions")
    segments = tuple(_segments(path, fields))
    layered = bool(segments) and len(shape) == 4 and fields.get("kinds", "").lower().startswith("list")
    _check_shape(path, shape[1:] if layered else shape)
    if layered and not 1 <= shape[0] <= len(segments):
        raise bad(path, f"claims {shape[0]} layers for {len(segments)} segments")
    if fields.get("type", "").lower() == "block":
        raise bad(path, "holds blocks, not numbers", "save the labels as integers")
    stated = fields.get("spacedirections", fields.get("spacings"))
    _require_grid(path, stated, "space directions")
    _check_numbers(path, fields, "spaceorigin")
    _same_folder(path, fields.get("datafile", "LOCAL"))
    encoding = fields.get("encoding", "").lower()
    if encoding not in _NRRD_EXPANSION:
        raise bad(path, f"has the encoding {encoding!r}", "save it raw or with gzip")
    need = math.prod(shape) * _NRRD_BYTES.get(fields.get("type", "").lower(), 1)
    _require_voxels(path, handle, fields.get("datafile", "LOCAL"), need, _NRRD_EXPANSION[encoding])
    return Header(None, "space" in fields and "spacedirections" in fields, segments, shape[0] if layered else 1)


def _segments(path: Path, fields: Mapping[str, str]) -> Iterator[tuple[Segment, int]]:
    """The segments that Slicer writes into a .seg.nrrd: Segment0_LabelValue, _Layer, _Name and _TerminologyEntry, whose second
    part is the type as SCHEME^VALUE^MEANING."""
    for key in fields:
        if not (found := re.fullmatch(r"segment(\d{1,6})_labelvalue", key)):
            continue
        prefix = f"segment{found[1]}_"
        type_ = re.split(r"[~]", fields.get(prefix + "terminologyentry", "") + "~~")[2].split("^")
        code = f"{type_[0]}:{type_[1]}" if len(type_) >= 2 and all(type_[:2]) else ""
        yield (
            Segment(_numbers(path, fields, key)[0], fields.get(prefix + "name", ""), code),
            (_numbers(path, fields, prefix + "layer") if prefix + "layer" in fields else [0])[0],
        )


def _meta(path: Path, handle: BinaryIO) -> Header:
    fields = _text_header(path, handle, "=", "elementdatafile")
    shape = _numbers(path, fields, "dimsize")
    if _numbers(path, fields, "ndims") != [len(shape)]:
        raise bad(path, f"states {len(shape)} sizes for {fields['ndims']} dimensions")
    _check_shape(path, shape)
    if fields.get("elementnumberofchannels", "1") != "1":
        raise bad(path, f"holds {fields['elementnumberofchannels']} channels", "save the labels as one integer per voxel")
    _require_grid(path, fields.get("elementspacing", fields.get("elementsize")), "ElementSpacing")
    _check_numbers(path, fields, "transformmatrix", "rotation", "orientation", "offset", "position", "origin")
    _same_folder(path, fields["elementdatafile"])
    need = math.prod(shape) * _META_BYTES.get(fields.get("elementtype", "").upper(), 1)
    packed = fields.get("compresseddata", "false").lower()[:1] in "t1"
    text = fields.get("binarydata", "true").lower()[:1] in "f0"
    _require_voxels(path, handle, fields["elementdatafile"], need, DEFLATE if packed else 8 if text else 1)
    return Header(None, any(key in fields for key in ("transformmatrix", "rotation", "orientation")))


def _require_grid(path: Path, stated: str | None, key: str) -> None:
    """The spacing must be there, in finite numbers, not all of a direction 0."""
    try:
        numbers = [float(n) for n in re.split(r"[\s(),]+", (stated or "").replace("none", "")) if n]
    except ValueError:
        numbers = []
    if not numbers or not all(abs(n) <= LARGEST_MM for n in numbers) or not any(numbers):
        raise GeometryError(f"{path.name} does not state its voxel spacing ({key}: {stated})", expected="a grid in mm; it is never guessed",
                            remedy="write the true spacing into the header", file=path)  # fmt: skip


def _check_numbers(path: Path, fields: Mapping[str, str], *keys: str) -> None:
    """What states origin and direction must be numbers of a human size: ITK does not come back from a matrix of 1e308."""
    for key in keys:
        try:
            good = all(abs(float(n)) <= LARGEST_MM for n in re.split(r"[\s(),]+", fields.get(key, "")) if n)
        except ValueError:
            good = False
        if not good:
            raise GeometryError(f"{path.name} states the {key} {fields[key][:80]}", expected=f"numbers within {LARGEST_MM:g} mm",
                                remedy="write a valid header", file=path)  # fmt: skip


def _require_voxels(path: Path, handle: BinaryIO, data_file: str, need: int, expansion: float) -> None:
    """`need` bytes of voxels must be there, or could be: `expansion` is the most that a byte of their encoding can stand for."""
    local = data_file.upper() == "LOCAL"
    have = path.stat().st_size - handle.tell() if local else (path.parent / data_file).stat().st_size
    if have * expansion + (0 if expansion == 1 else 64) < need:
        raise bad(path, f"is truncated: {have} bytes are there for {need} bytes of voxels", "copy or download it again")


def _same_folder(path: Path, data_file: str) -> None:
    """A header may name another file for its voxels: only one beside it is read."""
    beside = path.parent / data_file
    if data_file.upper() != "LOCAL" and (Path(data_file).name != data_file or not belongs_to(path.parent, beside)):
        raise bad(path, f"keeps its voxels in {data_file!r}", "keep header and voxels in one folder, or in one file")
