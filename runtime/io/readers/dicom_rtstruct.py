"""RT Structure Sets (PS3.3, A.19 and C.8.8.6): from planar contours to regions on a grid.

The grid is that of the image series on which the contours were drawn, or one that the user gave.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import GeometryError, InputError, UnreadableVolume, quantity
from ...core.volume import DicomSource, Geometry, Layers, Segment
from ..dicom.files import IDENTITY, dicom_source, map_dicom_errors
from ..dicom.header import DicomFile, first_item, items_of, opened, text_of
from .crossings import TOLERANCE, Work
from .dicom_seg import code_of
from .nesting import THIN, Area, area, once_around
from .polygons import Contour

# Distance of a contour's corners from its plane, in slice spacings (at least 0.1 mm).
PLANE_TOLERANCE = 0.1
# Crossings of a region's contours with the rows of a slice, per pixel: outlines have far fewer.
MOST_CROSSINGS = 16
# Crossings that are allowed in any image.
MIN_CROSSINGS = 1 << 22
_HEADER = (*IDENTITY, "SOPClassUID", "SOPInstanceUID", "FrameOfReferenceUID")
_SEQUENCES = (
    "ReferencedFrameOfReferenceSequence",
    "StructureSetROISequence",
    "ROIContourSequence",
    "RTROIObservationsSequence",
)
_AREAS = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR", "CLOSED_PLANAR_XOR")
# Slice, and corners as (column, row), in voxels of the grid.
_Placed = list[tuple[float, Contour]]
# The contours of each height, in slices.
_Planes = dict[float, list[Contour]]
# The grid, its shape (D, H, W) and the images that it comes from.
Grid = tuple[Geometry, tuple[int, int, int], DicomSource]


@dataclass
class _Region:
    """One ROI.

    Attributes:
        segment: Its number, name and code.
        contours: Its closed contours, each (n, 3) in mm, LPS.
        passed_over: One corner of each contour that is not an area.
        xor: Whether all its contours state exclusive or (PS3.3, C.8.8.6.3).
    """

    segment: Segment
    contours: list[NDArray[np.float64]] = field(default_factory=list)
    passed_over: list[NDArray[np.float64]] = field(default_factory=list)
    xor: bool = True


@dataclass(frozen=True)
class References:
    """The images that a structure set refers to.

    Attributes:
        frame_of_reference: UID of its frame of reference.
        series: UIDs of the referenced series.
        instances: UIDs of the images that contours were drawn on.
    """

    frame_of_reference: str
    series: frozenset[str]
    instances: frozenset[str]


def references(path: Path, name: str) -> References:
    """The images that a structure set refers to.

    Args:
        path: The structure set.
        name: What messages call it.

    Raises:
        UnreadableVolume: The file cannot be read.
    """
    with map_dicom_errors(name), _opened(path) as source:
        drawn_on: set[str] = set()
        for roi in source.items("ROIContourSequence"):
            for contour in items_of(roi, "ContourSequence"):
                drawn_on.update(_referenced_images(contour))
        return _references(source, drawn_on)


@contextmanager
def _opened(path: Path) -> Iterator[DicomFile]:
    """An open structure set that does not end early: contours would be missing."""
    with opened(path, _HEADER, _SEQUENCES) as source:
        if source.ends_early:
            raise UnreadableVolume(
                "a DICOM file is truncated: it ends within an element",
                expected="complete DICOM files",
                remedy="copy or export it again",
            )
        yield source


def _referenced_images(item: Any) -> Iterator[str]:
    """UIDs of the images that a contour or a series refers to."""
    for image in items_of(item, "ContourImageSequence"):
        yield text_of(image, "ReferencedSOPInstanceUID")


def _references(source: DicomFile, drawn_on: Iterable[str]) -> References:
    """The references of a structure set; `drawn_on` are the images of its contours."""
    frame_of_reference: str | None = None
    series_uids: set[str] = set()
    instances = set(drawn_on)
    for frame in source.items("ReferencedFrameOfReferenceSequence"):
        if frame_of_reference is None:
            frame_of_reference = str(frame.get("FrameOfReferenceUID", ""))
        for study in items_of(frame, "RTReferencedStudySequence"):
            for series in items_of(study, "RTReferencedSeriesSequence"):
                series_uids.add(str(series.get("SeriesInstanceUID", "")))
                instances.update(_referenced_images(series))
    if frame_of_reference is None:
        frame_of_reference = str(source.header.get("FrameOfReferenceUID", ""))
    return References(frame_of_reference, frozenset(series_uids), frozenset(instances))


def read_rtstruct(
    path: Path, name: str, grid: Grid | None, *, like: bool = False, allow_missing: bool = False
) -> Layers:
    """Read a structure set.

    Args:
        path: The structure set.
        name: What messages call it.
        grid: Grid of the referenced series, or the user's grid with `like`; None if there is none.
        like: Whether the user gave the grid.
        allow_missing: Whether the contours may refer to images that the series does not have.

    Returns:
        Its regions on `grid`, with notes for the user.

    Raises:
        InputError: It cannot be read, or refers to images that are missing.
        GeometryError: Its contours do not lie in the slices of the grid.
    """
    with map_dicom_errors(name), _opened(path) as source:
        ds = source.header
        regions, refers = _regions(source, name)
        if grid is None or not like:
            _check_references(refers, None if grid is None else grid[2], name, allow_missing)
        assert grid is not None
        geometry, shape, series = grid
        # In slices.
        tolerance = max(PLANE_TOLERANCE, min(0.4, 0.1 / geometry.spacing[2]))
        placed = {
            region.segment.number: _to_voxels(region, geometry, tolerance, name)
            for region in regions
        }
        # On its own series a contour belongs to its slice. On another grid it reaches half way to
        # the next plane of the set.
        heights = sorted(k for contours in placed.values() for k, _ in contours)
        distinct = [*_planes([(k, None) for k in heights], tolerance)]
        reach = max(0.5, float(np.diff(distinct).min()) / 2) if like and len(distinct) > 1 else 0.5
        if not like and any(abs(k - round(k)) > tolerance for k in heights):
            raise GeometryError(
                f"{name} has contours between the slices of the series",
                expected="contours in its slices",
                remedy="give the series that they were drawn on, or a grid with --like IMAGE",
                file=Path(name),
            )
        notes: list[str] = []
        slices: dict[int, dict[int, Area]] = {}
        work = Work()
        for region in regions:
            number = region.segment.number
            planes = _planes(placed.pop(number), tolerance if like else None)
            slices[number], facts = _areas_by_slice(planes, region.xor, shape, reach, work)
            facts += _passed_over(region, geometry)
            notes += [f"{name}: {fact.format(f'ROI {number}')}" for fact in facts]
        origin = dicom_source(
            ds,
            (str(ds.get("SOPInstanceUID", "")),),
            refers.frame_of_reference or series.frame_of_reference_uid,
        )

    def pieces() -> Iterator[tuple[int, int, NDArray[np.bool_]]]:
        for number, planes in slices.items():
            for k, plane in sorted(planes.items()):
                yield number, k, plane.pixels(shape[1:])

    segments = tuple(region.segment for region in regions if region.contours)
    return Layers(segments, shape, geometry, pieces, origin, tuple(notes))


def _areas_by_slice(
    planes: _Planes, xor: bool, shape: tuple[int, int, int], reach: float, work: Work
) -> tuple[dict[int, Area], list[str]]:
    """The area of a region in each slice of the grid, and notes for the user.

    The notes have "{}" in the place of the region's name.
    """
    slices = _by_slice(planes, shape[0], reach)
    areas = {height: _area(planes[height], xor, shape[1:], work) for height in {*slices.values()}}
    repeated, united, touching, thin, overlaid = (
        sum(getattr(plane, name) for plane in areas.values())
        for name in ("repeated", "united", "touching", "thin", "overlaid")
    )
    gaps = max(slices) - min(slices) + 1 - len(slices) if slices else 0
    within = f"(to {TOLERANCE} pixels)"
    facts = [
        (
            _contours_beyond(planes, shape),
            "contour of {} reaches beyond the grid and is cut off",
            "contours of {} reach beyond the grid and are cut off",
        ),
        (
            repeated,
            f"contour of {{}} occurs twice {within} and counts once",
            f"contours of {{}} occur twice {within} and count once",
        ),
        (
            united,
            "contour of {} overlaps others without lying inside them and is united with them",
            "contours of {} overlap others without lying inside them and are united with them",
        ),
        (
            touching,
            f"contour of {{}} overlaps others by up to {TOLERANCE} pixels and is not united",
            f"contours of {{}} overlap others by up to {TOLERANCE} pixels and are not united",
        ),
        (
            thin,
            f"contour of {{}} is a hole that leaves a wall of less than {THIN:g} pixel",
            f"contours of {{}} are holes that leave a wall of less than {THIN:g} pixel",
        ),
        (
            overlaid,
            "contour of {} goes around some area twice, which counts as outside of it",
            "contours of {} go around some area twice, which counts as outside of them",
        ),
        (
            gaps,
            "slice between the first and the last of {} has no contour of it and stays empty",
            "slices between the first and the last of {} have no contour of it and stay empty",
        ),
    ]
    messages = [quantity(count, singular, plural) for count, singular, plural in facts if count]
    return {k: areas[height] for k, height in slices.items()}, messages


def _area(contours: list[Contour], xor: bool, shape: tuple[int, int], work: Work) -> Area:
    """The area of a region in one plane of an image of `shape` (H, W).

    Raises:
        UnreadableVolume: The contours are not outlines.
    """
    crossings = sum(_rows_crossed(contour, shape[0]) for contour in contours)
    if crossings > max(MIN_CROSSINGS, MOST_CROSSINGS * shape[0] * shape[1]):
        raise UnreadableVolume(
            "a structure set has contours that cross the rows of its image too often for an"
            " outline",
            expected="outlines of structures",
            remedy="export it again",
        )
    return area(contours, xor=xor, work=work)


def _passed_over(region: _Region, geometry: Geometry) -> list[str]:
    """A note for the user on a region's points and open lines."""
    if not region.passed_over:
        return []
    inverse = np.linalg.inv(geometry.affine)
    heights = np.array(region.passed_over) @ inverse[2, :3] + inverse[2, 3]
    slices = sorted({int(k) for k in np.rint(heights)})
    listed = ", ".join(map(str, slices[:8])) + (", …" if len(slices) > 8 else "")
    where = f"in slice{'s' if len(slices) > 1 else ''} {listed}, counted from 0"
    count = len(region.passed_over)
    figures = quantity(count, "point or open line", "points or open lines")
    return [f"{figures} of {{}} ({where}) {_are(count)} not an area and {_are(count)} left out"]


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _check_references(
    refers: References, series: DicomSource | None, name: str, allowed: bool
) -> None:
    """Refuse a structure set whose contours were drawn on images that are missing.

    `allowed`: whether the available series may replace them.
    """
    missing = sorted(refers.instances - set(() if series is None else series.sop_instance_uids))
    if series is not None and not missing and refers.instances:
        return
    if series is not None and allowed:
        if refers.frame_of_reference != series.frame_of_reference_uid:
            raise GeometryError(
                f"{name} lies in another frame of reference than the image series beside it",
                expected="the series that it was drawn on",
                remedy="give a grid with --like IMAGE",
                file=Path(name),
            )
        return
    reason = "it refers to no image"
    if refers.instances:
        stated = quantity(len(refers.instances), "image")
        reason = f"{len(missing)} of the {stated} that it refers to {_are(len(missing))} missing"
    if series is None:
        fact = f"{name} was drawn on a series that is not beside it: {reason}"
        remedy = "add the series, give the folder that holds both, or "
    else:
        fact = f"{name} was drawn on other images than those beside it: {reason}"
        remedy = "add --allow-missing-references to use the series beside it, or "
    raise InputError(
        fact,
        expected="the referenced series in the same folder or zip",
        remedy=f"{remedy}give a grid with --like IMAGE",
        file=Path(name),
    )


def _regions(source: DicomFile, name: str) -> tuple[list[_Region], References]:
    """The regions in their order, and the images that the structure set refers to."""
    names = {
        int(roi.ROINumber): str(roi.get("ROIName", ""))
        for roi in source.items("StructureSetROISequence")
    }
    codes = {}
    for observation in source.items("RTROIObservationsSequence"):
        code = first_item(observation, "RTROIIdentificationCodeSequence")
        if code is not None:
            codes[int(observation.ReferencedROINumber)] = code_of(code)
    listed: list[int] = []
    regions: dict[int, _Region] = {}
    drawn_on: set[str] = set()
    for roi in source.items("ROIContourSequence"):
        n = int(roi.ReferencedROINumber)
        listed.append(n)
        region = regions.setdefault(
            n, _Region(Segment(n, names.get(n, ""), codes.get(n, ""), private=True))
        )
        for contour in items_of(roi, "ContourSequence"):
            drawn_on.update(_referenced_images(contour))
            _add_contour(region, contour, name)
    if len(regions) < len(listed) or not any(r.contours for r in regions.values()):
        raise UnreadableVolume(
            f"{name} has no closed contour, or one ROI twice",
            expected="closed planar contours",
            remedy="export it again",
            file=Path(name),
        )
    return [*regions.values()], _references(source, drawn_on)


def _add_contour(region: _Region, contour: Any, name: str) -> None:
    """Add a contour to its region."""
    kind = text_of(contour, "ContourGeometricType")
    if kind not in _AREAS and kind not in ("POINT", "OPEN_PLANAR"):
        # Any other text comes from the file and may not be repeated.
        type_text = f"the type {kind!r}" if kind == "OPEN_NONPLANAR" else "another type"
        raise UnreadableVolume(
            f"{name} has a contour of {type_text}",
            expected="closed planar contours",
            remedy="export it with planar contours",
            file=Path(name),
        )
    corners = _corners(contour, name)
    if kind in _AREAS and len(corners) >= 3 and not _is_line(corners):
        region.contours.append(corners)
        region.xor &= kind != "CLOSED_PLANAR"
    elif len(corners):
        region.passed_over.append(corners[0])


def _is_line(corners: NDArray[np.float64]) -> bool:
    """Whether all corners (n, 3), in mm, lie on one line or in one point."""
    offsets = corners - corners[0]
    distances = np.einsum("ij,ij->i", offsets, offsets)
    farthest = offsets[int(distances.argmax())]
    squared = max(float(farthest @ farthest), 1e-12)
    off_line = offsets - np.outer(offsets @ farthest / squared, farthest)
    return bool(np.abs(off_line).max() < 1e-6)


def _corners(contour: Any, name: str) -> NDArray[np.float64]:
    """The corners of a contour, (n, 3) in mm.

    They are parsed at once: pydicom makes an object per number.
    """
    raw = contour.get_item("ContourData")
    value = getattr(raw, "value", None)
    if isinstance(value, bytes):
        text = value.rstrip(b" \0")
        points = np.fromstring(text.decode("ascii"), sep=" \\ ")
        is_complete = points.size == (text.count(b"\\") + 1 if text else 0)
    else:
        points, is_complete = np.array([] if value is None else value, float).reshape(-1), True
    stated = int(text_of(contour, "NumberOfContourPoints") or 0)
    # A contour that lost corners must not pass for a point or a line.
    lost_corners = points.size < 9 and stated * 3 > points.size
    if (
        not is_complete
        or lost_corners
        or points.size % 3
        or not np.isfinite(points).all()
        or np.abs(points).max(initial=0) > 1e6
    ):
        raise UnreadableVolume(
            f"{name} has a contour of {points.size} numbers",
            expected="three finite numbers of mm for each corner",
            remedy="export it again",
            file=Path(name),
        )
    return points.reshape(-1, 3)


def _to_voxels(region: _Region, geometry: Geometry, tolerance: float, name: str) -> _Placed:
    """The contours of a region as (slice, corners as (column, row)) in voxels of the grid."""
    inverse = np.linalg.inv(geometry.affine)
    placed = []
    for n, contour in enumerate(region.contours):
        ijk = contour @ inverse[:3, :3].T + inverse[:3, 3]
        if (across := float(np.ptp(ijk[:, 2]))) > tolerance:
            raise GeometryError(
                f"{name}: a contour of ROI {region.segment.number} spans"
                f" {across * geometry.spacing[2]:.2f} mm across the slices",
                expected="contours in the planes of the grid's slices",
                remedy=(
                    "give the series that they were drawn on, or --like an image of their"
                    " orientation"
                ),
                file=Path(name),
            )
        placed.append((float(ijk[:, 2].mean()), once_around(np.ascontiguousarray(ijk[:, :2]))))
        # The corners in mm are not needed any more, and there may be many.
        region.contours[n] = contour[:0]
    return placed


def _planes(placed: Iterable[tuple[float, Any]], tolerance: float | None) -> dict[float, list[Any]]:
    """The items at each height, in ascending order of the heights.

    Without a `tolerance` the heights are the slices of the grid.
    """
    planes: dict[float, list[Any]] = {}
    height = last = -np.inf
    for at, item in sorted(placed, key=lambda pair: pair[0]):
        if tolerance is None:
            height = float(round(at))
        elif at - last > tolerance:
            height = at
        last = at
        planes.setdefault(height, []).append(item)
    return planes


def _by_slice(planes: _Planes, depth: int, reach: float) -> dict[int, float]:
    """The height of the nearest plane for each slice of the grid, up to `reach` slices away."""
    if not planes:
        return {}
    heights = np.array([*planes])
    first = max(0, int(np.floor(heights[0] - reach)))
    stop = min(depth, int(np.ceil(heights[-1] + reach)) + 1)
    result = {}
    for k in range(first, stop):
        nearest = float(heights[np.argmin(np.abs(heights - k))])
        # A slice halfway between two planes takes one of them.
        if 1e-6 - reach < k - nearest <= reach + 1e-6:
            result[k] = nearest
    return result


def _rows_crossed(contour: Contour, height: int) -> float:
    """How many rows of the image the edges of a contour cross, added up over the edges."""
    rows = np.clip(contour[:, 1], -1, height)
    return float(np.abs(np.diff(rows)).sum())


def _contours_beyond(planes: _Planes, shape: tuple[int, int, int]) -> int:
    """How many contours reach beyond the grid."""
    depth, height, width = shape
    highest = np.array([width, height]) - 0.5 + 1e-6
    lowest = -0.5 - 1e-6
    return sum(
        not -0.5 <= k <= depth - 0.5 or bool((c < lowest).any() or (c > highest).any())
        for k, contours in planes.items()
        for c in contours
    )
