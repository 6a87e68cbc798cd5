"""Simulated training data: patients with contrast-enhanced cardiac CT and heart labels.

    python -m train.phantom OUT --patients N [--seed S] [--size Z Y X] [--quiet]

writes, in the layout of the MM-WHS challenge (Zhuang & Shen 2016, Med Image Anal 31:77),
``ct_train_1001_image.nii.gz`` (int16, HU) and ``ct_train_1001_label.nii.gz`` (uint16), 1002, and so
on, and ``cohort.json`` with the parameters of each patient.

The field of view is 384 x 384 mm in plane and 132 mm along z for any matrix. A patient depends on
(seed, index, size) only: a larger cohort begins with the smaller one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.core import console
from runtime.core.errors import UsageError, writing
from runtime.engines.base import cores
from train.phantom.anatomy import LABELS, Parameters, render
from train.phantom.physics import Warp, blocks, enhancement, sample_axes, scan

# Along z, y and x.
FIELD_OF_VIEW_MM = (132.0, 384.0, 384.0)
# Structures are sampled at least this finely, then averaged over each voxel.
FINEST_SAMPLE_MM = 1.5
# The texture of lung tissue: vessels too small to be drawn.
PARENCHYMA_HU = 28.0
FIRST_CASE = 1001
SMALLEST_SIZE, LARGEST_SIZE = 32, 1024
# Factors that are spread evenly over the cohort.
FACTORS = ("timing", "dose", "habitus", "size", "phase", "yaw", "height")
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Patient:
    """One simulated examination; arrays are (Z, Y, X).

    Slices run from inferior, rows from anterior, columns from the patient's right.
    """

    hu: NDArray[np.int16]
    labels: NDArray[np.uint16]  # MM-WHS values
    spacing: tuple[float, float, float]  # (x, y, z) mm
    params: Parameters


def factors(seed: int, index: int) -> dict[str, float]:
    """Draw the main factors of one patient, spread evenly within any prefix of a cohort.

    A Kronecker sequence on the powers of the generalised golden ratio (Roberts 2018, "The
    unreasonable effectiveness of quasirandom sequences"), shifted by an offset drawn from the seed
    (Cranley-Patterson).

    Args:
        seed: The cohort.
        index: The patient, from 0.

    Returns:
        Values in [-1, 1] by the names in `FACTORS`.
    """
    ratio = 2.0
    # The fixed point of x ** (d + 1) = x + 1.
    for _ in range(60):
        ratio = (1 + ratio) ** (1 / (len(FACTORS) + 1))
    offset = np.random.Generator(np.random.Philox(key=[seed, 0])).random(len(FACTORS))
    place = np.mod(offset + (index + 1) * ratio ** -np.arange(1.0, len(FACTORS) + 1), 1.0)
    return dict(zip(FACTORS, (float(v) for v in 2 * place - 1), strict=True))


def draw(seed: int, index: int) -> Parameters:
    """Draw the parameters of one patient.

    Main factors are even over the cohort and correlated; minor ones are independent.

    Args:
        seed: The cohort.
        index: The patient, from 0.

    Returns:
        The parameters.
    """
    f = factors(seed, index)
    # Large people have large hearts, so the heart's size predicts the body's.
    f["habitus"] = 0.9 * f["size"] + 0.4 * f["habitus"]
    rng = np.random.Generator(np.random.Philox(key=[seed, index + 1]))

    def draw_factor(mean: float, sd: float) -> float:
        return float(mean + sd * np.clip(rng.standard_normal(), -2, 2))

    skeleton = 1 + 0.035 * f["size"] + 0.02 * f["habitus"] + draw_factor(0, 0.008)
    heart = 0.98 + 0.08 * f["size"] + 0.015 * f["habitus"]
    dose = 1 + 0.14 * f["dose"] - 0.03 * f["habitus"]
    blood = enhancement(24.5 + 0.68 * f["timing"], dose)
    blood = {chamber: draw_factor(value, 8.0) for chamber, value in blood.items()}
    return Parameters(
        skeleton=skeleton,
        fat=18 + 10 * f["habitus"],
        heart=heart,
        phase=0.5 + 0.5 * f["phase"],
        yaw=9 * f["yaw"] + draw_factor(0, 1.5),
        tilt=draw_factor(0, 3),
        roll=draw_factor(0, 3),
        body=(draw_factor(0, 4), draw_factor(0, 4)),
        shift=(draw_factor(0, 2), draw_factor(0, 1.5), 3 * f["height"]),
        wall=draw_factor(9.6, 0.6),
        blood=blood,
        myocardium=draw_factor(58 + 64 * dose, 7),
        streaming=draw_factor(18, 6),
        bone=draw_factor(1, 0.1),
        liver=draw_factor(95, 10),
        spleen=draw_factor(122, 9),
        lung=draw_factor(-835, 12),
        dome=draw_factor(-20, 2.5),
        vertebra=draw_factor(0.5, 0.05),
        rib=draw_factor(0.5, 0.05),
        stomach_gas=draw_factor(18, 12),
        breast=float(f["size"] + draw_factor(0, 0.1) < 0) * draw_factor(14, 2),
        noise=draw_factor(17, 1.8),
        warp=Warp(
            draw_factor(1.3, 0.2),
            draw_factor(85, 8),
            tuple(float(a) for a in 2 * np.pi * rng.random(6)),
        ),
        texture=int(rng.integers(2**62)),
    )


def vote(labels: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Find the commonest label in each voxel; ties go to the background or to the lower value.

    Args:
        labels: Samples in blocks, (Z, f, Y, g, X, h).

    Returns:
        (Z, Y, X).
    """
    best = (labels == 0).sum((1, 3, 5), dtype=np.uint16)
    winner = np.zeros(best.shape, np.uint16)
    for value in sorted(LABELS.values()):
        count = (labels == value).sum((1, 3, 5), dtype=np.uint16)
        winner[count > best] = value
        np.maximum(best, count, out=best)
    return winner


def make_patient(seed: int, index: int, size: Size = (48, 128, 128)) -> Patient:
    """Simulate one patient of a cohort.

    Args:
        seed: The cohort.
        index: The patient, from 0.
        size: The matrix (Z, Y, X).

    Returns:
        The examination.

    Raises:
        UsageError: The matrix is too small or too large.
    """
    return simulate(draw(seed, index), size)


def simulate(params: Parameters, size: Size = (48, 128, 128)) -> Patient:
    """Simulate the patient that parameters describe.

    Args:
        params: The parameters.
        size: The matrix (Z, Y, X).

    Returns:
        The examination.

    Raises:
        UsageError: The matrix is too small or too large.
    """
    check_size(size)
    z, y, x = (extent / n for extent, n in zip(FIELD_OF_VIEW_MM, size, strict=True))
    factor, grid = sample_axes(size, (z, y, x), FINEST_SAMPLE_MM)
    hu, labels = np.empty(size, np.float32), np.empty(size, np.uint16)
    for rows, fine, classes in render(params, grid, FINEST_SAMPLE_MM, slab=4 * factor[0]):
        voxels = slice(rows.start // factor[0], rows.stop // factor[0])
        hu[voxels] = blocks(fine, factor).mean((1, 3, 5))
        labels[voxels] = vote(blocks(classes, factor))
    rng = np.random.Generator(np.random.Philox(key=[params.texture, 2]))
    lungs = (hu > -930) & (hu < -600)
    hu += PARENCHYMA_HU * lungs * rng.standard_normal(size, dtype=np.float32)
    return Patient(scan(hu, (z, y, x), params.noise, rng), labels, (x, y, z), params)


def check_size(size: Sequence[int]) -> None:
    """Check that a matrix can show a thorax and fits into memory.

    Args:
        size: The matrix (Z, Y, X).

    Raises:
        UsageError: It cannot, or does not.
    """
    if len(size) != 3 or min(size) < SMALLEST_SIZE or max(size) > LARGEST_SIZE:
        raise UsageError(
            f"a phantom cannot have {' x '.join(map(str, size))} voxels",
            expected=f"Z Y X of {SMALLEST_SIZE} to {LARGEST_SIZE} each",
            remedy="give for example --size 48 128 128 (data.phantom.size in a config)",
        )


def write_volume(
    path: Path, array: NDArray[np.generic], spacing: tuple[float, float, float]
) -> None:
    """Write a volume as NIfTI, atomically, centred at the origin with identity direction (LPS).

    Args:
        path: The file.
        array: (Z, Y, X).
        spacing: (x, y, z) in mm.

    Raises:
        OSError: The file cannot be written.
    """
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(
        [-(n - 1) / 2 * edge for n, edge in zip(array.shape[::-1], spacing, strict=True)]
    )
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        sitk.WriteImage(image, str(partial), useCompression=True, compressionLevel=1)
        os.replace(partial, path)
    except RuntimeError as error:
        raise OSError(f"cannot write {path}: {str(error).strip().splitlines()[-1]}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_patient(out: Path, seed: int, index: int, size: Size) -> dict[str, Any]:
    """Simulate one patient and write its two files.

    Args:
        out: The folder.
        seed: The cohort.
        index: The patient, from 0.
        size: The matrix (Z, Y, X).

    Returns:
        The patient's name and parameters, as cohort.json states them.
    """
    patient = make_patient(seed, index, size)
    stem = f"ct_train_{FIRST_CASE + index}"
    write_volume(out / f"{stem}_image.nii.gz", patient.hu, patient.spacing)
    write_volume(out / f"{stem}_label.nii.gz", patient.labels, patient.spacing)
    return {"case": stem, **asdict(patient.params)}


def generate_cohort(
    out: Path,
    patients: int,
    *,
    seed: int = 0,
    size: Size = (48, 128, 128),
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Simulate patients and write their files.

    Args:
        out: The folder, created if missing.
        patients: The number of patients.
        seed: The cohort.
        size: The matrix (Z, Y, X).
        workers: Processes that share the work; None: one per CPU that this process may use; 1: this
            process alone.
        progress: Called with (patients done, all patients) after every patient.

    Returns:
        The image files in order.

    Raises:
        UsageError: The request cannot be met.
        OutputError: The folder cannot be written.
    """
    if patients < 1 or not 0 <= seed < 2**63:
        raise UsageError(
            f"a cohort cannot have {patients} patients with seed {seed}",
            expected="at least 1 patient and a seed from 0 to 2^63 - 1",
            remedy="give for example --patients 24 --seed 0",
        )
    check_size(size)
    out = Path(out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        workers = min(workers or cores(), patients)
        report = progress or (lambda count, total: None)
        drawn: list[dict[str, Any]] = [{}] * patients
        if workers == 1:
            for index in range(patients):
                drawn[index] = write_patient(out, seed, index, size)
                report(index + 1, patients)
        else:
            # Processes are spawned and not forked: the caller may have threads.
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
                tasks = {
                    pool.submit(write_patient, out, seed, index, size): index
                    for index in range(patients)
                }
                try:
                    for count, task in enumerate(as_completed(tasks), 1):
                        drawn[tasks[task]] = task.result()
                        report(count, patients)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        summary = out / f".{os.getpid()}-cohort.json"
        summary.write_text(
            json.dumps({"seed": seed, "size": list(size), "patients": drawn}, indent=1) + "\n"
        )
        os.replace(summary, out / "cohort.json")
    return [out / f"{case['case']}_image.nii.gz" for case in drawn]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line in the module's docstring.

    Args:
        arguments: The arguments; None: those of the process.

    Returns:
        The exit code, 0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m train.phantom", description="Write a simulated cardiac CT cohort."
    )
    parser.add_argument("out", type=Path, help="folder to write the cases to; created if missing")
    parser.add_argument("--patients", type=int, required=True, metavar="N", help="number of cases")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="cohort to draw (default 0)"
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=3,
        default=(48, 128, 128),
        metavar=("Z", "Y", "X"),
        help="voxels along each axis of the fixed field of view (default 48 128 128)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress line")
    options = parser.parse_args(arguments)
    z, y, x = options.size
    line = console.Progress("phantom patients", options.patients, quiet=options.quiet)
    generate_cohort(
        options.out,
        options.patients,
        seed=options.seed,
        size=(z, y, x),
        progress=lambda count, total: line.update(count),
    )
    line.close()
    return 0
