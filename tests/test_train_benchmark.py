"""The training benchmark compares like with like, and says where it was measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import TINY

from benchmarks.harness.roofline import PEAK
from benchmarks.suites.train import OURS, PLAIN, WORKERS, PlainLoop, SliceFiles, _moved
from train.config import AugmentConfig, resolve
from train.data import augmentation
from train.loop import Training, open_cohort


def test_benchmark_plain_loop_takes_same_step(cohort: Path, tmp_path: Path) -> None:
    settings = resolve(
        {}, [*TINY, "data.slices=3", "data.slice_spacing=5"], dataset_path=str(cohort)
    )
    opened = open_cohort(settings, tmp_path)
    training = Training(settings, tmp_path, opened, quiet=True)
    plain = PlainLoop(settings)
    plain.generator.load_state_dict(training.step.generator.state_dict())
    plain.discriminator.load_state_dict(training.step.discriminator.state_dict())
    for n in range(3):
        batch = training.batch(n)
        ours, theirs = training.step(n, batch), plain(batch)
        assert theirs == pytest.approx(
            {name: float(value) for name, value in ours.items()}, rel=1e-2, abs=1e-4
        )


def test_benchmark_plain_loop_files_hold_slices(cohort: Path, tmp_path: Path) -> None:
    """The files of the plain loop hold the same slices as the cohort."""
    settings = resolve(
        {}, [*TINY, "data.slices=3", "data.slice_spacing=5"], dataset_path=str(cohort)
    )
    opened = open_cohort(settings, tmp_path)
    (tmp_path / "files").mkdir()
    files = SliceFiles(
        tmp_path / "files",
        opened.train,
        settings.augment,
        Training(settings, tmp_path, opened, quiet=True).batches._intensity,
    )
    patient = opened.train[0]
    for k in (0, len(patient) - 1):
        labels, image, noise = files[k]
        assert np.array_equal(labels, patient.labels[k]) and noise.dtype == torch.uint8
        assert np.array_equal(
            np.rint(image[0].numpy() * 2048 - 1024), np.clip(patient.image[k], -1024, 1024)
        )


def test_benchmark_items_move_like_training_batches() -> None:
    y, x = np.mgrid[:48, :64].astype(np.float32)
    image = (np.exp(-((y - 20) ** 2 + (x - 40) ** 2) / 60))[None]
    labels = (image > 0.5).astype(np.uint8)
    affine = augmentation.draw(
        AugmentConfig(rotation=20, shift_width=0.1, shift_height=0.1, zoom=0.2),
        1,
        np.random.default_rng(3),
    )
    ours = augmentation.apply(*(torch.from_numpy(a) for a in (affine, labels[None], image[None])))
    moved_labels, moved = _moved(affine[0], labels, image)
    assert np.abs(ours[1][0].numpy() - moved).max() < 0.03
    assert (ours[0][0].numpy() != moved_labels).mean() < 0.005


@pytest.mark.slow
def test_benchmark_prints_table_and_json_line(cohort: Path, tmp_path: Path, command) -> None:
    done = command(
        "benchmarks/run.py",
        "train",
        "--quick",
        "--quiet",
        "--dataset-path",
        cohort,
        "--json",
        tmp_path / "r.json",
        "--set",
        *TINY,
    )
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout.splitlines()[-1])
    assert [record] == json.loads((tmp_path / "r.json").read_text())
    peaks = {name: row for name, row in record["contenders"].items() if name.startswith(PEAK)}
    contenders = {name: row for name, row in record["contenders"].items() if name not in peaks}
    assert (
        list(contenders) == [OURS, PLAIN, WORKERS]
        and len(peaks) == 2
        and record["machine"]["packages"]["torch"]
    )
    assert str(cohort) not in json.dumps(record)
    for row in contenders.values():
        assert (
            len(row["rates"]) >= 7
            and min(row["rates"]) > 0
            and 0 <= row["loader_share"] < 1
            and row["roof"] == "fp32"
        )
