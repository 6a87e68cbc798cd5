"""DICOM Segmentation objects (PS3.3, A.51): BINARY, LABELMAP, and FRACTIONAL with a threshold.

One frame is in memory at a time. Frames lie where their positions state. A place without a frame
holds no segment: empty frames may be left out (PS3.3, C.8.20.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import GeometryError, InputError, UnreadableVolume
from ...core.label_codes import concept, modified
from ...core.volume import Layers, Segment
from ..dicom.files import IDENTITY, dicom_source, map_dicom_errors
from ..dicom.header import (
    PIXEL_DESCRIPTION,
    DicomFile,
    first_item,
    items_of,
    opened,
    pixels_opened,
    pydicom,
)
from ..dicom.stacking import ORIENTATION_TOLERANCE, finite_numbers, stack
from . import seg_frames
from .seg_frames import check_frames

MAX_FRAMES = 1 << 17
# Pixels of one frame.
MAX_PIXELS = 1 << 26
MAX_VOXELS = 1 << 32
# Pixels of a frame that are sorted together.
VALUES_AT_ONCE = 1 << 20
# Segments are numbered in 16 bits (PS3.3, C.8.20.2).
MAX_SEGMENTS = 1 << 16
_HEADER = (
    *IDENTITY,
    *PIXEL_DESCRIPTION,
    "SOPClassUID",
    "SOPInstanceUID",
    "FrameOfReferenceUID",
    "SegmentationType",
    "MaximumFractionalValue",
    "DimensionOrganizationType",
    "TotalPixelMatrixColumns",
    "PixelPaddingValue",
)
_SEQUENCES = (
    "SegmentSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)


def read_seg(path: Path, name: str, *, threshold: float | None = None) -> Layers:
    """Read a DICOM SEG.

    Args:
        path: The SEG.
        name: What messages call it.
        threshold: Fraction (0 to 1] from which a voxel of a FRACTIONAL SEG belongs to its segment.

    Returns:
        Its segments, with notes for the user; frames are decoded while the layers are read.

    Raises:
        InputError: It cannot be read, or holds fractions and no threshold is given.
        GeometryError: Its frames are not one grid.
    """
    with map_dicom_errors(name), opened(path, _HEADER, _SEQUENCES) as source:
        return _read(path, source, name, threshold)


def _read(path: Path, source: DicomFile, name: str, threshold: float | None) -> Layers:
    """Read an open SEG: what its header decides before its pixels are read."""
    ds = source.header
    file, kind = Path(name), str(ds.get("SegmentationType", ""))
    _check_volume(ds, kind, name)
    rows, columns, frames = int(ds.Rows), int(ds.Columns), int(ds.get("NumberOfFrames") or 1)
    if not 0 < frames <= MAX_FRAMES or not 0 < rows * columns <= MAX_PIXELS:
        raise UnreadableVolume(
            f"{name} claims {frames} frames of {columns} x {rows} pixels",
            expected="a volume",
            remedy="export it again",
            file=file,
        )
    places = _read_places(source, kind, frames, name)
    check_frames(ds, frames, source.pixel_bytes, name)
    notes: list[str] = []
    geometry, slices, depth = stack(
        places.positions,
        places.orientation,
        places.spacing,
        name,
        step=places.step,
        thickness=places.thickness,
        gaps=True,
        notes=notes,
    )
    if depth == 1 and places.step is None and places.thickness is None:
        raise GeometryError(
            f"{name} has one slice and states no thickness",
            expected="SliceThickness; geometry is never guessed",
            remedy="export it with its geometry",
            file=file,
        )
    if depth * rows * columns > MAX_VOXELS:
        raise UnreadableVolume(
            f"{name} claims {depth} slices of {columns} x {rows} pixels",
            expected="a volume",
            remedy="export it again",
            file=file,
        )
    described = [*islice(source.items("SegmentSequence"), MAX_SEGMENTS)]
    segments = tuple(_segments(described, kind))
    if not described:
        raise UnreadableVolume(
            f"{name} describes no segment",
            expected="a complete DICOM SEG",
            remedy="export it again",
            file=file,
        )
    numbers_described, of_frame = {segment.number for segment in segments}, places.segments
    if stray := set(of_frame) - numbers_described:
        raise UnreadableVolume(
            f"{name} has frames of the segments {sorted(stray)[:8]}, which it does not describe",
            expected="a complete DICOM SEG",
            remedy="export it again",
            file=file,
        )
    frame_places = set(zip(of_frame, slices.tolist(), strict=False))
    slices_repeat = kind == "LABELMAP" and len(set(slices.tolist())) < frames
    if len(frame_places) < len(of_frame) or slices_repeat:
        raise GeometryError(
            f"{name} has two frames of one segment in one place",
            expected="each place once (a volume, not a tiled slide)",
            remedy="export it again",
            file=file,
        )
    background = int(ds.get("PixelPaddingValue", 0) or 0)
    source.stream_pixels()
    lowest_inside = 1
    if kind == "FRACTIONAL":
        lowest_inside, read_as = _lowest_inside(ds, frames, threshold, name)
        notes += read_as

    def pieces() -> Iterator[tuple[int, int, NDArray[np.bool_]]]:
        with map_dicom_errors(name), pixels_opened(path, source):
            for n, frame in enumerate(seg_frames.frames(ds, frames, name)):
                k = int(slices[n])
                if kind != "LABELMAP":
                    yield of_frame[n], k, frame >= lowest_inside
                    continue
                for value in _values_in(frame):
                    if value in numbers_described:
                        yield value, k, frame == value
                    elif value not in (0, background):
                        raise UnreadableVolume(
                            f"{name} holds the segment {value}, which it does not describe",
                            expected="a complete DICOM SEG",
                            remedy="export it again",
                            file=file,
                        )

    numbers_used = numbers_described if kind == "LABELMAP" else set(of_frame)
    uids = (str(ds.get("SOPInstanceUID", "")),)
    return Layers(
        tuple(s for s in segments if s.number in numbers_used),
        (depth, rows, columns),
        geometry,
        pieces,
        dicom_source(ds, uids),
        tuple(notes),
    )


def _values_in(frame: NDArray[Any]) -> list[int]:
    """The values of a frame in ascending order; a part of it is sorted at a time."""
    rows = max(1, VALUES_AT_ONCE // frame.shape[1])
    parts = [np.unique(frame[top : top + rows]) for top in range(0, len(frame), rows)]
    values: list[int] = np.unique(np.concatenate(parts)).tolist()
    return values


def _check_volume(ds: Any, kind: str, name: str) -> None:
    """Refuse segmentations of slides, and types that are not read."""
    if kind not in ("BINARY", "LABELMAP", "FRACTIONAL"):
        what = "is a segmentation of another type" if kind else "states no SegmentationType"
        raise UnreadableVolume(
            f"{name} {what}",
            expected="BINARY, FRACTIONAL or LABELMAP",
            remedy="export it as a BINARY DICOM SEG",
            file=Path(name),
        )
    if (
        str(ds.get("DimensionOrganizationType", "")).startswith("TILED")
        or "TotalPixelMatrixColumns" in ds
    ):
        raise GeometryError(
            f"{name} is a segmentation of a slide (a whole-slide image in tiles)",
            expected="a segmentation of a volume",
            remedy="give a mask of a CT or MR volume: a slide cannot be synthesized",
            file=Path(name),
        )


def _lowest_inside(
    ds: Any, frames: int, threshold: float | None, name: str
) -> tuple[int, list[str]]:
    """The lowest value of a FRACTIONAL SEG that belongs to its segment, and notes for the user.

    Without a threshold the SEG may hold only 0 and its largest value.
    """
    largest = int(ds.get("MaximumFractionalValue") or 255)
    if threshold is not None:
        return max(1, int(np.ceil(threshold * largest))), []
    for frame in seg_frames.frames(ds, frames, name):
        if ((frame != 0) & (frame != largest)).any():
            raise InputError(
                f"{name} holds fractions, not labels",
                expected="a BINARY or LABELMAP segmentation, or the fraction that counts as inside",
                remedy="give --threshold 0.5",
                file=Path(name),
            )
    return largest, [
        f"{name} is FRACTIONAL, but holds only 0 and {largest}, its largest value: it is read as"
        " BINARY"
    ]


@dataclass(frozen=True)
class _Places:
    """Where the frames lie.

    Attributes:
        positions: (N, 3), mm.
        segments: Segment number of each frame; empty for a LABELMAP.
        orientation: Row and column directions (6).
        spacing: Of rows and columns, mm.
        step: Distance of the slices, mm; None if it is not stated.
        thickness: Of a slice, mm; None if it is not stated.
    """

    positions: NDArray[np.float64]
    segments: list[int]
    orientation: NDArray[np.float64]
    spacing: NDArray[np.float64]
    step: float | None
    thickness: float | None


def _read_places(source: DicomFile, kind: str, frames: int, name: str) -> _Places:
    """Read where the frames lie, from one functional group after the other."""
    shared = next(source.items("SharedFunctionalGroupsSequence"), pydicom().Dataset())
    positions, segments, plane = np.empty((frames, 3)), [], None
    described = 0
    for n, frame in enumerate(source.items("PerFrameFunctionalGroupsSequence")):
        described += 1
        if described > frames:
            break
        position = _group(frame, shared, "PlanePositionSequence", name).get("ImagePositionPatient")
        positions[n] = finite_numbers(position, 3, name, "ImagePositionPatient")
        if kind != "LABELMAP":
            identification = _group(frame, shared, "SegmentIdentificationSequence", name)
            segments.append(int(identification.ReferencedSegmentNumber))
        if plane is None or "PlaneOrientationSequence" in frame or "PixelMeasuresSequence" in frame:
            frame_plane = _plane(frame, shared, name)
            plane = frame_plane if plane is None else plane
            if np.abs(frame_plane[:8] - plane[:8]).max() > ORIENTATION_TOLERANCE:
                raise GeometryError(
                    f"{name} has frames in mixed orientations or spacings",
                    expected="one grid",
                    remedy="export one stack per file",
                    file=Path(name),
                )
    if described != frames:
        raise UnreadableVolume(
            f"{name} claims {frames} frames and describes"
            f" {'more' if described > frames else described}",
            expected="a complete DICOM SEG",
            remedy="export it again",
            file=Path(name),
        )
    assert plane is not None
    return _Places(
        positions, segments, plane[:6], plane[6:8], float(plane[8]) or None, float(plane[9]) or None
    )


def _group(frame: Any, shared: Any, sequence: str, name: str) -> Any:
    """A functional group's item, of the frame or shared by all frames."""
    item = first_item(frame, sequence) or first_item(shared, sequence)
    if item is None:
        raise GeometryError(
            f"{name} has frames without a {sequence}",
            expected="a segmentation of a volume, each frame with its position",
            remedy="a segmentation of a radiograph or of a slide cannot be synthesized",
            file=Path(name),
        )
    return item


def _plane(frame: Any, shared: Any, name: str) -> NDArray[np.float64]:
    """Orientation (6), pixel spacing (2), slice distance and thickness of a frame, in mm.

    Slice distance and thickness are 0 where the frame does not state them.
    """
    plane = _group(frame, shared, "PlaneOrientationSequence", name)
    orientation = plane.get("ImageOrientationPatient")
    measures = _group(frame, shared, "PixelMeasuresSequence", name)
    depths = (
        abs(float(measures.get(key) or 0)) for key in ("SpacingBetweenSlices", "SliceThickness")
    )
    spacing = finite_numbers(measures.get("PixelSpacing"), 2, name, "PixelSpacing")
    cosines = finite_numbers(orientation, 6, name, "ImageOrientationPatient")
    return np.array([*cosines, *spacing, *depths])


def _segments(items: Iterable[Any], kind: str) -> Iterator[Segment]:
    for item in items:
        number = int(item.SegmentNumber)
        # A label map may describe its background.
        if kind != "LABELMAP" or number:
            label = str(item.get("SegmentLabel", ""))
            yield Segment(number, label, _segment_code(item), private=True)


def _segment_code(segment: Any) -> str:
    """A segment's type with its modifiers, its anatomic regions and theirs (PS3.3, C.8.20.2)."""
    kind = first_item(segment, "SegmentedPropertyTypeCodeSequence")
    return "" if kind is None else modified(code_of(kind), map(code_of, _modifiers(segment, kind)))


def _modifiers(segment: Any, kind: Any) -> Iterator[Any]:
    """The coded entries that modify a segment's type, `kind`."""
    yield from items_of(kind, "SegmentedPropertyTypeModifierCodeSequence")
    for region in items_of(segment, "AnatomicRegionSequence"):
        yield region
        yield from items_of(region, "AnatomicRegionModifierSequence")


def code_of(item: Any) -> str:
    """A coded entry as "SCHEME:VALUE".

    Codes of SNOMED's older scheme become today's codes (PS3.16, annex L).

    Args:
        item: An item of a code sequence.
    """
    value = str(
        item.get("CodeValue") or item.get("LongCodeValue") or item.get("URNCodeValue") or ""
    )
    return concept(str(item.get("CodingSchemeDesignator", "")), value)
