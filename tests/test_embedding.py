"""docs/how-to/embedding.md is run: each of its blocks is a script of its own, beside a `runs/demo` with
a small model.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hand_made import write_model
from samples import blobs, write_mask

from runtime.core.manifest import Manifest
from runtime.engines.memory import HOST_STREAM
from runtime.engines.registry import open_engine
from runtime.io.writers.registry import FORMATS

BLOCK = re.compile(r"```python\n# (\w+\.py)\n(.*?)```", re.DOTALL)
PRINTS = {
    "arrays.py": "3 (8, 96, 96) [  0 205 500]",
    "warped.py": "3 (8, 96, 96) [0 1]",
    "rand_warp.py": "warped (1, 40, 40, 6) (1, 40, 40, 6)",
    "pairs.py": "fixed 2 (2, 1, 6, 40, 40)\nfresh 2",
    "with_monai.py": "monai (1, 40, 40, 6)",
    "with_torchio.py": "torchio 4 (1, 40, 40, 6)",
    "with_asyncio.py": "first synthesizing 0/2\ncancelled True\nthen 2 CTs",
    "with_nnunet.py": "unseen_1 1 ['unseen_1_v1_0000.nii.gz', 'unseen_1_v1.nii.gz']",
}


def blocks(root: Path) -> dict[str, str]:
    return dict(BLOCK.findall((root / "docs" / "how-to" / "embedding.md").read_text()))


def test_every_block_is_run(root: Path) -> None:
    text = (root / "docs" / "how-to" / "embedding.md").read_text()
    assert set(blocks(root)) == set(PRINTS) and text.count("```python") == len(PRINTS)


@pytest.mark.parametrize("name", PRINTS)
def test_the_block_runs(name: str, root: Path, model: Path, tmp_path: Path) -> None:
    if name == "with_nnunet.py" and "nnunet" not in FORMATS:
        pytest.skip("this version writes no nnU-Net data sets")
    demo = tmp_path / "runs" / "demo"
    (demo / "masks").mkdir(parents=True)
    (demo / "model").symlink_to(model)
    for n in range(2):
        write_mask(
            demo / "masks" / f"unseen_{n}.nii.gz",
            blobs((6, 40, 40), seed=n),
            direction=np.diag([1.0, -1.0, 1.0]),
        )
    (tmp_path / name).write_text(blocks(root)[name])
    done = subprocess.run(
        [sys.executable, name],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert PRINTS[name] in done.stdout


def test_plain_onnx_runtime_gives_our_bytes(root: Path, tmp_path: Path) -> None:
    """docs/how-to/plain-onnx.md: the graph without this package, and the same bytes with it."""
    text = (root / "docs" / "how-to" / "plain-onnx.md").read_text()
    ((name, block),) = BLOCK.findall(text)
    assert len(block.strip().splitlines()) <= 15 and "mask2ct" not in block
    folder = write_model(tmp_path / "runs" / "demo" / "model")
    (tmp_path / name).write_text(block + 'np.savez("plain.npz", hu=hu, **taken)\n')
    done = subprocess.run(
        [sys.executable, name],
        cwd=tmp_path,
        env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "plain (1, 64, 64) int16", done.stderr
    plain = dict(np.load(tmp_path / "plain.npz"))
    hu = plain.pop("hu")
    assert len(np.unique(hu)) > 2
    manifest = Manifest.load(folder)
    engine, *_ = open_engine("onnx", manifest, folder)
    batch = engine.spec.batch
    inputs = {key: np.repeat(array, batch, 0) for key, array in plain.items()}
    out = np.empty((batch, *manifest.grid.canvas, 2), np.uint8)
    engine.run(inputs, out, stream=HOST_STREAM)
    engine.close()
    assert np.array_equal(out[:1].view("<i2")[..., 0], hu)
