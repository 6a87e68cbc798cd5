"""Whether the pixels of a DICOM file have the size that its header states, before they are read.

A few bytes may claim any size, and a small image may be followed by any number of bytes.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from ...core.errors import UnreadableVolume

# A compressed frame is at most so many times as large as without compression, and so many bytes
# larger: headers of a frame and its tiles.
COMPRESSED = 2
FRAME_HEADERS = 1 << 12
# Bytes that may follow the pixels: some exporters pad them to a block.
PADDING = 1 << 12


def check_pixel_bytes(ds: Any, have: int, frames: int, name: str, *, compressed: bool) -> None:
    """Refuse pixels that are not of the size that the header states.

    Args:
        ds: the header.
        have: bytes of the pixels, or of their fragments.
        frames: the number of frames.
        name: the pseudonym of the source, for the message.
        compressed: whether the pixels are in fragments.

    Raises:
        UnreadableVolume: There are fewer or more bytes than the frames can have.
    """
    values = int(ds.Rows) * int(ds.Columns) * int(ds.get("SamplesPerPixel") or 1)
    bits = int(ds.BitsAllocated)
    need = (values * frames * bits + 7) // 8
    if not have or (not compressed and have < need):
        raise UnreadableVolume(
            f"{name} is truncated: it has {have} of {need} bytes of pixels",
            expected="complete DICOM files",
            remedy="copy or export it again",
            file=Path(name),
        )
    limit = need + PADDING
    if compressed:
        # a bit may be stored as a byte (CP-2301)
        limit = frames * (COMPRESSED * values * ((bits + 7) // 8) + FRAME_HEADERS)
    if have > limit:
        raise UnreadableVolume(
            f"{name} has {have} bytes of pixels, more than its frames can have",
            expected=f"at most {limit}",
            remedy="export it again",
            file=Path(name),
        )


def codestream_size(data: bytes) -> tuple[int, int] | None:
    """Rows and columns that a frame of JPEG, JPEG-LS or JPEG 2000 states itself.

    A decoder makes an image of that size, whatever the header states.

    Args:
        data: the compressed frame.

    Returns:
        The size; None where it states none.
    """
    # The SIZ marker of JPEG 2000 (ISO/IEC 15444-1, A.5.1).
    start = data.find(b"\xff\x4f\xff\x51")
    if start >= 0 and len(data) >= start + 24:
        x_end, y_end, x_start, y_start = struct.unpack(">4L", data[start + 8 : start + 24])
        return y_end - y_start, x_end - x_start
    # The frame header of JPEG and JPEG-LS (ISO/IEC 10918-1, B.2.2).
    place = data.find(b"\xff\xd8") + 2
    while 2 <= place <= len(data) - 9:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in (0xC0, 0xC1, 0xC2, 0xC3, 0xF7):
            rows, columns = struct.unpack_from(">HH", data, place + 5)
            return rows, columns
        place += 2 + length
    return None
