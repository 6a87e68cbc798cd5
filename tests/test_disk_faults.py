"""A disk that fails one call: what has a result's name is whole, the error is one screen,
`--resume` makes the rest, bit for bit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from samples import blobs, results, write_mask

pytestmark = pytest.mark.slow

# The call that fails and which of a thread's; what it says: a broken disk, a full one, one over its
# quota
FAULTS = {
    "fsync 1": "fsync:error=EIO:when=1",
    "fsync 3": "fsync:error=ENOSPC:when=3",
    "write 1": "write:error=EIO:when=1",
    "write 2": "write:error=EDQUOT:when=2",
    "write 5": "write:error=ENOSPC:when=5",
    "rename 1": "rename:error=EIO:when=1",
    "rename 4": "rename:error=EIO:when=4",
    "every other fsync": "fsync:error=EIO:when=2+2",
}
FORMATS = ("nifti", "dicom", "nnunet")
INDEX = {"dataset.json", "splits_final.json", "synthetic.csv"}  # of the cases that are there


@pytest.fixture(scope="module")
def strace() -> str:
    path = shutil.which("strace")
    if (
        path is None
        or subprocess.run([path, "-qq", "-f", "true"], check=False, capture_output=True).returncode
    ):
        assert not os.environ.get("MASK2CT_REQUIRE_TOOLS"), (
            "strace is not installed, or may not trace"
        )
        pytest.skip("strace is not installed, or may not trace")
    return path


@pytest.fixture(scope="module")
def synth(
    root: Path, tmp_path_factory: pytest.TempPathFactory, fake_model: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`synth --resume` of three masks, two variants each, into a folder, behind the words of
    `before`.
    """
    masks = tmp_path_factory.mktemp("masks")
    for n in range(3):
        write_mask(masks / f"m{n}.nii.gz", blobs(seed=n))
    engine = [
        "--model",
        str(fake_model),
        "--backend",
        "fake",
        "--variants",
        "2",
        "--quiet",
        "--resume",
    ]

    def start(out: Path, form: str, *before: str) -> subprocess.CompletedProcess[str]:
        line = [
            *before,
            sys.executable,
            "-m",
            "runtime",
            "synth",
            str(masks),
            *engine,
            "--format",
            form,
            "--output",
            str(out),
        ]
        return subprocess.run(
            line, cwd=root, capture_output=True, text=True, check=False, timeout=120
        )

    return start


@pytest.mark.parametrize("form", FORMATS)
def test_one_failing_call_costs_no_result(
    form: str, strace: str, synth: Callable, tmp_path: Path
) -> None:
    assert synth(tmp_path / "out", form).returncode == 0
    whole = results(tmp_path / "out")
    hits = 0
    for name, fault in FAULTS.items():
        shutil.rmtree(tmp_path / "out")
        call = fault.partition(":")[0]
        run = synth(
            tmp_path / "out",
            form,
            strace,
            "-f",
            "--seccomp-bpf",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            f"trace={call}",
            "-e",
            f"inject={fault}",
        )
        left = results(tmp_path / "out") if (tmp_path / "out").exists() else {}
        assert "Traceback" not in run.stdout + run.stderr, name
        assert run.returncode == 4 or (run.returncode == 0 and left == whole), (
            f"{name}: {run.returncode} {run.stderr}"
        )
        assert all(
            whole.get(file) == content
            for file, content in left.items()
            if Path(file).name not in INDEX
        ), name
        again = synth(tmp_path / "out", form)
        assert again.returncode == 0, f"{name}: {again.stderr}"
        assert results(tmp_path / "out") == whole, name
        hits += run.returncode == 4
    assert hits > len(FAULTS) / 2, f"{hits} of {len(FAULTS)} faults met anything"
    print(f"{form}: {len(FAULTS)} faults, {hits} ended the run, none cost a result")
