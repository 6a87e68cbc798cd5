"""Nothing of the source patient reaches an output, a log or a report in detached mode, and no
name leads out of the output folder.
"""

from __future__ import annotations

import gzip
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_masks import save, segmentation, slices, structure_set
from pydicom.uid import RTStructureSetStorage, SegmentationStorage
from samples import MM_WHS_VALUES, blobs, synth, write_fake_model, write_mask
from series import write_series

from runtime import Synthesizer
from runtime.__main__ import main
from runtime.core.console import run
from runtime.core.labels import MM_WHS
from runtime.core.manifest import Label, LabelTable
from runtime.core.volume import DicomSource
from runtime.engines.fake import FakeEngine, fake_manifest
from runtime.io.case_finding import find_cases
from runtime.io.cases import read_case
from runtime.io.writers.registry import FORMATS

PLANTED = {
    "PatientName": "ZZDOE^QQJANE",
    "PatientID": "MRN-7788991",
    "PatientBirthDate": "19700229",
    "PatientSex": "F",
    "StudyInstanceUID": "1.2.826.7.77.777",
    "StudyDate": "20240131",
    "StudyTime": "101112",
    "StudyID": "STUDY-4711",
    "StudyDescription": "ZZCARDIAC of QQJANE",
    "AccessionNumber": "ACC-090807",
    "ReferringPhysicianName": "XXWHO^DR",
    "SpecificCharacterSet": "ISO_IR 100",
    "PatientAge": "054Y",
}
PLANTED_TAGS = {
    k: v for k, v in PLANTED.items() if k not in ("StudyInstanceUID", "SpecificCharacterSet")
} | {"PatientBirthDate": "19700228"}
UIDS = ("1.2.826.7.78.1", "1.2.826.7.78.2")
FRAME_OF_REFERENCE = "1.2.826.7.79"
WORDS = (
    "ZZDOE",
    "QQJANE",
    "MRN-7788991",
    "19700229",
    "20240131",
    "101112",
    "STUDY-4711",
    "ZZCARDIAC",
    "ACC-090807",
    "XXWHO",
    "054Y",
    "1.2.826.7.",
)


def contents(folder: Path) -> dict[Path, bytes]:
    """Every byte of every file below, decompressed as well."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            raw = path.read_bytes()
            start = raw.find(b"\x1f\x8b\x08")
            found[path] = raw + (
                gzip.decompress(raw[start:])
                if start in (0, raw.find(b"\n\n") + 2) and start >= 0
                else b""
            )
    return found


def assert_nothing_planted(data: bytes, where: object, words: tuple[str, ...] = WORDS) -> None:
    for word in words:
        assert word.encode() not in data and word.encode("utf-16-le") not in data, (
            f"{word} in {where}"
        )


@pytest.mark.parametrize("name", FORMATS)
def test_nifti_header_patient_data(name: str, tmp_path: Path, command) -> None:
    """A NIfTI header that names a patient leaves nothing in the results.

    In every free field of the header, in an extension and behind the voxels.
    """
    mask = nibabel.Nifti1Image(
        np.asfortranarray(blobs().T.astype(np.int16)), np.diag([-1.5, -1.25, 2.5, 1])
    )
    mask.header["descrip"], mask.header["aux_file"] = (
        "ZZDOE^QQJANE 19700229 MRN-7788991",
        "ZZDOE_QQJANE.dcm",
    )
    mask.header["intent_name"], mask.header["db_name"] = "MRN-7788991", "STUDY-4711"
    mask.header.extensions.append(
        nibabel.nifti1.Nifti1Extension("comment", b"ZZDOE^QQJANE; ACC-090807; 1.2.826.7.77")
    )
    nibabel.save(mask, tmp_path / "case.nii")
    with open(tmp_path / "case.nii", "ab") as file:
        file.write(b"XXWHO^DR 20240131")
    model = write_fake_model(tmp_path / "model", fake_manifest(noise=False))
    done = command(
        "-m",
        "runtime",
        "synth",
        tmp_path / "case.nii",
        "--model",
        model,
        "--backend",
        "fake",
        "--output",
        tmp_path / "out",
        "--format",
        name,
        "--variants",
        "2",
        "--report",
        tmp_path / "out" / "report.json",
    )
    assert done.returncode == 0, done.stderr
    made = contents(tmp_path / "out")
    assert len(made) >= 5
    for path, data in made.items():
        assert_nothing_planted(data, path)
        assert str(tmp_path).encode() not in data, path
    assert_nothing_planted((done.stdout + done.stderr).encode(), "the log")


@pytest.mark.parametrize("name", FORMATS)
def test_file_name_not_in_images(name: str, tmp_path: Path, fake_model: Path) -> None:
    """A result is named after its mask; inside, nothing is: no gzip file name, no comment, no
    attribute.
    """
    mask = write_mask(tmp_path / "ZZDOE_QQJANE.nii.gz")
    with Synthesizer.open(fake_model, backend="fake") as synth:
        assert list(synth.stream([mask], tmp_path / "out", format=name))
    for path, data in contents(tmp_path / "out").items():
        if path.suffix not in {".json", ".csv"} and not path.name.startswith("."):
            assert_nothing_planted(data, path)


@pytest.mark.parametrize("sop_class", [SegmentationStorage, RTStructureSetStorage])
def test_dicom_source_data_needs_attach(sop_class: str, tmp_path: Path) -> None:
    """A DICOM source leaves nothing in the results, unless they are attached to it."""
    source = DicomSource(sop_class, UIDS, FRAME_OF_REFERENCE, PLANTED)
    series = write_series(tmp_path / "detached", source=source, segmentation="binary", variant=1)
    for path, data in contents(series.folder).items():
        assert_nothing_planted(data, path)
    attached = write_series(
        tmp_path / "attached", source=source, segmentation="binary", attach=True
    )
    for path, data in contents(attached.folder).items():
        assert all(
            word.encode() in data for word in ("ZZDOE^QQJANE", "MRN-7788991", "1.2.826.7.79")
        ), path  # the words would be found
        assert b"054Y" not in data, path


@pytest.mark.parametrize("name", FORMATS)
def test_names_stay_in_output_folder(name: str, tmp_path: Path) -> None:
    """No name in a model or a header leads out of the output folder."""
    names = ["background", "../../up", "/etc/passwd", "a/b", "..", "C:\\x", "\x00", "%2e%2e/x"]
    table = LabelTable(tuple(Label(label, n) for n, label in enumerate(names)))
    manifest = replace(fake_manifest(table), name="../../../model")
    here = tmp_path / "a" / "b"
    here.mkdir(parents=True)
    mask = nibabel.Nifti1Image(
        np.asfortranarray((blobs(values=tuple(range(8)))).T.astype(np.int16)), np.eye(4)
    )
    mask.header["descrip"], mask.header["aux_file"] = "../../../../up", "../../up"
    nibabel.save(mask, here / "case.nii")
    with Synthesizer(manifest, FakeEngine(manifest)) as synth:
        assert list(synth.stream([here / "case.nii"], here / "out", format=name, variants=1))
    assert sorted(
        p.relative_to(tmp_path).as_posix()
        for p in tmp_path.rglob("*")
        if here / "out" not in p.parents
    ) == [
        "a",
        "a/b",
        "a/b/case.nii",
        "a/b/out",
    ]


def hospital(folder: Path) -> tuple[Path, list[str]]:
    """A SEG, an RTSTRUCT on its CT, and a label series, with a patient in every attribute,
    private ones too; and what must not come out.
    """
    here = np.zeros((4, 12, 14), np.uint8)
    here[1:3, 3:9, 4:11] = 3
    private = {0x00110010: "ZZDOE CREATOR", 0x00111001: "QQJANE private"}
    images = slices((here * 100).astype(np.int16), Modality="CT", **PLANTED_TAGS)
    labels = slices(here, SeriesDescription="labels of QQJANE", Modality="SEG", **PLANTED_TAGS)
    for ds in (*images, *labels):
        for tag, value in private.items():
            ds.add_new(tag, "LO", value)
    save(folder / "CT_ZZDOE", images, "ZZDOE_QQJANE")
    save(folder / "LABELS_ZZDOE", labels, "ZZDOE_QQJANE")
    seg = segmentation(
        folder / "SEG_ZZDOE" / "ZZDOE_QQJANE.dcm",
        images,
        (here > 0).astype(np.uint8),
        [("left ventricle", "87878005")],
    )
    square = np.array([[4, 3], [10, 3], [10, 8], [4, 8]])
    corners = [
        np.array(
            [
                [
                    *(np.array(images[k].ImagePositionPatient, float)[:2] + [1.5, 1.25] * p),
                    images[k].ImagePositionPatient[2],
                ]
                for p in square
            ],
            float,
        )
        for k in (1, 2)
    ]
    plan = structure_set(
        folder / "RS_ZZDOE" / "ZZDOE_QQJANE.dcm", images, {"left ventricle": corners}
    )
    for path in (seg, plan):
        ds = pydicom.dcmread(path)
        for tag, value in private.items():
            ds.add_new(tag, "LO", value)
        ds.save_as(path)
    made = [*images, *labels, pydicom.dcmread(seg), pydicom.dcmread(plan)]
    uids = {
        str(element.value)
        for ds in made
        for element in ds.iterall()
        if element.VR == "UI" and "SOPClass" not in element.keyword
    }
    return folder, [*WORDS, *(uid for uid in uids if not uid.startswith("1.2.840.10008."))]


@pytest.mark.parametrize("name", [*FORMATS, "dicom --enhanced"])
def test_hospital_patient_data_never_leaks(
    name: str, tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of a hospital's patient reaches a result, a log or a report."""
    source, words = hospital(tmp_path / "in")
    with_own_grid = [str(source / "SEG_ZZDOE"), str(source / "LABELS_ZZDOE")]
    contours = [str(source / "RS_ZZDOE"), "--like", str(source / "CT_ZZDOE")]
    for n, masks in enumerate((with_own_grid, contours)):
        code = run(
            main,
            [
                "synth",
                *masks,
                "--model",
                str(fake_model),
                "--backend",
                "fake",
                "--output",
                str(tmp_path / "out"),
                "--format",
                *name.split(),
                "--variants",
                "2",
                "--labels",
                str(label_map(tmp_path)),
                "--report",
                str(tmp_path / "out" / f"report{n}.json"),
            ],
        )
        assert code == 0
    said = capsys.readouterr()
    assert_nothing_planted((said.out + said.err).encode(), "the log", words)
    made = contents(tmp_path / "out")
    assert len([path for path in made if path.parent.name != "out" or path.suffix != ".json"]) >= 6
    for path, data in made.items():
        assert_nothing_planted(data + str(path.relative_to(tmp_path)).encode(), path, words)


def test_attached_series_lies_on_source(tmp_path: Path, fake_model: Path) -> None:
    """A series that is attached to a SEG lies on the source of the SEG."""
    source, _ = hospital(tmp_path / "in")
    out = tmp_path / "out"
    assert (
        run(
            main,
            [
                "synth",
                str(source / "SEG_ZZDOE"),
                "--model",
                str(fake_model),
                "--backend",
                "fake",
                "--output",
                str(out),
                "--quiet",
                "--format",
                "dicom",
                "--attach",
            ],
        )
        == 0
    )
    seg = pydicom.dcmread(source / "SEG_ZZDOE" / "ZZDOE_QQJANE.dcm")
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    for path in sorted(folder.glob("[0-9]*.dcm")):
        ds = pydicom.dcmread(path)
        assert (ds.PatientID, ds.StudyInstanceUID, ds.FrameOfReferenceUID) == (
            seg.PatientID,
            seg.StudyInstanceUID,
            seg.FrameOfReferenceUID,
        )
        assert (
            ds.SourceImageSequence[0].ReferencedSOPInstanceUID == seg.SOPInstanceUID
            and ds[0x0008001C].value == "YES"
        )
        assert ds.SeriesInstanceUID != seg.SeriesInstanceUID and "PatientIdentityRemoved" not in ds


def test_written_seg_is_a_mask(tmp_path: Path, fake_model: Path) -> None:
    """The SEG that is written can be read as a mask again."""
    mask = write_mask(tmp_path / "m.nii.gz", direction=np.diag([1.0, -1.0, 1.0]))
    assert (
        run(
            main,
            [
                "synth",
                str(mask),
                "--model",
                str(fake_model),
                "--backend",
                "fake",
                "--output",
                str(tmp_path / "out"),
                "--format",
                "dicom",
            ],
        )
        == 0
    )
    (case,) = find_cases([tmp_path / "out" / "m" / "seg.dcm"])
    read = read_case(case, MM_WHS).labels
    assert np.array_equal(
        np.bincount(read.ravel())[1:],
        np.bincount(np.searchsorted(MM_WHS_VALUES, blobs()).ravel())[1:],
    )


def label_map(folder: Path) -> Path:
    (folder / "map.json").write_text(
        json.dumps({"left ventricle": "left ventricle", "3": "left ventricle", "*": "background"})
    )
    return folder / "map.json"


def test_zip_folder_names_stay_private(
    fake_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder within a zip archive is named in no message.

    Archives are packed by patient. The mask's own name is its owner's choice, and names its result.
    """
    zipped, out, report = tmp_path / "masks.zip", tmp_path / "out", tmp_path / "report.json"
    write_mask(tmp_path / "good.nii.gz")
    with zipfile.ZipFile(zipped, "w") as made:
        made.write(tmp_path / "good.nii.gz", "Doe^John/1944/good.nii.gz")
        made.writestr("Doe^John/torn.nii.gz", (tmp_path / "good.nii.gz").read_bytes()[:100])
    assert synth(fake_model, out, zipped, "--report", report) == 1
    assert (
        run(main, ["labels", str(zipped)])
        == run(
            main,
            [
                "synth",
                str(zipped),
                "--model",
                str(fake_model),
                "--backend",
                "fake",
                "--output",
                str(out),
                "--dry-run",
            ],
        )
        == 1
    )
    said = capsys.readouterr()
    everything = (
        said.out
        + said.err
        + report.read_text()
        + "".join(path.read_bytes().decode("latin-1") for path in out.glob(".*"))
    )
    assert (
        "Doe" not in everything
        and "masks.zip/…/torn.nii.gz" in said.err
        and "masks.zip/…/good.nii.gz" in said.out
    )
    with zipfile.ZipFile(zipped, "a") as made:
        made.write(tmp_path / "good.nii.gz", "Doe^Jane/good.nii.gz")
    assert synth(fake_model, out, zipped) == 2
    said = capsys.readouterr()
    assert "both be written as good" in said.err and "Doe" not in said.err
