"""`mask2ct synth --warp`: real CTs deformed with their masks, from files to files, without a
model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.dataset import FileMetaDataset
from samples import results
from test_dicom_conformance import UNKNOWN_TO_IT, output_of, tool

from runtime.__main__ import main
from runtime.core.console import run
from runtime.core.deformation import DeformationParams
from runtime.io.dicom.files import scan
from runtime.io.marks import written_by_mask2ct
from runtime.io.readers.volume import read_volume

SHAPE = (12, 40, 44)
VALUES = (0, 205, 500)
HU = {0: 40, 205: 120, 500: 300}
AIR = -1000


def pair(shift: int = 0) -> tuple[NDArray[np.uint16], NDArray[np.int16]]:
    """Two structures in a body, and a CT that is a function of them; air around."""
    d, h, w = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    radius = np.sqrt((3 * (d - 5.5)) ** 2 + (2 * (h - 20.0)) ** 2 + (2 * (w - 20.0 - shift)) ** 2)
    mask = np.where(radius < 10, 500, np.where(radius < 17, 205, 0)).astype(np.uint16)
    body = np.hypot(2 * (h - 20), 2 * (w - 22)) + 0 * d < 36
    ct = np.where(body, np.vectorize(HU.get)(mask), AIR).astype(np.int16)
    return mask, ct


def write(path: Path, values: NDArray[Any], **grid: Any) -> Path:
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(grid.get("spacing", (2.0, 2.0, 3.0)))
    image.SetOrigin(grid.get("origin", (-40.0, -38.0, 10.0)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    mask, ct = pair()
    return write(tmp_path / "in" / "p1_label.nii.gz", mask), write(
        tmp_path / "in" / "p1_image.nii.gz", ct
    )


def warp(*arguments: object) -> int:
    return run(main, ["synth", "--quiet", *map(str, arguments)])


def read(path: Path) -> NDArray[Any]:
    return read_volume(path).values


def inside(labels: NDArray[Any], value: int) -> NDArray[np.bool_]:
    """Voxels whose neighbourhood all has the value: no interpolation reaches across a border."""
    out = labels == value
    for axis in range(3):
        out = out & np.roll(out, 1, axis) & np.roll(out, -1, axis)
        out[(slice(None),) * axis + ([0, -1],)] = False
    return out


def test_warp_moves_ct_with_mask(files: tuple[Path, Path], tmp_path: Path) -> None:
    mask, ct = files
    assert (
        warp(
            mask,
            "--warp",
            ct,
            "--output",
            tmp_path / "out",
            "--intensity-jitter",
            "off",
            "--variants",
            4,
        )
        == 0
    )
    assert np.array_equal(read(tmp_path / "out" / "p1_label_v0_ct.nii.gz"), read(ct))
    for n in range(1, 4):
        image, labels = (
            read(tmp_path / "out" / f"p1_label_v{n}_{what}.nii.gz") for what in ("ct", "mask")
        )
        assert set(np.unique(labels)) == set(VALUES) and not np.array_equal(labels, read(mask))
        for value in VALUES[1:]:
            where = inside(labels, value)
            assert where.sum() > 20 and np.array_equal(
                image[where], np.full(where.sum(), HU[value])
            )
        assert image.min() == AIR and image.max() == HU[500]
        assert np.array_equal(image[:, 0, 0], np.full(SHAPE[0], AIR))


def test_warped_labels_equal_variant_labels(files: tuple[Path, Path], tmp_path: Path) -> None:
    """The mask of a warped pair is the mask that a model's CT of the same variant has."""
    from runtime.core.deformation import deform
    from runtime.core.manifest import Label, LabelTable
    from runtime.io.readers.volume import read_labels

    mask, ct = files
    assert warp(mask, "--warp", ct, "--output", tmp_path / "out", "--variants", 2, "--seed", 5) == 0
    table = LabelTable((Label("background", 0), Label("a", 205), Label("b", 500)))
    expected = deform(
        read_labels(mask, table), DeformationParams(), seed=5, variant=1
    ).volume.labels
    assert np.array_equal(
        read(tmp_path / "out" / "p1_label_v1_mask.nii.gz"), np.array(VALUES)[expected]
    )


def test_jitter_moves_whole_classes(files: tuple[Path, Path], tmp_path: Path) -> None:
    mask, ct = files
    shifts = []
    for seed in range(40):
        assert (
            warp(
                mask,
                "--warp",
                ct,
                "--output",
                tmp_path / str(seed),
                "--variants",
                1,
                "--seed",
                seed,
            )
            == 0
        )
        image = read(tmp_path / str(seed) / "p1_label_v0_ct.nii.gz")
        medians = [np.median(image[inside(read(mask), value)]) for value in VALUES[1:]]
        shifts.append([medians[0] - HU[205], medians[1] - HU[500]])
        assert (image[read(ct) == AIR] <= AIR + 60).all()
    spread = np.std(shifts, 0)
    assert (spread > 0.6 * np.hypot(22, 12)).all() and (spread < 1.5 * np.hypot(22, 12)).all()
    assert np.corrcoef(np.array(shifts).T)[0, 1] < 0.8


def test_warp_nnunet_folders_match_by_name(tmp_path: Path) -> None:
    for n in range(3):
        mask, ct = pair(shift=n)
        write(
            tmp_path / "raw" / "labelsTr" / f"p{n}.nii.gz",
            np.searchsorted(VALUES, mask).astype(np.uint8),
        )
        if n < 2:
            write(tmp_path / "raw" / "imagesTr" / f"p{n}_0000.nii.gz", ct)
    stated = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "myocardium": 1, "ventricle": 2},
        "file_ending": ".nii.gz",
    }
    (tmp_path / "raw" / "dataset.json").write_text(json.dumps(stated))
    out = tmp_path / "out"
    code = warp(
        tmp_path / "raw" / "labelsTr",
        "--warp",
        tmp_path / "raw" / "imagesTr",
        "--output",
        out,
        "--format",
        "nnunet",
        "--variants",
        2,
        "--intensity-jitter",
        "off",
    )
    assert code == 1  # p2 has no CT; the others are made
    assert sorted(path.name for path in (out / "labelsTr").iterdir()) == [
        f"p{n}_v{v}.nii.gz" for n in range(2) for v in range(2)
    ]
    made = json.loads((out / "dataset.json").read_text())
    assert (
        made["labels"] == stated["labels"]
        and made["numTraining"] == 4
        and "DERIVED" in made["description"]
    )
    for n in range(2):
        assert np.array_equal(read(out / "imagesTr" / f"p{n}_v0_0000.nii.gz"), pair(shift=n)[1])


def test_warp_refuses_other_grids(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask, _ = files
    ct = pair()[1]
    for number, grid in enumerate(
        (
            {"spacing": (2.0, 2.0, 2.5)},
            {"origin": (-39.0, -38.0, 10.0)},
            {"origin": (0.0, -38.0, 10.0)},
        )
    ):
        other = write(tmp_path / "other" / f"{number}.nii.gz", ct, **grid)
        assert warp(mask, "--warp", other, "--output", tmp_path / "out") == 1
        message = capsys.readouterr().err
        assert (
            "not on one grid" in message
            and "44 x 40 x 12 voxels of 2 x 2 x 3 mm from -40, -38, 10" in message
        )
    assert results(tmp_path / "out") == {}


def test_warp_pairs_in_one_folder(tmp_path: Path) -> None:
    """CASE_image and CASE_label side by side, the folder given twice; and in a zip."""
    both = tmp_path / "both"
    for n in range(2):
        mask, ct = pair(shift=n)
        write(both / f"p{n}_label.nii.gz", mask)
        write(both / f"p{n}_image.nii.gz", ct)
    assert warp(both, "--warp", both, "--output", tmp_path / "out", "--variants", 2) == 0
    with zipfile.ZipFile(tmp_path / "cts.zip", "w") as archive:
        for path in sorted(both.glob("*_image.nii.gz")):
            archive.write(path, path.name)
    assert (
        warp(
            *sorted(both.glob("*_label*")),
            "--warp",
            tmp_path / "cts.zip",
            "--output",
            tmp_path / "zip",
            "--variants",
            2,
        )
        == 0
    )
    assert (
        results(tmp_path / "out") == results(tmp_path / "zip")
        and len(results(tmp_path / "out")) == 8
    )


def test_warp_refuses_lossy_ct_or_mr(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask, ct = files
    series = write_dicom(tmp_path / "dicom", read(ct))
    for keyword, value, words in (
        ("LossyImageCompression", "01", "with loss"),
        ("Modality", "MR", "is not a CT"),
    ):
        ds = pydicom.dcmread(series / "000.dcm")
        setattr(ds, keyword, value)
        ds.save_as(series / "000.dcm")
        assert warp(mask, "--warp", series, "--output", tmp_path / "out") == 1
        assert words in capsys.readouterr().err and results(tmp_path / "out") == {}


def test_warp_accepts_reordered_voxels(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A CT stored in another axis order, and one that reaches further, have the mask's voxels
    all the same.
    """
    mask, ct = files
    image = sitk.ReadImage(str(ct))
    turned = sitk.Flip(sitk.PermuteAxes(image, [2, 0, 1]), [True, False, True])
    larger = sitk.ConstantPad(image, [3, 0, 2], [1, 4, 0], -1000.0)
    for number, other in enumerate((turned, larger)):
        sitk.WriteImage(other, str(tmp_path / f"{number}.nii.gz"))
        out = tmp_path / f"out{number}"
        assert (
            warp(
                mask,
                "--warp",
                tmp_path / f"{number}.nii.gz",
                "--output",
                out,
                "--variants",
                1,
                "--intensity-jitter",
                "off",
            )
            == 0
        )
        assert np.array_equal(read(out / "p1_label_v0_ct.nii.gz"), read(ct))


def test_warp_remakes_changed_ct(files: tuple[Path, Path], tmp_path: Path) -> None:
    mask, ct = files
    command = (
        mask,
        "--warp",
        ct,
        "--output",
        tmp_path / "out",
        "--variants",
        2,
        "--resume",
        "--report",
        tmp_path / "report.json",
    )
    assert warp(*command) == 0
    first = results(tmp_path / "out")
    assert warp(*command) == 0 and results(tmp_path / "out") == first
    cases = json.loads((tmp_path / "report.json").read_text())["cases"]
    assert all(case["skipped"] for case in cases) and len(cases[0]["input_sha256"]) == 2
    write(ct, read(ct) + np.int16(7))
    assert warp(*command) == 0
    changed = results(tmp_path / "out")
    assert changed["p1_label_v1_ct.nii.gz"] != first["p1_label_v1_ct.nii.gz"]
    assert changed["p1_label_v1_mask.nii.gz"] == first["p1_label_v1_mask.nii.gz"]
    assert warp(*command, "--intensity-jitter", "off") == 0
    assert results(tmp_path / "out")["p1_label_v1_ct.nii.gz"] != changed["p1_label_v1_ct.nii.gz"]


def test_killed_warp_run_is_resumed(files: tuple[Path, Path], tmp_path: Path) -> None:
    mask, ct = files
    whole, out = tmp_path / "whole", tmp_path / "out"
    command = [str(mask), "--warp", str(ct), "--variants", "12", "--quiet"]
    assert warp(*command, "--output", whole) == 0
    line = [sys.executable, "-m", "runtime", "synth", *command, "--output", str(out)]
    process = subprocess.Popen(line, cwd=Path(__file__).parent.parent)
    while process.poll() is None and not [*out.glob("*_v2_mask.nii.gz")]:
        os.sched_yield()
    process.kill()
    process.wait()
    assert warp(*command, "--output", out, "--resume") == 0
    assert results(out) == results(whole)


def test_warp_results_state_their_origin(files: tuple[Path, Path], tmp_path: Path) -> None:
    mask, ct = files
    assert (
        warp(mask, "--warp", ct, "--output", tmp_path / "dry", "--dry-run") == 0
        and not (tmp_path / "dry").exists()
    )
    for name in ("nifti", "nrrd", "mha"):
        out = tmp_path / name
        assert (
            warp(
                mask,
                "--warp",
                ct,
                "--output",
                out,
                "--variants",
                1,
                "--format",
                name,
                "--audit",
                tmp_path / "audit.jsonl",
            )
            == 0
        )
        for path in out.glob("p1*"):
            assert written_by_mask2ct(path)  # ours, and so no mask, and never taken for a real CT
            assert warp(mask, "--warp", path, "--output", tmp_path / "again") == 2
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    made, *_ = [line for line in lines if line["action"] == "synthesized"]
    assert (made["model"], made["model_sha256"]) == ("warp", "") and made["engine"].startswith(
        "warp, IntensityJitter(shift=22.0"
    )
    assert len(made["image_sha256"]) == 64 and not [
        line for line in lines if line["action"] == "model loaded"
    ]


@pytest.mark.parametrize(
    "option",
    [("--model", "somewhere"), ("--workers", "2"), ("--backend", "onnx"), ("--ray",)],
    ids=lambda option: option[0],
)
def test_warp_refuses_model_options(
    option: tuple[str, ...], files: tuple[Path, Path], tmp_path: Path
) -> None:
    mask, ct = files
    assert warp(mask, "--warp", ct, "--output", tmp_path / "out", *option) == 2


def test_warp_refuses_values_without_hu(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask, _ = files
    for values in (
        pair()[1].astype(np.float32) / 400,
        pair()[1] + 1024,
        np.where(pair()[1] < 0, np.nan, 40).astype(np.float32),
    ):
        other = write(tmp_path / "other.nii.gz", values)
        assert warp(mask, "--warp", other, "--output", tmp_path / "out") == 1
        assert "Hounsfield" in capsys.readouterr().err


def write_dicom(folder: Path, ct: NDArray[np.int16]) -> Path:
    """A CT series whose pixels are rescaled, files in no order."""
    folder.mkdir(parents=True)
    for k, plane in enumerate(ct):
        ds = pydicom.Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{k + 1}"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = (
            "1.2.3.7",
            "1.2.3.8",
            "1.2.3.9",
        )
        ds.PatientName, ds.PatientID, ds.Modality = "DOE^JANE", "MRN123", "CT"
        ds.Rows, ds.Columns = plane.shape
        ds.PixelSpacing, ds.ImageOrientationPatient = [2.0, 2.0], [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient, ds.SliceThickness = [-40, -38, 10 + 3 * k], 3.0
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
        ds.PixelData = (plane.astype(np.int32) + 1024).astype("<u2").tobytes()
        ds.save_as(folder / f"{(7 * k) % len(ct):03d}.dcm", enforce_file_format=True)
    return folder


def problems(file: Path) -> list[str]:
    lines = output_of(tool("dciodvfy"), "-new", file).splitlines()
    assert any(line in ("CTImage", "EnhancedCTImage", "Segmentation") for line in lines), lines
    assert UNKNOWN_TO_IT[0] not in lines
    return [line for line in lines if line.startswith("Error")]


@pytest.mark.parametrize("enhanced", [(), ("--enhanced",)], ids=["classic", "enhanced"])
def test_warp_dicom_says_derived_not_synthetic(
    enhanced: tuple[str, ...], files: tuple[Path, Path], tmp_path: Path
) -> None:
    mask, ct = files
    series, out = write_dicom(tmp_path / "dicom", read(ct)), tmp_path / "out"
    command = (
        "--warp",
        series,
        "--output",
        out,
        "--variants",
        2,
        "--format",
        "dicom",
        "--labels",
        "mm-whs",
        *enhanced,
    )
    assert warp(mask, *command) == 0
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        for file in folder.iterdir():
            assert problems(file) == []
            ds = pydicom.dcmread(file)
            assert (
                ds.ImageType[0] == "DERIVED"
                and "SyntheticData" not in ds
                and "PatientIdentityRemoved" not in ds
            )
            assert (
                "DERIVED CT - NOT FOR DIAGNOSIS" in ds.SeriesDescription and ds.StudyID == "DERIVED"
            )
            text = str(ds)
            assert (
                "SYNTH" not in text.upper()
                and "DOE" not in text
                and "MRN123" not in text
                and "1.2.3.8" not in text
            )
            assert written_by_mask2ct(file)
        assert all(instance.written_by_mask2ct for instance in scan(folder.iterdir()))
        assert "Error" not in output_of(tool("dcentvfy"), *sorted(folder.iterdir()))
    first = {pydicom.dcmread(file).SOPInstanceUID for file in out.rglob("*.dcm")}
    assert (
        warp(mask, *command, "--intensity-jitter", "off") == 0
    )  # other pixels are other instances
    assert not first & {pydicom.dcmread(file).SOPInstanceUID for file in out.rglob("[0-9ct]*.dcm")}


def test_warp_dicom_ct_with_dicom_masks(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A SEG and its series in one folder: voxels by value, the patient's own frame left."""
    import highdicom
    from pydicom.sr.codedict import codes

    mask, ct = files
    study = tmp_path / "study"
    write_dicom(study / "ct", read(ct))
    sources = sorted(
        (pydicom.dcmread(path) for path in (study / "ct").iterdir()),
        key=lambda ds: ds.ImagePositionPatient[2],
    )
    for source in sources:
        for keyword in (
            "PatientBirthDate",
            "PatientSex",
            "StudyDate",
            "StudyTime",
            "AccessionNumber",
            "StudyID",
        ):
            setattr(source, keyword, "")
    described = highdicom.seg.SegmentDescription(
        1, "Jane's heart", codes.SCT.AnatomicalStructure, codes.SCT.Heart, "MANUAL"
    )
    seg = highdicom.seg.Segmentation(
        sources,
        read(mask) > 0,
        "BINARY",
        [described],
        "1.2.3.50",
        2,
        "1.2.3.51",
        1,
        "x",
        "x",
        "1",
        "1",
    )
    seg.save_as(study / "seg.dcm")
    out = tmp_path / "out"
    assert (
        warp(
            study / "seg.dcm",
            "--warp",
            study,
            "--output",
            out,
            "--variants",
            2,
            "--intensity-jitter",
            "off",
        )
        == 0
    )
    labels = read(next(out.glob("*_v0_mask.nii.gz")))
    image = read(next(out.glob("*_v0_ct.nii.gz")))
    slices = np.flatnonzero((read(mask) > 0).any((1, 2)))  # the SEG leaves empty slices out
    assert np.array_equal(labels, (read(mask) > 0)[slices[0] : slices[-1] + 1])
    assert np.array_equal(image, read(ct)[slices[0] : slices[-1] + 1])
    assert (
        warp(study / "seg.dcm", "--warp", study, "--output", out, "--format", "dicom", "--attach")
        == 2
    )


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0)], ids=["axial", "sagittal"])
def test_warp_keeps_axis_order_of_file(
    axes: tuple[int, int, int], tmp_path: Path, files: tuple[Path, Path]
) -> None:
    paths = []
    for path in files:
        turned = sitk.PermuteAxes(sitk.ReadImage(str(path)), list(axes))
        paths.append(tmp_path / path.name)
        sitk.WriteImage(turned, str(paths[-1]))
    out = tmp_path / "out"
    assert (
        warp(
            paths[0],
            "--warp",
            paths[1],
            "--output",
            out,
            "--variants",
            2,
            "--intensity-jitter",
            "off",
        )
        == 0
    )
    image, labels = (read(out / f"p1_label_v1_{what}.nii.gz") for what in ("ct", "mask"))
    assert image.shape == read(paths[1]).shape
    assert np.array_equal(image[inside(labels, 205)], np.full(inside(labels, 205).sum(), HU[205]))


def test_warp_loads_no_model_code(files: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "import sys; from runtime.__main__ import main; from runtime.core.console import run;"
        " assert run(main, sys.argv[1:]) == 0; print(sorted(m for m in sys.modules if"
        " m.startswith(('torch', 'onnxruntime', 'openvino', 'tensorrt', 'train', 'export'))))"
    )
    line = [
        "synth",
        str(files[0]),
        "--warp",
        str(files[1]),
        "--output",
        str(tmp_path / "out"),
        "--quiet",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *line],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "[]", done.stderr
    assert len([*(tmp_path / "out").glob("*_ct.nii.gz")]) == 3
