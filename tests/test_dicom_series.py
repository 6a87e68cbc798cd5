"""The DICOM series and its SEG: where voxels lie for every reader, what the headers say, and
that a second run says the same.
"""

from __future__ import annotations

import hashlib
import io
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.uid import RTStructureSetStorage, SegmentationStorage
from samples import directions, synth, write_mask
from series import SOURCE, TILT, Series, assert_in_place, write_series

from runtime import GeometryError, InputError
from runtime.core.manifest import Label, LabelTable
from runtime.core.volume import CTSlab, DicomSource, Geometry, LabelVolume
from runtime.engines.fake import fake_manifest
from runtime.io.writers.registry import FORMATS, FormatOptions, OutputRecord


def gdcm(series: Series) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    ids = reader.GetGDCMSeriesIDs(str(series.folder))
    (ct,) = [
        i
        for i in ids
        if len(reader.GetGDCMSeriesFileNames(str(series.folder), i)) == len(series.slices)
    ]
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series.folder), ct))
    return reader.Execute()


def assert_every_voxel_in_place(
    series: Series, values: NDArray[Any], affine: NDArray[np.float64]
) -> None:
    assert values.size == series.hu.size
    assert_in_place(series.points.reshape(-1, 3), series.hu.ravel(), values, affine)


@pytest.mark.parametrize("tilt", [np.eye(3), TILT], ids=["straight", "oblique"])
@pytest.mark.parametrize(
    "direction",
    directions(),
    ids=lambda d: "".join("+-"[int(c.sum() < 0)] + "xyz"[int(np.abs(c).argmax())] for c in d.T),
)
def test_gdcm_and_highdicom_place_every_voxel(
    direction: np.ndarray, tilt: np.ndarray, tmp_path: Path
) -> None:
    series = write_series(tmp_path, tilt @ direction)
    read = gdcm(series)
    affine = Geometry.from_parts(read.GetOrigin(), read.GetSpacing(), read.GetDirection()).affine
    assert_every_voxel_in_place(series, sitk.GetArrayFromImage(read).transpose(2, 1, 0), affine)
    volume = highdicom.get_volume_from_series(series.slices)
    assert_every_voxel_in_place(series, volume.array, volume.affine)
    normals = [
        np.cross(d.ImageOrientationPatient[:3], d.ImageOrientationPatient[3:])
        @ d.ImagePositionPatient
        for d in series.slices
    ]
    assert normals == sorted(normals) and [d.InstanceNumber for d in series.slices] == list(
        range(1, len(normals) + 1)
    )
    canonical = np.reshape(series.slices[0].ImageOrientationPatient, (2, 3))
    assert (
        canonical[0].argmax() == 0 and canonical[1].argmax() == 1
    )  # right to left, front to back: the picture is not upside down


@pytest.mark.parametrize("direction", [TILT @ d for d in directions()[::5]], ids=str)
def test_enhanced_ct_places_every_voxel(direction: np.ndarray, tmp_path: Path) -> None:
    series = write_series(tmp_path, direction, enhanced=True, segmentation="binary")
    read = sitk.ReadImage(str(series.folder / "ct.dcm"))
    affine = Geometry.from_parts(read.GetOrigin(), read.GetSpacing(), read.GetDirection()).affine
    assert_every_voxel_in_place(series, sitk.GetArrayFromImage(read).transpose(2, 1, 0), affine)
    volume = highdicom.imread(series.folder / "ct.dcm").get_volume()
    assert_every_voxel_in_place(series, volume.array, volume.affine)
    mask = highdicom.seg.segread(series.folder / "seg.dcm").get_volume(combine_segments=True)
    labelled = series.mask.labels > 0
    assert_in_place(series.points[labelled], series.mask.labels[labelled], mask.array, mask.affine)
    ds = pydicom.dcmread(series.folder / "ct.dcm")
    assert (
        ds[0x0008001C].value == "YES"
        and ds.ImageType[0] == "DERIVED"
        and ds.PatientID.startswith("SYNTH-")
    )
    assert "mask sha256" in ds.DerivationDescription and ds.SOPInstanceUID.startswith("2.25.")
    before = digests(series.folder)
    assert (
        digests(write_series(tmp_path, direction, enhanced=True, segmentation="binary").folder)
        == before
    )


@pytest.mark.parametrize("enhanced", [False, True], ids=["classic", "enhanced"])
def test_slices_are_written_as_they_come(enhanced: bool, tmp_path: Path) -> None:
    shape = (96, 256, 256)  # 12 MiB
    mask = LabelVolume(
        np.zeros(shape, np.uint8), Geometry(np.diag([1.0, 1.0, -2.0, 1.0]))
    )  # towards the feet: the last slice comes first
    record = OutputRecord("case", None, mask, fake_manifest(), "fake (given)", "", 0)
    writer = FORMATS["dicom"](FormatOptions(enhanced=enhanced, segmentation="none"))
    writer.check(record.manifest, tmp_path)
    slabs = (CTSlab(np.full((4, *shape[1:]), k, np.int16), 0, k) for k in range(0, 96, 4))
    tracemalloc.start()
    try:
        (folder,) = writer.write(tmp_path, record, slabs)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    read = (
        sitk.ReadImage(str(folder / "ct.dcm"))
        if enhanced
        else gdcm(Series(folder, np.empty(shape, np.int16), mask))
    )
    assert sitk.GetArrayFromImage(read)[:, 0, 0].tolist() == [
        k // 4 * 4 for k in reversed(range(96))
    ]


def test_single_slice_keeps_thickness_and_place(tmp_path: Path) -> None:
    series = write_series(tmp_path, TILT, shape=(1, 8, 9))
    (ds,) = series.slices
    assert (
        np.array_equal(ds.pixel_array, series.hu[0])
        and ds.SliceThickness == 3.1
        and ds.PixelSpacing == [0.9, 0.7]
    )
    assert np.allclose(ds.ImagePositionPatient, series.points[0, 0, 0], atol=1e-3)


@pytest.mark.parametrize("kind", ["binary", "labelmap"])
@pytest.mark.parametrize("direction", [np.eye(3), *directions()[3::11]], ids=str)
def test_seg_is_mask_on_series_grid(kind: str, direction: np.ndarray, tmp_path: Path) -> None:
    """The SEG holds the mask on the grid of the series."""
    series = write_series(tmp_path, TILT @ direction, segmentation=kind)
    seg = highdicom.seg.segread(series.folder / "seg.dcm")
    volume = seg.get_volume(combine_segments=True)
    labelled = series.mask.labels > 0
    assert_in_place(
        series.points[labelled], series.mask.labels[labelled], volume.array, volume.affine
    )
    assert np.count_nonzero(volume.array) == np.count_nonzero(labelled)
    for number, label in enumerate(fake_manifest().labels.labels[1:], 1):
        described = seg.get_segment_description(number)
        assert (described.segment_label, described.segmented_property_type.value) == (
            label.name,
            label.snomed,
        )
    ct = series.slices
    (referenced,) = seg.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == ct[0].SeriesInstanceUID
    assert {r.ReferencedSOPInstanceUID for r in referenced.ReferencedInstanceSequence} == {
        d.SOPInstanceUID for d in ct
    }
    assert (seg.FrameOfReferenceUID, seg.StudyInstanceUID, seg.PatientID) == (
        ct[0].FrameOfReferenceUID,
        ct[0].StudyInstanceUID,
        ct[0].PatientID,
    )
    assert seg[0x0008001C].value == "YES" and "NOT FOR DIAGNOSIS" in seg.SeriesDescription


def test_seg_of_labels_without_snomed(tmp_path: Path) -> None:
    """Labels without a SNOMED code make a SEG too."""
    table = LabelTable(
        tuple(Label(f"étiquette {n}" if n else "background", 10 * n) for n in range(8))
    )
    made = write_series(tmp_path, segmentation="binary", manifest=fake_manifest(table))
    described = highdicom.seg.segread(made.folder / "seg.dcm").get_segment_description(3)
    assert (
        described.segment_label == "étiquette 3"
        and described.segmented_property_type.scheme_designator == "99MASK2CT"
    )
    assert pydicom.dcmread(made.folder / "0001.dcm").get("BodyPartExamined") is None


def test_empty_mask_gives_series_and_seg(
    tmp_path: Path, fake_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mask = write_mask(tmp_path / "m.nii.gz", np.zeros((3, 20, 20), np.uint8))
    assert synth(fake_model, tmp_path / "out", mask, "--format", "dicom") == 0
    others = [record for record in caplog.records if not record.name.startswith("mask2ct")]
    assert not others  # highdicom would say so on the screen
    assert (
        not highdicom.seg.segread(tmp_path / "out" / "m" / "seg.dcm")
        .get_volume(combine_segments=True)
        .array.any()
    )


def test_the_profile_of_a_detached_series(tmp_path: Path) -> None:
    series = write_series(tmp_path, source=SOURCE, seed=7)
    for ds in series.slices:
        assert (
            ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
            and ds.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"
        )
        assert (
            ds.SOPClassUID == "1.2.840.10008.5.1.4.1.1.2"
            and ds.ImageType == ["DERIVED", "SECONDARY", "AXIAL"]
            and ds.Modality == "CT"
        )
        assert ds[0x0008001C].value == "YES" and ds[0x0008001C].VR == "CS"
        assert (
            ds.PatientID.startswith("SYNTH-")
            and str(ds.PatientName).startswith("SYNTH-")
            and ds.PatientBirthDate == ds.PatientSex == ""
        )
        assert ds.PatientIdentityRemoved == "YES" and ds.DeidentificationMethod
        assert (
            ds.SeriesDescription == "SYNTHETIC CT - NOT FOR DIAGNOSIS"
            and ds.BurnedInAnnotation == "NO"
            and ds.SeriesNumber == 9000
        )
        (equipment,) = ds.ContributingEquipmentSequence
        (tag,) = equipment.PurposeOfReferenceCodeSequence
        assert (tag.CodeValue, tag.CodingSchemeDesignator, tag.CodeMeaning) == (
            "109100",
            "DCM",
            "Synthesizing Equipment",
        )
        assert "model fake" in ds.DerivationDescription and "seed 7" in ds.DerivationDescription
        assert (
            f"mask sha256 {series.mask.digest.hex()}" in ds.DerivationDescription
            and "engine file none" in ds.DerivationDescription
        )
        assert (
            (ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType) == (0, 1, "HU")
            and ds.KVP is None
            and ds.AcquisitionNumber is None
        )
        assert (ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation) == (
            16,
            16,
            15,
            1,
        )
        assert (
            "SourceImageSequence" not in ds
            and ds.BodyPartExamined == "HEART"
            and ds.PatientPosition == "HFS"
        )
    uids = {ds.SOPInstanceUID for ds in series.slices}
    assert len(uids) == 5 and all(
        u.startswith("2.25.") and len(u) <= 64 and u.is_valid for u in uids
    )
    assert (
        len({ds.SeriesInstanceUID for ds in series.slices})
        == len({ds.FrameOfReferenceUID for ds in series.slices})
        == 1
    )


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_repeated_run_keeps_dicom_uids(tmp_path: Path) -> None:
    """A second run writes the same objects, and a run with other keys writes others."""
    first = write_series(tmp_path / "0", segmentation="binary")
    assert digests(write_series(tmp_path / "1", segmentation="binary").folder) == digests(
        first.folder
    )
    assert digests(write_series(tmp_path / "0", segmentation="binary").folder) == digests(
        first.folder
    )  # in its own place
    assert digests(
        write_series(tmp_path / "2", segmentation="binary", variant=0).folder
    ) == digests(first.folder)  # the same picture
    seen = {ds.SOPInstanceUID for ds in first.slices}
    kinds = ({"seed": 1}, {"variant": 1}, {"direction": TILT}, {"source": SOURCE, "attach": True})
    for n, change in enumerate(kinds):
        other = {ds.SOPInstanceUID for ds in write_series(tmp_path / f"x{n}", **change).slices}  # type: ignore[arg-type]
        assert not other & seen
        seen |= other
    assert {
        ds.SOPInstanceUID for ds in write_series(tmp_path / "s", source=SOURCE).slices
    } <= seen  # detached: the source makes no difference


@pytest.mark.parametrize(
    ("sop_class", "sequence"),
    [
        (SegmentationStorage, "SourceImageSequence"),
        (RTStructureSetStorage, "SourceInstanceSequence"),
    ],
)
def test_attached_series_joins_mask_study(sop_class: str, sequence: str, tmp_path: Path) -> None:
    """An attached series is in the study of its mask and refers to the mask."""
    source = DicomSource(
        sop_class, SOURCE.sop_instance_uids, SOURCE.frame_of_reference_uid, SOURCE.attributes
    )
    series = write_series(tmp_path, source=source, attach=True, segmentation="binary")
    seg = pydicom.dcmread(series.folder / "seg.dcm")
    for ds in [*series.slices, seg]:
        assert {
            k: str(ds[k].value) for k in SOURCE.attributes
        } == SOURCE.attributes and ds.FrameOfReferenceUID == "1.2.3.99"
        assert (
            ds[0x0008001C].value == "YES"
            and "PatientIdentityRemoved" not in ds
            and ds.SeriesInstanceUID.startswith("2.25.")
        )
    for ds in series.slices:
        (item,) = ds[sequence].value
        assert (item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID) == (
            sop_class,
            "1.2.3.4.5",
        )


@pytest.mark.parametrize("attach", [False, True])
def test_dicom_bytes_equal_pydicoms(attach: bool, tmp_path: Path) -> None:
    """The files are byte for byte what pydicom writes."""
    named = {**SOURCE.attributes, "PatientName": "Müller^Jörg"}
    series = write_series(
        tmp_path, source=replace(SOURCE, attributes=named) if attach else None, attach=attach
    )
    for path in sorted(series.folder.glob("0*.dcm")):
        ds = pydicom.dcmread(path)
        again = pydicom.Dataset()
        for element in ds:  # decoded, so that it is encoded anew
            again.add(element)
        again.file_meta = ds.file_meta
        assert again.PatientName == "Müller^Jörg" or not attach
        whole = io.BytesIO()
        pydicom.dcmwrite(whole, again, enforce_file_format=True)
        assert whole.getvalue() == path.read_bytes()


def test_invalid_source_values_are_attached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A series is attached to a source that has invalid values.

    As hospitals have it: dates that never were, names of one part, values too long.

    Nothing is said of them, for they name a patient.
    """
    odd = {
        **SOURCE.attributes,
        "PatientBirthDate": "19700229",
        "PatientName": "DOE",
        "StudyID": "X" * 20,
        "StudyDate": "unknown",
    }
    series = write_series(
        tmp_path, source=replace(SOURCE, attributes=odd), attach=True, segmentation="binary"
    )
    for path in series.folder.iterdir():
        ds = pydicom.dcmread(path)
        for keyword in odd:
            assert ds.get_item(keyword).value.decode().strip(" \0") == odd[keyword]  # type: ignore[union-attr]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "direction",
    [np.eye(3), np.diag([1.0, -1.0, -1.0])],
    ids=["towards the head", "towards the feet"],
)
def test_slices_refer_to_source_slices(direction: np.ndarray, tmp_path: Path) -> None:
    """Each slice refers to the slice of the label series at its position."""
    source = DicomSource(
        "1.2.840.10008.5.1.4.1.1.2",
        tuple(f"1.2.3.{k}" for k in range(5)),
        "1.2.3.99",
        SOURCE.attributes,
    )
    series = write_series(tmp_path, direction, source=source, attach=True)
    for ds in series.slices:
        (item,) = ds.SourceImageSequence
        k = int(item.ReferencedSOPInstanceUID.rpartition(".")[2])
        assert np.isclose(ds.ImagePositionPatient[2], series.points[k, 0, 0, 2])


@pytest.mark.parametrize("missing", ["all", "frame of reference", "study"])
def test_attach_needs_study_and_frame(missing: str, tmp_path: Path) -> None:
    """Nothing is attached to a mask that lacks its source, study or frame of reference."""
    study = {k: v for k, v in SOURCE.attributes.items() if k != "StudyInstanceUID"}
    source = {
        "all": None,
        "frame of reference": DicomSource(SegmentationStorage, ("1.2",), "", SOURCE.attributes),
        "study": DicomSource(SegmentationStorage, ("1.2",), "1.3", study),
    }[missing]
    with pytest.raises(InputError, match="mask"):
        write_series(tmp_path, source=source, attach=True)
    assert not list(tmp_path.iterdir())


def test_sheared_grid_is_refused(tmp_path: Path) -> None:
    """A shear that a series of slices cannot hold is refused.

    Cosine 9e-4 between slices and rows: within `Geometry`'s tolerance, 0.27 mm over 300 mm.
    """
    affine = np.eye(4)
    affine[1, 2] = 9e-4
    mask = LabelVolume(np.zeros((301, 4, 4), np.uint8), Geometry(affine))
    writer = FORMATS["dicom"](FormatOptions())
    writer.check(fake_manifest(), tmp_path)
    with pytest.raises(GeometryError, match=r"far corner 0\.27 mm off"):
        writer.check_mask(mask)


@pytest.fixture
def without_highdicom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)


def test_without_the_dicom_extra_nothing_starts(
    without_highdicom: None, tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask, out = write_mask(tmp_path / "m.nii.gz"), tmp_path / "out"
    assert synth(fake_model, out, mask, "--format", "dicom") == 3
    assert "mask2ct[dicom]" in capsys.readouterr().err and not out.exists()
    assert synth(fake_model, out, mask, "--format", "dicom", "--segmentation", "none") == 0
    for option in (
        ["--attach"],
        ["--enhanced"],
        ["--segmentation", "none"],
    ):  # without --format dicom
        assert synth(fake_model, out, mask, *option) == 2


def test_the_command_writes_variants_as_folders(tmp_path: Path, fake_model: Path) -> None:
    mask = write_mask(tmp_path / "m.nii.gz", direction=directions()[20])
    out, options = tmp_path / "out", ("--format", "dicom", "--variants", "2")
    assert synth(fake_model, out, mask, *options) == 0
    made = {p.name: digests(p) for p in sorted(out.iterdir()) if p.is_dir()}
    assert list(made) == ["m_v0", "m_v1"] and list(made["m_v0"])[-1] == "seg.dcm"
    assert synth(fake_model, out, mask, *options, "--batch", "1") == 0
    assert {p.name: digests(p) for p in sorted(out.iterdir()) if p.is_dir()} == made
