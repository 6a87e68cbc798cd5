"""Patients → slices on the model's canvas, split by patient, and batches that are a function of (seed, step) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from runtime.contract import GridPolicy, Intensity, LabelTable
from runtime.errors import InputError, UsageError
from runtime.grid import SliceGrid
from runtime.io.nifti import read_labels, read_volume, simpleitk
from runtime.volume import Geometry

from .config import DataConfig

SUFFIXES = (".nii.gz", ".nii")
LAYOUT = "a folder with CASE_image.nii.gz and CASE_label.nii.gz for every patient, as MM-WHS has it"
LEAST_PATIENTS = 3  # one to train on, one to validate with, one to test on
AIR_HU = -200  # every CT of a thorax holds values below this
HIGHEST_HU = 32767  # metal, in scanners with an extended range
GRID_TOLERANCE_MM = 1e-3  # between the corners of an image's and its label map's grid


@dataclass(frozen=True)
class Pair:
    """The two files of one patient."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Slices:
    """n axial slices on the canvas: `labels` uint8 (n, Z, H, W) model indices, `image` int16 (n, H, W) in HU (or a.u.)."""

    labels: NDArray[np.uint8]
    image: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True)
class Cohort:
    """The slices of every split's patients, one entry a patient; `digest`: SHA-256 of all of them, in order."""

    train: tuple[Slices, ...]
    valid: tuple[Slices, ...]
    test: tuple[Slices, ...]
    digest: str

    def summary(self) -> dict[str, Any]:
        """Counts per split, as run.json states them: no names."""
        splits = {"train": self.train, "valid": self.valid, "test": self.test}
        return {
            "patients": {name: len(patients) for name, patients in splits.items()},
            "slices": {name: sum(map(len, patients)) for name, patients in splits.items()},
            "digest": self.digest,
        }


Loader = Callable[[Pair, LabelTable, GridPolicy, Intensity], Slices]


def find_pairs(folder: Path) -> list[Pair]:
    """The patients of an MM-WHS folder, by name. Raises `UsageError` when there are too few or one lacks a file."""
    remedy = "check --dataset-path"
    if not folder.is_dir():
        raise UsageError(f"the dataset folder {folder} does not exist", expected=LAYOUT, remedy=remedy, file=folder)
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        for suffix in SUFFIXES:
            for kind in ("image", "label"):
                if path.name.endswith(f"_{kind}{suffix}") and not path.name.startswith("."):
                    found.setdefault(path.name.removesuffix(f"_{kind}{suffix}"), {})[kind] = path
    if not any(len(files) == 2 for files in found.values()):
        raise UsageError(f"{folder.name or folder} holds no pair of image and label map", expected=LAYOUT, remedy=remedy, file=folder)
    for name, files in found.items():
        if len(files) < 2:
            missing = "image" if "label" in files else "label"
            raise UsageError(f"patient {name} has no {name}_{missing}.nii.gz", expected=LAYOUT,
                             remedy="add the file, or take the patient out", file=next(iter(files.values())))  # fmt: skip
    if len(found) < LEAST_PATIENTS:
        raise UsageError(f"{folder.name} holds {len(found)} patient(s)", expected=f"at least {LEAST_PATIENTS}: patients are split, never slices",
                         remedy="add patients", file=folder)  # fmt: skip
    return [Pair(name, **files) for name, files in sorted(found.items())]


def split(count: int, data: DataConfig) -> dict[str, list[int]]:
    """Patient numbers 0..count-1 of each split: a seeded shuffle, at least one to train and one to validate with."""
    order = [int(n) for n in np.random.default_rng(data.split_seed).permutation(count)]
    valid = max(1, round(data.valid_ratio * count))
    train = min(max(1, round(data.train_ratio * count)), count - valid)
    return {"train": sorted(order[:train]), "valid": sorted(order[train : train + valid]), "test": sorted(order[train + valid :])}


def load_cohort(pairs: Sequence[Pair], data: DataConfig, table: LabelTable, policy: GridPolicy, intensity: Intensity,
                load: Loader | None = None) -> Cohort:  # fmt: skip
    """Read every patient onto the canvas. Raises `InputError`s that name the file, `UsageError` when nobody has a label.

    `load`: how a patient is read, such as a train/cache.py `SliceCache`; None: `load_patient`.
    """
    patients = [(load or load_patient)(pair, table, policy, intensity) for pair in pairs]
    if not any((p.labels != 0).any() for p in patients):
        raise UsageError(
            "no patient has a labelled voxel", expected=f"label maps with some of {table}", remedy="check the label maps and data.keep"
        )
    digest = hashlib.sha256()
    for patient in patients:
        digest.update(patient.labels.tobytes())
        digest.update(patient.image.tobytes())
    parts = {name: tuple(patients[n] for n in numbers) for name, numbers in split(len(patients), data).items()}
    return Cohort(**parts, digest=digest.hexdigest())


def load_patient(pair: Pair, table: LabelTable, policy: GridPolicy, intensity: Intensity) -> Slices:
    """One patient's axial slices on the canvas, labels nearest and image linear; a canvas that grew is cut to its middle."""
    labels, image = read_labels(pair.label, table), read_volume(pair.image)
    _check_same_grid(pair, labels.labels.shape, labels.geometry, image.values.shape, image.geometry)
    _check_intensity(pair.image, image.values, intensity)
    grid = SliceGrid(policy, image.geometry, image.values.shape, labels.labels)
    outside = intensity.low
    planes = [fit(grid.labels(labels.labels, k), policy.canvas, 0) for k in range(grid.count)]
    slices = [fit(grid.image(image.values, k, outside), policy.canvas, outside) for k in range(grid.count)]
    return Slices(np.stack(planes), np.clip(np.rint(np.stack(slices)), -32768, 32767).astype(np.int16))


def fit(plane: NDArray[Any], canvas: tuple[int, int], fill: float) -> NDArray[Any]:
    """Crop or pad the last two axes to `canvas` (H, W) about their centre."""
    for axis, side in zip((-2, -1), canvas, strict=True):
        surplus = plane.shape[axis] - side
        if surplus > 0:
            plane = plane.take(range(surplus // 2, surplus // 2 + side), axis)
        elif surplus < 0:
            pads = [(0, 0)] * plane.ndim
            pads[axis] = (-surplus // 2, -surplus - -surplus // 2)
            plane = np.pad(plane, pads, constant_values=fill)
    return plane


def slice_counts(pairs: Iterable[Pair], policy: GridPolicy) -> list[int]:
    """Axial slices of each patient, from the headers alone."""
    counts = []
    for pair in pairs:
        reader = simpleitk().ImageFileReader()
        reader.SetFileName(str(pair.image))
        try:
            reader.ReadImageInformation()
            geometry = Geometry.from_parts(reader.GetOrigin(), reader.GetSpacing(), reader.GetDirection())
            w, h, d = reader.GetSize()
        except (RuntimeError, ValueError):
            read_volume(pair.image)  # says in our words what is wrong
            raise
        counts.append(SliceGrid(policy, geometry, (d, h, w)).count)
    return counts


class Batches:
    """Endless training batches over `slices`. Batch n is a function of (seed, n): a resumed run sees the same ones.

    Every epoch is a fresh permutation of all slices; a batch may straddle two. Slices are read where they lie, which may be a
    memory-mapped file. Of `world` ranks, each has the `part` of the batch that belongs to `rank`.
    """

    def __init__(self, patients: Sequence[Slices], batch_size: int, seed: int, intensity: Intensity, rank: int = 0, world: int = 1):
        self.batch_size, self.part = batch_size, slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self._slices = [(patient, k) for patient in patients for k in range(len(patient))]
        self._seed, self._intensity = seed, intensity

    def __getitem__(self, step: int) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
        """(labels uint8 (N, Z, H, W), image float32 (N, 1, H, W) in [0, 1], noise uint8 (N, 1, H, W)) of this step."""
        order = self.slices(step)
        chosen = [self._slices[n] for n in order[self.part]]
        labels = np.stack([patient.labels[k] for patient, k in chosen])
        image = to_unit(np.stack([patient.image[k] for patient, k in chosen]), self._intensity)[:, None]
        return labels, image, noise_bytes((self.batch_size, *image.shape[1:]), self._seed, step)[self.part]

    def slices(self, step: int) -> NDArray[np.intp]:
        """Which slices, counted through all patients, this step's batch holds, of all ranks."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        count = len(self._slices)
        epochs = {p // count for p in positions}
        orders = {epoch: stream(self._seed, "order", epoch).permutation(count) for epoch in epochs}
        return np.array([orders[p // count][p % count] for p in positions])


def stream(seed: int, purpose: Literal["order", "noise", "augment", "style"], n: int) -> np.random.Generator:
    """The random numbers of the n-th epoch or step: a function of the arguments, so that nothing random need be saved."""
    return np.random.default_rng([seed, ("order", "noise", "augment", "style").index(purpose), n])


def noise_bytes(shape: tuple[int, ...], seed: int, step: int) -> NDArray[np.uint8]:
    """White noise, uniform bytes of `shape`, a function of (seed, step)."""
    return stream(seed, "noise", step).integers(0, 256, shape, np.uint8)


def to_unit(values: NDArray[Any], intensity: Intensity) -> NDArray[np.float32]:
    """HU → [0, 1], float32; what lies outside the range is clipped."""
    scaled: NDArray[np.float32] = (values.astype(np.float32) - np.float32(intensity.low)) / np.float32(intensity.high - intensity.low)
    np.clip(scaled, 0, 1, out=scaled)
    return scaled


def from_unit(values: NDArray[np.float32], intensity: Intensity) -> NDArray[np.int16]:
    """[0, 1] → HU, int16, rounded."""
    hu: NDArray[np.int16] = np.rint(values * np.float32(intensity.high - intensity.low) + intensity.low).astype(np.int16)
    return hu


def _check_same_grid(pair: Pair, label_shape: tuple[int, ...], label: Geometry, image_shape: tuple[int, ...], image: Geometry) -> None:
    remedy = "resample the label map onto its image"
    if label_shape != image_shape:
        raise InputError(
            f"{pair.label.name} has {label_shape} voxels, its image {image_shape}", expected="one grid", remedy=remedy, file=pair.label
        )
    d, h, w = label_shape
    corners = np.array([[i, j, k, 1] for i in (0, w - 1) for j in (0, h - 1) for k in (0, d - 1)], float).T
    distance = float(np.abs((label.affine - image.affine) @ corners).max())
    if distance > GRID_TOLERANCE_MM:
        raise InputError(f"{pair.label.name} lies {distance:.3g} mm off its image", expected=f"one grid, within {GRID_TOLERANCE_MM} mm",
                         remedy=remedy, file=pair.label)  # fmt: skip


def _check_intensity(file: Path, values: NDArray[Any], intensity: Intensity) -> None:
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise InputError(
            f"{file.name} holds NaN or infinite values", expected="finite intensities", remedy="check how it was written", file=file
        )
    if intensity.unit == "HU" and not (low <= AIR_HU and high <= HIGHEST_HU and low >= -HIGHEST_HU):
        raise InputError(f"{file.name} holds values from {low:g} to {high:g}, which are no HU", expected=f"air below {AIR_HU} HU, nothing above {HIGHEST_HU}",
                         remedy="apply the rescale intercept (often -1024), or set intensity.unit to a.u.", file=file)  # fmt: skip
