"""RTSTRUCT in: filled contours against analytic shapes and plastimatch, on the right grid,
dangling references refused.
"""

from __future__ import annotations

import shutil
import subprocess
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_masks import save, slices, structure_set
from pydicom import dcmread
from pydicom.uid import generate_uid
from samples import directions, image, rotation

from runtime.core.errors import GeometryError, InputError, UnknownLabels, UnreadableVolume
from runtime.core.labels import MM_WHS
from runtime.io.case_finding import find_cases
from runtime.io.cases import Case, ReadOptions, read_case
from runtime.io.readers.nesting import _overlapping, area, once_around
from runtime.io.readers.polygons import fill

CIRCLE = np.linspace(0, 2 * np.pi, 200, endpoint=False)


def ellipse(column: float, row: float, a: float, b: float) -> np.ndarray:
    return np.stack([column + a * np.cos(CIRCLE), row + b * np.sin(CIRCLE)], axis=1)


def inside(
    column: float, row: float, a: float, b: float, shape: tuple[int, int] = (60, 70)
) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return ((x - column) / a) ** 2 + ((y - row) / b) ** 2 < 1


def test_rtstruct_ellipse_fills_enclosed_pixel_centres() -> None:
    """An ellipse covers the pixels whose centres lie in it."""
    for n in range(20):
        column, row, a, b = np.random.default_rng(n).uniform((20, 20, 5, 5), (50, 40, 18, 18))
        assert (
            np.count_nonzero(
                fill([ellipse(column, row, a, b)], (60, 70)) != inside(column, row, a, b)
            )
            <= 2
        )  # a polygon of 200 corners


def test_rtstruct_neighbours_share_edge_without_gap() -> None:
    """Neighbours that share an edge leave no gap and do not overlap."""
    corners = np.random.default_rng(3).uniform(0, 60, (4, 2)).round()  # on pixel centres
    first, second = (
        fill([np.array(t)], (60, 60))
        for t in ([[5, 5], [50, 5], [5, 50]], [[50, 5], [50, 50], [5, 50]])
    )
    assert not (first & second).any() and (first | second).sum() == 45 * 45
    assert np.array_equal(
        fill([corners], (60, 60)), fill([corners[::-1]], (60, 60))
    )  # either way round


def test_rtstruct_keyhole_equals_separate_hole() -> None:
    """A hole drawn by its own contour is the same as one drawn by a keyhole."""
    outer, inner = ellipse(35, 30, 25, 20), ellipse(33, 31, 10, 8)[::-1]
    keyhole = np.concatenate([outer, outer[:1], inner, inner[:1]])
    ring = inside(35, 30, 25, 20) & ~inside(33, 31, 10, 8)
    for contours in ([outer, inner], [keyhole], [outer, inner[::-1]]):
        assert np.count_nonzero(fill(contours, (60, 70)) != ring) <= 4


def test_rtstruct_contour_clipped_at_image_edge() -> None:
    huge = np.array([[-1e6, -1e6], [1e6, -1e6], [1e6, 1e6], [-1e6, 1e6]])
    assert (
        fill([huge], (7, 9)).all()
        and not fill([huge + 3e6], (7, 9)).any()
        and not fill([], (7, 9)).any()
    )


def in_mm(sources, k: int, corners: np.ndarray) -> np.ndarray:
    """(column, row) of a slice → mm, by the standard's own formula (PS3.3, C.7.6.2.1.1)."""
    ds = sources[k]
    row_axis, column_axis = np.reshape([float(x) for x in ds.ImageOrientationPatient], (2, 3))
    dr, dc = (float(x) for x in ds.PixelSpacing)
    return (
        np.array([float(x) for x in ds.ImagePositionPatient])
        + np.outer(corners[:, 0] * dc, row_axis)
        + np.outer(corners[:, 1] * dr, column_axis)
    )


def case(path: Path, **options: object) -> Case:
    (found,) = find_cases([path], options=ReadOptions(**options))  # type: ignore[arg-type]
    return found


def drawn(folder: Path, direction: np.ndarray | None = None, kind: str = "CLOSED_PLANAR") -> list:
    """A CT of 6 slices with a ventricle in slices 1 to 4 (a ring in 2) and an atrium in 3, and
    its structure set.
    """
    sources = slices(
        np.arange(6 * 60 * 70).reshape(6, 60, 70).astype(np.uint16),
        direction=direction,
        Modality="CT",
    )
    big, hole, small = ellipse(30, 30, 20, 15), ellipse(30, 30, 6, 5), ellipse(58, 45, 7, 9)
    rois = {
        "left ventricle": (
            [in_mm(sources, k, big) for k in (1, 2, 3, 4)] + [in_mm(sources, 2, hole)]
        ),
        "Atrium": [in_mm(sources, 3, small)],
    }
    save(folder / "ct", sources)
    structure_set(folder / "rs" / "Doe.dcm", sources, rois, kind, codes={"Atrium": "82471001"})
    return sources


@pytest.mark.parametrize("kind", ["CLOSED_PLANAR", "CLOSEDPLANAR_XOR"])
@pytest.mark.parametrize("turn", range(0, 48, 5))
def test_rtstruct_contours_fill_source_series_grid(kind: str, turn: int, tmp_path: Path) -> None:
    """Contours fill the grid of the series on which they were drawn."""
    sources = drawn(tmp_path, rotation((9.0, -5.0, 13.0)) @ directions()[turn], kind)
    read = read_case(case(tmp_path), MM_WHS)
    assert read.labels.shape == (6, 60, 70)
    for n, source in enumerate(sources):  # by position, since k counts along the normal
        position = np.array([float(x) for x in source.ImagePositionPatient])
        k = int(np.rint((np.linalg.inv(read.geometry.affine) @ [*position, 1])[2]))
        assert np.abs(read.geometry.affine @ [0, 0, k, 1] - [*position, 1]).max() < 1e-3
        expected = np.zeros((60, 70), np.uint8)
        if n in (1, 2, 3, 4):
            expected[inside(30, 30, 20, 15)] = 3
        if n == 2:
            expected[inside(30, 30, 6, 5)] = 0
        if n == 3:
            expected[inside(58, 45, 7, 9)] = 2
        assert np.count_nonzero(read.labels[k] != expected) <= 6
    assert (
        read.dicom is not None
        and read.dicom.frame_of_reference_uid == sources[0].FrameOfReferenceUID
    )


def test_rtstruct_without_series_needs_like_image(
    tmp_path: Path,
) -> None:
    """Without its series, the missing references are counted, and --like may give a grid."""
    sources = drawn(tmp_path)
    alone = tmp_path / "elsewhere" / "rs.dcm"
    alone.parent.mkdir()
    shutil.copy(tmp_path / "rs" / "Doe.dcm", alone)
    with pytest.raises(
        InputError, match=r"6 of the 6 images that it refers to are missing"
    ) as caught:
        read_case(case(alone), MM_WHS)
    assert "6 of the 6 images" in caught.value.fact and sources[0].SOPInstanceUID[-12:] not in str(
        caught.value
    )
    assert "--like IMAGE" in caught.value.remedy
    on_series = read_case(case(tmp_path / "rs" / "Doe.dcm", like=tmp_path / "ct"), MM_WHS)
    whole = read_case(case(tmp_path, like=None), MM_WHS)
    assert np.array_equal(on_series.labels, whole.labels) and on_series.geometry == whole.geometry
    # a finer, larger volume in another order: each slice takes the plane next to it, and the volume
    # in ml is the same
    grid = image(np.zeros((30, 150, 160), np.uint8), (0.75, 0.625, 1.25), (-30.0, -10.0, 35.0))
    sitk.WriteImage(grid, str(tmp_path / "grid.nii.gz"))
    fine = read_case(case(alone, like=tmp_path / "grid.nii.gz"), MM_WHS)
    assert fine.labels.shape == (30, 150, 160)
    for label in (2, 3):
        ml = [
            np.count_nonzero(v.labels == label) * np.prod(v.geometry.spacing) for v in (whole, fine)
        ]
        assert ml[1] == pytest.approx(ml[0], rel=0.02)


def test_rtstruct_missing_references_need_option(tmp_path: Path) -> None:
    """A series without the referenced images is used only with --allow-missing-references."""
    drawn(tmp_path)
    for path in sorted(
        (tmp_path / "ct").iterdir()
    ):  # as after an anonymiser that forgot the structure set
        ds = dcmread(path)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.save_as(path)
    with pytest.raises(InputError, match="other images than those beside it") as caught:
        read_case(case(tmp_path), MM_WHS)
    assert "--allow-missing-references" in caught.value.remedy
    assert (
        np.count_nonzero(
            read_case(case(tmp_path, allow_missing_references=True), MM_WHS).labels == 3
        )
        > 3000
    )
    other = generate_uid()
    for path in sorted((tmp_path / "ct").iterdir()):
        ds = dcmread(path)
        ds.FrameOfReferenceUID = other
        ds.save_as(path)
    with pytest.raises(GeometryError, match="another frame of reference"):
        read_case(case(tmp_path, allow_missing_references=True), MM_WHS)


def bend(contour) -> None:
    corners = [float(x) for x in contour.ContourData]
    corners[2] += 2.0
    contour.ContourData = corners


BAD = {
    "not planar": (lambda c: bend(c), GeometryError, "spans 2.00 mm across the slices"),
    "between slices": (
        lambda c: setattr(
            c,
            "ContourData",
            [x + (1.2 if n % 3 == 2 else 0) for n, x in enumerate(map(float, c.ContourData))],
        ),
        GeometryError,
        "between the slices",
    ),
    "not finite": (
        lambda c: setattr(c, "ContourData", ["1e999"] * 9),
        UnreadableVolume,
        "contour of 9 numbers",
    ),
    "odd count": (
        lambda c: setattr(c, "ContourData", list(c.ContourData)[:-1]),
        UnreadableVolume,
        "contour of 599 numbers",
    ),
    "another type": (
        lambda c: setattr(c, "ContourGeometricType", "OPEN_NONPLANAR"),
        UnreadableVolume,
        "'OPEN_NONPLANAR'",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_rtstruct_bad_contour_is_refused(kind: str, tmp_path: Path) -> None:
    """The refusal of a bad contour states its reason."""
    change, error, fact = BAD[kind]
    drawn(tmp_path)
    path = tmp_path / "rs" / "Doe.dcm"
    ds = dcmread(path)
    change(ds.ROIContourSequence[0].ContourSequence[1])
    ds.save_as(path)
    with pytest.raises(error, match=fact):
        read_case(case(tmp_path), MM_WHS)


def test_rtstruct_notes_points_and_clipped_regions(tmp_path: Path) -> None:
    """Points are skipped, and a note names a region that reaches beyond the grid."""
    sources = drawn(tmp_path)
    path = tmp_path / "rs" / "Doe.dcm"
    structure_set(
        path,
        sources,
        {
            "left ventricle": [
                in_mm(sources, 1, ellipse(2, 30, 20, 15)),
                in_mm(sources, 2, ellipse(2, 30, 9, 9)),
            ]
        },
    )
    ds = dcmread(path)
    ds.ROIContourSequence[0].ContourSequence[1].ContourGeometricType = "POINT"
    ds.save_as(path)
    read = read_case(case(tmp_path), MM_WHS)
    assert any("1 contour of ROI 1 reaches beyond the grid" in n for n in read.notes) and any(
        "1 point or open line" in n for n in read.notes
    )
    assert not read.labels[2].any() and read.labels[1].any()


@pytest.mark.skipif(
    shutil.which("plastimatch") is None,
    reason="plastimatch is not installed (apt-get install plastimatch)",
)
def test_rtstruct_fill_agrees_with_plastimatch(tmp_path: Path) -> None:
    sources = drawn(tmp_path)
    flat = tmp_path / "flat"
    save(flat, sources)
    shutil.copy(tmp_path / "rs" / "Doe.dcm", flat / "rs.dcm")
    done = subprocess.run(
        [
            "plastimatch",
            "convert",
            "--input",
            flat / "rs.dcm",
            "--referenced-ct",
            flat,
            "--output-prefix",
            tmp_path / "out",
            "--prefix-format",
            "nrrd",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    read = read_case(case(tmp_path), MM_WHS)
    for name, label in (("left ventricle", 3), ("Atrium", 2)):
        (file,) = (p for p in (tmp_path / "out").iterdir() if name.split()[-1] in p.name)
        theirs = sitk.ReadImage(str(file))
        assert np.allclose(theirs.GetOrigin(), read.geometry.origin, atol=1e-3) and np.allclose(
            theirs.GetSpacing(), read.geometry.spacing, atol=1e-3
        )
        values = sitk.GetArrayFromImage(theirs) > 0
        ours = read.labels == label
        assert np.count_nonzero(values ^ ours) <= 0.03 * np.count_nonzero(ours)


def box(x0: float, x1: float, y0: float, y1: float) -> np.ndarray:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float)


def mask(*boxes: tuple[int, int, int, int], shape: tuple[int, int] = (60, 70)) -> np.ndarray:
    result = np.zeros(shape, bool)
    for x0, x1, y0, y1 in boxes:
        result[y0:y1, x0:x1] = True
    return result


def filled(contours, shape: tuple[int, int]) -> tuple[np.ndarray, int]:
    """The pixels of a region, and how many of its contours were united with others."""
    region = area([*contours])
    return region.pixels(shape), region.united


OUTER, HOLE, ISLAND = (5, 45, 5, 45), (10, 30, 10, 30), (15, 20, 15, 20)
AREAS = {
    "apart": ([OUTER, (50, 60, 5, 9)], mask(OUTER, (50, 60, 5, 9)), 0),
    "sharing an edge": ([OUTER, (45, 60, 5, 45)], mask((5, 60, 5, 45)), 0),
    "hole": ([OUTER, HOLE], mask(OUTER) & ~mask(HOLE), 0),
    "island in a hole": ([OUTER, HOLE, ISLAND], mask(OUTER) & ~mask(HOLE) | mask(ISLAND), 0),
    "crossing": ([OUTER, (30, 60, 20, 55)], mask(OUTER, (30, 60, 20, 55)), 1),
    "chain of three": ([(0, 20, 0, 20), (15, 40, 0, 20), (35, 60, 0, 20)], mask((0, 60, 0, 20)), 2),
    "a bridge over two": (
        [(0, 20, 0, 20), (30, 50, 0, 20), (10, 40, 5, 10)],
        mask((0, 20, 0, 20), (30, 50, 0, 20), (10, 40, 5, 10)),
        2,
    ),
    "crossing beside a hole": (
        [OUTER, HOLE, (35, 60, 20, 40)],
        mask(OUTER, (35, 60, 20, 40)) & ~mask(HOLE),
        1,
    ),
    "two holes that cross": (
        [OUTER, HOLE, (25, 40, 25, 40)],
        mask(OUTER) & ~mask(HOLE, (25, 40, 25, 40)),
        1,
    ),
    "across a hole and its outline": (
        [OUTER, HOLE, (20, 60, 20, 40)],
        mask(OUTER, (20, 60, 20, 40)),
        2,
    ),
    "within two but in neither": (
        [(0, 30, 0, 30), (20, 50, 0, 30), (10, 40, 10, 20)],
        mask((0, 50, 0, 30)),
        2,
    ),
    "in the middle of a frame": (
        [(5, 45, 5, 15), (5, 45, 35, 45), (5, 15, 5, 45), (35, 45, 5, 45), (20, 30, 20, 30)],
        mask((5, 45, 5, 15), (5, 45, 35, 45), (5, 15, 5, 45), (35, 45, 5, 45), (20, 30, 20, 30)),
        3,
    ),
    "a hole in the overlap": (
        [OUTER, (20, 60, 5, 45), (25, 35, 10, 20)],
        mask((5, 60, 5, 45)) & ~mask((25, 35, 10, 20)),
        1,
    ),
}


@pytest.mark.parametrize("name", AREAS)
def test_rtstruct_crossing_contours_unite_holes_stay(name: str) -> None:
    boxes, expected, united = AREAS[name]
    for shift in (0.0, -0.25):  # corners on pixel centres, and between them
        for contours in (
            [box(*b) + shift for b in boxes],
            [box(*b)[::-1] + shift for b in boxes[::-1]],
        ):
            region = area(contours)
            assert np.array_equal(region.pixels((60, 70)), expected) and region.united == united


def _heap_of_boxes(random: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """Some boxes (x0, x1, y0, y1); often they share edges or corners."""
    starts = random.integers(0, 10, (random.integers(2, 8), 2)) * 4
    ends = starts + random.integers(1, 7, starts.shape) * 4
    return [(x0, x1, y0, y1) for (x0, y0), (x1, y1) in zip(starts, ends, strict=True)]


def _within(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return other[0] <= one[0] and one[1] <= other[1] and other[2] <= one[2] and one[3] <= other[3]


def _cross(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    meet = one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]
    return meet and not _within(one, other) and not _within(other, one)


def _expected(boxes: list[tuple[int, int, int, int]], shape: tuple[int, int]) -> np.ndarray:
    """The rule of docs/reference/masks.md, written down once more for boxes."""
    parts: list[set[tuple[int, ...]]] = []
    for new in set(boxes):
        joined = [part for part in parts if any(_cross(new, other) for other in part)]
        parts = [part for part in parts if part not in joined] + [{new}.union(*joined)]
    result = np.zeros(shape, bool)
    for part in parts:
        result ^= mask(*part, shape=shape)
    return result


def test_rtstruct_random_boxes_follow_union_rule() -> None:
    for n in range(200):
        boxes = _heap_of_boxes(np.random.default_rng(n))
        pixels, _ = filled([box(*b) for b in boxes], (64, 64))
        assert np.array_equal(pixels, _expected(boxes, (64, 64))), boxes


# columns, rows, half axes and turns of ellipses; pixels by shapely 2.2 (GEOS 3.14), united
HEAPS = {
    "heap 7": (
        [
            (95.0, 85.5, 14.0, 17.0, 2.7),
            (25.4, 89.1, 36.9, 23.7, 0.9),
            (46.7, 44.9, 22.8, 25.2, 1.7),
            (102.6, 86.8, 29.9, 44.6, 0.7),
            (37.5, 72.8, 6.8, 6.4, 1.6),
        ],
        7513,
        2,
    ),
    "heap 12": (
        [
            (98.8, 39.8, 12.2, 19.0, 0.7),
            (77.3, 34.0, 40.9, 39.3, 0.0),
            (67.2, 33.3, 15.3, 21.7, 1.4),
            (61.5, 97.3, 15.4, 12.5, 2.1),
        ],
        3766,
        1,
    ),
    "heap 13": (
        [
            (91.7, 88.3, 15.5, 8.1, 2.9),
            (72.9, 25.2, 41.4, 44.4, 0.9),
            (88.5, 31.4, 22.5, 37.7, 1.3),
            (65.4, 34.1, 37.6, 24.9, 0.8),
            (85.6, 101.4, 26.5, 34.5, 3.1),
        ],
        7485,
        2,
    ),
    "heap 28": (
        [
            (94.0, 84.7, 6.3, 7.0, 1.0),
            (93.3, 99.2, 26.3, 36.4, 1.0),
            (88.8, 88.7, 7.9, 43.5, 1.1),
            (38.8, 65.5, 29.9, 5.7, 0.5),
        ],
        3563,
        1,
    ),
    "heap 46": (
        [
            (31.0, 46.3, 29.9, 42.4, 0.3),
            (74.1, 85.5, 25.5, 34.9, 2.7),
            (63.9, 87.0, 7.2, 34.2, 2.4),
            (30.2, 33.2, 20.6, 18.0, 0.8),
        ],
        5505,
        2,
    ),
}


@pytest.mark.parametrize("name", HEAPS)
def test_rtstruct_random_ellipses_follow_union_rule(name: str) -> None:
    ellipses, pixels, united = HEAPS[name]
    contours = [_turned_ellipse(*numbers) for numbers in ellipses]
    for order in (contours, contours[::-1]):
        region = area(order)
        assert abs(np.count_nonzero(region.pixels((128, 128))) - pixels) <= 3
        assert region.united == united


def _turned_ellipse(column: float, row: float, a: float, b: float, turn: float) -> np.ndarray:
    x, y = a * np.cos(CIRCLE), b * np.sin(CIRCLE)
    across, down = x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)
    return np.stack([column + across, row + down], axis=1)


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.7])
def test_rtstruct_union_independent_of_pixel_grid(shift: float) -> None:
    outer = box(5, 45, 5, 45) + shift
    for left, unites in ((4.95, False), (4.85, True)):  # no pixel lies between
        region = area([outer, box(left, 25, 10, 30) + shift])
        assert region.united == unites and region.touching == (not unites)
        hole = region.pixels((60, 70))[12:28, 8:23]
        assert hole.all() if unites else not hole.any()


def _ring() -> np.ndarray:
    """A ring as one contour: an outline, a hole, and a cut between them."""
    outer, hole = ellipse(35, 30, 25, 20), ellipse(33, 31, 10, 8)[::-1]
    return np.concatenate([outer, outer[:1], hole, hole[:1]])


@pytest.mark.parametrize("again", [ellipse(33, 31, 10, 8), ellipse(35, 30, 25, 20), _ring()[::-1]])
def test_rtstruct_repeated_ring_counts_once(again: np.ndarray) -> None:
    for contours in ([_ring(), again], [again, _ring()]):
        region = area(contours)
        assert np.array_equal(region.pixels((60, 70)), fill([_ring()], (60, 70)))
        assert region.repeated == 1


def test_rtstruct_island_in_ring_stays() -> None:
    region = area([_ring(), ellipse(33, 31, 4, 3)])
    expected = fill([_ring(), ellipse(33, 31, 4, 3)], (60, 70))
    assert np.array_equal(region.pixels((60, 70)), expected) and not region.repeated


def test_rtstruct_close_copies_are_reported() -> None:
    contour = ellipse(35, 30, 25, 20)
    for smaller in (0.01, 0.05, 0.09):
        region = area([contour, ellipse(35, 30, 25 - smaller, 20 - smaller)])
        assert region.repeated == 1 and region.pixels((60, 70)).sum() > 1500
    for smaller in (0.11, 0.5, 0.9):
        assert area([contour, ellipse(35, 30, 25 - smaller, 20 - smaller)]).thin == 1
    assert not area([contour, ellipse(35, 30, 23, 18)]).thin


def test_rtstruct_doubly_enclosed_areas_are_reported() -> None:
    contour, lobes = ellipse(35, 30, 25, 20), CIRCLE * 2
    eight = np.stack([35 + 25 * np.sin(CIRCLE), 30 + 20 * np.sin(lobes)], axis=1)
    loop = np.stack([np.cos(CIRCLE), np.sin(CIRCLE)], axis=1) * (10 + 15 * np.cos(CIRCLE))[:, None]
    for simple in (contour, eight, _ring(), np.repeat(contour, 2, axis=0)):
        assert not area([simple]).overlaid
    for twice in (loop + 30, np.concatenate([contour, ellipse(35, 30, 25, 20)[::2]])):
        assert area([twice]).overlaid == 1 and area([twice, box(2, 6, 2, 6)]).overlaid == 1


@pytest.mark.slow
def test_rtstruct_too_many_overlaps_are_refused() -> None:
    with pytest.raises(UnreadableVolume, match="contours overlap more than"):
        area([ellipse(35, 30, 20, 10 + n / 50)[::20] for n in range(300)])


def test_rtstruct_nested_contours_follow_even_odd() -> None:
    for n in range(30):
        random = np.random.default_rng(n)
        column, row = random.uniform(25, 40, 2)
        contours = [
            ellipse(column, row, *random.uniform(0.9, 1, 2) * size) for size in (24, 18, 12, 6, 0.3)
        ]
        pixels, united = filled(random.permutation(np.array(contours)), (60, 70))
        assert np.array_equal(pixels, fill(contours, (60, 70))) and not united


def test_rtstruct_hole_along_outline_stays() -> None:
    outer, hole = box(5, 45, 5, 45), box(5, 25, 10, 30)
    for noise in (0, 1e-4, -1e-4, 1e-2, -1e-2):  # as files round it
        pixels, united = filled([outer, hole + noise], (60, 70))
        assert (
            np.count_nonzero(pixels != (mask((5, 45, 5, 45)) & ~mask((5, 25, 10, 30)))) <= 80
            and not pixels[15:25, 6:24].any()
        )
        assert not united


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c,
        lambda c: c[::-1],
        lambda c: np.roll(c, 77, axis=0),
        lambda c: np.concatenate([c, c[:1]]),
        lambda c: c.round(2),
        lambda c: np.repeat(c, 2, axis=0),
        lambda c: (c + np.roll(c, -1, axis=0)) / 2,
    ],
    ids=[
        "again",
        "reversed",
        "from another corner",
        "closed",
        "rounded",
        "corners doubled",
        "other corners",
    ],
)
def test_rtstruct_duplicate_contour_counts_once(change) -> None:
    contour = ellipse(35, 30, 25, 20)
    assert area([contour, change(contour)]).repeated == 1
    assert not area(
        [contour, ellipse(35, 30, 24.8, 19.8), contour * [-1, 1] + [71, 0]]
    ).repeated  # a thin wall, a neighbour


def test_rtstruct_contour_around_twice_is_filled() -> None:
    once = ellipse(35, 30, 25, 20)
    for twice in (
        np.concatenate([once, once]),
        np.concatenate([once, once[:1], once]),
        np.concatenate([once, once[:1], once, once[:1]]),
    ):
        assert np.array_equal(fill([once_around(twice)], (60, 70)), fill([once], (60, 70)))
    assert once_around(once) is once


def structure(folder: Path, contours, kind: str = "CLOSED_PLANAR", **more) -> Case:
    """A CT of 6 slices, and on it an ROI of (slice, corners); a quarter of a pixel off, so that
    rounding decides nothing.
    """
    sources = slices(np.zeros((6, 60, 70), np.uint16), Modality="CT")
    save(folder / "ct", sources)
    rois = {"left ventricle": [in_mm(sources, k, c - 0.25) for k, c in contours]}
    rois |= {
        name.replace("_", " "): [in_mm(sources, k, c - 0.25) for k, c in drawn]
        for name, drawn in more.items()
    }
    structure_set(
        folder / "rs" / "Doe.dcm", sources, rois, kind, codes={"left ventricle": "87878005"}
    )
    return case(folder)


def test_rtstruct_notes_doubled_and_crossing_contours(tmp_path: Path) -> None:
    square = box(10, 30, 10, 30)
    read = read_case(
        structure(
            tmp_path,
            [(1, square), (1, square[::-1]), (2, square), (2, box(20, 50, 20, 50)), (4, square)],
        ),
        MM_WHS,
    )
    assert np.array_equal(read.labels[1] == 3, mask((10, 30, 10, 30)))
    assert np.array_equal(read.labels[2] == 3, mask((10, 30, 10, 30), (20, 50, 20, 50)))
    said = " | ".join(read.notes)
    assert (
        "1 contour of ROI 1 occurs twice" in said and "1 contour of ROI 1 overlaps others" in said
    )
    assert (
        "1 slice between the first and the last of ROI 1 has no contour" in said
        and "ventricle" not in said
    )


def turned(contour: np.ndarray, side: str) -> np.ndarray:
    """A contour drawn at the left side of the 60 x 70 image, at another side of it."""
    column, row = contour.T
    turns = {
        "left": (column, row),
        "right": (69 - column, row),
        "top": (row, column),
        "bottom": (row, 59 - column),
    }
    return np.stack(turns[side], axis=1)


SIDES = ("left", "right", "top", "bottom")


@pytest.mark.parametrize("side", SIDES)
def test_rtstruct_contours_crossing_outside_image_unite(side: str) -> None:
    outer = box(-20, 40, 10, 50)
    for other in (box(-35, 25, 20, 40), box(-15, 25, -10, 20), box(-15, -5, 30, 70)):
        for shift in (0.25, -0.25):
            contours = [turned(c, side) + shift for c in (outer, other)]
            pixels, united = filled(contours, (60, 70))
            either = fill(contours[:1], (60, 70)) | fill(contours[1:], (60, 70))
            assert np.array_equal(pixels, either) and united == 1


@pytest.mark.parametrize("side", SIDES)
def test_rtstruct_contours_crossing_beyond_corner_unite(side: str) -> None:
    outer, inner = box(-20, 40, -30, 40) + 0.25, box(-30, 20, -20, 20) + 0.25
    contours = [turned(outer, side), turned(inner, side)]
    pixels, united = filled(contours, (60, 70))
    assert np.array_equal(pixels, fill(contours[:1], (60, 70))) and united == 1


@pytest.mark.parametrize("side", SIDES)
def test_rtstruct_hole_outside_image_stays(side: str) -> None:
    for outer, hole in (
        (box(-20, 40, 10, 50), box(-10, 25, 20, 40)),
        (box(-20, 40, -30, 40), box(-15, 20, -25, 20)),
        (box(-1e6, 40, -1e6, 1e6), box(-300, 25, 20, 40)),
    ):
        contours = [turned(outer, side) + 0.25, turned(hole, side) + 0.25]
        pixels, united = filled(contours, (60, 70))
        assert np.array_equal(pixels, fill(contours, (60, 70))) and not united
        assert not pixels[fill(contours[1:], (60, 70))].any() and pixels.any()


def test_rtstruct_union_independent_of_image_edge() -> None:
    for n in range(60):
        random = np.random.default_rng(n)
        sizes = random.uniform((10, 10, 3, 3), (80, 70, 28, 28), (random.integers(2, 7), 4))
        contours = [ellipse(*size) for size in sizes]
        whole, _ = filled([c + 64 for c in contours], (256, 256))
        for top, left in ((0, 0), (20, 30), (35, 45)):
            pixels, _ = filled([c - [left, top] for c in contours], (30, 40))
            assert np.array_equal(pixels, whole[64 + top :, 64 + left :][:30, :40])


def test_rtstruct_outside_contour_joins_two_inside() -> None:
    first, second, bridge = box(-30, 30, 5, 20), box(-30, 30, 30, 45), box(-25, -10, 10, 40)
    both = box(5, 15, 10, 40)  # crosses the two, and lies in no single one
    pixels, united = filled([first, second, bridge, both], (60, 70))
    assert (
        np.array_equal(pixels, mask((0, 30, 5, 20), (0, 30, 30, 45), (5, 15, 10, 40)))
        and united == 3
    )


@pytest.mark.parametrize("shape", ["box", "ellipse"])
def test_rtstruct_rounding_is_no_crossing(shape: str) -> None:
    outer = box(5.1, 45, 5, 45)
    for left, is_hole in ((5.02, True), (4.5, False)):
        inner = box(left, 25, 10, 30) if shape == "box" else ellipse(left + 10, 20, 10, 9)
        pixels, united = filled([outer, inner], (60, 70))
        hole = fill([inner], (60, 70))
        assert united == (not is_hole) and pixels[hole].any() == (not is_hole)


def test_rtstruct_many_crossings_in_one_outline() -> None:
    corners = [(x, y) for x in range(10, 500, 10) for y in range(10, 400, 10)]
    holes = [box(x, x + 4, y, y + 4) for x, y in corners]
    crossing = [box(x + 2, x + 5, y + 2, y + 5) for x, y in corners]
    pixels, united = filled([box(0, 510, 0, 410), *holes, *crossing], (512, 512))
    assert united == len(corners)
    assert np.count_nonzero(pixels) == 510 * 410 - (16 + 9 - 4) * len(corners)


def test_rtstruct_notes_crossings_outside_image(tmp_path: Path) -> None:
    contours = [(1, box(-20, 50, 10, 50)), (1, box(-40, 30, 20, 40))]
    read = read_case(structure(tmp_path, contours), MM_WHS)
    assert np.array_equal(read.labels[1] == 3, mask((0, 50, 10, 50)))
    assert "1 contour of ROI 1 overlaps others" in " | ".join(read.notes)


def test_rtstruct_distant_crossings_unite(tmp_path: Path) -> None:
    contours = [(1, box(-9000, 30, -9000, 30)), (1, box(-9900, 20, -8000, 20))]
    read = read_case(structure(tmp_path, contours), MM_WHS)
    assert np.array_equal(read.labels[1] == 3, mask((0, 30, 0, 30)))
    assert "1 contour of ROI 1 overlaps others" in " | ".join(read.notes)


def test_rtstruct_xor_contours_stay_exclusive(tmp_path: Path) -> None:
    first, second = (10, 30, 10, 30), (20, 50, 20, 50)
    read = read_case(
        structure(tmp_path, [(1, box(*first)), (1, box(*second))], "CLOSEDPLANAR_XOR"), MM_WHS
    )
    assert np.array_equal(read.labels[1] == 3, mask(first) ^ mask(second))


def test_rtstruct_point_contours_keep_other_rois(tmp_path: Path) -> None:
    """Contours of one or two corners do not refuse the other ROIs."""
    square = box(10, 30, 10, 30)
    read = read_case(
        structure(tmp_path, [(1, square), (3, square[:2])], Doe_marker=[(4, square[:1])]), MM_WHS
    )
    assert (
        np.array_equal(np.argwhere(read.labels == 3)[:, 0], np.ones(400))
        and not read.labels[3].any()
    )
    said = " | ".join(read.notes)
    assert (
        "1 point or open line of ROI 1 (in slice 3, " in said
        and "1 point or open line of ROI 2 (in slice 4, " in said
    )
    assert "Doe" not in said


def test_rtstruct_flat_contour_encloses_no_area(tmp_path: Path) -> None:
    line = np.array([[10, 10], [30, 20], [50, 30], [20, 15]], float)
    contours = [(1, box(10, 30, 10, 30)), (1, line), (3, np.full((4, 2), 20.0))]
    read = read_case(structure(tmp_path, contours), MM_WHS)
    assert np.array_equal(read.labels[1] == 3, mask((10, 30, 10, 30))) and not read.labels[3].any()
    assert "2 points or open lines of ROI 1 (in slices 1, 3, " in " | ".join(read.notes)


def test_rtstruct_notes_state_tolerances(tmp_path: Path) -> None:
    square = box(10, 30, 10, 30)
    twice = np.concatenate([square, box(10, 30, 10, 30)[[1, 2, 3, 0]], square[1:2]])
    contours = [
        (1, square),
        (1, box(9.95, 20, 15, 25)),
        (2, square),
        (2, box(10.5, 29.5, 10.5, 29.5)),
        (3, twice),
    ]
    notes = " | ".join(read_case(structure(tmp_path, contours), MM_WHS).notes)
    assert "1 contour of ROI 1 overlaps others by up to 0.1 pixels and is not united" in notes
    assert "1 contour of ROI 1 is a hole that leaves a wall of less than 1 pixel" in notes
    assert "1 contour of ROI 1 goes around some area twice" in notes


def test_rtstruct_contour_missing_corners_is_refused(tmp_path: Path) -> None:
    structure(tmp_path, [(1, box(10, 30, 10, 30)), (2, box(10, 30, 10, 30))])
    ds = dcmread(tmp_path / "rs" / "Doe.dcm")
    ds.ROIContourSequence[0].ContourSequence[1].ContourData = ["1", "2", "3"]
    ds.save_as(tmp_path / "rs" / "Doe.dcm")
    with pytest.raises(UnreadableVolume, match="a contour of 3 numbers"):
        read_case(case(tmp_path), MM_WHS)


def test_rtstruct_nearby_contours_fill_same_slice(tmp_path: Path) -> None:
    found = structure(tmp_path, [(1, box(5, 13, 10, 20)), (2, box(20, 28, 10, 20))])
    ds = dcmread(tmp_path / "rs" / "Doe.dcm")
    contours = ds.ROIContourSequence[0].ContourSequence
    for contour, height in zip(
        contours, (-0.09, 0.09), strict=True
    ):  # both of slice 1, 0.18 slices apart
        contour.ContourData = [
            x if n % 3 < 2 else 40 + 2.5 * (1 + height)
            for n, x in enumerate(map(float, contour.ContourData))
        ]
    ds.save_as(tmp_path / "rs" / "Doe.dcm")
    assert np.array_equal(
        read_case(found, MM_WHS).labels[1] == 3, mask((5, 13, 10, 20), (20, 28, 10, 20))
    )


def test_rtstruct_memory_bounded_by_image() -> None:
    corners = np.column_stack([np.linspace(0, 511, 40_000), np.arange(40_000) % 2 * 511.0])
    fill([corners[:1000]], (512, 512))
    tracemalloc.start()
    fill([corners], (512, 512))  # crosses the rows 20 million times
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()


@pytest.mark.filterwarnings("ignore")  # so long a value is written as UN
def test_rtstruct_scribble_is_refused_at_once(tmp_path: Path) -> None:
    zigzag = np.column_stack([np.linspace(0, 69, 100_000), np.arange(100_000) % 2 * 59.0])
    found = structure(tmp_path, [(1, zigzag)])
    with pytest.raises(UnreadableVolume, match="too often for an outline"):
        read_case(found, MM_WHS)


def test_rtstruct_uneven_series_is_refused(tmp_path: Path) -> None:
    found = structure(tmp_path, [(1, box(10, 30, 10, 30))])
    path = sorted((tmp_path / "ct").iterdir())[2]
    ds = dcmread(path)
    ds.ImagePositionPatient = [
        *ds.ImagePositionPatient[:2],
        float(ds.ImagePositionPatient[2]) + 1.1,
    ]
    ds.save_as(path)
    with pytest.raises(
        GeometryError,
        match=f"^the image series that {found.name} was drawn on .*slices .* mm apart",
    ):
        read_case(found, MM_WHS)


def test_rtstruct_sister_folder_series_gets_remedy(tmp_path: Path) -> None:
    structure(tmp_path, [(1, box(10, 30, 10, 30))])
    with pytest.raises(InputError) as caught:
        read_case(case(tmp_path / "rs"), MM_WHS)
    assert "give the folder that holds both" in caught.value.remedy
    assert (read_case(case(tmp_path), MM_WHS).labels == 3).any()


def test_rtstruct_messages_omit_roi_names(tmp_path: Path) -> None:
    found = structure(
        tmp_path, [(1, box(10, 30, 10, 30))], Doe_John_lesion=[(2, box(10, 30, 10, 30))]
    )
    with pytest.raises(
        UnknownLabels,
        match=r"holds 2, which the model does not know; all its values: 1 \(SCT:87878005\), 2\n",
    ) as caught:
        read_case(found, MM_WHS)
    assert (
        "Doe" not in str(caught.value)
        and "mask2ct labels FILE shows the names" in caught.value.remedy
    )


def test_overlaps_are_those_of_every_pair() -> None:
    """The pairs of contours that are compared, in their order, on heaps of 1 to 60 contours."""
    draw = np.random.default_rng(5)
    turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    for count in range(1, 61):
        heap = []
        for _ in range(count):
            radius = draw.choice([0.0, 0.5, 3, 8, 30])
            # whole numbers, so that extents touch
            centre = np.round(draw.uniform(-5, 70, 2))
            heap.append(centre + radius * np.column_stack([np.cos(turn), np.sin(turn)]))
        extents = [(contour.min(axis=0), contour.max(axis=0)) for contour in heap]
        expected = [
            (n, m)
            for n, (low, high) in enumerate(extents)
            for m, (second_low, second_high) in enumerate(extents)
            if m > n and (second_low < high).all() and (second_high > low).all()
        ]
        assert list(_overlapping(heap)) == expected
