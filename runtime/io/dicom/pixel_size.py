"""Whether the pixels of a DICOM file have the size that its header states, before they are read.

A few bytes may claim any size, and a small image may be followed by any number of bytes.
"""

from __future__ import annotations

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
