"""What the header of any volume file states once it is checked, and what its text may look like."""

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
MAX_EXTENT = 32767  # voxels along one axis that NIfTI-1 can say
MAX_VOXELS = 1 << 34  # 16 G voxels: past this a header is taken for damaged
MAX_HEADER = 1 << 20  # bytes of a text header, Slicer's lists of segments among them
MAX_GAP = 1 << 26  # bytes between a header and its voxels, NIfTI extensions among them
DEFLATE = 1032  # the most bytes that one byte of deflate can stand for (zlib's technical details)
# What compressed voxels may become, of whatever type: each is held as a label of one byte. An organ
# in 512 x 512 x 2000 voxels,
# all of one label, is within the first alone; a large mask has outlines, and deflate needs a byte
# for some hundred voxels of them.
ALWAYS = 1 << 30  # voxels, however few their compressed bytes are
EXPANSION = 250  # voxels beyond that for each compressed byte; deflate itself ends at 1032 bytes
SLICE_MM = 1.0  # thickness of a single slice that states none
SHEAR_SAID = 1e-5  # cosine between two axes from which on a person is told
UNSHEARED = 1e-4  # up to which other readers (ITK) take a grid

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
    """Where the voxels of a volume lie, and how they are stored.

    Attributes:
        file: The file that holds them: the header's own, or one beside it.
        start: The byte of that file where their encoding begins.
        skip: Decoded bytes before the first voxel.
        encoding: "raw", "gzip", "zlib", "text" or "hex".
        dtype: Of one value, in the file's byte order.
        shape: (D, H, W) in voxels.
        layers: Values of one voxel; they lie next to each other.
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
        geometry: Where the grid lies, LPS in mm.
        voxels: Where the values lie.
        nifti: A NIfTI-1 header as 348 little-endian bytes, so that a NIfTI result can carry its
            grid bit for bit; None for other formats, and where parts of it contradict each other.
        oriented: Whether it states how the axes lie in the patient.
        notes: What a person should be told.
        keys: Key/value pairs of an NRRD, keys in lower case without blanks.
        segments: Of a Slicer .seg.nrrd, each with the layer that it lies in.
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
        return self.voxels.layers


def bad(
    path: Path, fact: str, remedy: str = "check the file, or write it again"
) -> UnreadableVolume:
    """The file is not what a reader takes."""
    return UnreadableVolume(f"{path.name} {fact}", expected=EXPECTED, remedy=remedy, file=path)


def bad_grid(path: Path, fact: str, expected: str, remedy: str) -> GeometryError:
    """The file does not state where its voxels lie, or states it twice."""
    return GeometryError(f"{path.name} {fact}", expected=expected, remedy=remedy, file=path)


def check_shape(path: Path, sizes: Sequence[int]) -> tuple[int, int, int]:
    """Two or three dimensions, further ones only of 1 voxel, as (D, H, W).

    Args:
        path: The file, for the error.
        sizes: Voxels along each axis, the fastest first.

    Raises:
        UnreadableVolume: For any other number of dimensions or voxels.
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
    """The voxels, when the file can hold as many as its header claims.

    Raises:
        UnreadableVolume: When they begin too far behind the header, or when even the best
            compression could not put them into the bytes that are there.
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
            f"is truncated: {max(0, have - voxels.skip)} bytes are there for {voxels.size} bytes of"
            " voxels",
            "copy or download it again",
        )
    count, most = voxels.size // voxels.dtype.itemsize, ALWAYS + EXPANSION * have
    if voxels.encoding in ("gzip", "zlib") and count > most:
        raise UnreadableVolume(
            f"{path.name} states {count} voxels in {have} compressed bytes",
            expected=f"at most {most} voxels: {EXPANSION} for each compressed byte, and {ALWAYS}",
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
    if voxels.encoding == "text":  # a digit and a blank a value
        return 2 * (voxels.size // voxels.dtype.itemsize) - 1
    return (voxels.skip + voxels.size) // DEFLATE - 64


def voxel_name(path: Path, name: str) -> str:
    """The name of the one file beside the header `path` that `name` means.

    Raises:
        UnreadableVolume: For a list or pattern of files, and for a name that leads elsewhere.
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
    """The file beside the header `path` that `name` means: a plain file of the same folder.

    Raises:
        UnreadableVolume: As `voxel_name`, and for what is no file, or a link.
    """
    beside = path.parent / voxel_name(path, name)
    try:
        kind = os.lstat(beside).st_mode
    except (OSError, ValueError):
        kind = 0
    if not stat.S_ISREG(kind):
        fact = "is a link" if stat.S_ISLNK(kind) else "is no file beside it"
        raise bad(
            path,
            f"keeps its voxels in {name[:80]!r}, which {fact}",
            "keep header and voxels in one folder, or in one file",
        )
    return beside


def header_lines(path: Path, handle: BinaryIO) -> Iterator[str]:
    """The lines of a text header, without their ends.

    Raises:
        UnreadableVolume: For control characters, a lone carriage return among them, which other
            readers take for the end of a line, and for a header without an end.
    """
    left = MAX_HEADER
    while line := handle.readline(left + 1):
        left -= len(line)
        if left < 0:
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
    """At most 16 whole numbers that a field states. Raises `UnreadableVolume`."""
    words = fields.get(key, "").split()
    if not words or len(words) > 16 or not all(_INTEGER.fullmatch(word) for word in words):
        raise bad(path, f"has no readable '{key}' in its header")
    return [int(word) for word in words]


def lengths(path: Path, key: str, text: str) -> list[float]:
    """Numbers of mm, or of a unit near it, that a field states.

    Raises:
        GeometryError: For what is no number, and for numbers that no grid has.
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
    """`count` distances of neighbouring voxels other than 0. Raises `GeometryError`."""
    words = (text or "").split()
    if len(words) >= count and all(_NUMBER.fullmatch(word) for word in words[:count]):
        numbers = [float(word) for word in words[:count]]
        if all(0 < abs(number) <= LARGEST_MM for number in numbers):
            return numbers
    raise no_spacing(path, key, text)


def no_spacing(path: Path, key: str, text: str | None) -> GeometryError:
    stated = None if text is None else text[:80]
    return bad_grid(
        path,
        f"does not state its voxel spacing ({key}: {stated})",
        "a grid in mm; it is never guessed",
        "write the true spacing into the header",
    )


def third_axis(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """The 3x3 columns of a single slice, from the two that it states: `SLICE_MM` thick, along the
    normal that makes the axes right-handed."""
    normal = np.cross(columns[:, 0], columns[:, 1])
    length = float(np.linalg.norm(normal))
    return np.column_stack([columns[:, :2], normal * (SLICE_MM / length if length else 0.0)])


def slice_note(path: Path) -> str:
    return f"{path.name} is one slice that states no thickness: it is taken to be {SLICE_MM:g} mm"


def geometry_of(path: Path, columns: Any, origin: Any) -> tuple[Geometry, tuple[str, ...]]:
    """The grid of three column vectors (mm, LPS) and an origin, and a note where it is sheared.

    Raises:
        GeometryError: Naming the file, for what is no grid.
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
    return geometry, (
        (
            f"{path.name} is sheared a little: two of its axes have the cosine {shear:.1g}; it is"
            " taken as it is"
        ),
    )


def shear_of(affine: NDArray[np.float64]) -> float:
    """The largest |cosine| between two of a grid's axes."""
    unit = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.abs(unit.T @ unit - np.eye(3)).max())
