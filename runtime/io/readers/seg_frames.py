"""The frames of a SEG one at a time, whatever they are compressed as; a claim that the file does
not keep is refused.

Single bits are unpacked here: pydicom 3.0 counts frames of an odd number of bits wrongly, and
decodes neither packed RLE nor the deflated and the uncompressed encapsulated frames of PS3.5
(A.4.11, A.4.13). JPEG and its kin are pydicom's.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import MissingDecoder, UnreadableVolume
from ..dicom.files import pydicom

RLE = "1.2.840.10008.1.2.5"
UNCOMPRESSED = "1.2.840.10008.1.2.1.98"  # Encapsulated Uncompressed Explicit VR Little Endian
DEFLATED = "1.2.840.10008.1.2.8.1"  # Deflated Image Frame Compression
_LOSSY = (
    "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.51",
    "1.2.840.10008.1.2.4.81",
)  # JPEG baseline, extended; JPEG-LS near-lossless
# Packages with a decoder that pydicom takes. Licences: Pillow MIT-CMU, pyjpegls and
# pylibjpeg-openjpeg MIT, GDCM BSD-3.
_PACKAGES = {
    "1.2.840.10008.1.2.4.57": "python-gdcm",
    "1.2.840.10008.1.2.4.70": "python-gdcm",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pillow",
    "1.2.840.10008.1.2.4.91": "pillow",
    "1.2.840.10008.1.2.4.201": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.202": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg pylibjpeg-openjpeg",
}


def check_frames(ds: Any, count: int, name: str) -> None:
    """Raise for pixels that are not all there, were changed by compression, or that nothing here
    decodes.

    Args:
        ds: The SEG.
        count: Its frames.
        name: What messages call it.
    """
    syntax, bits = str(ds.file_meta.TransferSyntaxUID), int(ds.BitsAllocated)
    if int(ds.get("SamplesPerPixel") or 1) != 1 or bits not in (1, 8, 16, 32):
        raise UnreadableVolume(
            f"{name} holds pixels of {bits} bits",
            expected="one label or one bit per pixel",
            remedy="export it as a BINARY DICOM SEG",
            file=Path(name),
        )
    if syntax in _LOSSY or (_encapsulated(ds) and ds.get("LossyImageCompression") == "01"):
        raise UnreadableVolume(
            f"{name} is compressed with loss",
            expected="labels as they were drawn",
            remedy="export it without loss",
            file=Path(name),
        )
    have, need = (
        len(ds.get("PixelData") or b""),
        (count * int(ds.Rows) * int(ds.Columns) * bits + 7) // 8,
    )
    if have == 0 or (not _encapsulated(ds) and have < need):
        raise _truncated(name, f"{have} of {need} bytes of pixels")
    if _encapsulated(ds) and syntax not in (RLE, UNCOMPRESSED, DEFLATED):
        _check_decoder(syntax, name)


def frames(ds: Any, count: int, name: str) -> Iterator[NDArray[Any]]:
    """One frame (rows, columns) after the other, of single bits as 0 and 1.

    Args:
        ds: A SEG that `check_frames` passed.
        count: Its frames.
        name: What messages call it.

    Raises:
        UnreadableVolume: Where a frame is missing or is not of the size that the header states.
    """
    shape, number = (int(ds.Rows), int(ds.Columns)), 0
    for frame in (
        _encapsulated_frames(ds, count, shape, name)
        if _encapsulated(ds)
        else _native_frames(ds, count, shape)
    ):
        number += 1
        if number > count or frame.shape != shape:
            raise _wrong(name)
        yield frame
    if number < count:
        raise _truncated(name, f"{number} of {count} frames")


def _encapsulated(ds: Any) -> bool:
    """Whether the pixels are in fragments (PS3.5, A.4)."""
    syntax = ds.file_meta.TransferSyntaxUID
    return str(syntax) == DEFLATED or bool(syntax.is_encapsulated)


def _native_frames(ds: Any, count: int, shape: tuple[int, int]) -> Iterator[NDArray[Any]]:
    if int(ds.BitsAllocated) != 1:
        yield from pydicom().pixels.iter_pixels(ds, raw=True)
        return
    packed = np.frombuffer(ds.PixelData, np.uint8)
    if ds.original_encoding[1] is False and ds["PixelData"].VR == "OW":  # big endian words
        packed = packed[: len(packed) // 2 * 2].reshape(-1, 2)[:, ::-1].ravel()
    size = shape[0] * shape[1]
    for start in range(
        0, count * size, size
    ):  # they follow each other without padding (PS3.5, 8.1.1)
        bits = np.unpackbits(packed[start // 8 : (start + size + 7) // 8], bitorder="little")
        yield bits[start % 8 : start % 8 + size].reshape(shape)


def _encapsulated_frames(
    ds: Any, count: int, shape: tuple[int, int], name: str
) -> Iterator[NDArray[Any]]:
    syntax, bits, size = (
        str(ds.file_meta.TransferSyntaxUID),
        int(ds.BitsAllocated),
        shape[0] * shape[1],
    )
    if syntax in (RLE, UNCOMPRESSED, DEFLATED):
        dtype = np.dtype(
            f"{'i' if bits > 1 and ds.get('PixelRepresentation') else 'u'}{max(1, bits // 8)}"
        ).newbyteorder("<")
        for data in _fragments(ds, count):
            content = _plain(syntax, data, size, bits, name)
            if bits > 1:
                yield np.frombuffer(content, dtype, size).reshape(shape)
            elif len(content) == size and size > 8:  # RLE may hold a byte for each bit (CP-2301)
                yield _bits(np.frombuffer(content, np.uint8), name).reshape(shape)
            else:
                yield np.unpackbits(
                    np.frombuffer(content, np.uint8), bitorder="little", count=size
                ).reshape(shape)
        return
    for data in _fragments(ds, count):
        _check_size(data, shape, name)
    for frame in pydicom().pixels.iter_pixels(ds, raw=True):
        yield _bits(frame, name) if bits == 1 else frame


def _fragments(ds: Any, count: int) -> Iterator[bytes]:
    """The compressed bytes of one frame after the other."""
    from pydicom.encaps import generate_frames

    offsets = (ds.get("ExtendedOffsetTable"), ds.get("ExtendedOffsetTableLengths"))
    return generate_frames(
        ds.PixelData, number_of_frames=count, extended_offsets=offsets if all(offsets) else None
    )


def _plain(syntax: str, data: bytes, size: int, bits: int, name: str) -> bytes:
    """A frame's own bytes, no more of them than its pixels take."""
    need = size * bits // 8 if bits > 1 else (size + 7) // 8
    if syntax == RLE:
        return _from_rle(data, size, bits, name)
    if syntax == DEFLATED:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        content = inflater.decompress(data, need + 2)
        if not inflater.eof:
            raise _wrong(name)
    else:
        content = data
    if not need <= len(content) <= need + 1:  # a byte more makes it even
        raise _wrong(name)
    return content[:need]


def _from_rle(data: bytes, size: int, bits: int, name: str) -> bytes:
    """RLE Lossless (PS3.5, annex G): a segment for each byte of a pixel, the highest first.

    Single bits come packed, or one a byte.
    """
    width = max(1, bits // 8)
    number, *offsets = struct.unpack("<16L", data[:64].ljust(64, b"\0"))
    ends = [*offsets[1:width], len(data)]
    if number != width or any(
        not 64 <= a <= b <= len(data) for a, b in zip(offsets, ends, strict=False)
    ):
        raise _wrong(name)
    planes = [_unpacked(data[a:b], size) for a, b in zip(offsets, ends, strict=False)]
    if bits == 1:
        packed, whole = (size + 7) // 8, planes[0]
        if len(whole) == size and size > 8:
            return whole
        if packed <= len(whole) <= packed + 1:
            return whole[:packed]
        raise _wrong(name)
    if any(len(plane) < size for plane in planes):
        raise _wrong(name)
    return np.stack(
        [np.frombuffer(plane, np.uint8, size) for plane in planes[::-1]], axis=1
    ).tobytes()


def _unpacked(data: bytes, most: int) -> bytes:
    """A segment's bytes, at most that many."""
    out, place = bytearray(), 0
    while place < len(data) and len(out) < most:
        head = data[place]
        if head < 128:
            out += data[place + 1 : place + 2 + head]
            place += 2 + head
        elif head > 128:
            out += data[place + 1 : place + 2] * (257 - head)
            place += 2
        else:
            place += 1
    return bytes(out[:most])


def _bits(frame: NDArray[Any], name: str) -> NDArray[Any]:
    if frame.max(initial=0) > 1:
        raise UnreadableVolume(
            f"{name} states single bits, and its compressed frames hold {int(frame.max())}",
            expected="0 and 1 alone",
            remedy="export it again, without compression",
            file=Path(name),
        )
    return frame


def _check_decoder(syntax: str, name: str) -> None:
    from pydicom.pixels.decoders.base import get_decoder

    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as exc:
        raise UnreadableVolume(
            f"{name} is compressed in a way that is not read",
            expected="a DICOM SEG without compression",
            remedy="export it without compression",
            file=Path(name),
        ) from exc
    if not decoder.is_available:
        package = _PACKAGES.get(syntax, "pylibjpeg")
        raise MissingDecoder(
            f"{name} is compressed as {decoder.UID.name}, for which no decoder is installed",
            expected=f"the package {package}",
            remedy=f"pip install {package}, or export it without compression",
            file=Path(name),
        )


def _check_size(data: bytes, shape: tuple[int, int], name: str) -> None:
    """Raise where the codestream states another size than the header: it would be decoded as it
    says, however large.
    """
    if (start := data.find(b"\xff\x4f\xff\x51")) >= 0 and len(
        data
    ) >= start + 24:  # JPEG 2000: SIZ (ISO/IEC 15444-1, A.5.1)
        right, bottom, left, top = struct.unpack(">4L", data[start + 8 : start + 24])
        size = (bottom - top, right - left)
    else:
        size = _jpeg_size(data) or (0, 0)
    if size != shape:
        raise _wrong(name)


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Rows and columns of a JPEG or JPEG-LS codestream, by its frame header (ISO/IEC 10918-1,
    B.2.2).
    """
    place = data.find(b"\xff\xd8") + 2
    while 2 <= place <= len(data) - 9:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in (0xC0, 0xC1, 0xC2, 0xC3, 0xF7):
            return int.from_bytes(data[place + 5 : place + 7], "big"), int.from_bytes(
                data[place + 7 : place + 9], "big"
            )
        place += 2 + length
    return None


def _truncated(name: str, what: str) -> UnreadableVolume:
    return UnreadableVolume(
        f"{name} is truncated: {what} are there",
        expected="a complete DICOM SEG",
        remedy="copy or export it again",
        file=Path(name),
    )


def _wrong(name: str) -> UnreadableVolume:
    return UnreadableVolume(
        f"{name} has a compressed frame that is damaged, or not of the size that its header states",
        expected="a complete DICOM SEG",
        remedy="export it again, without compression",
        file=Path(name),
    )
