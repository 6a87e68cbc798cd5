"""Whether a DICOM file ends before it is whole: pydicom reads what is there, and says nothing of
what is missing.
"""

from __future__ import annotations

import os
import struct
from typing import Any

from ..dicom.inflate import Inflated

_PIXEL_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)  # float, double float, integer
_UNDEFINED = 0xFFFFFFFF  # a length that a delimiter ends (PS3.5, 7.1.3)
_ITEM, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE0DD
_PADDING = 4096  # bytes of zeros that may follow a file's last element
_MAX_FRAGMENTS = 1 << 17  # of compressed pixels that are followed to their end


def last_element_is_cut(ds: Any, plain: Any) -> bool:
    """Whether the file ended within its last element, which pydicom takes as it comes: contours
    would be missing without a word.
    """
    if not len(ds):
        return False
    last = ds.get_item(max(ds.keys()))
    if getattr(last, "is_raw", False):
        return (
            last.length != _UNDEFINED and last.value is not None and len(last.value) < last.length
        )
    if not getattr(last, "is_undefined_length", False) or last.VR != "SQ":
        return False
    plain.seek(max(0, plain.seek(0, 2) - _PADDING))
    delimiter = struct.pack(
        "<HH" if ds.original_encoding[1] else ">HH", _SEQUENCE_END >> 16, _SEQUENCE_END & 0xFFFF
    )
    return not plain.read(_PADDING).rstrip(b"\0").endswith(delimiter)  # whose length is 0


def ends_early(ds: Any, plain: Any, *, pixels: bool) -> bool:
    """Whether a file ends within an element, or before its pixels do.

    `plain`: the file, where pydicom stopped before them.

    Of a deflated file nothing is said: inflating it finds out.
    """
    if isinstance(plain, Inflated):
        return False
    start = plain.tell()
    try:
        size = os.fstat(plain.fileno()).st_size  # a seek to the end would empty the buffer
    except OSError:  # of a zip's member, which lies in memory
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
    place = 4 if implicit else 8
    if len(head) < place + 4:
        return True
    (length,) = struct.unpack(f"{order}L", head[place : place + 4])
    if length != _UNDEFINED:
        return bool(start + place + 4 + length > size)
    place += start + 4
    for _ in range(_MAX_FRAGMENTS):  # one by one, to the delimiter (PS3.5, A.4)
        plain.seek(place)
        head = plain.read(8)
        if len(head) < 8:
            return True
        group, element, length = struct.unpack("<HHL", head)
        if group << 16 | element != _ITEM:
            return group << 16 | element != _SEQUENCE_END
        place += 8 + length
    return False
