"""Whole runs by the command line: what they leave, how they resume, how they refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from runtime.core.errors import ModelError
from train import checkpoint, verdict
from train.config import resolve
from train.loop import Training, open_cohort
from train.run import refuse_broken
from train.step import Batch, Step
from train.training_monitor import Collapsed, Diverged, TrainingMonitor
from train.verdict import BrokenModel

TINY = [
    "data.canvas=[64,64]",
    "generator.kind=unet",
    "generator.filters=8",
    "generator.depth=4",
    "generator.skips=true",
    "generator.textures=2",
    "generator.style=2",
    "loss.texture=10",
    "discriminator.filters=8",
    "training.batch_size=4",
    "training.recalibrate=2",
    "training.valid_slices=6",
    "training.threads=2",
    "training.log_every=2",
    "training.valid_every=10",
    "training.checkpoint_every=5",
]


def arguments(config: Path, cohort: Path, run: Path, steps: int, *more: str) -> list[object]:
    return [
        "train/run.py",
        "--config",
        config,
        "--dataset-path",
        cohort,
        "--output",
        run,
        "--quiet",
        "--set",
        *TINY,
        f"training.steps={steps}",
        *more,
    ]


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.load(run / "checkpoints" / f"step-{step:08d}")[1]


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def losses(run: Path) -> list[tuple[int, dict[str, float], object]]:
    """Everything in metrics.jsonl but the time."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["losses"], row.get("metrics")) for row in rows]


def test_run_folder_holds_promised_files(trained: Path, cohort: Path) -> None:
    files = {p.relative_to(trained).as_posix() for p in trained.rglob("*") if p.is_file()}
    assert {
        "generator.safetensors",
        "run.json",
        "config.json",
        "metrics.jsonl",
        "report.html",
        "figures/step-00000006.png",
        "checkpoints/step-00000006/state.json",
    } <= files
    assert not [
        name for name in files if name.endswith((".pt", ".pth", ".pkl")) or ".mask2ct-part-" in name
    ]
    text = (trained / "run.json").read_text()
    assert (
        str(cohort) not in text and "ct_train" not in text
    )  # run folders travel; patients' names do not
    data = json.loads(text)
    assert (
        data["schema_version"] == 1
        and data["step"] == 6
        and data["noise"] is True
        and data["style"] == 0
    )
    assert data["data"]["patients"] == {"train": 3, "valid": 1, "test": 0} and set(
        data["metrics"]
    ) == {
        "cases",
        "organs",
        "body",
        "similarity",
        "distribution",
        "ceiling",
    }
    assert data["verdict"]["verdict"] == "not assessed"
    assert data["weights"]["average"] == "ema" and [row["index"] for row in data["labels"]] == list(
        range(8)
    )
    page = (trained / "report.html").read_text()
    assert (
        page.count("data:image/png;base64,") == 2
        and "left ventricle" in page
        and "W1 real-real" in page
    )  # a figure, the curves
    assert "held-out patient 1" in page and '"title": "synthetic"' in page  # the viewer
    assert (trained / "figures" / "step-00000006.png").read_bytes().startswith(b"\x89PNG")
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 6 and last["metrics"]["body"]["mae"] > 0 and last["seconds"] > 0


def test_generator_rebuilds_from_run_folder(trained: Path) -> None:
    run = checkpoint.load_run(trained)
    net = checkpoint.load_generator(trained)
    assert not net.training and net.divisor == run.grid.divisor
    stored = load_file(trained / "generator.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in net.state_dict().items())


def test_altered_missing_run_files_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"run\.json"):
        checkpoint.load_run(tmp_path)
    for name in ("run.json", "generator.safetensors", "validation.safetensors"):
        if (trained / name).exists():
            (tmp_path / name).write_bytes((trained / name).read_bytes())
    checkpoint.load_run(tmp_path)
    (tmp_path / "generator.safetensors").write_bytes(b"other")
    with pytest.raises(ModelError, match="not the file"):
        checkpoint.load_run(tmp_path)
    data = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**data, "config": {"nmae": "x"}}))
    with pytest.raises(ModelError, match="nmae"):
        checkpoint.load_run(tmp_path)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_resumed_run_equals_uninterrupted_run(
    precision: str, config: Path, cohort: Path, tmp_path: Path, command
) -> None:
    """The resumed run equals the uninterrupted one bit for bit."""
    how = f"training.precision={precision}"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command(*arguments(config, cohort, whole, 20, how)).returncode == 0
    assert command(*arguments(config, cohort, parts, 10, how)).returncode == 0
    done = command(*arguments(config, cohort, parts, 20, how), "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_bits(tensors(whole, 20), tensors(parts, 20))
    assert_same_bits(
        load_file(whole / "generator.safetensors"), load_file(parts / "generator.safetensors")
    )
    assert losses(whole) == losses(parts)
    assert (
        json.loads((whole / "run.json").read_text())["metrics"]
        == json.loads((parts / "run.json").read_text())["metrics"]
    )
    kept = {p.name for p in (parts / "checkpoints").iterdir()}
    assert kept >= {"step-00000015", "step-00000020"} and kept == {
        p.name for p in (whole / "checkpoints").iterdir()
    }


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(
    config: Path, cohort: Path, root: Path, tmp_path: Path, command
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command(*arguments(config, cohort, whole, 40)).returncode == 0
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments(config, cohort, killed, 40))], cwd=root
    )
    wait_for(lambda: (killed / "checkpoints" / "step-00000020").exists(), process)
    process.kill()
    process.wait()
    with open(killed / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 22, "los')  # a line that was cut off
    done = command(
        "train/run.py", "--resume", "--output", killed, "--quiet"
    )  # the run's own config
    assert done.returncode == 0, done.stderr
    assert_same_bits(tensors(whole, 40), tensors(killed, 40))
    assert_same_bits(
        load_file(whole / "generator.safetensors"), load_file(killed / "generator.safetensors")
    )
    assert losses(whole) == losses(killed)


def test_interrupt_saves_and_exits_130(
    config: Path, cohort: Path, root: Path, tmp_path: Path, command
) -> None:
    """An interrupt saves a checkpoint, says how to go on and exits with 130."""
    run = tmp_path / "run"
    command_line = [sys.executable, *map(str, arguments(config, cohort, run, 100_000))]
    process = subprocess.Popen(command_line, cwd=root, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (run / "checkpoints" / "step-00000005").exists(), process)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "--resume" in errors and "Traceback" not in errors
    newest = checkpoint.newest(run)
    assert newest is not None and f"step {int(newest.name[5:])}" in errors
    assert not (run / "run.json").exists()


def wait_for(condition, process: subprocess.Popen) -> None:
    """Poll, a minute at most, for something that the process does."""
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


def test_folder_with_run_is_not_overwritten(
    trained: Path, config: Path, cohort: Path, command
) -> None:
    before = (trained / "run.json").read_bytes()
    done = command(*arguments(config, cohort, trained, 5))
    assert (
        done.returncode == 2
        and "already holds a run" in done.stderr
        and "--resume" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert (trained / "run.json").read_bytes() == before


def test_resume_with_other_config_names_keys(trained: Path, command) -> None:
    done = command(
        "train/run.py",
        "--resume",
        "--output",
        trained,
        "--set",
        "optimizer.lr_g=0.5",
        "LOG_INTERVAL=3",
    )
    assert (
        done.returncode == 2
        and "optimizer.lr_g" in done.stderr
        and "training.log_every" in done.stderr
    )


def test_resume_without_run_is_an_error(tmp_path: Path, command) -> None:
    done = command("train/run.py", "--resume", "--output", tmp_path / "none")
    assert done.returncode == 2 and "no run to resume" in done.stderr
    assert command("train/run.py", "--resume").returncode == 2


@pytest.mark.slow
def test_torn_checkpoint_resumes_to_same_bits(
    config: Path, cohort: Path, tmp_path: Path, command
) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert command(*arguments(config, cohort, whole, 15)).returncode == 0
    assert command(*arguments(config, cohort, torn, 10)).returncode == 0
    os.truncate(torn / "checkpoints" / "step-00000010" / "state.safetensors", 1000)
    done = command(*arguments(config, cohort, torn, 15), "--resume")
    assert done.returncode == 0 and "step-00000010 cannot be used" in done.stderr, done.stderr
    assert_same_bits(tensors(whole, 15), tensors(torn, 15))
    assert_same_bits(tensors(whole, 10), tensors(torn, 10))
    assert losses(whole) == losses(torn)
    for path in (torn / "checkpoints").iterdir():
        (path / "state.json").unlink()
    done = command("train/run.py", "--resume", "--output", torn, "--quiet")
    assert (
        done.returncode == 2
        and "none of the 2 checkpoints" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_nan_loss_stops_the_run(cohort: Path, tmp_path: Path) -> None:
    config = resolve(
        {}, [*TINY, "training.steps=20", "optimizer.lr_g=1e30"], dataset_path=str(cohort)
    )
    with pytest.raises(Diverged, match="diverged before step 2") as caught:
        Training(config, tmp_path, open_cohort(config, tmp_path), quiet=True).run()
    assert "lr_g" in caught.value.remedy


def test_nan_weights_never_become_checkpoint(cohort: Path, tmp_path: Path) -> None:
    config = resolve({}, [*TINY, "training.steps=10"], dataset_path=str(cohort))
    training = Training(config, tmp_path, open_cohort(config, tmp_path), quiet=True)
    advance = training._advance

    def break_at_nine() -> None:
        advance()
        if training.done == 10:  # after the losses of this step were taken
            training.step.generator.top.image.weight.data[0] = float("nan")

    training._advance = break_at_nine  # type: ignore[method-assign]
    with pytest.raises(Diverged, match=r"diverged at step 10: generator/top\.image\.weight"):
        training.run()
    newest = checkpoint.newest(tmp_path)
    assert (
        newest is not None
        and newest.name == "step-00000005"
        and not (tmp_path / "run.json").exists()
    )


def test_broken_training_draws_worst_slice(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps give images that no one can use; a training that is assessed says so."""
    monkeypatch.setattr(verdict, "LEAST_STEPS", 1)
    config = resolve({}, [*TINY, "training.steps=2"], dataset_path=str(cohort))
    training = Training(config, tmp_path, open_cohort(config, tmp_path), quiet=True)
    training.run()
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["verdict"] == training.verdict and run["verdict"]["verdict"] == "broken"
    assert {"synthetic", "table", "real", "memory"} == set(run["quality"])
    assert (tmp_path / "figures" / "worst.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert run["verdict"]["findings"][0]["text"].replace("'", "&#x27;") in page
    assert "real-vs-real" in page and "worst" in page
    with pytest.raises(BrokenModel):
        refuse_broken(run["verdict"], tmp_path)


def test_dead_discriminator_stops_run_keeps_checkpoints(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead discriminator stops the run, and the checkpoints from before are kept."""
    settings = [
        *TINY,
        "training.steps=200",
        "training.collapse_steps=20",
        "training.keep_checkpoints=1",
        "training.valid_every=500",
    ]
    config = resolve({}, settings, dataset_path=str(cohort))
    advance = Step.__call__

    def dying(self: Step, step: int, batch: Batch) -> dict[str, torch.Tensor]:
        losses = advance(self, step, batch)
        return (
            losses
            if step < 10
            else {**losses, "d_real": torch.tensor(1e-4), "d_fake": torch.tensor(1e-4)}
        )

    monkeypatch.setattr(Step, "__call__", dying)
    training = Training(config, tmp_path, open_cohort(config, tmp_path), quiet=True)
    with pytest.raises(Collapsed, match="since step 10") as caught:
        training.run()
    assert (
        "step 10 are kept" in caught.value.remedy
        and caught.value.file == tmp_path
        and training.done == 30
    )
    assert [p.name[-2:] for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "10",
        "15",
        "20",
        "25",
    ]


def test_monitor_discriminator_recovery_and_grey_images(
    tmp_path: Path,
) -> None:
    """The monitor forgets when the discriminator recovers; it notices images of one grey."""
    watch = TrainingMonitor(tmp_path, 100)
    dead, alive = {"d_real": 0.0, "d_fake": 1e-3}, {"d_real": 0.1, "d_fake": 0.1}
    for step, losses_ in ((60, dead), (90, alive), (150, dead), (180, dead)):
        watch.losses(step - 30, step, losses_)
    assert watch.suspicious
    with pytest.raises(Collapsed, match="since step 120"):
        watch.losses(180, 220, dead)
    TrainingMonitor(tmp_path, 0).losses(0, 10_000, dead)  # 0: for ever
    true = [np.random.default_rng(0).normal(0, 300, (2, 8, 8))]
    watch.check_images(5, [true[0] * 0.1], true)
    with pytest.raises(Collapsed, match="one grey"):
        watch.check_images(5, [np.full((2, 8, 8), -500) + true[0] * 0.001], true)


def test_training_seed_decides_losses(cohort: Path, tmp_path: Path) -> None:
    def first_losses(seed: int) -> dict[str, float]:
        folder = tmp_path / f"{seed}-{len(list(tmp_path.iterdir()))}"
        config = resolve(
            {}, [*TINY, "training.steps=2", f"training.seed={seed}"], dataset_path=str(cohort)
        )
        Training(config, folder, open_cohort(config, folder), quiet=True).run()
        return losses(folder)[0][1]

    assert first_losses(1) == first_losses(1) != first_losses(2)


def test_kept_labels_train_smaller_table(cohort: Path, tmp_path: Path) -> None:
    config = resolve({}, [*TINY, "training.steps=1", "LABELS=[0,1,3]"], dataset_path=str(cohort))
    opened = open_cohort(config, tmp_path)
    assert max(int(p.labels.max()) for p in opened.train) == 2
    Training(config, tmp_path, opened, quiet=True).run()
    run = checkpoint.load_run(tmp_path)
    assert [label.name for label in run.labels.labels] == [
        "background",
        "myocardium",
        "left ventricle",
    ]
    assert 420 in run.labels.labels[0].aliases and checkpoint.load_generator(tmp_path).channels == 3


def test_training_dry_run_starts_nothing(
    config: Path, cohort: Path, tmp_path: Path, command
) -> None:
    """A dry run shows the settings, the data, the network and the step, and starts nothing."""
    run = tmp_path / "run"
    done = command(*arguments(config, cohort, run, 1000), "--dry-run")
    assert done.returncode == 0, done.stderr
    for expected in (
        '"batch_size": 4',
        "train                 3      96",
        "generator",
        "MACs per slice",
        "for 1000 steps",
        "a step in fp32; ",
    ):
        assert expected in done.stdout, done.stdout
    assert not run.exists()


def test_training_help_answers_without_torch(command) -> None:
    done = command("train/run.py", "--help", env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0
    assert "exit codes" in done.stdout and " torch\n" not in done.stderr
    assert "--dataset_path" in done.stdout or "--dataset-path" in done.stdout


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        ((), 2, "--config"),
        (("--config", "absent.json"), 2, "absent.json does not exist"),
        (("--config", "train/configs/whs.json"), 2, "--dataset-path"),
        (
            ("--config", "train/configs/phantom.json", "--set", "training.stepz=3"),
            2,
            "did you mean 'steps'?",
        ),
        (
            ("--config", "train/configs/whs.json", "--dataset_path", "nowhere"),
            2,
            "nowhere does not exist",
        ),
    ],
)
def test_wrong_training_command_is_one_screen(
    tmp_path: Path, command, more: tuple[str, ...], code: int, says: str
) -> None:
    done = command("train/run.py", "--output", tmp_path / "run", "--quiet", *more)
    assert done.returncode == code and says in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "config.json").exists()


def test_unwritable_training_output_is_exit_4(
    config: Path, cohort: Path, tmp_path: Path, command
) -> None:
    (tmp_path / "file").write_text("in the way")
    done = command(*arguments(config, cohort, tmp_path / "file" / "run", 1))
    assert done.returncode == 4 and "Traceback" not in done.stderr


def test_checkpoints_are_never_half_written(trained: Path) -> None:
    for folder in (trained / "checkpoints").iterdir():
        step, loaded = checkpoint.load(folder)
        assert folder.name == f"step-{step:08d}" and all(
            np.isfinite(t.float().numpy()).all() for t in loaded.values()
        )
        assert os.path.getsize(folder / "state.safetensors") > 0
