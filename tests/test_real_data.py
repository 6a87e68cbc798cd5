"""Every real file there is either works, on its own grid, or is refused on one screen. Needs the folder of real images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from runtime.__main__ import main
from runtime.console import run
from runtime.io.headers import stem


def test_every_real_file_works_on_its_own_grid_or_is_refused(
    real_data: Path, tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label_map = tmp_path / "map.json"
    label_map.write_text(json.dumps({"1": "left ventricle", "*": "background"}))
    done = refused = 0
    for n, path in enumerate(sorted(p for p in real_data.rglob("*") if p.is_file())):
        out = tmp_path / str(n)
        arguments = [
            "synth",
            str(path),
            "--model",
            str(fake_model),
            "--backend",
            "fake",
            "--output",
            str(out),
            "--labels",
            str(label_map),
            "--quiet",
        ]
        code, error = run(main, arguments), capsys.readouterr().err
        assert code in (0, 1), (path, error)
        assert "Traceback" not in error and len(error.splitlines()) <= 8, (path, error)
        if code == 1:
            assert path.name in error and "remedy" in error
            assert not list(out.iterdir())
            refused += 1
            continue
        done += 1
        mask, ct = sitk.ReadImage(str(path)), sitk.ReadImage(str(out / f"{stem(path)}_ct.nii.gz"))
        assert ct.GetSize() == mask.GetSize()
        if path.name.endswith((".nii", ".nii.gz")):
            assert (ct.GetOrigin(), ct.GetSpacing(), ct.GetDirection()) == (mask.GetOrigin(), mask.GetSpacing(), mask.GetDirection()), path
        corner = [n - 1 for n in mask.GetSize()]
        assert np.allclose(ct.TransformIndexToPhysicalPoint(corner), mask.TransformIndexToPhysicalPoint(corner), atol=1e-4), path
    assert done >= 30 and refused >= 100


def test_a_real_mask_through_a_label_map_and_a_real_network(real_data: Path, tmp_path: Path, model: Path) -> None:
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
