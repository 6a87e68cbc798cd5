"""Every real file there is either works, on its own grid, or is refused on one screen.

Needs the folder of real images.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from samples import synth

from runtime.__main__ import main
from runtime.core.console import run
from runtime.io.volume_files import SUFFIXES, stem


def test_real_files_keep_grid_or_fail(
    real_data: Path, tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every real file works on its own grid or is refused."""
    label_map = tmp_path / "map.json"
    label_map.write_text(json.dumps({"1": "left ventricle", "*": "background"}))
    done = refused = 0
    for n, path in enumerate(sorted(p for p in real_data.rglob("*") if p.is_file())):
        out = tmp_path / str(n)
        code, error = synth(fake_model, out, path, "--labels", label_map), capsys.readouterr().err
        assert code in (0, 1), (path, error)
        assert "Traceback" not in error and len(error.splitlines()) <= 8, (path, error)
        if code == 1:
            assert (
                path.name in error
                or re.search(r"(seg|rtstruct|series|dicom|damaged)-[0-9a-f]{8}", error)
            ) and "remedy" in error
            assert not list(out.iterdir())
            refused += 1
            continue
        done += 1
        if not path.name.endswith(SUFFIXES):  # DICOM
            (made,) = out.glob("[!.]*")
            assert re.fullmatch(r"(seg|rtstruct|series)-[0-9a-f]{8}_ct\.nii\.gz", made.name)
            continue
        mask, ct = sitk.ReadImage(str(path)), sitk.ReadImage(str(out / f"{stem(path)}_ct.nii.gz"))
        assert ct.GetSize() == mask.GetSize()
        if path.name.endswith((".nii", ".nii.gz")):
            assert (ct.GetOrigin(), ct.GetSpacing(), ct.GetDirection()) == (
                mask.GetOrigin(),
                mask.GetSpacing(),
                mask.GetDirection(),
            ), path
        corner = [n - 1 for n in mask.GetSize()]
        assert np.allclose(
            ct.TransformIndexToPhysicalPoint(corner),
            mask.TransformIndexToPhysicalPoint(corner),
            atol=1e-4,
        ), path
    assert done >= 30 and refused >= 100


def test_real_mask_with_map_and_network(real_data: Path, tmp_path: Path, model: Path) -> None:
    """AMOS: 512 x 512 x 82, uint16; its aorta (8) becomes the ascending aorta."""
    (path,) = (real_data / "amos_mask").rglob("*.nii.gz")
    (tmp_path / "map.json").write_text(json.dumps({"8": "ascending aorta", "*": "background"}))
    assert (
        run(
            main,
            [
                "synth",
                str(path),
                "--model",
                str(model),
                "--output",
                str(tmp_path / "out"),
                "--labels",
                str(tmp_path / "map.json"),
                "--quiet",
            ],
        )
        == 0
    )
    ct = sitk.ReadImage(str(tmp_path / "out" / f"{stem(path)}_ct.nii.gz"))
    assert ct.GetSize() == (512, 512, 82) and ct.GetPixelID() == sitk.sitkInt16


# folder, options → exit code, how many CTs, what is said
FOLDERS: dict[str, tuple[str, list[str], int, int, str]] = {
    "contours on their CT": ("rtstruct/mock", [], 0, 1, ""),
    "dangling references": (
        "rtstruct/sts001",
        [],
        1,
        0,
        "267 of the 267 images that it refers to are missing",
    ),
    "dangling references allowed": ("rtstruct/sts001", ["--allow-missing-references"], 0, 1, ""),
    "contours on a given grid": (
        "rtstruct/sts001/STS_001/CT/mask",
        ["--like", "rtstruct/sts001/STS_001/CT/image"],
        0,
        1,
        "",
    ),
    "SEGs, volumes and CTs": ("seg_and_ct", [], 0, 8, "heart_seg.nrrd is empty"),
    "fractions": ("seg_fractional_overlap", [], 1, 4, "holds fractions, not labels"),
    "fractions by a threshold": (
        "seg_fractional_overlap",
        ["--threshold", "0.5"],
        1,
        5,
        "frames without a PlanePositionSequence",
    ),
    "three series": ("odd_dicom/dicomdirtests", [], 2, 0, "holds 3 image series"),
    "one of three series": (
        "odd_dicom/dicomdirtests",
        ["--series", "5"],
        1,
        0,
        "a CT image, not a mask",
    ),
    "a missing slice": ("odd_series/sliceincrement", [], 1, 0, "5, 10 mm apart (some are missing)"),
    "duplicate slices": ("odd_series/notavolume", [], 1, 0, "duplicate slices"),
    "a CT": ("liver_ct_series", [], 1, 0, "a CT image, not a mask"),
    "slices without a modality": ("chest_slices", [], 1, 0, "an image, not a mask"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_real_folders_are_synthesized(
    kind: str, real_data: Path, tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, options, code, count, said = FOLDERS[kind]
    (tmp_path / "map.json").write_text(json.dumps({"1": "left ventricle", "*": "background"}))
    extra = (real_data / option if "/" in option else option for option in options)
    assert (
        synth(
            fake_model,
            tmp_path / "out",
            real_data / folder,
            "--labels",
            tmp_path / "map.json",
            *extra,
        )
        == code
    )
    assert said in capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("*_ct.nii.gz"))) == count


def test_real_seg_overlap_needs_order(
    real_data: Path, tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = real_data / "seg_and_ct" / "partial_overlaps.dcm"
    names = {
        "GREEN": "myocardium",
        "ORANGE": "left atrium",
        "PURPLE": "left ventricle",
        "LIGHT_BLUE": "right atrium",
        "DARK_BLUE": "right ventricle",
    }
    (tmp_path / "map.json").write_text(json.dumps(names))
    arguments = (fake_model, tmp_path / "out", path, "--labels", tmp_path / "map.json")
    assert synth(*arguments) == 1
    assert "overlap" in capsys.readouterr().err
    assert synth(*arguments, "--overlap-order", "DARK_BLUE,LIGHT_BLUE,PURPLE,ORANGE") == 0
