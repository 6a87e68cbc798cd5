"""Write a binary SEG: functional groups are encoded once per slice, pixels go slice by slice.

A frame is one segment in one slice. highdicom makes an object for each frame and pydicom encodes
it: for 300 slices with 7 labels that holds Python's global lock for a second and a half. Here both
see a single-pixel stand-in of the mask, one pixel per slice, for which they state the same
functional groups. The encoded groups of a slice are repeated for each segment with three numbers
replaced. The bytes equal those for the full mask, which tests check.
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
    """Find the labels of each slice.

    Args:
        labels: uint8 (slices, rows, columns) in model indices.
        count: the largest label.

    Returns:
        The labels 1 … `count` of each slice; all of them where the mask is empty, because a SEG
        must have frames.
    """
    slice_labels = [
        [n for n in range(1, count + 1) if (plane == n).any()]
        for plane in map(np.ascontiguousarray, labels)
    ]
    return slice_labels if any(slice_labels) else [[*range(1, count + 1)] for _ in slice_labels]


def stand_in(slice_labels: Sequence[Sequence[int]]) -> NDArray[np.uint8]:
    """Make a single-pixel stand-in of a mask, because functional groups do not depend on pixels.

    Args:
        slice_labels: the labels of each slice.

    Returns:
        uint8 (slices, 1, 1) with segment 1 in each slice that has a label.
    """
    return np.array([[[bool(numbers)]] for numbers in slice_labels], np.uint8)


def write_binary(
    path: Path, seg: Dataset, labels: NDArray[np.uint8], slice_labels: Sequence[Sequence[int]]
) -> None:
    """Write highdicom's SEG of the `stand_in` as that of the full mask.

    Args:
        path: the file.
        seg: the SEG of the stand-in, which is changed.
        labels: the full mask, uint8 (slices, rows, columns).
        slice_labels: the labels of each slice.

    Raises:
        OutputError: the pixels or the functional groups take more than `MOST_BYTES`.
    """
    from pydicom import dcmwrite

    # both towards the head, which highdicom's frames need not be
    slices = [k for k, numbers in enumerate(slice_labels) if numbers]
    items = sorted(
        seg.PerFrameFunctionalGroupsSequence,
        key=lambda item: item.PlanePositionSequence[0].ImagePositionPatient[2],
    )
    common, groups, position = dict(encoded(items[0])), {}, {}
    for k, item in zip(slices, items, strict=True):
        position[k] = item.FrameContentSequence[0].DimensionIndexValues[-1]
        for tag in (FRAME_CONTENT, SEGMENT):  # `_item` sets their numbers
            item.pop(tag, None)
        groups[k] = {**common, **dict(encoded(item))}
    frames = sorted(
        ((n, k) for k in slices for n in slice_labels[k]),
        key=lambda frame: (frame[0], position[frame[1]]),
    )
    # frames follow each other without gaps, also within a byte (PS3.5 8.1.1)
    packed = -(-len(frames) * labels[0].size // 8)
    size = packed + packed % 2
    item_size = {k: 8 + sum(map(len, groups[k].values())) for k in slices}
    group_size = sum(item_size[k] * len(slice_labels[k]) for k in slices)
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
            file.write(_item(groups[k], n, position[k]))
        file.write(head(PIXELS, b"OB", size))
        _write_pixels(file, labels, slice_labels, frames)
        file.seek(0, 2)
        file.write(b"0" * (packed % 2))  # the padding of highdicom, not the standard's 00H


def _item(slice_groups: dict[int, bytes], segment: int, position: int) -> bytes:
    """The functional groups of a frame, from those of its slice.

    The Dimension Index Values and the Referenced Segment Number are replaced, each the last value
    of its group. With a single segment the latter is in the shared groups.
    """
    content = slice_groups[FRAME_CONTENT][:-8] + struct.pack("<II", segment, position)
    groups = {**slice_groups, FRAME_CONTENT: content}
    if SEGMENT in slice_groups:
        groups[SEGMENT] = slice_groups[SEGMENT][:-2] + struct.pack("<H", segment)
    body = b"".join(groups[tag] for tag in sorted(groups))
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(body)) + body


def _write_pixels(
    file: BinaryIO,
    labels: NDArray[np.uint8],
    slice_labels: Sequence[Iterable[int]],
    frames: list[tuple[int, int]],
) -> None:
    """Copy each slice once, whatever the order of the axes, and write its frames at their places.

    `frames` are (segment, slice) in the order of the file.
    """
    start, number = file.tell(), {key: n for n, key in enumerate(frames)}
    # the bits so far of each byte that two frames share; the later frame completes the byte
    shared: dict[int, int] = defaultdict(int)
    # a frame behind 7 zeros, the most bits that its first byte may hold of the frame before
    bits = np.zeros(7 + labels[0].size, bool)
    frame = bits[7:].reshape(labels.shape[1:])
    for k, plane in enumerate(map(np.ascontiguousarray, labels)):
        for n in slice_labels[k]:
            offset, bits_before = divmod(number[n, k] * plane.size, 8)
            np.equal(plane, n, out=frame)
            packed = np.packbits(bits[7 - bits_before :], bitorder="little")
            for end in (0, packed.size - 1):
                shared[offset + end] |= int(packed[end])
                packed[end] = shared[offset + end]
            file.seek(start + offset)
            file.write(packed.data)
