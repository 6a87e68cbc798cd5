"""The voxels of a volume file, read as its checked header states.

No library parses the file again.
"""

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

# Bytes that are read from a file at once.
PIECE = 1 << 20
_GZIP = b"\x1f\x8b"


def planes(path: Path, voxels: Voxels, at_once: int) -> Iterator[NDArray[Any]]:
    """The values of a volume, `at_once` slices at a time.

    Args:
        path: The file that errors name.
        voxels: From the checked header.
        at_once: Slices per array; the last array may hold fewer.

    Yields:
        (n, H, W), with several layers (n, H, W, layers), in the machine's byte order and the file's
        dtype; scaled values as floats. The checksum of gzip is verified before the last array.

    Raises:
        UnreadableVolume: The voxels end too early or are damaged.
    """
    depth, sides = voxels.shape[0], voxels.shape[1:]
    row = (*sides, voxels.layers) if voxels.layers > 1 else sides
    bytes_read = 0
    with reading(path, EXPECTED), _decoded(path, voxels) as content:
        for start in range(0, depth, at_once):
            values = np.empty((min(at_once, depth - start), *row), voxels.dtype)
            buffer = values.reshape(-1).view(np.uint8).data
            count = _fill(content, buffer)
            bytes_read += count
            if count < len(buffer):
                raise bad(
                    path,
                    f"is truncated: it has {bytes_read} of {voxels.size} bytes of voxels",
                    "copy or download it again",
                )
            if start + len(values) == depth and voxels.encoding != "raw":
                # A read at the end compares the checksum of a compressed stream.
                content.read(1)
            if not values.dtype.isnative:
                values = values.byteswap(inplace=True).view(values.dtype.newbyteorder("="))
            yield values if voxels.scale is None else _scaled(values, *voxels.scale)


def check_complete(path: Path, voxels: Voxels) -> None:
    """Check that all voxels are there and undamaged; none is kept.

    Args:
        path: The file that errors name.
        voxels: From the checked header.

    Raises:
        UnreadableVolume: The voxels end too early or are damaged.
    """
    # `check_voxels` has compared the size of raw voxels with the file's.
    if voxels.encoding == "raw":
        return
    slice_bytes = voxels.size // voxels.shape[0]
    for _ in planes(path, voxels, max(1, PIECE // slice_bytes)):
        pass


@contextmanager
def unpacked(path: Path, handle: BinaryIO) -> Iterator[BinaryIO]:
    """Open the content of a gzip file, with isal, which is three times as fast as zlib.

    Args:
        path: The file that errors name.
        handle: The open file.

    Raises:
        UnreadableVolume: The content is cut or damaged.
    """
    from isal import igzip

    with damage(path), igzip.open(handle, "rb") as content:
        yield content


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Map what decompressors raise to `UnreadableVolume`.

    Args:
        path: The file that errors name.
    """
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
        # MetaIO accepts gzip and zlib, whatever the header states.
        if first == _GZIP:
            with unpacked(path, handle) as content:
                _skip(path, content, voxels.skip)
                yield content
            return
        if voxels.encoding == "gzip":
            raise bad(path, "is not gzip-compressed though its header says so")
        pieces = {"zlib": _inflated, "hex": _from_hex, "text": _from_text}[voxels.encoding]
        with damage(path):
            stream = _PieceStream(pieces(path, handle, voxels.dtype))
            _skip(path, stream, voxels.skip)
            yield stream


@contextmanager
def _plain_file(path: Path, file: Path) -> Iterator[BinaryIO]:
    """The open file; a detached file is not opened if it has become a link since it was checked."""
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if file != path:
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(os.open(file, flags), "rb") as handle:
        yield handle


def _fill(content: Any, buffer: memoryview) -> int:
    """Read into `buffer` until it is full or the content ends; return the number of bytes."""
    filled = 0
    while filled < len(buffer) and (count := content.readinto(buffer[filled : filled + PIECE])):
        filled += count
    return filled


def _skip(path: Path, content: Any, count: int) -> None:
    """Read `count` bytes without keeping them."""
    buffer = memoryview(bytearray(min(count, PIECE)))
    remaining = count
    while remaining and (read := _fill(content, buffer[: min(remaining, PIECE)])):
        remaining -= read
    if remaining:
        raise bad(
            path,
            f"is truncated: it ends {remaining} bytes before its voxels",
            "copy or download it again",
        )


def _scaled(values: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    """The values slope * value + intercept, computed in double precision.

    They are float32 for types of up to 32 bits, else float64.
    """
    dtype = np.float64 if values.dtype.itemsize > 4 else np.float32
    return (values.astype(np.float64) * slope + intercept).astype(dtype)


class _PieceStream(io.RawIOBase):
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
    """The content of a zlib stream, at most `PIECE` bytes at a time."""
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
            raise bad(path, "holds voxels that are not numbers")
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
            raise bad(path, "holds voxels that are not numbers of its type") from None
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
            raise bad(path, "holds voxels that are not hexadecimal digits") from None
        digits = digits[even:]
