"""Folders with CT series that mask2ct wrote: no masks, but a person may draw contours on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_masks import structure_set
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from samples import blobs, rotation, synth, write_mask

from runtime.__main__ import main
from runtime.core.console import run
from runtime.core.labels import MM_WHS
from runtime.core.volume import LabelVolume
from runtime.io.case_finding import find_cases
from runtime.io.cases import read_case

# Column and row of the corners of a convex outline.
OUTLINE = np.array([[3.31, 2.73], [15.62, 4.17], [12.28, 13.81], [5.43, 11.94]])


@pytest.fixture
def series(tmp_path: Path, fake_model: Path) -> Path:
    """A folder with an oblique synthetic CT series and its SEG."""
    mask = write_mask(
        tmp_path / "m.nii.gz", blobs((7, 20, 24)), direction=rotation((9.0, -5.0, 13.0))
    )
    assert synth(fake_model, tmp_path / "out", mask, "--format", "dicom") == 0
    return tmp_path / "out" / "m"


def images_of(folder: Path) -> list[Dataset]:
    headers = [dcmread(path, stop_before_pixels=True) for path in sorted(folder.glob("*.dcm"))]
    return [header for header in headers if header.Modality == "CT"]


def axes(image: Dataset) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The position of the first pixel, and the steps of a column and of a row, in mm (3, 2)."""
    row, column = np.reshape([float(x) for x in image.ImageOrientationPatient], (2, 3))
    between_rows, between_columns = (float(x) for x in image.PixelSpacing)
    position = np.array([float(x) for x in image.ImagePositionPatient])
    return position, np.stack([row * between_columns, column * between_rows], axis=1)


def contour(image: Dataset) -> NDArray[np.float64]:
    position, steps = axes(image)
    return position + OUTLINE @ steps.T


def inside_outline(volume: LabelVolume, image: Dataset) -> NDArray[np.bool_]:
    """The voxels whose center lies in the plane of an image and left of every edge."""
    depth, height, width = volume.labels.shape
    k, j, i = np.meshgrid(*map(np.arange, (depth, height, width)), indexing="ij")
    ijk = np.stack([i, j, k, np.ones_like(i)], axis=-1)
    position, steps = axes(image)
    offsets = (ijk @ volume.geometry.affine.T)[..., :3] - position
    pixels = offsets @ np.linalg.pinv(steps).T
    across = offsets - pixels @ steps.T
    result = np.linalg.norm(across, axis=-1) < 0.01
    for start, end in zip(OUTLINE, np.roll(OUTLINE, -1, axis=0), strict=True):
        edge, corner = end - start, pixels - start
        result &= edge[0] * corner[..., 1] - edge[1] * corner[..., 0] > 0
    return result


@pytest.mark.parametrize("refers", [True, False], ids=["by its images", "by its frame"])
@pytest.mark.parametrize("as_file", [True, False], ids=["file", "folder"])
def test_contours_on_synthetic_ct_are_read(refers: bool, as_file: bool, series: Path) -> None:
    images = images_of(series)
    drawn_on = images[1:4]
    path = structure_set(
        series / "rt.dcm", images, {"left ventricle": [contour(image) for image in drawn_on]}
    )
    if not refers:
        ds = dcmread(path)
        frame = ds.ReferencedFrameOfReferenceSequence[0]
        del frame.RTReferencedStudySequence
        for item in ds.ROIContourSequence[0].ContourSequence:
            del item.ContourImageSequence
        ds.save_as(path)
    (case,) = find_cases([path if as_file else series])
    assert len(case.grid) == len(images)
    assert case.whole
    if not refers:
        return
    volume = read_case(case, MM_WHS)
    expected = np.zeros(volume.labels.shape, bool)
    for image in drawn_on:
        expected |= inside_outline(volume, image)
    assert expected.sum() > 250
    assert np.array_equal(volume.labels == 3, expected)
    assert set(np.unique(volume.labels)) == {0, 3}


def test_acquired_series_is_preferred(series: Path) -> None:
    """Contours without a reference to images lie on the acquired series of their frame."""
    images = images_of(series)
    acquired = series / "acquired"
    acquired.mkdir()
    for n, path in enumerate(sorted(series.glob("*.dcm"))):
        ds = dcmread(path)
        if ds.Modality == "CT":
            ds.SeriesDescription, ds.SeriesInstanceUID = "planted", "1.2.3"
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{n}"
            ds.save_as(acquired / path.name)
    path = structure_set(series / "rt.dcm", images, {"left ventricle": [contour(images[2])]})
    ds = dcmread(path)
    del ds.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence
    del ds.ROIContourSequence[0].ContourSequence[0].ContourImageSequence
    ds.save_as(path)
    (case,) = [case for case in find_cases([series]) if case.kind == "rtstruct"]
    assert {file.parent for file in case.grid} == {acquired}


def test_own_series_is_one_warning(
    series: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mask(series / "mine.nii.gz")
    assert run(main, ["labels", str(series)]) == 0
    count = len([*series.glob("*.dcm")])
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {count} files were written by mask2ct and are not taken for masks (name them"
        " to have them)"
    ]


def test_own_volumes_are_named_once(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their names are the user's own: twelve of them, or all with --verbose."""
    for n in range(15):
        write_mask(tmp_path / f"m{n:02d}.nii.gz", blobs((2, 8, 8)))
    assert synth(fake_model, tmp_path, tmp_path) == 0
    capsys.readouterr()
    for verbose, last in (((), "m11_ct.nii.gz, …"), (("--verbose",), "m14_ct.nii.gz")):
        assert synth(fake_model, tmp_path, tmp_path, "--dry-run", *verbose) == 0
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: 15 files were written by mask2ct")
        assert line.endswith(last)


def test_masks_called_like_structures_warn_once(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = []
    for n in range(3):
        (tmp_path / str(n)).mkdir()
        name = ("liver", "spleen", "aorta")[n]
        masks.append(str(write_mask(tmp_path / str(n) / f"{name}.nii.gz", blobs((2, 8, 8)))))
    assert run(main, ["labels", *masks]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    (line,) = warnings
    assert line.startswith("warning: 3 files (")
    assert "are called like a structure and read by their values" in line
