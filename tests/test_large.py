"""Memory: a mask of 2,048 slices in 2 GiB, and no more for many cases than for one.

Peaks are the kernel's, of a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from isal import igzip
from samples import MEASURED_COMMAND, blobs, write_mask

MIB = 1 << 20
CHILD = MEASURED_COMMAND.replace("IMPORTS", "numpy, SimpleITK, isal.igzip_threaded")


def peak(root: Path, model: Path, out: Path, *arguments: object) -> tuple[int, int]:
    """(before, most) in bytes of `synth` with those arguments."""
    command = [
        sys.executable,
        "-c",
        CHILD,
        "synth",
        *arguments,
        "--model",
        model,
        "--backend",
        "fake",
        "--output",
        out,
        "--quiet",
    ]
    done = subprocess.run(
        list(map(str, command)), cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, most = done.stdout.split()[-2:]
    return int(before) * 1024, int(most) * 1024


def write_large(path: Path, dtype: str) -> Path:
    """2,048 slices of 512 x 512: a shell and a ball that reach from the first slice to the last."""
    header = nibabel.Nifti1Header()
    header.set_data_shape((512, 512, 2048))
    header.set_data_dtype(dtype)
    header.set_zooms((1.0, 1.0, 0.5))
    header.set_sform(np.diag([1.0, 1.0, 0.5, 1.0]), 1)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    h, w = np.ogrid[:512, :512]
    radius = np.hypot(h - 250, w - 260)
    plane = (
        np.where(radius < 60, 500, np.where(radius < 90, 205, 0))
        if dtype == "uint16"
        else np.where(radius < 90, 205, 0)
    )
    with igzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.binaryblock + bytes(4))
        for k in range(2048):
            file.write(np.roll(plane, k // 64, 1).astype(dtype).tobytes())
    return path


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_2000_slices_fit_in_2_gib(dtype: str, root: Path, fake_model: Path, tmp_path: Path) -> None:
    mask = write_large(tmp_path / "large.nii.gz", dtype)
    before, most = peak(root, fake_model, tmp_path / "out", mask)
    voxels = 2048 * 512 * 512
    assert most < 2048 * MIB
    assert most - before < np.dtype(dtype).itemsize * voxels + 1.5 * voxels


@pytest.mark.slow
def test_large_variant_holds_one_mask(root: Path, fake_model: Path, tmp_path: Path) -> None:
    """A variant of a large mask holds one more mask in memory, and no deformation field."""
    before, most = peak(
        root,
        fake_model,
        tmp_path / "out",
        write_large(tmp_path / "large.nii.gz", "uint8"),
        "--variants",
        "2",
    )
    assert most - before < 2.5 * 2048 * 512 * 512


def test_memory_constant_over_cases(root: Path, fake_model: Path, tmp_path: Path) -> None:
    """Memory does not grow with the number of cases."""
    for n in range(24):
        write_mask(tmp_path / f"{n}.nii.gz", blobs((40, 256, 256), seed=n), spacing=(1.0, 1.0, 2.0))
    few = [tmp_path / f"{n}.nii.gz" for n in range(6)]
    _, small = peak(root, fake_model, tmp_path / "few", *few)
    _, large = peak(root, fake_model, tmp_path / "many", tmp_path)
    assert large - small < 12 * MIB  # 18 more masks and CTs would be 135 MiB
