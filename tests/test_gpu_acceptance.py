"""The acceptance script on a machine without a GPU: it says what is not there, and survives a
check that crashes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bindings import driver
from samples import write_fake_model

from runtime.engines.fake import fake_manifest
from runtime.engines.gpu.probe import why_no_gpu

SCRIPT = "benchmarks/gpu_acceptance.py"


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Packages that are found before the installed ones: SimpleITK is absent, torch ends the
    process.
    """
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "SimpleITK.py").write_text("raise ImportError('SimpleITK is hidden')")
    (folder / "torch.py").write_text("import os; os.abort()")
    return folder


def test_acceptance_needs_numpy_and_onnx(command) -> None:
    """The acceptance builds and measures with numpy and onnx alone.

    A GPU machine is what it is: everything else that the house uses is hidden.
    """
    code = """
import sys
for name in ("SimpleITK", "isal", "scipy", "torchmetrics", "matplotlib", "safetensors", "torch"):
    sys.modules[name] = None
import benchmarks.gpu_acceptance, export.attach_engine, export.to_tensorrt
print("imported")
"""
    done = command("-c", code)
    assert done.stdout.strip() == "imported", done.stderr


def test_checks_without_gpu_are_absent(packages: Path, command) -> None:
    """Without a GPU every check is reported as not present."""
    if why_no_gpu() is None:
        pytest.skip("there is a GPU: this machine runs the checks")
    done = command(SCRIPT, env={"PYTHONPATH": str(packages)})
    assert done.returncode == 3, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert len(record["result"]) > 12 and {row["outcome"] for row in record["result"].values()} == {
        "not present"
    }
    assert all(row["seen"] for row in record["result"].values()) and record["machine"]["cpu"]
    assert (
        "a CUDA graph of the lean engine with its copies" in done.stdout
        and "0 pass, 0 fail" in done.stdout
    )


def test_checks_past_their_time_are_named(packages: Path, command) -> None:
    """What the time did not reach is listed as not run, and is no failure."""
    done = command(SCRIPT, "--seconds", "0", env={"PYTHONPATH": str(packages)})
    rows = json.loads(done.stdout.splitlines()[-1])["result"]
    assert {row["outcome"] for row in rows.values()} == {"not run"}
    assert {"rtx", "tensorrt-rtx-parity", "onnx-cuda-parity", "tensorrt-parity"} <= set(rows)
    assert done.returncode == 3 and f"{len(rows)} not run" in done.stdout


def test_crashed_check_fails_alone(packages: Path, tmp_path: Path, command) -> None:
    driver(tmp_path, count=2, name="libcuda.so.1")
    model = write_fake_model(tmp_path / "model", fake_manifest())
    env = {"PYTHONPATH": str(packages), "LD_LIBRARY_PATH": str(tmp_path)}
    done = command(
        SCRIPT,
        "--model",
        model,
        "--only",
        "gpu",
        "half",
        "ort",
        "--json",
        tmp_path / "result.json",
        env=env,
    )
    rows = json.loads(done.stdout.splitlines()[-1])["result"]
    assert rows["gpu"] == {
        "outcome": "pass",
        "seen": "NVIDIA First (compute capability 8.9, 40.0 GiB), driver for CUDA 13.2",
    }
    assert rows["half"]["outcome"] == "fail" and "ended by signal 6" in rows["half"]["seen"]
    assert rows["ort"]["outcome"] == "not present" and "no CUDA provider" in rows["ort"]["seen"]
    assert (
        done.returncode == 1
        and json.loads((tmp_path / "result.json").read_text())["result"] == rows
    )
