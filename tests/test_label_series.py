"""Series of DICOM slices whose pixels are labels: where they lie by GDCM's reading, and which
series are refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_masks import save, slices
from pydicom import dcmread, dcmwrite
from samples import blobs, directions, rotation, write_slices

from runtime.core.errors import GeometryError, UnreadableVolume
from runtime.core.labels import MM_WHS, MM_WHS_INDICES
from runtime.io.case_finding import find_cases
from runtime.io.cases import read_case, read_mask


def read(folder: Path, table=MM_WHS):
    (found,) = find_cases([folder])
    return read_case(found, table)


def by_gdcm(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


@pytest.mark.parametrize("tilt", [(0.0, 0.0, 0.0), (11.0, -7.0, 16.0)], ids=["straight", "oblique"])
def test_axis_orders_agree_with_gdcm(tilt: tuple[float, float, float], tmp_path: Path) -> None:
    values = blobs((4, 7, 9))
    for n, direction in enumerate(directions()):
        folder = save(tmp_path / str(n), slices(values, direction=rotation(tilt) @ direction))
        ours, theirs = read(folder), by_gdcm(folder)
        inverse = np.linalg.inv(ours.geometry.affine)
        for index in [(0, 0, 0), (8, 0, 0), (0, 6, 0), (0, 0, 3), (8, 6, 3), (4, 3, 2)]:
            mm = np.array([*theirs.TransformIndexToPhysicalPoint(index), 1])
            i, j, k = np.rint((inverse @ mm)[:3]).astype(int)
            assert np.abs(ours.geometry.affine @ [i, j, k, 1] - mm).max() < 1e-3
            assert MM_WHS.labels[ours.labels[k, j, i]].value == theirs.GetPixel(index)


def test_slice_files_in_any_order(tmp_path: Path) -> None:
    """The slices may be named one by one, in any order."""
    values = blobs((4, 7, 9))
    folder = save(tmp_path / "s", slices(values))
    (found,) = find_cases(sorted(folder.iterdir(), reverse=True))
    assert (
        np.array_equal(read_case(found, MM_WHS).labels, read(folder).labels)
        and len(found.files) == 4
    )


def test_transfer_syntaxes_hold_same_labels(tmp_path: Path) -> None:
    """Big-endian and compressed slices hold the same labels."""
    from pydicom.uid import ExplicitVRBigEndian, RLELossless

    values = blobs((3, 8, 8))
    plain = read(save(tmp_path / "plain", slices(values)))
    for n, syntax in enumerate((RLELossless, ExplicitVRBigEndian)):
        made = slices(values)
        folder = tmp_path / str(n)
        folder.mkdir()
        for k, ds in enumerate(made):
            if syntax == RLELossless:
                ds.compress(RLELossless, generate_instance_uid=False)
            else:
                ds.PixelData = values[k].astype(">u2").tobytes()
                ds.file_meta.TransferSyntaxUID = syntax
            if syntax == RLELossless:
                ds.save_as(folder / f"{k}.dcm", enforce_file_format=True)
            else:
                dcmwrite(
                    folder / f"{k}.dcm",
                    ds,
                    little_endian=False,
                    implicit_vr=False,
                    force_encoding=True,
                )
        assert np.array_equal(read(folder).labels, plain.labels)


def test_original_system_slices_are_read(
    tmp_path: Path,
) -> None:
    """A note names what the slices of the original system do not state."""
    write_slices(tmp_path, 1)
    (path,) = tmp_path.rglob("*_gt.dcm")
    ds = dcmread(path)
    for key in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "SpacingBetweenSlices",
        "PixelSpacing",
    ):  # ITK writes them once it has read a series
        if key in ds:
            delattr(ds, key)
    ds.NominalScannedPixelSpacing = [1, 1]
    ds.save_as(path)
    mask = read(path, MM_WHS_INDICES)
    assert mask.labels.shape == (1, 64, 64) and np.array_equal(
        mask.labels, sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    )
    assert any("states no position" in n for n in mask.notes) and any(
        "thickness" in n for n in mask.notes
    )
    del ds.Modality, ds.NominalScannedPixelSpacing, ds.SOPInstanceUID, ds.SeriesInstanceUID
    ds.PixelSpacing = [2.0, 3.0]
    ds.save_as(path)
    assert read(path, MM_WHS_INDICES).geometry.spacing == (3.0, 2.0, 1.0)
    del ds.PixelSpacing
    ds.save_as(path)
    with pytest.raises(GeometryError, match="PixelSpacing"):
        read(path, MM_WHS_INDICES)


def grey(made) -> None:
    noise = np.random.default_rng(0).integers(0, 60, (40, 40)).astype(np.uint16)
    for ds in made:
        ds.Modality, ds.PixelData = "MR", noise.tobytes()


def each(change):
    return lambda made: [change(k, ds) for k, ds in enumerate(made)]


def shift(k: int, ds, by: tuple[float, float, float]) -> None:
    ds.ImagePositionPatient = [
        float(a) + k * b for a, b in zip(ds.ImagePositionPatient, by, strict=True)
    ]


def turn(ds) -> None:
    ds.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]


def wider(ds) -> None:
    ds.Columns, ds.PixelData = 20, ds.PixelData[: 40 * 40]


BAD = {
    "gantry tilt": (
        each(lambda k, ds: shift(k, ds, (0, 0.5, 0))),
        GeometryError,
        "is sheared: its slices drift 2.50 mm",
    ),
    "uneven gaps": (
        lambda made: shift(1, made[2], (0, 0, 0.7)),
        GeometryError,
        r"is uneven: it has slices 1.8, 2.5, 3.2 mm apart\n.*\n.*\n.*resample",
    ),
    "missing slice": (
        lambda made: made.pop(3),
        GeometryError,
        r"2.5, 5 mm apart \(some are missing\)\n.*\n.*\n.*whole series",
    ),
    "duplicate slice": (
        lambda made: shift(1, made[2], (0, 0, 2.5)),
        GeometryError,
        "duplicate slices",
    ),
    "mixed orientation": (lambda made: turn(made[4]), GeometryError, "mixed orientations"),
    "mixed sizes": (lambda made: wider(made[1]), UnreadableVolume, "20 x 40, 40 x 40 pixels"),
    "mixed spacing": (
        lambda made: setattr(made[1], "PixelSpacing", [1, 1]),
        GeometryError,
        "mixed orientations or spacings",
    ),
    "no position": (
        lambda made: delattr(made[1], "ImagePositionPatient"),
        GeometryError,
        "no usable ImagePositionPatient",
    ),
    "no direction": (
        lambda made: each(lambda k, ds: setattr(ds, "ImageOrientationPatient", [1, 0, 0, 1, 0, 0]))(
            made
        ),
        GeometryError,
        "which is not orthonormal",
    ),
    "multi-frame": (
        lambda made: setattr(made[0], "NumberOfFrames", 3),
        UnreadableVolume,
        "multi-frame",
    ),
    "truncated": (
        lambda made: setattr(made[0], "PixelData", bytes(100)),
        UnreadableVolume,
        "truncated: it has 100 of 3200 bytes",
    ),
    "CT": (
        each(lambda k, ds: setattr(ds, "RescaleIntercept", -1024) or setattr(ds, "Modality", "CT")),
        UnreadableVolume,
        "a CT image, not a mask",
    ),
    "grey": (grey, UnreadableVolume, "an MR image, not a mask"),
    "colour": (lambda made: setattr(made[0], "SamplesPerPixel", 3), UnreadableVolume, "colour"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_dicom_series_is_refused(kind: str, tmp_path: Path) -> None:
    """The error states the reason."""
    change, error, fact = BAD[kind]
    made = slices(blobs((6, 40, 40)))
    change(made)
    with pytest.raises(error, match=fact) as caught:
        read(save(tmp_path / "s", made))
    assert caught.value.remedy and caught.value.expected and "Planted" not in str(caught.value)


@pytest.mark.parametrize(("spacing", "off"), [(3.27, 0.04), (2.5, 0.1), (5.0, 0.24), (0.5, 0.09)])
def test_slightly_uneven_slices_are_read(spacing: float, off: float, tmp_path: Path) -> None:
    """Up to 0.1 mm or 5 % of the spacing, on the mean distance, with a note that reaches whoever
    reads the mask.
    """
    values = blobs((9, 20, 24))
    series = slices(values, spacing=(1.5, 1.25, spacing))
    for k in (2, 5):
        shift(1, series[k], (0, 0, off if k == 2 else -off))
    mask = read(save(tmp_path / "s", series))
    assert np.array_equal(mask.labels, read(save(tmp_path / "even", slices(values))).labels)
    assert np.allclose(mask.geometry.spacing, (1.5, 1.25, spacing)) and mask.geometry.origin == (
        -12.5,
        3.0,
        40.0,
    )
    (note,) = mask.notes
    assert (
        f"is uneven: slices lie up to {off:.2g} mm off" in note
        and f"mean of {spacing:g} mm" in note
    )


@pytest.mark.parametrize(("spacing", "off"), [(2.5, 0.13), (5.0, 0.26), (0.3, 0.08)])
def test_uneven_slices_are_refused(spacing: float, off: float, tmp_path: Path) -> None:
    """Slices are refused where they are less even than the limit allows."""
    series = slices(blobs((9, 20, 24)), spacing=(1.5, 1.25, spacing))
    shift(1, series[4], (0, 0, off))
    with pytest.raises(GeometryError, match="is uneven") as caught:
        read(save(tmp_path / "s", series))
    assert "whole series" not in str(caught.value)


def test_missing_slice_is_not_uneven(tmp_path: Path) -> None:
    for k in range(1, 19):
        series = slices(blobs((20, 8, 8)), spacing=(1, 1, 0.15))
        del series[k]
        with pytest.raises(GeometryError, match="some are missing"):
            read(save(tmp_path / str(k), series))


def test_one_uid_at_several_positions(tmp_path: Path) -> None:
    """Files of one SOP Instance UID are several slices where their positions differ."""
    values = blobs((6, 20, 24))
    plain, shared = slices(values), slices(values)
    for ds in shared:
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = shared[0].SOPInstanceUID
    folder = save(tmp_path / "shared", shared)
    for file in sorted(folder.iterdir())[:3]:
        (folder / f"copy_of_{file.name}").write_bytes(file.read_bytes())
    mask = read(folder)
    assert np.array_equal(mask.labels, read(save(tmp_path / "plain", plain)).labels)
    assert (
        np.array_equal(mask.labels, read(folder).labels)
        and mask.dicom is not None
        and len(mask.dicom.sop_instance_uids) == 6
    )


def test_saved_again_slice_counts_once(tmp_path: Path) -> None:
    values = blobs((6, 20, 24))
    series = slices(values)
    folder = save(tmp_path / "s", series)
    series[3].InstitutionName = "elsewhere"
    save(folder, [series[3]], "again")
    assert len(list(folder.iterdir())) == 7
    assert np.array_equal(
        read(folder).labels, read(save(tmp_path / "plain", slices(values))).labels
    )


def test_edited_slice_copy_is_refused(tmp_path: Path) -> None:
    """An edited slice beside its original is refused."""
    series = slices(blobs((6, 20, 24)))
    folder = save(tmp_path / "s", series)
    series[3].PixelData = bytes(len(series[3].PixelData))
    save(folder, [series[3]], "edited")
    with pytest.raises(
        UnreadableVolume, match="two files of one SOP Instance UID in one place, and they differ"
    ):
        read(folder)


def test_incomplete_series_warns(tmp_path: Path) -> None:
    """A series that states more images than there are gives a note."""
    series = slices(blobs((6, 20, 24)), ImagesInAcquisition=6)
    assert read(save(tmp_path / "whole", series)).notes == ()
    cases = {"first": series[1:], "last": series[:-1]}
    for end, rest in cases.items():
        (note,) = read(save(tmp_path / end, rest)).notes
        assert "may not be complete: it has 5 of the 6 images" in note
    unstated = slices(blobs((6, 20, 24)))
    (note,) = read(save(tmp_path / "from 3", unstated[2:])).notes
    assert "may not be complete: its images are numbered from 3" in note
    for ds in unstated:
        ds.InstanceNumber -= 1
    (case,) = find_cases([save(tmp_path / "from 0", unstated)])
    assert read_mask(case).notes == () and case.whole
