"""Whether a DICOM file was cut: pydicom reads what remains and raises no error for the rest."""

from __future__ import annotations

import os
import struct
from typing import Any

from ..dicom.inflate import Inflated

# Float, double float and integer pixels.
_PIXEL_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
# Undefined length: a delimiter ends the element (PS3.5, 7.1.3).
_UNDEFINED = 0xFFFFFFFF
_ITEM, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE0DD
# Bytes of zeros that may follow a file's last element.
_PADDING = 4096
# Fragments of compressed pixels that are followed to the end.
_MAX_FRAGMENTS = 1 << 17


def last_element_is_cut(ds: Any, plain: Any) -> bool:
    """Whether the file ends within its last element, which pydicom reads without an error.

    Contours would be missing without a message.

    Args:
        ds: The data set, as pydicom read it.
        plain: The file, inflated where its transfer syntax is deflated.
    """
    if not len(ds):
        return False
    last = ds.get_item(max(ds.keys()))
    if getattr(last, "is_raw", False):
        is_stated = last.length != _UNDEFINED and last.value is not None
        return is_stated and len(last.value) < last.length
    if not getattr(last, "is_undefined_length", False) or last.VR != "SQ":
        return False
    plain.seek(max(0, plain.seek(0, 2) - _PADDING))
    order = "<" if ds.original_encoding[1] else ">"
    delimiter = struct.pack(f"{order}HH", _SEQUENCE_END >> 16, _SEQUENCE_END & 0xFFFF)
    # The delimiter's length is 0, so it is removed with the padding.
    return not plain.read(_PADDING).rstrip(b"\0").endswith(delimiter)


def ends_early(ds: Any, plain: Any, *, pixels: bool) -> bool:
    """Whether a file ends within an element, or before its pixels.

    For a deflated file it is always False: inflating it reports the cut.

    Args:
        ds: The data set before the pixels.
        plain: The file, at the byte where pydicom stopped before the pixels.
        pixels: Whether the file must have pixels.
    """
    if isinstance(plain, Inflated):
        return False
    start = plain.tell()
    try:
        # A seek to the end would empty the buffer.
        size = os.fstat(plain.fileno()).st_size
    except OSError:
        # The member of a zip lies in memory.
        size = plain.seek(0, 2)
        plain.seek(start)
    if start >= size:
        return pixels or start > size
    implicit, little = ds.original_encoding
    order = "<" if little else ">"
    head = plain.read(12)
    if len(head) < 8:
        return True
    group, element = struct.unpack(f"{order}HH", head[:4])
    if group << 16 | element not in _PIXEL_TAGS:
        return False
    offset = 4 if implicit else 8
    if len(head) < offset + 4:
        return True
    (length,) = struct.unpack(f"{order}L", head[offset : offset + 4])
    if length != _UNDEFINED:
        return bool(start + offset + 4 + length > size)
    offset += start + 4
    # Fragments follow each other up to a delimiter (PS3.5, A.4).
    for _ in range(_MAX_FRAGMENTS):
        plain.seek(offset)
        head = plain.read(8)
        if len(head) < 8:
            return True
        group, element, length = struct.unpack("<HHL", head)
        if group << 16 | element != _ITEM:
            return group << 16 | element != _SEQUENCE_END
        offset += 8 + length
    return False
