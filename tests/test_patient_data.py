"""Nothing of the source patient reaches an output, a log or a report in detached mode, and no name leads out of the output folder."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from pydicom.uid import RTStructureSetStorage, SegmentationStorage
from samples import blobs, write_fake_model, write_mask
from series import write_series

from runtime import Synthesizer
from runtime.contract import Label, LabelTable
from runtime.engines.fake import FakeEngine, fake_manifest
from runtime.io.formats import FORMATS
from runtime.volume import DicomSource

PLANTED = {
    "PatientName": "ZZDOE^QQJANE", "PatientID": "MRN-7788991", "PatientBirthDate": "19700229", "PatientSex": "F", "StudyInstanceUID": "1.2.826.7.77.777",
    "StudyDate": "20240131", "StudyTime": "101112", "StudyID": "STUDY-4711", "StudyDescription": "ZZCARDIAC of QQJANE", "AccessionNumber": "ACC-090807",
    "ReferringPhysicianName": "XXWHO^DR", "SpecificCharacterSet": "ISO_IR 100", "PatientAge": "054Y",
}  # fmt: skip
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
            found[path] = raw + (gzip.decompress(raw[start:]) if start in (0, raw.find(b"\n\n") + 2) and start >= 0 else b"")
    return found


def assert_nothing_planted(data: bytes, where: object, words: tuple[str, ...] = WORDS) -> None:
    for word in words:
        assert word.encode() not in data and word.encode("utf-16-le") not in data, f"{word} in {where}"


@pytest.mark.parametrize("name", FORMATS)
def test_a_nifti_header_that_names_a_patient_leaves_nothing(name: str, tmp_path: Path, command) -> None:
    """In every free field of the header, in an extension and behind the voxels."""
    mask = nibabel.Nifti1Image(np.asfortranarray(blobs().T.astype(np.int16)), np.diag([-1.5, -1.25, 2.5, 1]))
    mask.header["descrip"], mask.header["aux_file"] = "ZZDOE^QQJANE 19700229 MRN-7788991", "ZZDOE_QQJANE.dcm"
    mask.header["intent_name"], mask.header["db_name"] = "MRN-7788991", "STUDY-4711"
    mask.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"ZZDOE^QQJANE; ACC-090807; 1.2.826.7.77"))
    nibabel.save(mask, tmp_path / "case.nii")
    with open(tmp_path / "case.nii", "ab") as file:
        file.write(b"XXWHO^DR 20240131")
    model = write_fake_model(tmp_path / "model", fake_manifest(noise=False))
    done = command("-m", "runtime", "synth", tmp_path / "case.nii", "--model", model, "--backend", "fake", "--output", tmp_path / "out",
                   "--format", name, "--variants", "2", "--report", tmp_path / "out" / "report.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = contents(tmp_path / "out")
    assert len(made) >= 5
    for path, data in made.items():
        assert_nothing_planted(data, path)
        assert str(tmp_path).encode() not in data, path
    assert_nothing_planted((done.stdout + done.stderr).encode(), "the log")


@pytest.mark.parametrize("name", FORMATS)
def test_a_files_name_is_in_no_image(name: str, tmp_path: Path, fake_model: Path) -> None:
    """A result is named after its mask; inside, nothing is: no gzip file name, no comment, no attribute."""
    mask = write_mask(tmp_path / "ZZDOE_QQJANE.nii.gz")
    with Synthesizer.open(fake_model, backend="fake") as synth:
        assert list(synth.stream([mask], tmp_path / "out", format=name))
    for path, data in contents(tmp_path / "out").items():
        if path.suffix != ".json" and not path.name.startswith("."):
            assert_nothing_planted(data, path)


@pytest.mark.parametrize("sop_class", [SegmentationStorage, RTStructureSetStorage])
def test_a_dicom_source_leaves_nothing_unless_attached(sop_class: str, tmp_path: Path) -> None:
    source = DicomSource(sop_class, UIDS, FRAME_OF_REFERENCE, PLANTED)
    series = write_series(tmp_path / "detached", source=source, segmentation="binary", variant=1)
    for path, data in contents(series.folder).items():
        assert_nothing_planted(data, path)
    attached = write_series(tmp_path / "attached", source=source, segmentation="binary", attach=True)
    for path, data in contents(attached.folder).items():
        assert all(word.encode() in data for word in ("ZZDOE^QQJANE", "MRN-7788991", "1.2.826.7.79")), path  # the words would be found
        assert b"054Y" not in data, path


@pytest.mark.parametrize("name", FORMATS)
def test_no_name_in_a_model_or_a_header_leads_out_of_the_output_folder(name: str, tmp_path: Path) -> None:
    names = ["background", "../../up", "/etc/passwd", "a/b", "..", "C:\\x", "\x00", "%2e%2e/x"]
    table = LabelTable(tuple(Label(label, n) for n, label in enumerate(names)))
    manifest = replace(fake_manifest(table), name="../../../model")
    here = tmp_path / "a" / "b"
    here.mkdir(parents=True)
    mask = nibabel.Nifti1Image(np.asfortranarray((blobs(values=tuple(range(8)))).T.astype(np.int16)), np.eye(4))
    mask.header["descrip"], mask.header["aux_file"] = "../../../../up", "../../up"
    nibabel.save(mask, here / "case.nii")
    with Synthesizer(manifest, FakeEngine(manifest)) as synth:
        assert list(synth.stream([here / "case.nii"], here / "out", format=name, variants=1))
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if here / "out" not in p.parents) == [
        "a", "a/b", "a/b/case.nii", "a/b/out",
    ]  # fmt: skip
