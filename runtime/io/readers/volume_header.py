"""What the checked header of any volume file states, and how the text of a header is parsed."""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ...core.errors import GeometryError, UnreadableVolume
from ...core.volume import LARGEST_MM, Geometry, Segment

EXPECTED = "one 3-D volume of integers as NIfTI, NRRD or MHA"
# Voxels along one axis that NIfTI-1 can state.
MAX_EXTENT = 32767
# A header with more voxels (16 G) counts as damaged.
MAX_VOXELS = 1 << 34
# Bytes of a text header, with Slicer's lists of segments.
MAX_HEADER = 1 << 20
# Bytes between a header and its voxels, with NIfTI extensions.
MAX_GAP = 1 << 26
# Bytes that one byte of deflate can stand for at most (zlib's technical details).
DEFLATE = 1032
# Limits of compressed voxels, of whatever type: each becomes a label of one byte. One organ in
# 512 x 512 x 2000 voxels is within the first limit; a larger mask has outlines, and deflate needs
# a byte for some hundred voxels of them.
ALWAYS = 1 << 30
# Voxels beyond that for each compressed byte.
EXPANSION = 250
# Thickness of a single slice that states none.
SLICE_MM = 1.0
# Cosine between two axes from which the user is told of a shear.
SHEAR_SAID = 1e-5
# Cosine up to which other readers (ITK) accept a grid.
UNSHEARED = 1e-4

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_INTEGER = re.compile(r"[-+]?\d{1,20}", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

MILLIMETRES = {
    name: mm
    for names, mm in (
        ("mm millimeter millimeters millimetre millimetres", 1.0),
        ("cm centimeter centimeters centimetre centimetres", 10.0),
        ("m meter meters metre metres", 1000.0),
        ("um \u00b5m \u03bcm micron microns micrometer micrometers micrometre micrometres", 0.001),
    )
    for name in names.split()
}


@dataclass(frozen=True)
class Voxels:
    """Where the voxels of a volume are, and how they are stored.

    Attributes:
        file: The file that holds them: the header's own, or one beside it.
        start: The byte of that file where their encoding begins.
        skip: Decoded bytes before the first voxel.
        encoding: "raw", "gzip", "zlib", "text" or "hex".
        dtype: Type of one value, in the file's byte order.
        shape: (D, H, W) in voxels.
        layers: Number of values per voxel; they are adjacent.
        scale: (slope, intercept) where a value is slope * stored + intercept.
    """

    file: Path
    start: int
    skip: int
    encoding: str
    dtype: np.dtype[Any]
    shape: tuple[int, int, int]
    layers: int = 1
    scale: tuple[float, float] | None = None

    @property
    def size(self) -> int:
        """Decoded bytes of all voxels."""
        return math.prod(self.shape) * self.layers * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """What a checked header states.

    Attributes:
        geometry: The grid, LPS in mm.
        voxels: Where the values are.
        nifti: The NIfTI-1 header as 348 little-endian bytes, so that a NIfTI result carries its
            grid bit for bit; None for other formats, and if its parts contradict each other.
        oriented: Whether it states how the axes lie in the patient.
        notes: Messages for the user.
        keys: Key/value pairs of an NRRD, with keys in lower case without blanks.
        segments: Segments of a Slicer .seg.nrrd, each with its layer.
    """

    geometry: Geometry
    voxels: Voxels
    nifti: bytes | None = None
    oriented: bool = True
    notes: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    segments: tuple[tuple[Segment, int], ...] = ()

    @property
    def layers(self) -> int:
        """Number of values per voxel."""
        return self.voxels.layers


def bad(
    path: Path, fact: str, remedy: str = "check the file, or write it again"
) -> UnreadableVolume:
    """The error for a file that a reader does not accept.

    Args:
        path: The file.
        fact: What is wrong; it follows the file's name.
        remedy: What the user can do.
    """
    return UnreadableVolume(f"{path.name} {fact}", expected=EXPECTED, remedy=remedy, file=path)


def bad_grid(path: Path, fact: str, expected: str, remedy: str) -> GeometryError:
    """The error for a file that states no grid, or two grids.

    Args:
        path: The file.
        fact: What is wrong; it follows the file's name.
        expected: What the file should state.
        remedy: What the user can do.
    """
    return GeometryError(f"{path.name} {fact}", expected=expected, remedy=remedy, file=path)


def check_shape(path: Path, sizes: Sequence[int]) -> tuple[int, int, int]:
    """The shape of a volume with two or three dimensions; further ones may have 1 voxel.

    Args:
        path: The file that errors name.
        sizes: Voxels along each axis, the fastest first.

    Returns:
        (D, H, W).

    Raises:
        UnreadableVolume: The number of dimensions or voxels is not supported.
    """
    text = "x".join(str(n) for n in sizes)
    if len(sizes) < 2:
        raise bad(path, f"is {len(sizes)}-D ({text})", "save it as a 2-D or 3-D label map")
    if any(n != 1 for n in sizes[3:]):
        raise bad(
            path,
            f"is {len(sizes)}-D ({text})",
            "save one 3-D volume per file: one channel, one time point",
        )
    if any(n < 1 for n in sizes) or math.prod(sizes) > MAX_VOXELS:
        raise bad(path, f"claims the size {text}")
    if max(sizes) > MAX_EXTENT:
        raise bad(
            path,
            f"has {max(sizes)} voxels along one axis",
            f"cut it: NIfTI-1, which is written, holds {MAX_EXTENT}",
        )
    return (sizes[2] if len(sizes) > 2 else 1), sizes[1], sizes[0]


def check_voxels(path: Path, voxels: Voxels) -> Voxels:
    """Check that the file can hold as many voxels as its header claims.

    Args:
        path: The file that errors name.
        voxels: What the header states.

    Returns:
        `voxels`.

    Raises:
        UnreadableVolume: The voxels begin too far behind the header, or the file is too short for
            them, even with the best compression.
    """
    if voxels.skip < 0 or (voxels.encoding != "raw" and voxels.skip > MAX_GAP):
        raise bad(
            path,
            f"puts its voxels {voxels.skip} bytes behind its header",
            f"write it again: up to {MAX_GAP} bytes may lie between",
        )
    have = voxels.file.stat().st_size - voxels.start
    if have < _least_bytes(voxels):
        raise bad(
            path,
            f"is truncated: it has {max(0, have - voxels.skip)} of {voxels.size} bytes of voxels",
            "copy or download it again",
        )
    count, limit = voxels.size // voxels.dtype.itemsize, ALWAYS + EXPANSION * have
    if voxels.encoding in ("gzip", "zlib") and count > limit:
        raise UnreadableVolume(
            f"{path.name} states {count} voxels in {have} compressed bytes",
            expected=f"at most {limit} voxels: {EXPANSION} for each compressed byte, and {ALWAYS}",
            remedy="if it is a mask, save it without compression, or cut it",
            file=path,
        )
    return voxels


def _least_bytes(voxels: Voxels) -> int:
    """The fewest bytes of a file that can hold these voxels."""
    if voxels.encoding == "raw":
        return voxels.skip + voxels.size
    if voxels.encoding == "hex":
        return 2 * voxels.size
    # Each value of a text is at least a digit and a blank.
    if voxels.encoding == "text":
        return 2 * (voxels.size // voxels.dtype.itemsize) - 1
    return (voxels.skip + voxels.size) // DEFLATE - 64


def voxel_name(path: Path, name: str) -> str:
    """The name of the one file with the voxels, beside its header.

    Args:
        path: The header.
        name: What the header states.

    Raises:
        UnreadableVolume: It is a list or pattern of files, or a name that leads elsewhere.
    """
    if name.upper().split(maxsplit=1)[:1] == ["LIST"] or "%" in name:
        raise bad(path, f"keeps its voxels in several files ({name[:80]!r})", "save it as one file")
    plain = name.removeprefix("./")
    if not plain or "/" in plain or "\\" in plain or plain in (".", ".."):
        raise bad(
            path,
            f"keeps its voxels in {name[:80]!r}",
            "keep header and voxels in one folder, or in one file",
        )
    return plain


def voxel_file(path: Path, name: str) -> Path:
    """The plain file with the voxels, beside its header.

    Args:
        path: The header.
        name: What the header states.

    Raises:
        UnreadableVolume: As `voxel_name`, and if it is not a file, or a link.
    """
    detached = path.parent / voxel_name(path, name)
    try:
        kind = os.lstat(detached).st_mode
    except (OSError, ValueError):
        kind = 0
    if not stat.S_ISREG(kind):
        fact = "is a link" if stat.S_ISLNK(kind) else "is not a file beside it"
        raise bad(
            path,
            f"keeps its voxels in {name[:80]!r}, which {fact}",
            "keep header and voxels in one folder, or in one file",
        )
    return detached


def header_lines(path: Path, handle: BinaryIO) -> Iterator[str]:
    """The lines of a text header, without their ends.

    Args:
        path: The file that errors name.
        handle: The open file.

    Raises:
        UnreadableVolume: The header has no end, or a control character. A lone carriage return is
            one: other readers take it for the end of a line.
    """
    bytes_left = MAX_HEADER
    while line := handle.readline(bytes_left + 1):
        bytes_left -= len(line)
        if bytes_left < 0:
            raise bad(path, "has a header without an end")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            text = line.decode("latin-1")
        text = text.removesuffix("\n").removesuffix("\r")
        if _CONTROL.search(text):
            raise bad(path, "has a control character in its header")
        yield text


def integers(path: Path, fields: Mapping[str, str], key: str) -> list[int]:
    """The 1 to 16 integers that a field states.

    Args:
        path: The file that errors name.
        fields: The header.
        key: The field.

    Raises:
        UnreadableVolume: The field is missing or not readable.
    """
    words = fields.get(key, "").split()
    if not words or len(words) > 16 or not all(_INTEGER.fullmatch(word) for word in words):
        raise bad(path, f"has no readable '{key}' in its header")
    return [int(word) for word in words]


def lengths(path: Path, key: str, text: str) -> list[float]:
    """The numbers of mm, or of a similar unit, that a field states.

    Args:
        path: The file that errors name.
        key: The field.
        text: Its text.

    Raises:
        GeometryError: A word is not a number, or is too large for a grid.
    """
    words = text.split()
    if all(_NUMBER.fullmatch(word) for word in words):
        numbers = [float(word) for word in words]
        if all(abs(number) <= LARGEST_MM for number in numbers):
            return numbers
    raise bad_grid(
        path,
        f"states the {key} {text[:80]}",
        f"numbers within {LARGEST_MM:g} mm",
        "write a valid header",
    )


def spacings(path: Path, key: str, text: str | None, count: int) -> list[float]:
    """Distances of neighbouring voxels, other than 0.

    Args:
        path: The file that errors name.
        key: The field.
        text: Its text; None if it is missing.
        count: Number of distances; more are ignored.

    Raises:
        GeometryError: A distance is missing or not valid.
    """
    words = (text or "").split()
    if len(words) >= count and all(_NUMBER.fullmatch(word) for word in words[:count]):
        numbers = [float(word) for word in words[:count]]
        if all(0 < abs(number) <= LARGEST_MM for number in numbers):
            return numbers
    raise no_spacing(path, key, text)


def no_spacing(path: Path, key: str, text: str | None) -> GeometryError:
    """The error for a header that does not state the voxel spacing.

    Args:
        path: The file.
        key: The field.
        text: Its text; None if it is missing.
    """
    stated = None if text is None else text[:80]
    return bad_grid(
        path,
        f"does not state its voxel spacing ({key}: {stated})",
        "a grid in mm; it is never guessed",
        "write the true spacing into the header",
    )


def third_axis(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """The columns of a single slice with a third one, `SLICE_MM` long, along the normal.

    Args:
        columns: (3, 2) or (3, 3) in mm; only the first two columns count.

    Returns:
        (3, 3) in mm, right-handed.
    """
    normal = np.cross(columns[:, 0], columns[:, 1])
    length = float(np.linalg.norm(normal))
    return np.column_stack([columns[:, :2], normal * (SLICE_MM / length if length else 0.0)])


def slice_note(path: Path) -> str:
    """The note on a single slice that states no thickness.

    Args:
        path: The file.
    """
    return f"{path.name} is one slice that states no thickness: it is taken to be {SLICE_MM:g} mm"


def geometry_of(path: Path, columns: Any, origin: Any) -> tuple[Geometry, tuple[str, ...]]:
    """The grid with these columns and this origin.

    Args:
        path: The file that errors name.
        columns: (3, 3), mm, LPS.
        origin: (3), mm, LPS.

    Returns:
        The grid, and a note if it is sheared.

    Raises:
        GeometryError: It is not a grid.
    """
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = columns, origin
    try:
        geometry = Geometry(affine)
    except GeometryError as exc:
        exc.file = path
        raise
    shear = shear_of(geometry.affine)
    if shear <= SHEAR_SAID:
        return geometry, ()
    note = (
        f"{path.name} is sheared a little: two of its axes have the cosine {shear:.1g}; it is"
        " taken as it is"
    )
    return geometry, (note,)


def shear_of(affine: NDArray[np.float64]) -> float:
    """The largest |cosine| between two axes of a grid.

    Args:
        affine: (3, 3) or larger; the first three rows and columns count.
    """
    unit = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.abs(unit.T @ unit - np.eye(3)).max())
