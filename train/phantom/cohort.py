"""Synthetic training data: a cohort of simulated patients with contrast-enhanced cardiac CT and
heart labels.

``python -m train.phantom OUT --patients N [--seed S] [--size Z Y X] [--quiet]`` writes, in the
layout of the MM-WHS challenge (Zhuang & Shen 2016, Med Image Anal 31:77),
``ct_train_1001_image.nii.gz`` (int16, HU) and ``ct_train_1001_label.nii.gz`` (uint16), 1002, and so
on, with ``cohort.json`` telling what was drawn for each.

The field of view is 384 x 384 mm in plane and 132 mm along z whatever the matrix.  A patient
depends on (seed, index, size) only: a larger cohort begins with the smaller one.
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
from train.phantom.anatomy import LABELS, Parameters, render
from train.phantom.physics import Warp, blocks, enhancement, sample_axes, scan

FIELD_OF_VIEW_MM = (132.0, 384.0, 384.0)  # z, y, x
FINEST_SAMPLE_MM = 1.5  # structures are sampled at least this finely, then averaged over each voxel
PARENCHYMA_HU = 28.0  # texture of lung tissue below the resolved vessels
FIRST_CASE = 1001
SMALLEST_SIZE, LARGEST_SIZE = 32, 1024
FACTORS = (
    "timing",
    "dose",
    "habitus",
    "size",
    "phase",
    "yaw",
    "height",
)  # drawn evenly over the cohort
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Patient:
    """One simulated examination; arrays are (Z, Y, X) from inferior, anterior and the patient's
    right.
    """

    hu: NDArray[np.int16]
    labels: NDArray[np.uint16]  # MM-WHS values
    spacing: tuple[float, float, float]  # (x, y, z) mm
    params: Parameters


def factors(seed: int, index: int) -> dict[str, float]:
    """The main factors of patient ``index``, each evenly spread over [-1, 1] within any prefix of a
    cohort.

    A Kronecker sequence on the powers of the generalised golden ratio (Roberts 2018, "The
    unreasonable effectiveness of quasirandom sequences"), shifted by an offset drawn from the seed
    (Cranley-Patterson).
    """
    ratio = 2.0
    for _ in range(60):  # fixed point of x ** (d + 1) = x + 1
        ratio = (1 + ratio) ** (1 / (len(FACTORS) + 1))
    offset = np.random.Generator(np.random.Philox(key=[seed, 0])).random(len(FACTORS))
    place = np.mod(offset + (index + 1) * ratio ** -np.arange(1.0, len(FACTORS) + 1), 1.0)
    return dict(zip(FACTORS, (float(v) for v in 2 * place - 1), strict=True))


def draw(seed: int, index: int) -> Parameters:
    """The parameters of one patient: even main factors, their correlations, and independent
    minor ones.
    """
    f = factors(seed, index)
    f["habitus"] = (
        0.9 * f["size"] + 0.4 * f["habitus"]
    )  # large people have large hearts: the heart tells of the body round it
    rng = np.random.Generator(np.random.Philox(key=[seed, index + 1]))

    def vary(mean: float, sd: float) -> float:
        return float(mean + sd * np.clip(rng.standard_normal(), -2, 2))

    skeleton = 1 + 0.035 * f["size"] + 0.02 * f["habitus"] + vary(0, 0.008)
    heart = 0.98 + 0.08 * f["size"] + 0.015 * f["habitus"]
    dose = 1 + 0.14 * f["dose"] - 0.03 * f["habitus"]
    blood = enhancement(24.5 + 0.68 * f["timing"], dose)
    blood = {chamber: vary(value, 8.0) for chamber, value in blood.items()}
    return Parameters(
        skeleton=skeleton,
        fat=18 + 10 * f["habitus"],
        heart=heart,
        phase=0.5 + 0.5 * f["phase"],
        yaw=9 * f["yaw"] + vary(0, 1.5),
        tilt=vary(0, 3),
        roll=vary(0, 3),
        body=(vary(0, 4), vary(0, 4)),
        shift=(vary(0, 2), vary(0, 1.5), 3 * f["height"]),
        wall=vary(9.6, 0.6),
        blood=blood,
        myocardium=vary(58 + 64 * dose, 7),
        streaming=vary(18, 6),
        bone=vary(1, 0.1),
        liver=vary(95, 10),
        spleen=vary(122, 9),
        lung=vary(-835, 12),
        dome=vary(-20, 2.5),
        vertebra=vary(0.5, 0.05),
        rib=vary(0.5, 0.05),
        stomach_gas=vary(18, 12),
        breast=float(f["size"] + vary(0, 0.1) < 0) * vary(14, 2),
        noise=vary(17, 1.8),
        warp=Warp(vary(1.3, 0.2), vary(85, 8), tuple(float(a) for a in 2 * np.pi * rng.random(6))),
        texture=int(rng.integers(2**62)),
    )


def vote(labels: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """The commonest label in each voxel of the blocks (Z, f, Y, g, X, h), ties to the background
    or lower value.
    """
    best = (labels == 0).sum((1, 3, 5), dtype=np.uint16)
    winner = np.zeros(best.shape, np.uint16)
    for value in sorted(LABELS.values()):
        count = (labels == value).sum((1, 3, 5), dtype=np.uint16)
        winner[count > best] = value
        np.maximum(best, count, out=best)
    return winner


def make_patient(seed: int, index: int, size: Size = (48, 128, 128)) -> Patient:
    """Patient ``index`` (from 0) of cohort ``seed`` on a ``size`` (Z, Y, X) matrix."""
    return simulate(draw(seed, index), size)


def simulate(params: Parameters, size: Size = (48, 128, 128)) -> Patient:
    """The patient that ``params`` describe on a ``size`` (Z, Y, X) matrix."""
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
    """Raise `UsageError` unless ``size`` is three matrix edges that can show a thorax and fit
    into memory.
    """
    if len(size) != 3 or min(size) < SMALLEST_SIZE or max(size) > LARGEST_SIZE:
        raise UsageError(
            f"a phantom of {' x '.join(map(str, size))} voxels was asked for",
            expected=f"Z Y X of {SMALLEST_SIZE} to {LARGEST_SIZE} each",
            remedy="give for example --size 48 128 128 (data.phantom.size in a config)",
        )


def write_volume(
    path: Path, array: NDArray[np.generic], spacing: tuple[float, float, float]
) -> None:
    """Write (Z, Y, X) voxels as NIfTI, centred at the origin with identity direction (LPS), all
    or nothing.
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
    """Simulate one patient, write its two files into ``out`` and return its parameters."""
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
    """Write ``patients`` simulated cases into ``out`` and return their image files in order.

    ``workers`` processes share the work (default: the CPUs this process may use; 1 stays in this
    process); ``progress(done, total)`` is called after every case.  Raises `UsageError` for an
    unusable request and `OutputError` where ``out`` cannot be written.
    """
    if patients < 1 or not 0 <= seed < 2**63:
        raise UsageError(
            f"{patients} patients with seed {seed} were asked for",
            expected="at least 1 patient and a seed from 0 to 2^63 - 1",
            remedy="give for example --patients 24 --seed 0",
        )
    check_size(size)
    out = Path(out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        workers = min(workers or len(os.sched_getaffinity(0)), patients)
        report = progress or (lambda done, total: None)
        drawn: list[dict[str, Any]] = [{}] * patients
        if workers == 1:
            for index in range(patients):
                drawn[index] = write_patient(out, seed, index, size)
                report(index + 1, patients)
        else:  # spawned, not forked: the caller may hold threads
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
                tasks = {
                    pool.submit(write_patient, out, seed, index, size): index
                    for index in range(patients)
                }
                try:
                    for done, task in enumerate(as_completed(tasks), 1):
                        drawn[tasks[task]] = task.result()
                        report(done, patients)
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
    """The command line in the module's docstring."""
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
        progress=lambda done, total: line.update(done),
    )
    line.close()
    return 0
