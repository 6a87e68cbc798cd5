"""The frames of a SEG, one at a time, in every supported compression.

A file that does not hold what its header states is refused. Single bits are unpacked here: pydicom
3.0 miscounts frames with an odd number of bits, and decodes neither packed RLE nor the deflated and
the uncompressed encapsulated frames of PS3.5 (A.4.11, A.4.13). pydicom decodes the JPEG family.
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
from ..dicom.element import read_head
from ..dicom.header import pydicom
from ..dicom.pixel_size import check_pixel_bytes, codestream_size

RLE = "1.2.840.10008.1.2.5"
# Encapsulated Uncompressed Explicit VR Little Endian.
UNCOMPRESSED = "1.2.840.10008.1.2.1.98"
# Deflated Image Frame Compression.
DEFLATED = "1.2.840.10008.1.2.8.1"
# JPEG baseline and extended, JPEG-LS near-lossless.
_LOSSY = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.81")
# Packages with a decoder that pydicom uses. Licences: Pillow MIT-CMU, pyjpegls and
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


def check_frames(ds: Any, count: int, have: int, name: str) -> None:
    """Check that the pixels of a SEG are complete, unchanged by compression, and can be decoded.

    Args:
        ds: The header of the SEG.
        count: Its number of frames.
        have: Bytes of its pixels, or of their fragments; 0 without any.
        name: What messages call it.

    Raises:
        UnreadableVolume: They are not.
        MissingDecoder: No decoder for its compression is installed.
    """
    syntax, bits = str(ds.file_meta.TransferSyntaxUID), int(ds.BitsAllocated)
    if int(ds.get("SamplesPerPixel") or 1) != 1 or bits not in (1, 8, 16, 32):
        raise UnreadableVolume(
            f"{name} holds pixels of {bits} bits",
            expected="one label or one bit per pixel",
            remedy="export it as a BINARY DICOM SEG",
            file=Path(name),
        )
    if syntax in _LOSSY or (_is_encapsulated(ds) and ds.get("LossyImageCompression") == "01"):
        raise UnreadableVolume(
            f"{name} is compressed with loss",
            expected="labels as they were drawn",
            remedy="export it without loss",
            file=Path(name),
        )
    check_pixel_bytes(ds, have, count, name, compressed=_is_encapsulated(ds))
    if _is_encapsulated(ds) and syntax not in (RLE, UNCOMPRESSED, DEFLATED):
        _check_decoder(syntax, name)


def frames(ds: Any, count: int, name: str) -> Iterator[NDArray[Any]]:
    """Decode the frames of a SEG.

    Args:
        ds: A SEG that `check_frames` has passed, whose pixels are a file
            (`runtime.io.dicom.header.DicomFile.stream_pixels`).
        count: Its number of frames.
        name: What messages call it.

    Yields:
        Each frame (rows, columns); single bits as 0 and 1.

    Raises:
        UnreadableVolume: A frame is missing, damaged or of another size than the header states.
    """
    shape, number = (int(ds.Rows), int(ds.Columns)), 0
    if _is_encapsulated(ds):
        decoded = _encapsulated_frames(ds, count, shape, name)
    else:
        decoded = _native_frames(ds, count, shape)
    for frame in decoded:
        number += 1
        if number > count or frame.shape != shape:
            raise _damaged_frame(name)
        yield frame
    if number < count:
        raise _truncated(name, f"{number} of {count} frames")


def _is_encapsulated(ds: Any) -> bool:
    """Whether the pixels are in fragments (PS3.5, A.4)."""
    syntax = ds.file_meta.TransferSyntaxUID
    return str(syntax) == DEFLATED or bool(syntax.is_encapsulated)


def _native_frames(ds: Any, count: int, shape: tuple[int, int]) -> Iterator[NDArray[Any]]:
    """The frames of pixels that are not compressed."""
    if int(ds.BitsAllocated) != 1:
        yield from pydicom().pixels.iter_pixels(ds, raw=True)
        return
    is_big_endian_words = ds.original_encoding[1] is False and ds["PixelData"].VR == "OW"
    size = shape[0] * shape[1]
    # Frames follow each other without padding (PS3.5, 8.1.1).
    for start in range(0, count * size, size):
        first, stop = start // 8, (start + size + 7) // 8
        if is_big_endian_words:
            first, stop = first - first % 2, stop + stop % 2
        ds.PixelData.seek(first)
        packed = np.frombuffer(ds.PixelData.read(stop - first), np.uint8)
        if is_big_endian_words:
            packed = packed.reshape(-1, 2)[:, ::-1].ravel()
        bits = np.unpackbits(packed, bitorder="little")
        start -= 8 * first
        yield bits[start : start + size].reshape(shape)


def _encapsulated_frames(
    ds: Any, count: int, shape: tuple[int, int], name: str
) -> Iterator[NDArray[Any]]:
    """The frames of pixels in fragments."""
    syntax, bits = str(ds.file_meta.TransferSyntaxUID), int(ds.BitsAllocated)
    size = shape[0] * shape[1]
    if syntax in (RLE, UNCOMPRESSED, DEFLATED):
        sign = "i" if bits > 1 and ds.get("PixelRepresentation") else "u"
        dtype = np.dtype(f"{sign}{max(1, bits // 8)}").newbyteorder("<")
        for data in _fragments(ds, count, name):
            content = _frame_bytes(syntax, data, size, bits, name)
            if bits > 1:
                yield np.frombuffer(content, dtype, size).reshape(shape)
                continue
            frame = np.frombuffer(content, np.uint8)
            # RLE may hold one byte per bit (CP-2301).
            if len(content) == size and size > 8:
                yield _check_bits(frame, name).reshape(shape)
            else:
                yield np.unpackbits(frame, bitorder="little", count=size).reshape(shape)
        return
    for data in _fragments(ds, count, name):
        if codestream_size(data) != shape:
            raise _damaged_frame(name)
    ds.PixelData.seek(0)
    for frame in pydicom().pixels.iter_pixels(ds, raw=True):
        yield _check_bits(frame, name) if bits == 1 else frame


def _fragments(ds: Any, count: int, name: str) -> Iterator[bytes]:
    """The compressed bytes of one frame after the other."""
    from pydicom.encaps import generate_frames

    ds.PixelData.seek(0)
    table = read_head(ds.PixelData, implicit=False, little=True)
    # It has four bytes for each frame; pydicom would make a number of each four that it states.
    if table is None or table.length > 4 * count:
        raise _damaged_frame(name)
    ds.PixelData.seek(0)
    offsets = (ds.get("ExtendedOffsetTable"), ds.get("ExtendedOffsetTableLengths"))
    return generate_frames(
        ds.PixelData, number_of_frames=count, extended_offsets=offsets if all(offsets) else None
    )


def _frame_bytes(syntax: str, data: bytes, size: int, bits: int, name: str) -> bytes:
    """The bytes of a frame, without padding."""
    need = size * bits // 8 if bits > 1 else (size + 7) // 8
    if syntax == RLE:
        return _from_rle(data, size, bits, name)
    if syntax == DEFLATED:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        content = inflater.decompress(data, need + 2)
        if not inflater.eof:
            raise _damaged_frame(name)
    else:
        content = data
    # One more byte may pad the frame to an even length.
    if not need <= len(content) <= need + 1:
        raise _damaged_frame(name)
    return content[:need]


def _from_rle(data: bytes, size: int, bits: int, name: str) -> bytes:
    """Decode RLE Lossless (PS3.5, annex G): one segment per byte of a pixel, the highest first.

    Single bits are packed, or one per byte.
    """
    width = max(1, bits // 8)
    number, *offsets = struct.unpack("<16L", data[:64].ljust(64, b"\0"))
    ends = [*offsets[1:width], len(data)]
    if number != width or any(
        not 64 <= a <= b <= len(data) for a, b in zip(offsets, ends, strict=False)
    ):
        raise _damaged_frame(name)
    planes = [_unpack_rle(data[a:b], size) for a, b in zip(offsets, ends, strict=False)]
    if bits == 1:
        packed_size, segment = (size + 7) // 8, planes[0]
        if len(segment) == size and size > 8:
            return segment
        if packed_size <= len(segment) <= packed_size + 1:
            return segment[:packed_size]
        raise _damaged_frame(name)
    if any(len(plane) < size for plane in planes):
        raise _damaged_frame(name)
    columns = [np.frombuffer(plane, np.uint8, size) for plane in planes[::-1]]
    return np.stack(columns, axis=1).tobytes()


def _unpack_rle(data: bytes, limit: int) -> bytes:
    """The bytes of an RLE segment, at most `limit`."""
    out, place = bytearray(), 0
    while place < len(data) and len(out) < limit:
        head = data[place]
        if head < 128:
            out += data[place + 1 : place + 2 + head]
            place += 2 + head
        elif head > 128:
            out += data[place + 1 : place + 2] * (257 - head)
            place += 2
        else:
            place += 1
    return bytes(out[:limit])


def _check_bits(frame: NDArray[Any], name: str) -> NDArray[Any]:
    """The frame, if it holds only 0 and 1."""
    if frame.max(initial=0) > 1:
        raise UnreadableVolume(
            f"{name} states single bits, and its compressed frames hold {int(frame.max())}",
            expected="only 0 and 1",
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


def _truncated(name: str, what: str) -> UnreadableVolume:
    return UnreadableVolume(
        f"{name} is truncated: it has {what}",
        expected="a complete DICOM SEG",
        remedy="copy or export it again",
        file=Path(name),
    )


def _damaged_frame(name: str) -> UnreadableVolume:
    return UnreadableVolume(
        f"{name} has a compressed frame that is damaged, or not of the size that its header states",
        expected="a complete DICOM SEG",
        remedy="export it again, without compression",
        file=Path(name),
    )
