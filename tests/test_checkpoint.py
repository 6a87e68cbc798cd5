"""Checkpoints on the disk: which are kept, which are used, and how torn ones are passed over."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from runtime.core.errors import ModelError, OutputError, writing
from train import checkpoint


def drop_meta(path: Path) -> None:
    (path / "state.json").unlink()


def drop_state(path: Path) -> None:
    (path / "state.safetensors").unlink()


def truncate(path: Path) -> None:
    os.truncate(path / "state.safetensors", 1000)


def flip(path: Path) -> None:
    content = (path / "state.safetensors").read_bytes()
    (path / "state.safetensors").write_bytes(content[:-4] + b"abcd")


def cut_meta(path: Path) -> None:
    os.truncate(path / "state.json", 20)


def other_meta(path: Path) -> None:
    (path / "state.json").write_text("[]")


def rename_step(path: Path) -> None:
    meta = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**meta, "step": 7}))


TEARS = (drop_meta, drop_state, truncate, flip, cut_meta, other_meta, rename_step)


@pytest.mark.parametrize("tear", TEARS)
def test_torn_checkpoint_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tear
) -> None:
    """A torn checkpoint is passed over with a warning."""
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"a": torch.full((1000,), float(step))}, keep=3)
    tear(tmp_path / "checkpoints" / "step-00000003")
    chosen = checkpoint.usable(tmp_path, limit=10)
    assert chosen is not None and checkpoint.load(chosen)[0] == 2
    assert "warning: checkpoint step-00000003 cannot be used" in capsys.readouterr().err
    with pytest.raises(ModelError, match="step-00000003"):
        checkpoint.load(tmp_path / "checkpoints" / "step-00000003")
    for step in (1, 2):
        tear(tmp_path / "checkpoints" / f"step-{step:08d}")
    with pytest.raises(ModelError, match="none of the 3 checkpoints") as caught:
        checkpoint.usable(tmp_path, limit=10)
    assert caught.value.remedy and caught.value.file == tmp_path / "checkpoints"


def test_newest_and_best_checkpoints_stay(tmp_path: Path) -> None:
    scores = {1: 0.9, 2: 0.4, 3: None, 4: 0.7, 5: 0.4, 6: None, 7: 0.5}
    for step, score in scores.items():
        checkpoint.save(tmp_path, step, {"a": torch.zeros(1)}, keep=2, score=score)
    assert [p.name for p in checkpoint._all(tmp_path)] == [
        "step-00000002",
        "step-00000006",
        "step-00000007",
    ]
    assert checkpoint.best(tmp_path, 7) == (tmp_path / "checkpoints" / "step-00000002", 0.4)
    assert (
        checkpoint.usable(tmp_path, limit=3) == tmp_path / "checkpoints" / "step-00000002"
    )  # the way back to the best
    drop_state(tmp_path / "checkpoints" / "step-00000007")
    checkpoint.save(
        tmp_path, 3, {"a": torch.zeros(1)}, keep=1
    )  # gone on from step 2: later folders wait to be written anew
    assert [p.name[-1] for p in checkpoint._all(tmp_path)] == ["2", "3", "6", "7"]


def test_checkpoint_full_disk_is_exit_4(tmp_path: Path) -> None:
    """A full disk is an output error.

    What safetensors raises for the file system's errors is not an OSError; ours is mapped to
    exit code 4.
    """
    with pytest.raises(OutputError) as caught, writing(tmp_path):
        checkpoint.write_tensors({"a": torch.zeros(2)}, tmp_path / "absent" / "state.safetensors")
    assert caught.value.exit_code == 4
