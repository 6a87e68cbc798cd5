"""Read deflated DICOM files (PS3.5 A.5) within a bound on the inflated size.

A file is inflated only as far as it is read. pydicom has no bound, and one byte may inflate to a
thousand.
"""

from __future__ import annotations

import zlib
from typing import Any, BinaryIO

from ...core.errors import UnreadableVolume
from .element import read_head
from .encoding import PREAMBLE

# All in bytes. A file without its pixels: a SEG of 40,000 frames needs some 60 MB.
MAX_HEADER = 1 << 26
MAX_META = 1 << 16  # meta information before the data set
MAX_INFLATED = 1 << 30  # with its pixels: 4096 slices of 512 x 512 labels
MARGIN = 1 << 20  # behind the pixels
STEP = 1 << 20  # inflated at once
_SYNTAX = (  # (0002,0010): Explicit VR Little Endian
    b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\x00"
)
_SIZE = ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated")


def readable(handle: BinaryIO) -> Any:
    """Prepare a file for pydicom.

    Args:
        handle: a DICOM file at its begin.

    Returns:
        `handle` itself, or an `Inflated` for a deflated file. Reading it beyond the bound raises
        `UnreadableVolume`.

    Raises:
        UnreadableVolume: The meta information is larger than any.
    """
    # the functions of dcmread itself, so that both see the same transfer syntax
    from pydicom.filereader import _read_file_meta_info, read_preamble
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    skip_meta(handle)
    handle.seek(0)
    read_preamble(handle, False)
    if _read_file_meta_info(handle).get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        handle.seek(0)
        return handle
    return Inflated(handle)


def skip_meta(handle: BinaryIO) -> None:
    """Move to the data set of a DICOM file: behind the preamble and the meta information.

    Args:
        handle: a DICOM file.

    Raises:
        UnreadableVolume: The meta information is larger than any; pydicom would keep it all.
    """
    start = len(PREAMBLE)
    handle.seek(start)
    while head := read_head(handle, implicit=False, little=True):
        if head.tag >> 16 == 0:  # a command, which has no value representation (PS3.7, 6.3.1)
            handle.seek(start)
            head = read_head(handle, implicit=True, little=True) or head
        elif head.tag >> 16 != 2:
            break
        start = handle.tell() + head.length
        if start > MAX_META:
            raise UnreadableVolume(
                f"a DICOM file has more than {MAX_META} bytes of meta information",
                expected="the meta information of PS3.10",
                remedy="export it again, if it can be trusted",
            )
        handle.seek(start)
    handle.seek(start)


class Inflated:
    """A deflated file as a file object in Explicit VR Little Endian, as far as pydicom needs one.

    Attributes:
        limit: the largest inflated size in bytes.
    """

    def __init__(self, handle: BinaryIO):
        """Begin to inflate a file.

        Args:
            handle: the file at its compressed part.

        Raises:
            ValueError: meta information stands within the compressed part. pydicom would read it,
                and it may state a deflated syntax again.
        """
        self._handle, self._inflater = handle, zlib.decompressobj(-zlib.MAX_WBITS)
        self._compressed_tail = b""
        self._inflated, self._position = bytearray(PREAMBLE + _SYNTAX), 0
        self._released, self._releases = 0, False  # bytes at the front
        self.limit = MAX_HEADER
        start = len(self._inflated)
        self._inflate(start + 2)
        if self._inflated[start : start + 2] == b"\x02\x00":
            raise ValueError("meta information within the compressed part")

    @property
    def size(self) -> int:
        """The inflated size so far, in bytes."""
        return self._released + len(self._inflated)

    def allow_pixels(self, header: Any) -> None:
        """Raise the limit by the size of the pixels that a header states."""
        rows, columns, frames, samples, bits = (int(header.get(name) or 1) for name in _SIZE)
        pixel_bytes = max(0, rows * columns * frames * samples * bits // 8)
        self.limit = min(self.size + pixel_bytes + MARGIN, MAX_INFLATED)

    def read_pixels_from(self, start: int, header: Any) -> None:
        """Move to the pixels, and from now on forget what lies before the place of each read.

        Args:
            start: where the pixels begin in the inflated file.
            header: the header, which states their size.
        """
        self.seek(start)
        self._inflate(start)
        self.allow_pixels(header)
        self._releases = True

    def read(self, size: int = -1) -> bytes:
        """Read `size` bytes, or all for a negative size.

        Raises:
            ValueError: The bytes have been released.
        """
        if self._position < self._released:
            raise ValueError("a part of a deflated file that has been released")
        if self._releases:
            self._inflate(self._position)
            passed = min(self._position - self._released, len(self._inflated))
            del self._inflated[:passed]
            self._released += passed
        self._inflate(MAX_INFLATED + 1 if size < 0 else self._position + size)
        start = self._position - self._released
        with memoryview(self._inflated) as inflated:
            data = bytes(inflated[start : None if size < 0 else start + size])
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a position, as `io.IOBase.seek` does; the end needs the file inflated."""
        if whence == 2:
            self._inflate(MAX_INFLATED + 1)
        self._position = max(0, offset + (0, self._position, self.size)[whence])
        return self._position

    def tell(self) -> int:
        """Return the position in the inflated file."""
        return self._position

    def close(self) -> None:
        """Release the inflated bytes; the handle stays open."""
        self._inflated = bytearray()

    def _inflate(self, size: int) -> None:
        """Inflate until there are `size` bytes, or all of them."""
        while self.size < size and not self._inflater.eof:
            compressed = self._compressed_tail or self._handle.read(1 << 16)
            # without input zlib returns the output that exceeded STEP before
            data = self._inflater.decompress(compressed, STEP)
            if not compressed and not data and not self._inflater.eof:
                raise zlib.error("the compressed part ends early")
            self._inflated += data
            self._compressed_tail = self._inflater.unconsumed_tail
            if self.size > self.limit:
                raise UnreadableVolume(
                    f"a deflated DICOM file inflates to more than {self.limit} bytes",
                    expected="at most the size that its header states",
                    remedy="export it without compression, if it can be trusted",
                )
