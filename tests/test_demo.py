"""The main job at its real size, and its limits on the files that it leaves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from demo_limits import (
    MOST_BODY_RATIO,
    MOST_MEDIAN_ERROR,
    STRUCTURES,
    TEXTURE_RATIOS,
    body_ratio,
    medians,
    texture_ratio,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` leaves."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    done = command("tools/demo.py", "--output", out, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def volume(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.fixture(scope="module")
def cases(demo: Path) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(mask, true, synthetic) of every unseen patient."""
    names = sorted(p.name.removesuffix(".nii.gz") for p in (demo / "masks").iterdir())
    assert len(names) >= 4
    return [
        (
            volume(demo / "masks" / f"{n}.nii.gz"),
            volume(demo / "truth" / f"{n}.nii.gz"),
            volume(demo / "synthetic" / f"{n}_ct.nii.gz"),
        )
        for n in names
    ]


def test_demo_leaves_promised_files(demo: Path) -> None:
    for name in (
        "train/generator.safetensors",
        "train/run.json",
        "model/manifest.json",
        "model/model.onnx",
        "report.html",
    ):
        assert (demo / name).is_file(), name
    assert not (demo / "unseen").exists()


def test_demo_split_has_no_leakage(demo: Path) -> None:
    """No held-out mask is among those of the training."""
    trained = [volume(p) for p in sorted((demo / "data").glob("*_label.nii.gz"))]
    for path in (demo / "masks").iterdir():
        assert not any(np.array_equal(volume(path), other) for other in trained)


@pytest.mark.parametrize("value", STRUCTURES)
def test_median_hu_of_each_structure(value: int, cases) -> None:
    true, synthetic = medians(cases, value)
    assert abs(synthetic - true) <= MOST_MEDIAN_ERROR, f"{synthetic} HU for {true} HU"


def test_body_error_against_mean_synthesis(cases) -> None:
    ratio = body_ratio(cases)
    assert ratio <= MOST_BODY_RATIO, f"ratio {ratio:.3f}"


@pytest.mark.parametrize("value", STRUCTURES)
def test_texture_is_neither_smear_nor_static(value: int, cases) -> None:
    ratio = texture_ratio(cases, value)
    assert TEXTURE_RATIOS[0] <= ratio <= TEXTURE_RATIOS[1], f"ratio {ratio:.2f}"


def test_the_cts_have_their_masks_grid(demo: Path) -> None:
    for path in (demo / "masks").iterdir():
        mask, ct = (
            sitk.ReadImage(str(path)),
            sitk.ReadImage(str(demo / "synthetic" / path.name.replace(".nii.gz", "_ct.nii.gz"))),
        )
        assert ct.GetPixelID() == sitk.sitkInt16 and ct.GetSize() == mask.GetSize()
        assert (ct.GetSpacing(), ct.GetOrigin(), ct.GetDirection()) == (
            mask.GetSpacing(),
            mask.GetOrigin(),
            mask.GetDirection(),
        )


def test_demo_report_is_self_contained(demo: Path) -> None:
    """The report is one file and says what was measured."""
    page = (demo / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert page.count('"title": "true"') == 3  # the viewer has three cases
    assert not re.search(r'(src|href)=(?!"data:)', page)
    metrics = json.loads((demo / "metrics.json").read_text())
    for name, organ in metrics["organs"].items():
        assert name in page and f"{organ['median']:.0f}" in page
    for stage in (
        "phantom cohort",
        "training",
        "export and proof",
        "synthesis",
        "slices/s",
        "commit",
        "openvino",
    ):
        assert stage in page, stage


def test_demo_parity_on_held_out_masks(demo: Path) -> None:
    """The parity of the demo's model is validated on its held-out masks."""
    manifest = json.loads((demo / "model" / "manifest.json").read_text())
    assert set(manifest["parity"]) == {"model.onnx", "model.fp16.onnx", "model.int8.onnx"}
    for proof in manifest["parity"]["model.onnx"].values():
        assert proof["validation masks"]["masks"] >= 64 and proof["validation masks"]["max"] <= 1
    for proof in manifest["parity"]["model.int8.onnx"].values():
        assert proof["validation masks"]["body_mean"] <= 8
    sizes = {name: file["bytes"] for name, file in manifest["files"].items()}
    assert sizes["model.int8.onnx"] <= 0.32 * sizes["model.onnx"]


def test_second_demo_run_starts_anew(tmp_path: Path, command) -> None:
    """A second run in the same folder starts anew and leaves other folders alone."""
    (tmp_path / "thesis.tex").write_text("all my work")
    done = command("tools/demo.py", "--output", tmp_path)
    assert done.returncode == 2 and "holds something else than a demo" in done.stderr
    assert (tmp_path / "thesis.tex").read_text() == "all my work"
