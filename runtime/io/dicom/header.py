"""Read a DICOM file in parts: its header without the pixels, sequences item by item, and pixels.

A file is refused for what its header states before its pixels are read. Anybody may have made the
file: a sequence is not turned into objects as a whole, since an item of 8 bytes becomes an object
of more than 1,000, and what is not asked for is passed over, however large it is.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ...core.errors import UnreadableVolume, importing
from .. import archive
from . import inflate
from .element import (
    ITEM,
    ITEM_END,
    PIXELS,
    SEQUENCE_END,
    UNDEFINED,
    ElementHead,
    read_head,
)
from .inflate import Inflated
from .pixel_stream import pixel_element

# The elements that describe pixels (PS3.3, C.7.6.3), which decoders need.
PIXEL_DESCRIPTION = (
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "LossyImageCompression",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
)
# Bytes of one element that is not a sequence, such as a table of the frames' offsets.
MAX_ELEMENT = 1 << 24
# Objects that pydicom makes of one item of a sequence: one for each element, and items count
# `ITEM_OBJECTS` times. They take up to 200 MB; a region of 30,000 contours has so many.
MAX_OBJECTS = 1 << 19
ITEM_OBJECTS = 4
# Bytes that cannot become more objects than that: an element has at least 8.
ALWAYS_SMALL = 8 * MAX_OBJECTS // ITEM_OBJECTS
# Sequences of a header that are passed over.
MAX_SEQUENCES = 1 << 14
# Fragments of compressed pixels that are followed to the end.
_MAX_FRAGMENTS = 1 << 17


def pydicom() -> Any:
    """Import pydicom.

    Returns:
        The module.

    Raises:
        MissingComponent: pydicom is not installed.
    """
    with importing("pydicom", "pydicom, which reads DICOM masks", 'pip install "mask2ct[dicom]"'):
        import pydicom
    return pydicom


def read_header(path: Path, tags: Sequence[str]) -> Any:
    """Read elements of a DICOM file, none of them a sequence. Call this in `map_dicom_errors`.

    Args:
        path: A file, or a file in a zip.
        tags: The elements.

    Returns:
        The data set.

    Raises:
        MissingComponent: pydicom is not installed.
        UnreadableVolume: An element is larger than any in a header.
    """
    with opened(path, tags) as file:
        return file.header


@contextmanager
def opened(path: Path, tags: Sequence[str], sequences: Sequence[str] = ()) -> Iterator[DicomFile]:
    """Open a DICOM file and read its header. Call this within `map_dicom_errors`.

    Args:
        path: A file, or a file in a zip.
        tags: The elements to read, none of them a sequence.
        sequences: The sequences that will be read.

    Yields:
        The open file.

    Raises:
        MissingComponent: pydicom is not installed.
        UnreadableVolume: An element is larger than any in a header.
    """
    pydicom()
    with archive.opened(path) as handle, closing(inflate.readable(handle)) as plain:
        yield DicomFile(plain, tags, sequences)


@contextmanager
def pixels_opened(path: Path, source: DicomFile) -> Iterator[None]:
    """Open a file again for its pixels. Call this within `map_dicom_errors`.

    Within the context the pixels of `source.header` are a file (`DicomFile.stream_pixels`).

    Args:
        path: The file that `source` was opened from.
        source: Its header; it may be closed.

    Raises:
        UnreadableVolume: The file ends within its pixels, or is another one than before.
    """
    with archive.opened(path) as handle, closing(inflate.readable(handle)) as plain:
        source.stream_pixels(plain)
        yield


@dataclass(frozen=True)
class _Place:
    """Where the value of a sequence begins, and its size in bytes (`UNDEFINED`: up to its end)."""

    start: int
    length: int


class DicomFile:
    """An open DICOM file.

    Attributes:
        header: The elements that were asked for, as far as the file has them, without sequences.
        has_pixels: Whether the file has pixels.
        pixel_bytes: Bytes of the pixels as their element states it, or of their fragments, as far
            as the file has them; 0 without pixels.
        ends_early: Whether the file ends within an element.
    """

    def __init__(self, plain: Any, tags: Sequence[str], sequences: Sequence[str]):
        """Read the header.

        Args:
            plain: The file at its begin, inflated where its transfer syntax is deflated.
            tags: As for `opened`.
            sequences: As for `opened`.
        """
        from pydicom.filereader import read_dataset, read_partial
        from pydicom.tag import Tag

        self._plain = plain
        self._places: dict[int, _Place] = {}
        wanted: list[Any] = [Tag(tag) for tag in tags]
        in_parts = {int(Tag(name)) for name in sequences}

        def stop(tag: int, vr: str | None, length: int) -> bool:
            if tag in PIXELS or tag in in_parts or length == UNDEFINED:
                return True
            if length > MAX_ELEMENT and tag in wanted:
                raise _too_large(f"an element of {length} bytes in its header", MAX_ELEMENT)
            return False

        self.header = read_partial(plain, stop, specific_tags=wanted)
        for _ in range(MAX_SEQUENCES):
            self._start = plain.tell()
            head = self._head()
            if head is None or head.tag in PIXELS:
                break
            if head.tag in in_parts:
                self._places[head.tag] = _Place(plain.tell(), head.length)
            self._pass_over(head)
            self._add(
                read_dataset(
                    plain,
                    *self._encoding,
                    stop_when=stop,
                    parent_encoding=self._charset,
                    specific_tags=wanted,
                )
            )
        else:
            raise _too_large("too many sequences in its header", MAX_SEQUENCES)
        self._pixels = head
        self.has_pixels, self.pixel_bytes = head is not None, 0
        self.ends_early = self._is_cut(head)

    def _add(self, part: Any) -> None:
        for element in part.values():
            self.header[element.tag] = element

    @property
    def _charset(self) -> Any:
        return self.header.original_character_set

    @property
    def _encoding(self) -> tuple[bool, bool]:
        """Whether elements are implicit, and whether they are little-endian."""
        implicit, little = self.header.original_encoding
        return bool(implicit), little is not False

    def _head(self) -> ElementHead | None:
        """The next element up to its value; None at the end of the file."""
        implicit, little = self._encoding
        return read_head(self._plain, implicit=implicit, little=little)

    def _pass_over(self, head: ElementHead) -> None:
        """Move behind the value of an element; `head` has been read."""
        if head.length != UNDEFINED:
            self._plain.seek(head.length, 1)
            return
        implicit, little = self._encoding
        if head.is_in_fragments:
            while (item := read_head(self._plain, implicit=implicit, little=little)) is not None:
                if item.tag == SEQUENCE_END:
                    return
                self._plain.seek(item.length, 1)
            raise EOFError("fragments without an end")
        while _measure_item(self._plain, implicit, little, None) is not None:
            pass

    def items(self, sequence: str) -> Iterator[Any]:
        """Read the items of a sequence, one at a time.

        Args:
            sequence: One of the `sequences` that the file was opened with.

        Yields:
            Each item as a data set; none where the file lacks the sequence.

        Raises:
            UnreadableVolume: An item holds more elements than `MAX_OBJECTS` allows.
        """
        from pydicom.tag import Tag

        place = self._places.get(int(Tag(sequence)))
        if place is not None:
            self._plain.seek(place.start)
            end = None if place.length == UNDEFINED else place.start + place.length
            yield from _items(self._plain, end, self._encoding, self._charset)

    def read_pixels(self) -> None:
        """Add the pixels to the header.

        Raises:
            UnreadableVolume: The file ends within them.
        """
        from pydicom.filereader import read_dataset

        if self._pixels is None:
            return
        self._require_whole()
        if isinstance(self._plain, Inflated):
            self._plain.allow_pixels(self.header)
        self._plain.seek(self._start)
        part = read_dataset(
            self._plain,
            *self._encoding,
            stop_when=lambda tag, vr, length: tag not in PIXELS,
            parent_encoding=self._charset,
        )
        self._add(part)
        if self._pixels.tag not in part:
            raise _truncated()

    def stream_pixels(self, plain: Any = None) -> None:
        """Add the pixels to the header as a file, of which decoders read a frame at a time.

        Args:
            plain: The same file, open again, inflated where it is deflated; None to read them from
                this one, whose sequences cannot be read afterwards.

        Raises:
            UnreadableVolume: The file ends within them, or is another one than before.
        """
        if self._pixels is None:
            return
        self._require_whole()
        plain = self._plain if plain is None else plain
        if isinstance(plain, Inflated):
            plain.read_pixels_from(self._start, self.header)
        plain.seek(self._start)
        implicit, little = self._encoding
        if read_head(plain, implicit=implicit, little=little) != self._pixels:
            raise UnreadableVolume(
                "a DICOM file has changed while it was read",
                expected="the file as it was found",
                remedy="run it again once the copy has ended",
            )
        self.header[self._pixels.tag] = pixel_element(plain, self._pixels)

    def _require_whole(self) -> None:
        """Raise `UnreadableVolume` where the file ends within its last element."""
        if self.ends_early:
            raise _truncated()

    def _is_cut(self, pixels: ElementHead | None) -> bool:
        """Whether the file ends within its last element, which is `pixels` where it has any.

        For a deflated file it is always False: inflating it reports the cut.
        """
        plain = self._plain
        if pixels is not None and pixels.length != UNDEFINED:
            self.pixel_bytes = pixels.length
        if isinstance(plain, Inflated):
            return False
        try:
            # A seek to the end would empty the buffer.
            size = os.fstat(plain.fileno()).st_size
        except OSError:
            # The member of a zip lies in memory.
            start = plain.tell()
            size = plain.seek(0, 2)
            plain.seek(start)
        if pixels is None or pixels.length != UNDEFINED:
            return bool(plain.tell() + self.pixel_bytes > size)
        # Fragments follow each other up to a delimiter (PS3.5, A.4).
        for _ in range(_MAX_FRAGMENTS):
            item = read_head(plain, implicit=False, little=True)
            if item is None or item.tag != ITEM:
                return item is None or item.tag != SEQUENCE_END
            self.pixel_bytes += item.length
            plain.seek(item.length, 1)
        return False


def items_of(ds: Any, sequence: str) -> Iterator[Any]:
    """Read the items of a sequence within an item, one at a time.

    Args:
        ds: An item that `DicomFile.items` or this function returned.
        sequence: The keyword of a sequence in it.

    Yields:
        Each item as a data set; none where `ds` lacks the sequence.

    Raises:
        UnreadableVolume: An item holds more elements than `MAX_OBJECTS` allows.
    """
    element = ds.get_item(sequence)
    value = getattr(element, "value", None)
    if isinstance(value, bytes):
        encoding = (element.is_implicit_VR, element.is_little_endian)
        yield from _items(io.BytesIO(value), len(value), encoding, ds.original_character_set)
    else:
        yield from value or ()


def text_of(ds: Any, keyword: str) -> str:
    """Read a UID, code or number of an item as its text, without an object for it.

    Args:
        ds: An item that `DicomFile.items` or `items_of` returned.
        keyword: The keyword of an element of ASCII text.

    Returns:
        The text without padding; empty where `ds` lacks the element.
    """
    value = getattr(ds.get_item(keyword), "value", None)
    if isinstance(value, bytes):
        return value.decode("ascii").strip(" \0")
    return "" if value is None else str(value)


def first_item(ds: Any, sequence: str) -> Any:
    """Read the first item of a sequence within an item; None where there is none."""
    return next(items_of(ds, sequence), None)


def _items(
    plain: BinaryIO, end: int | None, encoding: tuple[bool, bool], charset: Any
) -> Iterator[Any]:
    """The items from here up to `end`, or up to the sequence's delimiter."""
    from pydicom.filereader import read_sequence_item

    implicit, little = encoding
    start = plain.tell()
    small = end is not None and end - start <= ALWAYS_SMALL
    while end is None or start < end:
        if not small:
            if _measure_item(plain, implicit, little, MAX_OBJECTS) is None:
                return
            plain.seek(start)
        item = read_sequence_item(plain, implicit, little, charset)
        if item is None:
            return
        start = plain.tell()
        yield item
        # the receiver may have read elsewhere
        plain.seek(start)


def _measure_item(plain: BinaryIO, implicit: bool, little: bool, limit: int | None) -> int | None:
    """Move behind the item of a sequence that begins here.

    Args:
        plain: The file.
        implicit: Whether elements are without their value representation.
        little: Whether they are little-endian.
        limit: The most objects that the item may become; None to pass it over.

    Returns:
        The objects that pydicom makes of it; None if the sequence ends here.

    Raises:
        UnreadableVolume: There are more than `limit`.
        EOFError: The file ends within the item.
    """
    # Where each open item or sequence ends; None: at its delimiter.
    ends: list[int | None] = []
    objects = 0
    while True:
        while ends and ends[-1] is not None and plain.tell() >= ends[-1]:
            ends.pop()
        if objects and not ends:
            return objects
        head = read_head(plain, implicit=implicit, little=little)
        if head is None:
            raise EOFError("a sequence without an end")
        if head.tag in (ITEM_END, SEQUENCE_END):
            if not ends:
                return None
            ends.pop()
            continue
        objects += ITEM_OBJECTS if head.tag == ITEM else 1
        if limit is not None and objects > limit:
            raise _too_large("an item with too many elements", limit)
        is_open = head.length == UNDEFINED
        if is_open and head.tag != ITEM and head.is_in_fragments:
            raise ValueError("fragments within a sequence")
        if is_open or (head.tag == ITEM and limit is not None):
            ends.append(None if is_open else plain.tell() + head.length)
        else:
            plain.seek(head.length, 1)
            if not ends:
                return objects


def _truncated() -> UnreadableVolume:
    return UnreadableVolume(
        "a DICOM file is truncated: it ends within an element",
        expected="complete DICOM files",
        remedy="copy or export it again",
    )


def _too_large(what: str, limit: int) -> UnreadableVolume:
    return UnreadableVolume(
        f"a DICOM file has {what}",
        expected=f"at most {limit}, as in masks and images",
        remedy="export it again, if it can be trusted",
    )
