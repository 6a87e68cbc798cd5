"""Another modality by configuration alone: arbitrary units, other labels, from training to the painted image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from samples import image

LABELS = [{"name": "background", "value": 0}, {"name": "fluid", "value": 10}, {"name": "tissue", "value": 20, "aliases": [21]}]


def write_mr(folder: Path, patients: int) -> None:
    """MR-like pairs: tissue about 400, fluid about 800, air about 20, no HU anywhere."""
    rng = np.random.default_rng(0)
    for n in range(patients):
        labels = np.zeros((6, 64, 64), np.int16)
        labels[:, 12:50, 10 + n : 54] = 20
        labels[:, 24:36, 24:40] = 10
        values = np.choose(labels // 10, [20, 800, 400]) + rng.normal(0, 10, labels.shape)
        for kind, made in (("image", np.clip(values, 0, None).astype(np.float32)), ("label", labels)):
            sitk.WriteImage(image(made, spacing=(1.0, 1.0, 3.0)), str(folder / f"mr{n}_{kind}.nii.gz"))


def test_an_mr_like_cohort_trains_exports_and_synthesizes(tmp_path: Path, command) -> None:
    data, run, model, out = (tmp_path / name for name in ("data", "run", "model", "out"))
    data.mkdir()
    write_mr(data, 4)
    settings = [f"data.labels={json.dumps(LABELS)}", "data.canvas=[64,64]", "generator.depth=4", "generator.filters=8", "discriminator.filters=8",
                "training.steps=60", "training.batch_size=4", "training.recalibrate=4", "training.threads=2", "optimizer.lr_g=2e-3",
                "intensity.high=1200"]  # fmt: skip
    trained = command(
        "train/run.py", "--config", "train/configs/mr.json", "--dataset-path", data, "--output", run, "--quiet", "--set", *settings
    )
    assert trained.returncode == 0, trained.stderr
    exported = command("export/build_engine.py", run, "-o", model, "--onnx-only", "--quiet")
    assert exported.returncode == 0, exported.stderr
    manifest = json.loads((model / "manifest.json").read_text())
    assert manifest["intensity"] == {"unit": "a.u.", "low": 0, "high": 1200}
    assert [(row["name"], row["value"]) for row in manifest["labels"]] == [("background", 0), ("fluid", 10), ("tissue", 20)]
    painted = command("-m", "runtime", "synth", data / "mr0_label.nii.gz", "--model", model, "--output", out, "--quiet")
    assert painted.returncode == 0, painted.stderr
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(data / "mr0_label.nii.gz")))
    values = sitk.GetArrayFromImage(sitk.ReadImage(str(next(out.glob("*_ct.nii.gz")))))
    assert values.dtype == np.int16 and values.min() >= 0 and values.max() <= 1200
    air, fluid, tissue = (np.median(values[mask == value]) for value in (0, 10, 20))
    assert air < tissue < fluid and abs(tissue - 400) < 150  # what the labels mean is learnt
