"""`mask2ct demo`: a picture from the model and the masks in the package, without PyTorch."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from demo_limits import (
    MOST_BODY_RATIO,
    MOST_MEDIAN_ERROR,
    STRUCTURES,
    TEXTURE_RATIOS,
    Case,
    body_ratio,
    medians,
    texture_ratio,
)

from runtime import Synthesizer
from runtime.__main__ import main
from runtime.cli.demo import demo_folder
from runtime.core.console import run
from runtime.core.errors import MissingComponent
from runtime.core.manifest import Manifest
from runtime.engines.registry import BACKENDS, open_engine
from runtime.viewer.page import Viewer
from train.phantom.cohort import make_patient

# A cohort of which no patient was trained on, and none is in the package.
UNSEEN_SEED, UNSEEN = 11, 8


@pytest.fixture(scope="module")
def unseen() -> list[Case]:
    """(mask, true, synthetic) of phantom patients that the packaged model has not seen."""
    cases = []
    with Synthesizer.open(demo_folder() / "model") as synth:
        for index in range(UNSEEN):
            patient = make_patient(UNSEEN_SEED, index)
            mask = sitk.GetImageFromArray(patient.labels)
            mask.SetSpacing(patient.spacing)
            synthetic = sitk.GetArrayFromImage(synth(mask, seed=index))
            cases.append((patient.labels, patient.hu, synthetic))
    return cases


@pytest.mark.slow
def test_packaged_model_meets_medians(unseen: list[Case]) -> None:
    for value in STRUCTURES:
        true, synthetic = medians(unseen, value)
        assert abs(synthetic - true) <= MOST_MEDIAN_ERROR, f"{value}: {synthetic} for {true} HU"


@pytest.mark.slow
def test_packaged_model_meets_body_error(unseen: list[Case]) -> None:
    assert body_ratio(unseen) <= MOST_BODY_RATIO


@pytest.mark.slow
def test_packaged_model_meets_texture(unseen: list[Case]) -> None:
    for value in STRUCTURES:
        assert TEXTURE_RATIOS[0] <= texture_ratio(unseen, value) <= TEXTURE_RATIOS[1], value


def test_packaged_files_match_documented_digests(root: Path) -> None:
    page = (root / "docs" / "how-to" / "first-picture.md").read_text()
    stated = dict(re.findall(r"^\| `([^`]+)` \| `([0-9a-f]{64})` \|$", page, re.M))
    packaged = {
        path.relative_to(demo_folder()).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in demo_folder().rglob("*.*")
        if path.suffix != ".md"
    }
    assert stated == packaged
    assert sum(path.stat().st_size for path in demo_folder().rglob("*.*")) <= 4_000_000


def test_packaged_model_states_its_licence() -> None:
    manifest = Manifest.load(demo_folder() / "model")
    assert manifest.license.startswith("Apache-2.0") and "simulated" in manifest.license
    manifest.verify(demo_folder() / "model", manifest.files)


def test_demo_needs_no_torch(root: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from runtime.core.console import run\nfrom runtime.__main__ import main\n"
        f"sys.exit(run(main, ['demo', '--output', {str(tmp_path / 'out')!r}, '--no-open']))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "$ mask2ct synth" in done.stdout and "$ mask2ct view" in done.stdout
    assert len([*(tmp_path / "out").glob("phantom_*_v[01]_ct.nii.gz")]) == 8
    page = (tmp_path / "out" / "view.html").read_text()
    assert page.count('"title": "variant 1"') == 4 and "left ventricle" in page


def test_auto_takes_int8_where_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = demo_folder() / "model"
    manifest = Manifest.load(folder)
    engine, reason, file = open_engine("auto", manifest, folder)
    engine.close()
    assert file == "model.int8.onnx" and "INT8, the only precision" in reason
    for backend in BACKENDS:
        monkeypatch.setattr(f"{type(backend).__module__}.find_spec", lambda name: None)
    with pytest.raises(MissingComponent) as absent:
        open_engine("auto", manifest, folder)
    assert 'pip install "mask2ct[' in str(absent.value)


def test_demo_refuses_a_file_as_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    assert run(main, ["demo", "--output", str(tmp_path / "out"), "--no-open"]) == 4
    assert (tmp_path / "out").read_text() == "mine"
    assert "Traceback" not in capsys.readouterr().err


def test_large_volume_is_thinned_and_noted() -> None:
    from runtime.core.volume import Geometry

    viewer = Viewer({})
    shape = (300, 512, 512)
    image = np.broadcast_to(np.int16(40), shape)
    assert viewer.add("big", "synthetic", image, Geometry.from_spacing((0.7, 0.7, 1.0)))
    page = viewer.html()
    assert "one of 2 x 2 x 2 voxels is shown. The file has 512 x 512 x 300." in page
    small = Viewer({}, most_bytes=100)
    assert not small.add("big", "synthetic", image[:9], Geometry.from_spacing((1, 1, 1)))
    assert small.html() == ""
