"""Deflated DICOM files (PS3.5, A.5), inflated as far as they are read and never beyond a bound:
pydicom has none, and a byte may become a thousand.
"""

from __future__ import annotations

import zlib
from typing import Any, BinaryIO

from ...core.errors import UnreadableVolume
from .encoding import PREAMBLE

MAX_HEADER = (
    1 << 26
)  # bytes that all of a file but its pixels may become: a SEG of 40,000 frames needs some 60 MB
MAX_INFLATED = 1 << 30  # with them: what 4096 slices of 512 x 512 labels take
MARGIN = 1 << 20  # bytes that may stand behind the pixels
STEP = 1 << 20  # bytes that are inflated at once
_SYNTAX = (  # (0002,0010): Explicit VR Little Endian
    b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\x00"
)
_SIZE = ["Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated"]


def readable(handle: BinaryIO, *, pixels: bool) -> Any:
    """What pydicom may read in place of `handle`: itself, or a deflated file's `Inflated`, with or
    without room for the `pixels` it states.

    Reading raises `UnreadableVolume` beyond the bound.
    """
    from pydicom import dcmread
    from pydicom.filereader import (
        _read_file_meta_info,
        read_preamble,
    )  # what dcmread itself goes by: nothing passes by another reading
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    read_preamble(handle, False)
    if _read_file_meta_info(handle).get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        handle.seek(0)
        return handle
    found = Inflated(handle)
    if pixels:
        header = dcmread(found, stop_before_pixels=True, specific_tags=[*_SIZE])
        rows, columns, frames, samples, bits = (int(header.get(keyword) or 1) for keyword in _SIZE)
        found.limit = min(
            found.size + max(0, rows * columns * frames * samples * bits // 8) + MARGIN,
            MAX_INFLATED,
        )
        found.seek(0)
    return found


class Inflated:
    """A deflated file as the same file in Explicit VR Little Endian: what pydicom needs of a file.

    `handle`: at its compressed part.

    `limit`: bytes that it may become; `size`: those that it has become so far.
    """

    def __init__(self, handle: BinaryIO):
        self._handle, self._inflater, self._left = handle, zlib.decompressobj(-zlib.MAX_WBITS), b""
        self._held, self._place, self.limit = bytearray(PREAMBLE + _SYNTAX), 0, MAX_HEADER
        start = len(self._held)
        self._inflate(start + 2)
        if (
            self._held[start : start + 2] == b"\x02\x00"
        ):  # it would be read as meta information, whose syntax may be deflated again
            raise ValueError("meta information within the compressed part")

    @property
    def size(self) -> int:
        return len(self._held)

    def read(self, size: int = -1) -> bytes:
        self._inflate(MAX_INFLATED + 1 if size < 0 else self._place + size)
        with memoryview(self._held) as held:
            found = bytes(held[self._place : None if size < 0 else self._place + size])
        self._place += len(found)
        return found

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 2:
            self._inflate(MAX_INFLATED + 1)
        self._place = max(0, offset + (0, self._place, len(self._held))[whence])
        return self._place

    def tell(self) -> int:
        return self._place

    def close(self) -> None:
        self._held = bytearray()

    def _inflate(self, size: int) -> None:
        """Until there are `size` bytes, or all."""
        while len(self._held) < size and not self._inflater.eof:
            given = self._left or self._handle.read(1 << 16)
            found = self._inflater.decompress(
                given, STEP
            )  # of nothing: what it had no room for yet
            if not given and not found and not self._inflater.eof:
                raise zlib.error("the compressed part ends early")
            self._held += found
            self._left = self._inflater.unconsumed_tail
            if len(self._held) > self.limit:
                raise UnreadableVolume(
                    f"a deflated DICOM file becomes more than {self.limit} bytes",
                    expected="what its header states, and no more",
                    remedy="export it without compression, if it can be trusted",
                )
