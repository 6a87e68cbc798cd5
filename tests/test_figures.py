"""The paper's figure: condition, generated at six moments of a run, original."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from runtime.core.errors import UsageError
from train.figures import comparison, progress, write_snapshot


def test_run_keeps_slices_for_figure(trained: Path) -> None:
    """A run keeps three slices at the moments that the paper's figure shows."""
    files = sorted((trained / "progress").iterdir())
    assert [int(f.name[5:13]) for f in files] == sorted(
        {round(6 * share) for share in (0, 0.1, 0.25, 0.5, 0.75, 1)}
    )
    first, last = load_file(files[0]), load_file(files[-1])
    assert (
        first["labels"].shape == first["generated"].shape == first["original"].shape == (3, 64, 64)
    )
    assert (
        first["labels"].any((1, 2)).all()
        and first["generated"].dtype == first["original"].dtype == np.int16
    )
    assert np.array_equal(first["original"], last["original"]) and not np.array_equal(
        first["generated"], last["generated"]
    )


def test_one_command_draws_the_figure(trained: Path, tmp_path: Path, command) -> None:
    done = command("-m", "train.figures", trained, "-o", tmp_path / "figure.png")
    assert done.returncode == 0 and "steps 0, 1, 2, 3, 4, 6" in done.stdout, done.stderr
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    done = command("-m", "train.figures", tmp_path, "-o", tmp_path / "other.png")
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr
        and not (tmp_path / "other.png").exists()
    )


def test_nearest_moment_replaces_missing_one(trained: Path, tmp_path: Path) -> None:
    """The nearest moment stands in for one that was not synthesized."""
    shutil.copy(trained / "config.json", tmp_path)
    with pytest.raises(UsageError, match="no synthetic slices"):
        progress(tmp_path, tmp_path / "figure.png")
    plane = np.zeros((2, 8, 8), np.int16)
    for step in (0, 4):
        write_snapshot(tmp_path, step, plane.astype(np.uint8), plane, plane.copy())
    assert progress(tmp_path, tmp_path / "figure.png") == [0, 4]
    (tmp_path / "progress" / "step-00000004.safetensors").write_bytes(b"torn")
    with pytest.raises(UsageError, match="cannot be read"):
        progress(tmp_path, tmp_path / "figure.png")


def test_comparison_has_three_slices(
    tmp_path: Path,
) -> None:
    """A comparison shows condition, generated and original of three slices.

    As the original's pictures do: a row for each sample, at the window's dark end, its middle
    and its bright end.
    """
    from matplotlib.image import imread

    greys = np.array([-700, 0, 700], np.int16)
    planes = np.broadcast_to(greys[:, None, None], (3, 16, 16))
    labels = np.zeros((5, 16, 16), np.uint8)
    generated, original = (
        np.concatenate([planes, planes[:2]]),
        np.concatenate([planes[::-1], planes[:2]]),
    )
    comparison(tmp_path / "a.png", labels, generated, original, classes=2, window=(-700, 700))
    image = imread(tmp_path / "a.png")[..., :3]
    height, width = image.shape[:2]
    top = int(height * 0.4 / (3 * 3 + 0.4))  # the titles
    centres = [
        [
            image[top + (height - top) * (2 * row + 1) // 6, width * (2 * column + 1) // 6]
            for column in range(3)
        ]
        for row in range(3)
    ]
    shown = np.array(centres)[:, 1:].mean(-1)
    assert np.allclose(shown, [[0, 1], [0.5, 0.5], [1, 0]], atol=0.01)
