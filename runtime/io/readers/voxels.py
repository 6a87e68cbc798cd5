"""The voxels of a volume file, read as its checked header says: no library reads the file again."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ...core.errors import reading
from .volume_header import EXPECTED, Voxels, bad

PIECE = 1 << 20  # bytes asked of a file at once
_GZIP = b"\x1f\x8b"


def planes(path: Path, voxels: Voxels, at_once: int) -> Iterator[NDArray[Any]]:
    """The values of a volume, `at_once` slices at a time.

    Args:
        path: What errors are about.
        voxels: From the checked header.
        at_once: Slices of one array; the last array may hold fewer.

    Yields:
        (n, H, W), with several layers (n, H, W, layers), in the machine's byte order and the
        file's dtype; scaled values as floats. Of gzip the checksum is verified before the last.

    Raises:
        UnreadableVolume: When they end too early or are damaged.
    """
    depth, sides = voxels.shape[0], voxels.shape[1:]
    row = (*sides, voxels.layers) if voxels.layers > 1 else sides
    done = 0
    with reading(path, EXPECTED), _decoded(path, voxels) as content:
        for start in range(0, depth, at_once):
            values = np.empty((min(at_once, depth - start), *row), voxels.dtype)
            place = values.reshape(-1).view(np.uint8).data
            have = _fill(content, place)
            done += have
            if have < len(place):
                raise bad(
                    path,
                    f"is truncated: {done} of {voxels.size} bytes of voxels are there",
                    "copy or download it again",
                )
            if start + len(values) == depth and voxels.encoding != "raw":
                content.read(1)  # at its end the checksum of a compressed stream is compared
            if not values.dtype.isnative:
                values = values.byteswap(inplace=True).view(values.dtype.newbyteorder("="))
            yield values if voxels.scale is None else _scaled(values, *voxels.scale)


def check_complete(path: Path, voxels: Voxels) -> None:
    """Raise `UnreadableVolume` unless all voxels are there and undamaged; none of them is kept."""
    if voxels.encoding == "raw":
        return  # their number is what the header was checked for
    slice_bytes = voxels.size // voxels.shape[0]
    for _ in planes(path, voxels, max(1, PIECE // slice_bytes)):
        pass


@contextmanager
def unpacked(path: Path, handle: BinaryIO) -> Iterator[BinaryIO]:
    """What a gzip file holds, by isal, which is three times as fast as zlib."""
    from isal import igzip

    with damage(path), igzip.open(handle, "rb") as content:
        yield content


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Map what decompressors raise to `UnreadableVolume`."""
    from isal.igzip_lib import IsalError

    try:
        yield
    except (EOFError, OverflowError, gzip.BadGzipFile, zlib.error, IsalError) as exc:  # type: ignore[misc]
        raise bad(path, f"is truncated or damaged: {exc}", "copy or download it again") from exc


@contextmanager
def _decoded(path: Path, voxels: Voxels) -> Iterator[Any]:
    """The decoded bytes from the first voxel on."""
    with _plain_file(path, voxels.file) as handle:
        handle.seek(voxels.start)
        if voxels.encoding == "raw":
            handle.seek(voxels.start + voxels.skip)
            yield handle
            return
        packed = voxels.encoding in ("gzip", "zlib")
        first = handle.read(2) if packed else b""
        handle.seek(voxels.start)
        if first == _GZIP:  # MetaIO takes either for compressed, whatever its header calls it
            with unpacked(path, handle) as content:
                _pass_over(path, content, voxels.skip)
                yield content
            return
        if voxels.encoding == "gzip":
            raise bad(path, "is not gzip-compressed though its header says so")
        pieces = {"zlib": _inflated, "hex": _from_hex, "text": _from_text}[voxels.encoding]
        with damage(path):
            stream = _Pieces(pieces(path, handle, voxels.dtype))
            _pass_over(path, stream, voxels.skip)
            yield stream


@contextmanager
def _plain_file(path: Path, file: Path) -> Iterator[BinaryIO]:
    """The open file; a detached one is opened only where it is no link (it may have become one)."""
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if file != path:
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(os.open(file, flags), "rb") as handle:
        yield handle


def _fill(content: Any, place: memoryview) -> int:
    """Read into `place` until it is full or the content ends; how many bytes were read."""
    have = 0
    while have < len(place) and (count := content.readinto(place[have : have + PIECE])):
        have += count
    return have


def _pass_over(path: Path, content: Any, count: int) -> None:
    """Read `count` bytes without keeping them."""
    place = memoryview(bytearray(min(count, PIECE)))
    left = count
    while left and (read := _fill(content, place[: min(left, PIECE)])):
        left -= read
    if left:
        raise bad(
            path,
            f"is truncated: it ends {left} bytes before its voxels",
            "copy or download it again",
        )


def _scaled(values: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    """slope * value + intercept, computed in double precision; float32 for up to 32 bits a
    value.
    """
    dtype = np.float64 if values.dtype.itemsize > 4 else np.float32
    return (values.astype(np.float64) * slope + intercept).astype(dtype)


class _Pieces(io.RawIOBase):
    """Pieces of bytes as one stream."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces, self._rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def _inflated(path: Path, handle: BinaryIO, dtype: np.dtype[Any]) -> Iterator[bytes]:
    """What a zlib stream holds, at most `PIECE` bytes at a time."""
    from isal import isal_zlib

    stream = isal_zlib.decompressobj()
    pending = b""
    while not stream.eof:
        pending = pending or handle.read(PIECE)
        if not pending:
            raise EOFError("the compressed voxels end before their end")
        yield stream.decompress(pending, PIECE)
        pending = stream.unconsumed_tail


def _words(path: Path, handle: BinaryIO) -> Iterator[list[bytes]]:
    """The words of a text, some thousand at a time."""
    rest = b""
    while chunk := handle.read(1 << 16):
        if b"\0" in chunk or b"_" in chunk or len(rest) > 1 << 12:
            raise bad(path, "holds voxels that are no numbers")
        *words, rest = (rest + chunk.replace(b",", b" ") + b"\0").split()
        rest = rest[:-1]
        yield words
    yield rest.split()


def _from_text(path: Path, handle: BinaryIO, dtype: np.dtype[Any]) -> Iterator[bytes]:
    """Voxels that are written as numbers."""
    number = int if dtype.kind in "iu" else float
    limits = np.iinfo(dtype) if dtype.kind in "iu" else None
    for words in _words(path, handle):
        try:
            values = [number(word) for word in words]
        except ValueError:
            raise bad(path, "holds voxels that are no numbers of its type") from None
        if limits and values and not limits.min <= min(values) <= max(values) <= limits.max:
            raise bad(path, "holds voxels that its type cannot hold")
        yield np.array(values, dtype).tobytes()


def _from_hex(path: Path, handle: BinaryIO, dtype: np.dtype[Any]) -> Iterator[bytes]:
    """Voxels that are written as pairs of hexadecimal digits."""
    digits = b""
    while chunk := handle.read(1 << 16):
        digits += b"".join(chunk.split())
        even = len(digits) & ~1
        try:
            yield bytes.fromhex(digits[:even].decode("ascii"))
        except (ValueError, UnicodeDecodeError):
            raise bad(path, "holds voxels that are no hexadecimal digits") from None
        digits = digits[even:]
