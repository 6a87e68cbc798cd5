"""The beginning of a DICOM element: tag, value representation and length (PS3.5, 7.1)."""

from __future__ import annotations

import struct
from typing import BinaryIO, NamedTuple

# A delimiter ends the value (PS3.5, 7.5.2).
UNDEFINED = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
# Float, double float and integer pixels.
PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
# Value representations whose length has four bytes.
_LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
_BYTES = (b"OB", b"OW")


class ElementHead(NamedTuple):
    """An element up to its value.

    Attributes:
        tag: Group and element.
        length: Bytes of the value, or `UNDEFINED`.
        vr: Its value representation; empty for an implicit element.
    """

    tag: int
    length: int
    vr: bytes = b""

    @property
    def is_in_fragments(self) -> bool:
        """Whether a value of undefined length consists of fragments, not of items of elements."""
        return self.vr in _BYTES


def read_head(plain: BinaryIO, *, implicit: bool, little: bool) -> ElementHead | None:
    """Read an element up to its value.

    Args:
        plain: The file at an element.
        implicit: Whether the file has no value representations.
        little: Whether it is little-endian.

    Returns:
        The beginning of the element; None at the end of the file, and within a beginning.
    """
    order = "<" if little else ">"
    head = plain.read(8)
    if len(head) < 8:
        return None
    group, element, length = struct.unpack(f"{order}HHL", head)
    tag, vr = group << 16 | element, head[4:6]
    # as in pydicom, an element without letters is an implicit one
    if implicit or group == 0xFFFE or not (vr.isalpha() and vr.isupper()):
        return ElementHead(tag, length)
    if vr in _LONG:
        long = plain.read(4)
        if len(long) < 4:
            return None
        (length,) = struct.unpack(f"{order}L", long)
    else:
        (length,) = struct.unpack(f"{order}H", head[6:])
    return ElementHead(tag, length, vr)
