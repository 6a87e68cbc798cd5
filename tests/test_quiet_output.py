"""What a person is told: warnings once, what a folder without masks holds, which variant a DICOM
series is.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from samples import blobs, synth, write_mask
from test_dicom_conformance import output_of, problems, tool

from runtime.cli.failures import Warnings
from runtime.core.errors import UsageError
from runtime.io.case_finding import find_cases


def warnings_of(error: str) -> list[str]:
    return [line for line in error.splitlines() if line.startswith("warning")]


def test_mask_warns_once_per_run(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = write_mask(tmp_path / "m.nii.gz", np.zeros((4, 16, 16), np.uint16))
    assert synth(fake_model, tmp_path / "out", mask, "--variants", "5") == 0
    (warning,) = warnings_of(capsys.readouterr().err)
    assert "is empty" in warning


def test_variants_share_one_warning(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Specks that are bent so far that they merge keep their shape, and each variant says so."""
    dust = np.random.default_rng(0).random((12, 40, 40)) < 0.1
    mask = write_mask(tmp_path / "m.nii.gz", dust.astype(np.uint16) * 205)
    words = ("--variants", "6", "--deform", "60", "--rotate", "45")
    assert synth(fake_model, tmp_path / "all", mask, *words, "--verbose") == 0
    every = [line for line in warnings_of(capsys.readouterr().err) if ", variant " in line]
    assert len(every) >= 2
    assert synth(fake_model, tmp_path / "out", mask, *words) == 0
    first, more = [line for line in warnings_of(capsys.readouterr().err) if "shape" in line]
    assert first == every[0]
    assert f"the same for {len(every) - 1} more variant" in more and "m.nii.gz: " in more


def test_other_masks_keep_their_warning() -> None:
    stream = io.StringIO()
    warnings = Warnings(stream=stream)
    for case in ("a", "b"):
        warnings.add(f"{case} is empty")
    warnings.close()
    assert stream.getvalue() == "warning: a is empty\nwarning: b is empty\n"


def test_maskless_folder_tells_contents(tmp_path: Path) -> None:
    for name in ("a.txt", "Doe_Jane.TXT", "b.zip", "1.2.840.77", "README"):
        (tmp_path / name).write_text("text")
    (tmp_path / "below").mkdir()
    write_mask(tmp_path / "below" / "Doe.nii.gz")
    with pytest.raises(UsageError) as refused:
        find_cases([tmp_path])
    for part in ("2 .txt", "1 .zip", "1 .nii.gz in a folder below", "2 file of another kind"):
        assert part in refused.value.fact
    assert "Doe" not in refused.value.fact


def series_of(folder: Path) -> list:
    pydicom = pytest.importorskip("pydicom")
    return [
        pydicom.dcmread(file, stop_before_pixels=True) for file in sorted(folder.glob("*/0001.dcm"))
    ]


def test_variants_differ_by_description(tmp_path: Path, fake_model: Path) -> None:
    mask = write_mask(tmp_path / "m.nii.gz", blobs())
    assert synth(fake_model, tmp_path / "out", mask, "--variants", "3", "--format", "dicom") == 0
    headers = series_of(tmp_path / "out")
    plain = "SYNTHETIC CT - NOT FOR DIAGNOSIS"
    descriptions = [header.SeriesDescription for header in headers]
    assert descriptions == [plain, f"{plain}, VARIANT 1", f"{plain}, VARIANT 2"]
    assert len({header.PatientID for header in headers}) == 3


@pytest.mark.parametrize("enhanced", [False, True])
def test_variants_share_one_patient(enhanced: bool, tmp_path: Path, fake_model: Path) -> None:
    """They are series of one study, each in its own frame of reference."""
    pydicom = pytest.importorskip("pydicom")
    mask = write_mask(tmp_path / "m.nii.gz", blobs())
    other = write_mask(tmp_path / "n.nii.gz", blobs(seed=1))
    words = ["--variants", "3", "--format", "dicom", "--one-patient"]
    words += ["--enhanced"] * enhanced
    assert synth(fake_model, tmp_path / "out", mask, other, *words) == 0
    files = sorted((tmp_path / "out").glob("m_v*/*.dcm"))
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
    assert len({(header.PatientID, header.StudyInstanceUID) for header in headers}) == 1
    assert len({header.FrameOfReferenceUID for header in headers}) == 3
    assert len({header.SeriesInstanceUID for header in headers}) == 6  # each CT, each SEG
    assert len({header.SeriesNumber for header in headers}) == 6
    neighbour = next((tmp_path / "out").glob("n_v0/*.dcm"))
    assert pydicom.dcmread(neighbour).PatientID != headers[0].PatientID
    dcentvfy = tool("dcentvfy")
    assert "Error" not in output_of(dcentvfy, *files)
    assert not [line for line in problems(files[0]) if line.startswith("Error")]
    assert problems(files[-1]) == []


def test_one_patient_refuses_attach(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = write_mask(tmp_path / "m.nii.gz", blobs())
    words = ("--format", "dicom", "--one-patient", "--attach")
    assert synth(fake_model, tmp_path / "out", mask, *words) == 2
    assert "--one-patient and --attach" in capsys.readouterr().err
