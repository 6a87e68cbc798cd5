"""RT Structure Sets (PS3.3, A.19 and C.8.8.6): planar contours → regions on the grid of the series they were drawn on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import GeometryError, InputError, UnreadableVolume
from ..volume import DicomSource, Geometry, Layers, Segment
from .dicom_files import dataset, guarded, source
from .polygons import fill
from .seg import code_of

PLANE_TOLERANCE = 0.1  # how far the corners of a contour may lie off its plane, in slice spacings (at least 0.1 mm)
_AREAS = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR", "CLOSED_PLANAR_XOR")
Grid = tuple[Geometry, tuple[int, int, int], DicomSource]


@dataclass
class _Region:
    """One ROI: its contours, (n, 3) in mm, LPS."""

    segment: Segment
    contours: list[NDArray[np.float64]] = field(default_factory=list)
    passed_over: int = 0  # points and open lines


@dataclass(frozen=True)
class References:
    """What a structure set refers to. `series`: UIDs; `instances`: of the images its contours were drawn on."""

    frame_of_reference: str
    series: frozenset[str]
    instances: frozenset[str]


def references(path: Path, name: str) -> References:
    """What the structure set refers to. Raises `UnreadableVolume`."""
    with guarded(name):
        return _references(dataset(path))


def _references(ds: Any) -> References:
    frames = ds.get("ReferencedFrameOfReferenceSequence") or []
    listed = [
        s for f in frames for study in f.get("RTReferencedStudySequence") or [] for s in study.get("RTReferencedSeriesSequence") or []
    ]
    images = [i for s in listed for i in s.get("ContourImageSequence") or []]
    images += [
        i
        for roi in ds.get("ROIContourSequence") or []
        for c in roi.get("ContourSequence") or []
        for i in c.get("ContourImageSequence") or []
    ]
    frame = str(frames[0].get("FrameOfReferenceUID", "")) if frames else str(ds.get("FrameOfReferenceUID", ""))
    return References(frame, frozenset(str(s.get("SeriesInstanceUID", "")) for s in listed),
                      frozenset(str(i.get("ReferencedSOPInstanceUID", "")) for i in images))  # fmt: skip


def read_rtstruct(path: Path, name: str, grid: Grid | None, *, like: bool = False, allow_missing: bool = False) -> Layers:
    """Read a structure set as `Layers` on `grid`; messages call it `name`.

    `grid`: of the referenced series, or with `like` one that the user gave. References to images that are not in the series are an
    error unless `allow_missing` or `like`. Raises `InputError`s.
    """
    with guarded(name):
        ds = dataset(path)
        regions, refers = _regions(ds, name), _references(ds)
        if grid is None or not like:
            _check_references(refers, None if grid is None else grid[2], name, allow_missing)
        assert grid is not None
        geometry, shape, series = grid
        tolerance = max(PLANE_TOLERANCE, 0.1 / geometry.spacing[2])  # in slices
        placed = {region.segment.number: _place(region, geometry, tolerance, name) for region in regions}
        # On its own series a contour belongs to its slice. On another grid it reaches half way to the next plane of the set.
        apart = _planes((k for contours in placed.values() for k, _ in contours), tolerance)
        reach = max(0.5, float(np.diff(apart).min()) / 2) if like and len(apart) > 1 else 0.5
        if not like and any(abs(k - round(k)) > tolerance for k in apart):
            raise GeometryError(f"{name} has contours between the slices of the series", expected="contours in its slices",
                                remedy="give the series they were drawn on, or a grid with --like IMAGE", file=Path(name))  # fmt: skip
        planes = {number: _by_slice(contours, shape[0], reach, tolerance) for number, contours in placed.items()}
        notes = [f"{name}: {n} contours of ROI {number} reach beyond the grid and are cut off"
                 for number, contours in placed.items() if (n := _beyond(contours, shape))]  # fmt: skip
        notes += [f"{name}: {region.passed_over} points or open lines of ROI {region.segment.number} are no area and are passed over"
                  for region in regions if region.passed_over]  # fmt: skip
        origin = source(ds, (str(ds.get("SOPInstanceUID", "")),), refers.frame_of_reference or series.frame_of_reference_uid)

    def pieces() -> Iterator[tuple[int, int, NDArray[np.bool_]]]:
        for number, slices in planes.items():
            for k, contours in sorted(slices.items()):
                yield number, k, fill(contours, shape[1:])

    used = tuple(region.segment for region in regions if region.contours)
    return Layers(used, shape, geometry, pieces, origin, tuple(notes))


def _check_references(refers: References, series: DicomSource | None, name: str, allowed: bool) -> None:
    """Raise when images are missing that the contours were drawn on; `allowed`: when the series that is there cannot stand for them."""
    missing = sorted(refers.instances - set(() if series is None else series.sop_instance_uids))
    if series is not None and not missing and refers.instances:
        return
    if series is not None and allowed:
        if refers.frame_of_reference != series.frame_of_reference_uid:
            raise GeometryError(f"{name} lies in another frame of reference than the image series beside it", expected="the series it was drawn on",
                                remedy="give a grid with --like IMAGE", file=Path(name))  # fmt: skip
        return
    shown = ", ".join(f"…{uid[-12:]}" for uid in missing[:8]) + (
        ", …" if len(missing) > 8 else ""
    )  # the ends: a whole UID points to a patient
    fact = (
        f"{len(missing)} of the {len(refers.instances)} images it refers to are not there ({shown})"
        if refers.instances
        else "it refers to no image"
    )
    lift = "add it, or " if series is None else "add --allow-missing-references to use the series that is there, or "
    raise InputError(f"{name} was drawn on {'a series that is not beside it' if series is None else 'other images than those beside it'}: {fact}",
                     expected="the referenced series in the same folder or zip", remedy=f"{lift}give a grid with --like IMAGE", file=Path(name))  # fmt: skip


def _regions(ds: Any, name: str) -> list[_Region]:
    names = {int(roi.ROINumber): str(roi.get("ROIName", "")) for roi in ds.get("StructureSetROISequence") or []}
    codes = {}
    for seen in ds.get("RTROIObservationsSequence") or []:
        if identified := seen.get("RTROIIdentificationCodeSequence"):
            codes[int(seen.ReferencedROINumber)] = code_of(identified[0])
    regions = []
    for item in ds.get("ROIContourSequence") or []:
        number = int(item.ReferencedROINumber)
        region = _Region(Segment(number, names.get(number, ""), codes.get(number, "")))
        for contour in item.get("ContourSequence") or []:
            kind = str(contour.get("ContourGeometricType", ""))
            if kind in _AREAS:
                region.contours.append(_corners(contour, name))
            elif kind in ("POINT", "OPEN_PLANAR"):
                region.passed_over += 1
            else:
                raise UnreadableVolume(f"{name} has a contour of the type {kind!r}", expected="closed planar contours",
                                       remedy="export it with planar contours", file=Path(name))  # fmt: skip
        regions.append(region)
    if len({r.segment.number for r in regions}) < len(regions) or not any(r.contours for r in regions):
        raise UnreadableVolume(
            f"{name} has no closed contour, or one ROI twice", expected="closed planar contours", remedy="export it again", file=Path(name)
        )
    return regions


def _corners(contour: Any, name: str) -> NDArray[np.float64]:
    """ContourData as (n, 3) mm, from its text at once: pydicom's way is an object a number."""
    raw = contour.get_item("ContourData")
    value = getattr(raw, "value", None)
    texts = value.split(b"\\") if isinstance(value, bytes) else value
    points = np.array(texts if texts is not None else [], dtype="S" if isinstance(value, bytes) else float).astype(float)
    if points.size < 9 or points.size % 3 or not np.isfinite(points).all() or np.abs(points).max() > 1e6:
        raise UnreadableVolume(f"{name} has a contour of {points.size} numbers", expected="three finite numbers of mm for each of 3 or more corners",
                               remedy="export it again", file=Path(name))  # fmt: skip
    return points.reshape(-1, 3)


def _place(region: _Region, geometry: Geometry, tolerance: float, name: str) -> list[tuple[float, NDArray[np.float64]]]:
    """The region's contours as (slice, corners as (column, row)) in voxels of the grid."""
    inverse = np.linalg.inv(geometry.affine)
    placed = []
    for contour in region.contours:
        ijk = contour @ inverse[:3, :3].T + inverse[:3, 3]
        if (across := float(np.ptp(ijk[:, 2]))) > tolerance:
            raise GeometryError(f"{name}: a contour of ROI {region.segment.number} spans {across * geometry.spacing[2]:.2f} mm across the slices",
                                expected="contours in the planes of the grid's slices",
                                remedy="give the series they were drawn on, or --like an image of their orientation", file=Path(name))  # fmt: skip
        placed.append((float(ijk[:, 2].mean()), ijk[:, :2]))
    return placed


def _planes(heights: Iterable[float], tolerance: float) -> NDArray[np.float64]:
    """The distinct planes among the heights, ascending."""
    found = np.sort([*heights])
    return found[np.r_[True, np.diff(found) > tolerance]] if found.size else found


def _by_slice(
    placed: Sequence[tuple[float, NDArray[np.float64]]], depth: int, reach: float, tolerance: float
) -> dict[int, list[NDArray[np.float64]]]:
    """The contours that each slice of the grid takes: those of the plane next to it, up to `reach` slices away."""
    planes = _planes((height for height, _ in placed), tolerance)
    if not planes.size:
        return {}
    result = {}
    for k in range(max(0, int(np.floor(planes[0] - reach))), min(depth, int(np.ceil(planes[-1] + reach)) + 1)):
        nearest = planes[np.argmin(np.abs(planes - k))]
        if 1e-6 - reach < k - nearest <= reach + 1e-6:  # a slice halfway between planes takes one of them
            result[k] = [corners for height, corners in placed if -1e-9 <= height - nearest <= tolerance + 1e-9]
    return result


def _beyond(placed: Sequence[tuple[float, NDArray[np.float64]]], shape: tuple[int, int, int]) -> int:
    """How many contours reach beyond the grid."""
    depth, height, width = shape
    limits = np.array([width, height]) - 0.5 + 1e-6
    return sum(not (-0.5 <= k <= depth - 0.5) or bool((c < -0.5 - 1e-6).any() or (c > limits).any()) for k, c in placed)
