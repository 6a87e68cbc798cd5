"""Small volumes made in the test, and nothing downloaded. Import from here, never from conftest."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from itertools import permutations, product
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from runtime.__main__ import main
from runtime.batch.audit_log import AUDIT
from runtime.batch.completion_log import JOURNAL
from runtime.core.atomic_files import write_json
from runtime.core.console import run
from runtime.core.manifest import Manifest
from runtime.core.volume import Geometry
from runtime.service.work_queue import DONE, FAILED, LOCK, WORK

MM_WHS_VALUES = (0, 205, 420, 500, 550, 600, 820, 850)


def blobs(
    shape: tuple[int, int, int] = (6, 20, 24),
    values: tuple[int, ...] = MM_WHS_VALUES,
    seed: int = 0,
) -> NDArray[np.uint16]:
    """A label volume (D, H, W) of blocks, so that neighbours often agree and every value occurs."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice(values, [-(-n // 4) for n in shape])
    coarse.flat[: len(values)] = values
    return (
        coarse.repeat(4, 0)
        .repeat(4, 1)
        .repeat(4, 2)[: shape[0], : shape[1], : shape[2]]
        .astype(np.uint16)
    )


def rotation(degrees: tuple[float, float, float]) -> NDArray[np.float64]:
    """About x, then y, then z."""
    result = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        a, b = [n for n in range(3) if n != axis]
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        result = turn @ result
    return result


def directions() -> list[NDArray[np.float64]]:
    """All 48 axis orders and flips of a grid, as direction cosines."""
    return [
        np.eye(3)[:, list(order)] * np.array(signs)
        for order in permutations(range(3))
        for signs in product((1.0, -1.0), repeat=3)
    ]


def image(
    values: NDArray[Any],
    spacing: tuple[float, ...] = (1.5, 1.25, 2.5),
    origin: tuple[float, ...] = (-12.5, 3.0, 40.0),
    direction: Any = None,
) -> sitk.Image:
    made = sitk.GetImageFromArray(values)
    made.SetSpacing(spacing)
    made.SetOrigin(origin)
    if direction is not None:
        made.SetDirection(np.asarray(direction, float).ravel().tolist())
    return made


def write_mask(path: Path, values: NDArray[Any] | None = None, **grid: Any) -> Path:
    sitk.WriteImage(image(blobs() if values is None else values, **grid), str(path))
    return path


def geometry(made: sitk.Image) -> Geometry:
    return Geometry.from_parts(made.GetOrigin(), made.GetSpacing(), made.GetDirection())


def write_fake_model(folder: Path, manifest: Manifest) -> Path:
    """A model folder without files, for `--backend fake`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "manifest.json", manifest.to_json())
    return folder


def write_slices(
    folder: Path,
    patients: int,
    *,
    side: int = 64,
    hu: bool = False,
    seed: int = 0,
    split: str = "training",
) -> Path:
    """Patients in the original's layout: `split`/pN/pN_whs_img.dcm and pN_whs_img_gt.dcm, 8-bit
    greys (or HU), labels 0..7.
    """
    rng = np.random.default_rng(seed)
    for n in range(patients):
        labels = np.zeros((1, side, side), np.uint8)
        for value in range(1, 8):
            row, column = rng.integers(side // 4, side // 2, 2)
            labels[0, row : row + side // 6, column : column + side // 6] = value
        grey = rng.integers(0, 20, labels.shape) + 25 * labels
        values = (grey * 8 - 1000).astype(np.int16) if hu else grey.astype(np.uint8)
        patient = folder / split / f"{split[:2]}{n}"
        patient.mkdir(parents=True)
        for name, plane in (("whs_img", values), ("whs_img_gt", labels)):
            sitk.WriteImage(
                sitk.GetImageFromArray(plane), str(patient / f"{patient.name}_{name}.dcm")
            )
    return folder


def results(folder: Path) -> dict[str, bytes]:
    """What a run left in its output folder, by path, without its journal and audit file."""
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name not in (JOURNAL, AUDIT)
    )
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def mask2ct(arguments: list[str]) -> NoReturn:
    """The command, for a process of its own: in a terminal's place, for who runs in the
    background has Ctrl-C ignored.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(run(main, arguments))


def synth(model: Path, out: Path, *arguments: str | Path, backend: str | None = "fake") -> int:
    """The exit code of `mask2ct synth` on `arguments` (masks and options), run in this process.

    None: the backend of its own choice.
    """
    chosen = [] if backend is None else ["--backend", backend]
    return run(
        main,
        [
            "synth",
            *map(str, arguments),
            "--model",
            str(model),
            "--output",
            str(out),
            "--quiet",
            *chosen,
        ],
    )


def train_small(command: Any, cohort: Path, folder: Path, *settings: str) -> Path:
    """A run folder after a few steps of a small network on `cohort`, by the command people type
    (`command`: the fixture).
    """
    base = [
        "training.steps=6",
        "training.batch_size=4",
        "generator.filters=8",
        "generator.depth=5",
        "data.canvas=[64,64]",
        "discriminator.filters=8",
        "training.recalibrate=2",
        "training.valid_slices=8",
    ]
    line = [
        "train/run.py",
        "--config",
        "train/configs/phantom.json",
        "--dataset-path",
        cohort,
        "--output",
        folder,
        "--quiet",
    ]
    done = command(*line, "--set", *base, *settings)
    assert done.returncode == 0, done.stderr
    return folder


def export_run(command: Any, run_folder: Path, folder: Path) -> Path:
    """The model folder exported from a run."""
    done = command("export/build_engine.py", run_folder, "-o", folder, "--onnx-only", "--quiet")
    assert done.returncode == 0, done.stderr
    return folder


def elsewhere(name: str) -> str | None:
    """Where a program is that is not of this environment: pynetdicom brings a storescu of its
    own, which would hide DCMTK's.
    """
    ours = {Path(sys.prefix, "bin"), Path(sys.executable).parent}
    places = [place for place in os.environ["PATH"].split(os.pathsep) if Path(place) not in ours]
    return shutil.which(name, path=os.pathsep.join([*places, "/usr/sbin"]))


def listed(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def is_tidy(inbox: Path) -> bool:
    return listed(inbox) <= {WORK, DONE, FAILED} and listed(inbox / WORK) <= {LOCK}


# Runs a command of the runtime, and prints the largest resident set of its process in KiB, before
# and after. IMPORTS is what does not count as the command's own.
MEASURED_COMMAND = """
import sys
import IMPORTS
from runtime.__main__ import main
from runtime.core.console import run
def peak():
    # not ru_maxrss, which begins with the peak of the process that started this one
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
before = peak()
code = run(main, sys.argv[1:])
print(before, peak())
sys.exit(code)
"""
