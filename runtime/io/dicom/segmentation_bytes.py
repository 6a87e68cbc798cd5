"""A binary SEG as bytes: what its frames say of a slice is encoded once, and their pixels go to the
file slice by slice.

A frame is one segment in one slice. highdicom makes an object of each and pydicom encodes it: of
300 slices that show 7 labels, a second and a half of Python's lock. Here they see a sketch of the
mask, one pixel a slice, of which they say what they would of the whole; what a slice says is
repeated for each segment with three numbers set. The bytes are those that they write of the whole
mask, which tests hold them against.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ...core.errors import OutputError
from .encoding import MOST_BYTES, encoded, head

if TYPE_CHECKING:
    from pydicom import Dataset

FRAME_CONTENT, SEGMENT, FRAMES, PIXELS = 0x00209111, 0x0062000A, 0x52009230, 0x7FE00010


def labels_per_slice(labels: NDArray[np.uint8], count: int) -> list[list[int]]:
    """Which of the labels 1 … `count` each slice of (slices, rows, columns) shows.

    Of a mask that shows none: all, for a SEG has frames.
    """
    shown = [
        [n for n in range(1, count + 1) if (plane == n).any()]
        for plane in map(np.ascontiguousarray, labels)
    ]
    return shown if any(shown) else [[*range(1, count + 1)] for _ in shown]


def stand_in(shown: Sequence[Sequence[int]]) -> NDArray[np.uint8]:
    """A mask uint8 (slices, 1, 1) of segment 1 alone, in every slice that shows any: nothing
    that is said of a slice depends on its pixels.
    """
    return np.array([[[bool(numbers)]] for numbers in shown], np.uint8)


def write_binary(
    path: Path, seg: Dataset, labels: NDArray[np.uint8], shown: Sequence[Sequence[int]]
) -> None:
    """Write `seg`, highdicom's object of the `sketch`, as that of `labels` (slices, rows, columns),
    which it is then. Raises `OutputError` past `MOST_BYTES` of pixels, or of what frames say.
    """
    from pydicom import dcmwrite

    slices = [
        k for k, numbers in enumerate(shown) if numbers
    ]  # towards the head; highdicom's frames need not be
    items = sorted(
        seg.PerFrameFunctionalGroupsSequence,
        key=lambda item: item.PlanePositionSequence[0].ImagePositionPatient[2],
    )
    common, said, position = dict(encoded(items[0])), {}, {}
    for k, item in zip(slices, items, strict=True):
        position[k] = item.FrameContentSequence[0].DimensionIndexValues[-1]
        for tag in (FRAME_CONTENT, SEGMENT):  # `_item` sets their numbers
            item.pop(tag, None)
        said[k] = {**common, **dict(encoded(item))}
    frames = sorted(
        ((n, k) for k in slices for n in shown[k]), key=lambda frame: (frame[0], position[frame[1]])
    )
    packed = -(
        -len(frames) * labels[0].size // 8
    )  # bits of frames without gaps between (PS3.5 8.1.1)
    size = packed + packed % 2
    group_size = sum((8 + sum(map(len, said[k].values()))) * len(shown[k]) for k in slices)
    if max(size, group_size) > MOST_BYTES:
        raise OutputError(
            f"a binary SEG cannot hold {len(frames)} frames, {size} bytes of pixels",
            expected=f"at most {MOST_BYTES}",
            remedy="choose --segmentation labelmap, or none",
        )
    del seg.PerFrameFunctionalGroupsSequence, seg.PixelData
    seg.NumberOfFrames, seg.Rows, seg.Columns = len(frames), labels.shape[1], labels.shape[2]
    with open(path, "wb") as file:
        dcmwrite(file, seg, enforce_file_format=True)
        file.write(head(FRAMES, b"SQ", group_size))
        for n, k in frames:
            file.write(_item(said[k], n, position[k]))
        file.write(head(PIXELS, b"OB", size))
        _write_pixels(file, labels, shown, frames)
        file.seek(0, 2)
        file.write(b"0" * (packed % 2))  # not the standard's 00H: highdicom's


def _item(said: dict[int, bytes], segment: int, position: int) -> bytes:
    """A frame's functional groups: those of its slice, but for its Dimension Index Values and its
    Referenced Segment Number, which is in the shared groups where there is one segment. Each is the
    last value of its group.
    """
    own = {FRAME_CONTENT: said[FRAME_CONTENT][:-8] + struct.pack("<II", segment, position)}
    if SEGMENT in said:
        own[SEGMENT] = said[SEGMENT][:-2] + struct.pack("<H", segment)
    groups = {**said, **own}
    body = b"".join(groups[tag] for tag in sorted(groups))
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(body)) + body


def _write_pixels(
    file: BinaryIO,
    labels: NDArray[np.uint8],
    shown: Sequence[Iterable[int]],
    frames: list[tuple[int, int]],
) -> None:
    """Each slice is gathered once, whatever the order of the axes, and its frames written where
    they belong.
    """
    start, number = file.tell(), {key: n for n, key in enumerate(frames)}
    shared: dict[int, int] = defaultdict(
        int
    )  # a byte that frames share is written with each of them, by the last of them whole
    room = np.zeros(
        7 + labels[0].size, bool
    )  # a frame behind as many zeros as a byte may hold of the one before
    frame = room[7:].reshape(labels.shape[1:])
    for k, plane in enumerate(map(np.ascontiguousarray, labels)):
        for n in shown[k]:
            place, before = divmod(number[n, k] * plane.size, 8)
            np.equal(plane, n, out=frame)
            bits = np.packbits(room[7 - before :], bitorder="little")
            for end in (0, bits.size - 1):
                shared[place + end] |= int(bits[end])
                bits[end] = shared[place + end]
            file.seek(start + place)
            file.write(bits.data)
