"""The pixels of a DICOM file as a file of their own, which decoders read frame by frame."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

from .element import PIXELS, UNDEFINED, ElementHead

_NAMES = dict(zip(PIXELS, ("OF", "OD", "OW"), strict=True))


class ElementValue(io.BufferedIOBase):
    """The value of an element, read from its file on demand.

    It begins at 0, and no read passes its end.
    """

    def __init__(self, plain: BinaryIO, length: int) -> None:
        """Begin at the file's position.

        Args:
            plain: The file at the value.
            length: Bytes of the value, or `UNDEFINED`, which reaches to the end of the file.
        """
        self._plain, self._start = plain, plain.tell()
        self._length = None if length == UNDEFINED else length
        self._position = 0

    def readable(self) -> bool:
        """Whether it can be read: always."""
        return True

    def seekable(self) -> bool:
        """Whether its position can be set: always."""
        return True

    def tell(self) -> int:
        """The position within the value."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Set the position, as `io.IOBase.seek` does.

        Raises:
            ValueError: The position is relative to the end, which may be undefined.
        """
        if whence == io.SEEK_END:
            raise ValueError("the end of the pixels is not known")
        self._position = max(0, offset + (self._position if whence == io.SEEK_CUR else 0))
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to `size` bytes, fewer at the end of the value; all of them if it is negative."""
        size = -1 if size is None else size
        if self._length is not None:
            remaining = max(0, self._length - self._position)
            size = remaining if size < 0 else min(size, remaining)
        self._plain.seek(self._start + self._position)
        data = self._plain.read(size)
        self._position += len(data)
        return data


def pixel_element(plain: BinaryIO, head: ElementHead) -> Any:
    """Make an element of the pixels that begin at the file's position.

    Args:
        plain: The file behind `head`.
        head: The beginning of the element.

    Returns:
        A `pydicom.DataElement` whose value is an `ElementValue`.
    """
    from pydicom import DataElement

    # An implicit one has no VR; of 16 bits they are words (PS3.5, A.1).
    vr = "OB" if head.vr == b"OB" else _NAMES[head.tag]
    return DataElement(head.tag, vr, ElementValue(plain, head.length))
