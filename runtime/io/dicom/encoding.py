"""Encode the slices of a series, whose shared elements are encoded once.

pydicom takes milliseconds per header, and holds Python's global lock meanwhile. Explicit VR Little
Endian (PS3.5 7.1) encodes each element by itself, in the order of the tags, so that encoded shared
elements can be merged with those of a slice. The bytes equal those of `pydicom.dcmwrite`, which
tests check.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pydicom import Dataset

GROUP_LENGTH, MEDIA_STORAGE_INSTANCE = 0x00020000, 0x00020003
MOST_BYTES = (1 << 32) - 2  # the largest even length of an element
PREAMBLE = bytes(128) + b"DICM"  # PS3.10 7.1


class SliceWriter:
    """Writes slices that share all but a few elements and their pixels."""

    def __init__(self, common: Dataset):
        """Encode the shared elements.

        Args:
            common: the shared elements, with file meta information.
        """
        from pydicom.dataset import validate_file_meta
        from pydicom.uid import UID

        # a placeholder for the check: `write` sets that of the slice
        common.file_meta.MediaStorageSOPInstanceUID = UID("2.25.0")
        validate_file_meta(common.file_meta, enforce_standard=True)
        self._common, self._meta = dict(encoded(common)), dict(encoded(common.file_meta))

    def write(self, path: Path, specific: Dataset, plane: NDArray[Any]) -> None:
        """Write one slice.

        Args:
            path: the file.
            specific: the elements of this slice, among them the SOP Instance UID.
            plane: the pixels, int16 (H, W).
        """
        from pydicom.dataset import FileMetaDataset

        meta = FileMetaDataset()
        meta.MediaStorageSOPInstanceUID = specific.SOPInstanceUID
        parts = {**self._meta, **dict(encoded(meta)), GROUP_LENGTH: b""}
        group = b"".join(parts[tag] for tag in sorted(parts))
        elements = {**self._common, **dict(encoded(specific))}
        with open(path, "wb") as file:
            file.write(PREAMBLE + struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(group)) + group)
            file.write(b"".join(elements[tag] for tag in sorted(elements)))
            # Pixel Data (7FE0,0010) has the highest tag
            file.write(head(0x7FE00010, b"OW", plane.size * 2))
            file.write(np.ascontiguousarray(plane, "<i2").data.cast("B"))


def head(tag: int, vr: bytes, length: int) -> bytes:
    """Encode the header of an OB, OW or SQ element (PS3.5 7.1.2).

    Args:
        tag: the tag.
        vr: the VR, two bytes.
        length: the length of the value in bytes.

    Returns:
        12 bytes, which stand before the value.
    """
    return struct.pack("<HH2s2xI", tag >> 16, tag & 0xFFFF, vr, length)


def encoded(ds: Dataset) -> Iterator[tuple[int, bytes]]:
    """Yield the tag and the bytes of each element in Explicit VR Little Endian."""
    from pydicom import Dataset
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_dataset

    for element in ds:
        buffer, single = DicomBytesIO(), Dataset()
        buffer.is_little_endian, buffer.is_implicit_VR = True, False
        single.add(element)
        write_dataset(buffer, single, "ISO_IR 192")
        yield int(element.tag), buffer.getvalue()
