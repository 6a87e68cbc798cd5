"""TensorBoard and Weights & Biases: off unless asked for, refused when absent, offline in these
tests.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

QUICK = [
    "training.steps=4",
    "training.log_every=2",
    "training.batch_size=2",
    "training.recalibrate=1",
    "data.canvas=[64,64]",
    "generator.depth=4",
    "generator.filters=4",
    "discriminator.filters=4",
    "training.threads=2",
]


def arguments(cohort: Path, run: Path, *more: object) -> list[object]:
    return [
        "train/run.py",
        "--config",
        "train/configs/phantom.json",
        "--dataset-path",
        cohort,
        "--output",
        run,
        "--quiet",
        *more,
        "--set",
        *QUICK,
    ]


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (pip install {package})")


@pytest.mark.slow
def test_tensorboard_losses_and_metrics(cohort: Path, tmp_path: Path, command) -> None:
    needs("tensorboard")
    done = command(*arguments(cohort, tmp_path / "run", "--tensorboard"))
    assert done.returncode == 0, done.stderr
    reader = """
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1]).Reload()
print([e.step for e in events.Scalars("losses.reconstruction")], "metrics.body.mae" in events.Tags()["scalars"])
"""
    read = command("-W", "ignore", "-c", reader, tmp_path / "run" / "tensorboard")
    assert read.stdout.strip() == "[2, 4] True", read.stderr


@pytest.mark.slow
def test_offline_wandb_stays_in_run(cohort: Path, tmp_path: Path, command) -> None:
    """Weights & Biases, offline, keeps everything in the run folder."""
    needs("wandb")
    line = arguments(cohort, tmp_path / "run", "--use_wandb", "--wandb_resume_id", "abc123")
    done = command(*line, env={"WANDB_MODE": "offline", "HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    found = list((tmp_path / "run" / "wandb").glob("offline-run-*-abc123/run-abc123.wandb"))
    assert len(found) == 1 and str(cohort).encode() not in found[0].read_bytes()


@pytest.mark.parametrize(
    ("option", "package"), [("--tensorboard", "tensorboard"), ("--use_wandb", "wandb")]
)
def test_absent_logger_is_named_first(
    cohort: Path, tmp_path: Path, command, option: str, package: str
) -> None:
    """An absent logger is named before anything is started."""
    (tmp_path / "hidden" / package).mkdir(parents=True)
    (tmp_path / "hidden" / package / "__init__.py").write_text(
        "raise ImportError('it is absent')\n"
    )
    done = command(
        *arguments(cohort, tmp_path / "run", option), env={"PYTHONPATH": str(tmp_path / "hidden")}
    )
    assert (
        done.returncode == 3
        and f"pip install {package}" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "run").exists()
