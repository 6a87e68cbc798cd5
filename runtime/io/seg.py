"""DICOM Segmentation objects (PS3.3, A.51): BINARY, LABELMAP, and FRACTIONAL by a threshold; one frame in memory at a time.

The frames' own positions say where they lie. A place without a frame holds no segment (PS3.3, C.8.20.2: empty frames may be left out).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codes import concept, modified
from ..errors import GeometryError, InputError, UnreadableVolume
from ..volume import Layers, Segment
from .dicom_files import ORIENTATION_TOLERANCE, dataset, guarded, numbers, pydicom, source, stack

MAX_FRAMES = 1 << 20
MAX_PIXELS = 1 << 26  # of one frame
MAX_VOXELS = 1 << 32


def read_seg(path: Path, name: str, *, threshold: float | None = None) -> Layers:
    """Read a SEG as `Layers`; messages call it `name`.

    `threshold`: the fraction (0 to 1) from which on a voxel of a FRACTIONAL one belongs to its segment. Raises `InputError`s.
    """
    with guarded(name):
        ds = dataset(path)
        return _read(ds, name, threshold)


def _read(ds: Any, name: str, threshold: float | None) -> Layers:
    file, kind = Path(name), str(ds.get("SegmentationType", ""))
    if kind not in ("BINARY", "LABELMAP", "FRACTIONAL"):
        raise UnreadableVolume(f"{name} is a segmentation of the type {kind!r}", expected="BINARY, FRACTIONAL or LABELMAP",
                               remedy="export it as a BINARY DICOM SEG", file=file)  # fmt: skip
    if kind == "FRACTIONAL" and threshold is None:
        raise InputError(f"{name} holds fractions, not labels", expected="a BINARY or LABELMAP segmentation, or the fraction that counts as inside",
                         remedy="give --threshold 0.5", file=file)  # fmt: skip
    rows, columns, frames = int(ds.Rows), int(ds.Columns), int(ds.get("NumberOfFrames") or 1)
    groups = ds.get("PerFrameFunctionalGroupsSequence") or []
    if frames != len(groups) or not 0 < frames <= MAX_FRAMES:
        raise UnreadableVolume(f"{name} claims {frames} frames and describes {len(groups)}", expected="a complete DICOM SEG",
                               remedy="export it again", file=file)  # fmt: skip
    if not 0 < rows * columns <= MAX_PIXELS:
        raise UnreadableVolume(
            f"{name} claims frames of {columns} x {rows} pixels", expected="a volume", remedy="export it again", file=file
        )
    _check_pixels(ds, rows * columns * frames, name)
    shared = (ds.get("SharedFunctionalGroupsSequence") or [pydicom().Dataset()])[0]
    positions = np.array([numbers(_group(g, shared, "PlanePositionSequence", name).get("ImagePositionPatient"), 3, name, "ImagePositionPatient")
                          for g in groups])  # fmt: skip
    orientation, spacing, step, thickness = _plane(groups, shared, name)
    notes: list[str] = []
    geometry, slices, depth = stack(positions, orientation, spacing, name, step=step, thickness=thickness, gaps=True, notes=notes)
    if depth == 1 and step is None and thickness is None:
        raise GeometryError(f"{name} has one slice and states no thickness", expected="SliceThickness; geometry is never guessed",
                            remedy="export it with its geometry", file=file)  # fmt: skip
    if depth * rows * columns > MAX_VOXELS:
        raise UnreadableVolume(
            f"{name} claims {depth} slices of {columns} x {rows} pixels", expected="a volume", remedy="export it again", file=file
        )
    segments = tuple(_segments(ds, kind))
    of_frame = (
        []
        if kind == "LABELMAP"
        else [int(_group(g, shared, "SegmentIdentificationSequence", name).ReferencedSegmentNumber) for g in groups]
    )
    known = {segment.number for segment in segments}
    if stray := set(of_frame) - known:
        raise UnreadableVolume(f"{name} has frames of the segments {sorted(stray)[:8]}, which it does not describe", expected="a complete DICOM SEG",
                               remedy="export it again", file=file)  # fmt: skip
    if len(set(zip(of_frame, slices.tolist(), strict=False))) < len(of_frame) or (
        kind == "LABELMAP" and len(set(slices.tolist())) < frames
    ):
        raise GeometryError(f"{name} has two frames of one segment in one place", expected="each place once (a volume, not a tiled slide)",
                            remedy="export it again", file=file)  # fmt: skip
    least = 1 if threshold is None else max(1, int(np.ceil(threshold * int(ds.get("MaximumFractionalValue") or 255))))
    background = int(ds.get("PixelPaddingValue", 0) or 0)

    def pieces() -> Iterator[tuple[int, int, NDArray[np.bool_]]]:
        with guarded(name):
            for n, frame in enumerate(_frames(ds, frames, rows, columns)):
                k = int(slices[n])
                if kind != "LABELMAP":
                    yield of_frame[n], k, frame >= least
                    continue
                for value in np.unique(frame).tolist():
                    if value in known:
                        yield value, k, frame == value
                    elif value not in (0, background):
                        raise UnreadableVolume(f"{name} holds the segment {value}, which it does not describe",
                                               expected="a complete DICOM SEG", remedy="export it again", file=file)  # fmt: skip

    used = known if kind == "LABELMAP" else set(of_frame)
    uids = (str(ds.get("SOPInstanceUID", "")),)
    shown = tuple(s for s in segments if s.number in used)
    return Layers(shown, (depth, rows, columns), geometry, pieces, source(ds, uids), tuple(notes))


def _frames(ds: Any, frames: int, rows: int, columns: int) -> Iterator[NDArray[Any]]:
    """One frame (rows, columns) after the other. Single bits are unpacked here: frames follow each other without padding (PS3.5, 8.1.1),
    which pydicom 3.0's own iterator does not allow for."""
    if int(ds.BitsAllocated) != 1:
        yield from pydicom().pixels.iter_pixels(ds, raw=True)
        return
    packed = np.frombuffer(ds.PixelData, np.uint8)
    if ds.original_encoding[1] is False and ds["PixelData"].VR == "OW":  # big endian words
        packed = packed[: len(packed) // 2 * 2].reshape(-1, 2)[:, ::-1].ravel()
    size = rows * columns
    for start in range(0, frames * size, size):
        bits = np.unpackbits(packed[start // 8 : (start + size + 7) // 8], bitorder="little")
        yield bits[start % 8 : start % 8 + size].reshape(rows, columns)


def _check_pixels(ds: Any, count: int, name: str) -> None:
    """What the header claims must be there before anyone makes room for it. Lossy labels are no labels."""
    syntax, bits = ds.file_meta.TransferSyntaxUID, int(ds.BitsAllocated)
    if syntax.is_compressed and ds.get("LossyImageCompression") == "01":
        raise UnreadableVolume(
            f"{name} is compressed with loss", expected="labels as they were drawn", remedy="export it without loss", file=Path(name)
        )
    have, need = len(ds.get("PixelData") or b""), (count * bits + 7) // 8
    if have == 0 or (not syntax.is_compressed and have < need):
        raise UnreadableVolume(f"{name} is truncated: {have} of {need} bytes of pixels are there", expected="a complete DICOM SEG",
                               remedy="copy or export it again", file=Path(name))  # fmt: skip


def _group(own: Any, shared: Any, sequence: str, name: str) -> Any:
    """A functional group's item, of the frame or shared by all."""
    items = own.get(sequence) or shared.get(sequence)
    if not items:
        raise GeometryError(f"{name} has frames without a {sequence}", expected="a segmentation of a volume, each frame with its place",
                            remedy="a segmentation of a radiograph or of a slide cannot be painted", file=Path(name))  # fmt: skip
    return items[0]


def _plane(groups: Any, shared: Any, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64], float | None, float | None]:
    """Orientation, pixel spacing, slice distance and thickness, the first two of which all frames must share."""
    found: list[NDArray[np.float64]] = []
    for own in groups if any("PlaneOrientationSequence" in g or "PixelMeasuresSequence" in g for g in groups) else groups[:1]:
        orientation = numbers(
            _group(own, shared, "PlaneOrientationSequence", name).get("ImageOrientationPatient"), 6, name, "ImageOrientationPatient"
        )
        measures = _group(own, shared, "PixelMeasuresSequence", name)
        spacing = numbers(measures.get("PixelSpacing"), 2, name, "PixelSpacing")
        found.append(
            np.array([*orientation, *spacing, *(abs(float(measures.get(key) or 0)) for key in ("SpacingBetweenSlices", "SliceThickness"))])
        )
    if any(np.abs(f[:8] - found[0][:8]).max() > ORIENTATION_TOLERANCE for f in found):
        raise GeometryError(
            f"{name} has frames in mixed orientations or spacings", expected="one grid", remedy="export one stack per file", file=Path(name)
        )
    return found[0][:6], found[0][6:8], float(found[0][8]) or None, float(found[0][9]) or None


def _segments(ds: Any, kind: str) -> Iterator[Segment]:
    for item in ds.SegmentSequence:
        number = int(item.SegmentNumber)
        if kind != "LABELMAP" or number:  # a label map may describe its background
            yield Segment(number, str(item.get("SegmentLabel", "")), _segment_code(item))


def _segment_code(segment: Any) -> str:
    """A segment's type with all that modifies it: the type's modifiers, the anatomic regions and theirs (PS3.3, C.8.20.2)."""
    types = segment.get("SegmentedPropertyTypeCodeSequence")
    if not types:
        return ""
    regions = segment.get("AnatomicRegionSequence") or []
    modifiers = [*(types[0].get("SegmentedPropertyTypeModifierCodeSequence") or []), *regions]
    modifiers += [item for region in regions for item in region.get("AnatomicRegionModifierSequence") or []]
    return modified(code_of(types[0]), map(code_of, modifiers))


def code_of(item: Any) -> str:
    """A coded entry as "SCHEME:VALUE"; codes of SNOMED's older scheme as those of today (PS3.16, annex L)."""
    value = str(item.get("CodeValue") or item.get("LongCodeValue") or item.get("URNCodeValue") or "")
    return concept(str(item.get("CodingSchemeDesignator", "")), value)
