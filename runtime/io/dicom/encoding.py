"""The slices of a series as bytes: what they share is encoded once. pydicom takes milliseconds, and
Python's lock, for every header.

Explicit VR Little Endian (PS3.5 7.1) encodes each element by itself and puts them in the order of
their tags, so that elements encoded before lie beside those of a single slice. The bytes are those
of `pydicom.dcmwrite`, which tests hold them against.
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
MOST_BYTES = (1 << 32) - 2  # that the length of an element can say
PREAMBLE = bytes(128) + b"DICM"  # PS3.10 7.1


class SliceWriter:
    """Writes slices that differ from `common`, with its file meta information, in a few elements
    and their pixels.
    """

    def __init__(self, common: Dataset):
        from pydicom.dataset import validate_file_meta
        from pydicom.uid import UID

        common.file_meta.MediaStorageSOPInstanceUID = UID("2.25.0")  # each slice has its own
        validate_file_meta(common.file_meta, enforce_standard=True)
        self._common, self._meta = dict(encoded(common)), dict(encoded(common.file_meta))

    def write(self, path: Path, own: Dataset, plane: NDArray[Any]) -> None:
        """One slice: `own` holds its SOP Instance UID and whatever else is not in `common`,
        `plane` int16 (H, W).
        """
        from pydicom.dataset import FileMetaDataset

        meta = FileMetaDataset()
        meta.MediaStorageSOPInstanceUID = own.SOPInstanceUID
        parts = {**self._meta, **dict(encoded(meta)), GROUP_LENGTH: b""}
        group = b"".join(parts[tag] for tag in sorted(parts))
        elements = {**self._common, **dict(encoded(own))}
        with open(path, "wb") as file:
            file.write(PREAMBLE + struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(group)) + group)
            file.write(
                b"".join(elements[tag] for tag in sorted(elements))
            )  # Pixel Data (7FE0,0010) has the highest tag
            file.write(head(0x7FE00010, b"OW", plane.size * 2))
            file.write(np.ascontiguousarray(plane, "<i2").data.cast("B"))


def head(tag: int, vr: bytes, length: int) -> bytes:
    """What stands before the value of an OB, OW or SQ element (PS3.5 7.1.2)."""
    return struct.pack("<HH2s2xI", tag >> 16, tag & 0xFFFF, vr, length)


def encoded(ds: Dataset) -> Iterator[tuple[int, bytes]]:
    """Each element's tag and bytes."""
    from pydicom import Dataset
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_dataset

    for element in ds:
        buffer, one = DicomBytesIO(), Dataset()
        buffer.is_little_endian, buffer.is_implicit_VR = True, False
        one.add(element)
        write_dataset(buffer, one, "ISO_IR 192")
        yield int(element.tag), buffer.getvalue()
