"""Volumes that would fill memory are refused by what their headers state, and want of memory is
told on one screen.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
from samples import synth

from runtime.core.errors import MemoryCapExceeded, OutputError, UnreadableVolume, writing
from runtime.core.memory_limit import group_limits, memory_limit
from runtime.io.readers.volume_header import ALWAYS, DEFLATE, EXPANSION
from runtime.io.volume_files import check_header

# Runs the command with so much address space, as `ulimit -v` gives it, and prints the peak of its
# memory in KiB.
LIMITED = """
import resource, sys
import numpy, SimpleITK, isal.igzip, isal.igzip_threaded
from runtime.__main__ import main
from runtime.core.console import run
most = int(sys.argv[1])
if most:
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
def peak():
    # not ru_maxrss, which begins with the peak of the process that started this one
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
before = peak()
code = run(main, sys.argv[2:])
print(peak() - before)
sys.exit(code)
"""


def header(shape: tuple[int, int, int], dtype: str = "uint8") -> bytes:
    """Of a NIfTI, with the four bytes behind it."""
    stated = nibabel.Nifti1Header()
    stated.set_data_shape(shape)
    stated.set_data_dtype(dtype)
    stated.set_sform(np.eye(4), 1)
    stated["vox_offset"], stated["magic"] = 352, b"n+1"
    return bytes(stated.binaryblock) + bytes(4)


def write_packed(path: Path, shape: tuple[int, int, int], size: int) -> Path:
    """A .nii.gz of `size` bytes that states `shape`, and holds a few voxels of it."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    packed = packer.compress(header(shape) + bytes(4096)) + packer.flush()
    path.write_bytes(packed.ljust(size, b"\0"))
    return path


def write_constant(path: Path, shape: tuple[int, int, int]) -> Path:
    """A whole .nii.gz of one label, as small as deflate makes it."""
    packer, plane = zlib.compressobj(9, zlib.DEFLATED, 31), b"\xcd" * (shape[0] * shape[1])
    with open(path, "wb") as file:
        file.write(packer.compress(header(shape)))
        for _ in range(shape[2]):
            file.write(packer.compress(plane))
        file.write(packer.flush())
    return path


def write_sparse(path: Path, shape: tuple[int, int, int], dtype: str) -> Path:
    """A whole .nii of zeros that takes no blocks of the disk."""
    with open(path, "wb") as file:
        file.write(header(shape, dtype))
        file.truncate(352 + int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return path


def limited(most: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED, most, *arguments]
    return subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )


def test_compressed_voxels_are_bounded(tmp_path: Path) -> None:
    """By their bytes: what deflate could hold is more than a mask ever is."""
    shape, size = (2048, 2048, 900), 4 << 20
    assert ALWAYS + EXPANSION * size < np.prod(shape) < DEFLATE * size
    with pytest.raises(
        UnreadableVolume, match=r"m\.nii\.gz states 3774873600 voxels in 4194304 compressed bytes"
    ) as refused:
        check_header(write_packed(tmp_path / "m.nii.gz", shape, size), voxels=False)
    assert (
        refused.value.expected
        == f"at most {ALWAYS + EXPANSION * size} voxels: 250 for each compressed byte, and {ALWAYS}"
    )
    assert refused.value.remedy == "if it is a mask, save it without compression, or cut it"


def test_constant_masks_are_in_bounds(tmp_path: Path) -> None:
    """A thousand voxels a byte, as deflate makes them of one label."""
    shape = (512, 512, 2000)
    path = write_packed(tmp_path / "m.nii.gz", shape, int(np.prod(shape)) // DEFLATE)
    assert check_header(path, voxels=False).voxels.shape == shape[::-1]


@pytest.mark.slow
def test_constant_mask_is_read(fake_model: Path, tmp_path: Path) -> None:
    mask = write_constant(tmp_path / "m.nii.gz", (512, 512, 2000))
    assert mask.stat().st_size < 600_000
    assert synth(fake_model, tmp_path / "out", mask, "--dry-run") == 0


def test_refusing_takes_little_memory(fake_model: Path, tmp_path: Path) -> None:
    mask = write_packed(tmp_path / "m.nii.gz", (2048, 2048, 900), 4 << 20)
    done = limited(
        0,
        "synth",
        mask,
        "--model",
        fake_model,
        "--backend",
        "fake",
        "--output",
        tmp_path / "out",
        "--quiet",
    )
    assert (
        done.returncode == 1
        and "states 3774873600 voxels" in done.stderr
        and not [*(tmp_path / "out").glob("m*")]
    )
    assert int(done.stdout) < 200 << 10


@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux holds them")
@pytest.mark.parametrize(
    ("shape", "why"),
    [((1300, 1300, 1300), "more than this run has memory for"), ((1000, 1000, 900), "memory")],
)
@pytest.mark.parametrize("command", ["synth", "labels"])
def test_memory_limits_of_run_hold(
    command: str, shape: tuple[int, int, int], why: str, fake_model: Path, tmp_path: Path
) -> None:
    """What does not fit at all is refused by its header; where less is left than that, the
    failure takes one screen, too.
    """
    mask = write_sparse(tmp_path / "m.nii", shape, "uint8")
    more = (
        ["--backend", "fake", "--output", tmp_path / "out", "--quiet"] if command == "synth" else []
    )
    done = limited(1100 << 20, command, mask, "--model", fake_model, *more)
    assert done.returncode == 1, done.stderr
    assert (
        "Traceback" not in done.stderr and why in done.stderr and len(done.stderr.splitlines()) <= 6
    )
    assert not [*(tmp_path / "out").glob("m*")]


def test_cgroups_limit_the_run(tmp_path: Path) -> None:
    """Of the unit, of what it lies in, and of the older version with its controllers."""
    inner = tmp_path / "system.slice" / "mask2ct.service"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner.parent / "memory.max").write_text("4096\n")
    older = tmp_path / "memory" / "unit"
    older.mkdir(parents=True)
    (older / "memory.limit_in_bytes").write_text("2048\n")
    (tmp_path / "groups").write_text(
        "0::/system.slice/mask2ct.service\n5:cpu:/unit\n7:memory:/unit\nnonsense\n"
    )
    assert sorted(group_limits(tmp_path / "groups", tmp_path)) == [2048, 4096]
    assert [*group_limits(tmp_path / "absent", tmp_path)] == []
    limit = memory_limit()
    assert limit is None or 0 < limit <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_writers_report_missing_memory(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"a\.nii cannot be written: the memory does not suffice"),
        writing(tmp_path / "a.nii"),
    ):
        np.empty(1 << 60, np.uint8)
    with pytest.raises(MemoryCapExceeded), writing(tmp_path / "a.nii"):
        raise MemoryCapExceeded.of("host memory", 2, cap=1, in_use=0)
