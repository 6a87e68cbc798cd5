"""Patients as slices on the model's canvas, split by patient, and batches of them.

A batch is a function of (seed, step) alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from runtime.core.context import Context
from runtime.core.errors import InputError, UsageError
from runtime.core.manifest import GridPolicy, Intensity, LabelTable
from runtime.core.resampling import SliceGrid
from runtime.core.tissue_classes import (
    Histogram,
    classes_of_volume,
    cohort_context,
    dense_labels,
)
from runtime.core.volume import Geometry
from runtime.io.readers.volume import simpleitk
from runtime.io.volume_files import check_header

from ..config import DataConfig
from ..metrics.scores import otsu
from .checks import Facts, check_leakage, facts_table, read_image, read_pair, refuse, require_labels
from .intensities import check_range
from .layouts import LEAST_PATIENTS, SPLITS, Pair

# The most slices of a patient that decide the quantiles of a cohort.
SAMPLED_SLICES = 64

# A public name of this module too, where pairs become slices.
from .layouts import find_pairs as find_pairs
from .pictures import is_picture, picture_shape


@dataclass(frozen=True)
class Slices:
    """Axial slices of one patient on the canvas.

    Attributes:
        labels: uint8 (n, Z, H, W) model indices.
        image: int16 (n, H, W) in HU (or a.u.).
        facts: What the patient's files hold, for the table of the data.
        tissues: uint8 (n, Z, H, W), the context class of every voxel, also of those with a label;
            None without `data.context`.
    """

    labels: NDArray[np.uint8]
    image: NDArray[np.int16]
    facts: Facts | None = None
    tissues: NDArray[np.uint8] | None = None

    def condition(self, k: int | slice | NDArray[np.intp] = slice(None)) -> NDArray[np.uint8]:
        """What the network sees: the labels, and the tissues where there is no label.

        Args:
            k: A slice, or several.

        Returns:
            uint8 (Z, H, W) or (n, Z, H, W), model indices.
        """
        labels = self.labels[k]
        return labels if self.tissues is None else dense_labels(labels, self.tissues[k])

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True)
class Cohort:
    """The slices of every split, one entry per pair of files.

    Attributes:
        train: The patients to train on.
        valid: Those to validate with.
        test: Those to test on.
        digest: SHA-256 of all slices, in the order of the pairs.
        context: The rule behind `Slices.tissues`, without medians; None without `data.context`.
    """

    train: tuple[Slices, ...]
    valid: tuple[Slices, ...]
    test: tuple[Slices, ...]
    digest: str
    context: Context | None = None

    def summary(self) -> dict[str, Any]:
        """Count patients and slices per split, as run.json states them: without names.

        Returns:
            JSON data.
        """
        splits = {"train": self.train, "valid": self.valid, "test": self.test}
        return {
            "patients": {name: len(patients) for name, patients in splits.items()},
            "slices": {name: sum(map(len, patients)) for name, patients in splits.items()},
            "digest": self.digest,
        }

    def table(self, labels: LabelTable, intensity: Intensity) -> str:
        """Describe the data for a person: patients and slices per split, and what the files hold.

        Args:
            labels: The label table.
            intensity: The intensity range.

        Returns:
            Lines of text.
        """
        counts = self.summary()
        rows = [f"{'split':<14} patients  slices"]
        rows += [
            f"{name:<14} {counts['patients'][name]:8d} {counts['slices'][name]:7d}"
            for name in SPLITS
        ]
        facts = [p.facts for p in (*self.train, *self.valid, *self.test) if p.facts is not None]
        return "\n".join([*rows, facts_table(facts, labels, intensity)] if facts else rows)


Loader = Callable[[Pair, LabelTable, GridPolicy, Intensity], Slices]
TissueLoader = Callable[[Pair, LabelTable, GridPolicy, Intensity, Context], NDArray[np.uint8]]


def split(count: int, data: DataConfig) -> dict[str, list[int]]:
    """Split patients by a seeded shuffle.

    Args:
        count: The number of patients.
        data: The section of the config, with ratios and seed.

    Returns:
        The numbers (0 to count - 1) of each split: at least one to train on, one to validate with.
    """
    order = [int(n) for n in np.random.default_rng(data.split_seed).permutation(count)]
    valid = max(1, round(data.valid_ratio * count))
    train = min(max(1, round(data.train_ratio * count)), count - valid)
    return {
        "train": sorted(order[:train]),
        "valid": sorted(order[train : train + valid]),
        "test": sorted(order[train + valid :]),
    }


def assign(pairs: Sequence[Pair], data: DataConfig) -> dict[str, list[int]]:
    """Split pairs: as the layout states it, else by `split`, with a patient's pairs together.

    Synthetic cases train, unless their patient is held out; then they are in no split.

    Args:
        pairs: The pairs.
        data: The section of the config.

    Returns:
        The numbers of the pairs of each split.
    """
    real = [pair for pair in pairs if not pair.synthetic]
    free = sorted({pair.who for pair in real if pair.split is None})
    drawn: dict[str, str] = {}
    if free:
        numbers_of = split(len(free), data)
        drawn = {free[n]: name for name, numbers in numbers_of.items() for n in numbers}
    split_of = {pair.who: pair.split or drawn[pair.who] for pair in real}
    return {
        name: [
            n
            for n, pair in enumerate(pairs)
            if (split_of.get(pair.who, "train") == name) and (name == "train" or not pair.synthetic)
        ]
        for name in SPLITS
    }


def load_cohort(
    pairs: Sequence[Pair],
    data: DataConfig,
    table: LabelTable,
    policy: GridPolicy,
    intensity: Intensity,
    load: Loader | None = None,
    load_context: TissueLoader | None = None,
) -> Cohort:
    """Read every patient onto the canvas, and check what training relies on.

    Args:
        pairs: The pairs of files.
        data: The section of the config.
        table: The label table.
        policy: The grid policy.
        intensity: The intensity range.
        load: Reads one patient, such as a `SliceCache` (train/data/slice_cache.py); None:
            `load_patient`.
        load_context: Finds the context classes of one patient, such as `SliceCache.tissues`; None:
            `load_tissues`. Only for `data.context`.

    Returns:
        The cohort.

    Raises:
        InputError: A file cannot be used for training; all such patients are named at once.
        UsageError: No patient has a label, or a volume has too few slices to split.
    """
    if data.split_by == "slices":
        # A block of a synthetic volume would validate.
        pairs = [pair for pair in pairs if not pair.synthetic]
    else:
        chosen_pairs = sorted(n for numbers in assign(pairs, data).values() for n in numbers)
        pairs = [pairs[n] for n in chosen_pairs]
    patients, errors = [], []
    for pair in pairs:
        try:
            patients.append((load or load_patient)(pair, table, policy, intensity))
        except InputError as exc:
            exc.file = exc.file or pair.label
            errors.append(exc)
    refuse(errors, len(pairs))
    facts = [p.facts for p in patients if p.facts]
    require_labels(pairs, facts, [len(p) for p in patients], table)
    check_range(pairs, facts, intensity, data.max_clipped)
    digest, images = hashlib.sha256(), []
    for patient in patients:
        digest.update(patient.labels.tobytes())
        digest.update(patient.image.tobytes())
        images.append(hashlib.sha256(patient.image.tobytes()).hexdigest())
    context = None
    if data.context == "auto":
        numbers_of = (
            range(len(pairs)) if data.split_by == "slices" else assign(pairs, data)["train"]
        )
        context = find_context([patients[n] for n in numbers_of], intensity)
        find_tissues = load_context or load_tissues
        patients = [
            replace(patient, tissues=find_tissues(pair, table, policy, intensity, context))
            for pair, patient in zip(pairs, patients, strict=True)
        ]
    if data.split_by == "slices":
        too_small = [
            pair.name for pair, p in zip(pairs, patients, strict=True) if len(p) < LEAST_PATIENTS
        ]
        if too_small:
            raise UsageError(
                f"{too_small[0]} has too few slices to be split",
                expected=f"at least {LEAST_PATIENTS}",
                remedy="drop data.split_by",
            )
        blocks = [_blocks(p, data) for p in patients]
        return Cohort(
            **{name: tuple(b[name] for b in blocks if len(b[name])) for name in SPLITS},
            digest=digest.hexdigest(),
            context=context,
        )
    numbers = assign(pairs, data)
    check_leakage(
        {name: {pairs[n].name: images[n] for n in chosen} for name, chosen in numbers.items()}
    )
    return Cohort(
        **{name: tuple(patients[n] for n in chosen) for name, chosen in numbers.items()},
        digest=digest.hexdigest(),
        context=context,
    )


def _blocks(patient: Slices, data: DataConfig) -> dict[str, Slices]:
    """Cut a volume into neighbouring slices to train on, to validate with and to test on.

    The facts go with the first.
    """
    parts, at = {}, 0
    for name, numbers in split(len(patient), data).items():
        parts[name] = Slices(
            patient.labels[at : at + len(numbers)],
            patient.image[at : at + len(numbers)],
            None if at else patient.facts,
            None if patient.tissues is None else patient.tissues[at : at + len(numbers)],
        )
        at += len(numbers)
    return parts


def load_patient(pair: Pair, table: LabelTable, policy: GridPolicy, intensity: Intensity) -> Slices:
    """Read one patient's axial slices onto the canvas, labels nearest and image linear.

    A canvas that the grid policy enlarged is cropped to its middle.

    Args:
        pair: The files.
        table: The label table.
        policy: The grid policy.
        intensity: The intensity range.

    Returns:
        The slices.

    Raises:
        InputError: A file cannot be used for training.
    """
    labels, image, facts = read_pair(
        pair, table, intensity, spaced=policy.pixel_spacing is not None
    )
    grid = SliceGrid(policy, image.geometry, image.values.shape, labels.labels)
    outside = intensity.low
    planes = [fit(grid.labels(labels.labels, k), policy.canvas, 0) for k in range(grid.count)]
    slices = [
        fit(grid.image(image.values, k, outside), policy.canvas, outside) for k in range(grid.count)
    ]
    hu = np.clip(np.rint(np.stack(slices)), -32768, 32767).astype(np.int16)
    return Slices(np.stack(planes), hu, facts)


def find_context(train: Sequence[Slices], intensity: Intensity) -> Context:
    """Find the rule of the tissue classes for a cohort.

    Args:
        train: The training patients.
        intensity: The intensity range.

    Returns:
        The thresholds of HU; for other units Otsu's threshold of the body, and quantiles of the
        bodies' intensities outside the labels.
    """
    if intensity.unit == "HU":
        return cohort_context(intensity.unit)
    # A sample of slices is enough for a few quantiles.
    sample = [p.image[:: 1 + len(p) // SAMPLED_SLICES] for p in train]
    body = otsu(np.concatenate([images.ravel() for images in sample]), intensity)
    values = Histogram(intensity.low, intensity.high)
    for patient, images in zip(train, sample, strict=True):
        masks = patient.labels[:: 1 + len(patient) // SAMPLED_SLICES]
        inside = (images >= body) & (masks[:, masks.shape[1] // 2] == 0)
        values.add(images[inside].astype(np.float64))
    return cohort_context(intensity.unit, values, body)


def load_tissues(
    pair: Pair, table: LabelTable, policy: GridPolicy, intensity: Intensity, context: Context
) -> NDArray[np.uint8]:
    """Read one patient's image and find the context class of every voxel, on the canvas.

    The classes are found on the image's own grid and put on the canvas as labels are: a layout at
    inference comes the same way.

    Args:
        pair: The files.
        table: The label table.
        policy: The grid policy.
        intensity: The intensity range.
        context: The rule.

    Returns:
        uint8 (n, Z, H, W) model indices.

    Raises:
        InputError: A file cannot be used for training.
    """
    labels, image, _ = read_pair(pair, table, intensity, spaced=policy.pixel_spacing is not None)
    classes = classes_of_volume(image.values, image.geometry, context, len(table), policy)
    grid = SliceGrid(policy, image.geometry, image.values.shape, labels.labels)
    return np.stack([fit(grid.labels(classes, k), policy.canvas, 0) for k in range(grid.count)])


def fit(plane: NDArray[Any], canvas: tuple[int, int], fill: float) -> NDArray[Any]:
    """Crop or pad the last two axes about their centre.

    Args:
        plane: (..., H, W).
        canvas: The new (H, W).
        fill: The value of padded pixels.

    Returns:
        The plane on the canvas.
    """
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
    """Count the axial slices of each patient, from the headers alone.

    Args:
        pairs: The pairs of files.
        policy: The grid policy.

    Returns:
        The counts.

    Raises:
        InputError: A file cannot be read.
    """
    return [SliceGrid(policy, *grid_of(pair.image)).count for pair in pairs]


def grid_of(image: Path) -> tuple[Geometry, tuple[int, int, int]]:
    """Read the grid of an image from its header.

    Args:
        image: A volume, a picture or one DICOM slice.

    Returns:
        The geometry, and the shape (D, H, W).

    Raises:
        InputError: The file cannot be read.
    """
    if is_picture(image):
        return Geometry(np.eye(4)), picture_shape(image)
    if image.suffix.lower() != ".dcm":
        header = check_header(image, voxels=False)
        return header.geometry, header.voxels.shape
    reader = simpleitk().ImageFileReader()
    reader.SetFileName(str(image))
    try:
        reader.ReadImageInformation()
        geometry = Geometry.from_parts(
            reader.GetOrigin(), reader.GetSpacing(), reader.GetDirection()
        )
        w, h, d = reader.GetSize()
    except (RuntimeError, ValueError):
        # This raises an error of this project, with a remedy.
        read_image(image)
        raise
    return geometry, (d, h, w)


class Batches:
    """Endless training batches.

    Batch n is a function of (seed, n), so a resumed run sees the same ones. Every epoch is a new
    permutation of all slices; a batch may straddle two epochs. Slices are read from where they are,
    which may be a memory-mapped file.

    Args:
        patients: The patients.
        batch_size: Slices per batch, over all ranks.
        seed: The seed of the order and of the noise.
        intensity: The intensity range.
        rank: The number of this rank.
        world: The number of all ranks.

    Attributes:
        batch_size: Slices per batch, over all ranks.
        part: This rank's part of a batch.
    """

    def __init__(
        self,
        patients: Sequence[Slices],
        batch_size: int,
        seed: int,
        intensity: Intensity,
        rank: int = 0,
        world: int = 1,
    ):
        self.batch_size = batch_size
        self.part = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self._slices = [(patient, k) for patient in patients for k in range(len(patient))]
        self._seed, self._intensity = seed, intensity

    def __getitem__(
        self, step: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
        """Read this rank's part of a batch.

        Args:
            step: The number of the batch.

        Returns:
            Labels uint8 (N, Z, H, W), image float32 (N, 1, H, W) in [0, 1], noise uint8 (N, 1, H,
            W).
        """
        order = self.slices(step)
        chosen = [self._slices[n] for n in order[self.part]]
        labels = np.stack([patient.condition(k) for patient, k in chosen])
        values = np.stack([patient.image[k] for patient, k in chosen])
        image = to_unit(values, self._intensity)[:, None]
        noise = noise_bytes((self.batch_size, *image.shape[1:]), self._seed, step)
        return labels, image, noise[self.part]

    def tissues(self, step: int) -> NDArray[np.uint8]:
        """Read the context classes of this rank's part of a batch.

        Args:
            step: The number of the batch.

        Returns:
            uint8 (N, Z, H, W) model indices.
        """
        chosen = [self._slices[n] for n in self.slices(step)[self.part]]
        return np.stack(
            [patient.tissues[k] for patient, k in chosen if patient.tissues is not None]
        )

    def slices(self, step: int) -> NDArray[np.intp]:
        """Choose the slices of a batch.

        Args:
            step: The number of the batch.

        Returns:
            Slice numbers, counted through all patients, for all ranks.
        """
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        count = len(self._slices)
        epochs = {p // count for p in positions}
        orders = {epoch: stream(self._seed, "order", epoch).permutation(count) for epoch in epochs}
        return np.array([orders[p // count][p % count] for p in positions])


def stream(
    seed: int, tag: Literal["order", "noise", "augment", "style", "drop"], n: int
) -> np.random.Generator:
    """Make the random generator of one epoch or step.

    It is a function of the arguments, so that no random state need be saved.

    Args:
        seed: The seed of the run.
        tag: What it is for.
        n: The number of the epoch or step.

    Returns:
        The generator.
    """
    tags = ("order", "noise", "augment", "style", "drop")
    return np.random.default_rng([seed, tags.index(tag), n])


def noise_bytes(shape: tuple[int, ...], seed: int, step: int) -> NDArray[np.uint8]:
    """Draw white noise, a function of (seed, step).

    Args:
        shape: Any shape.
        seed: The seed of the run.
        step: The number of the step.

    Returns:
        Uniform bytes, uint8.
    """
    return stream(seed, "noise", step).integers(0, 256, shape, np.uint8)


def to_unit(values: NDArray[Any], intensity: Intensity) -> NDArray[np.float32]:
    """Scale intensities to [0, 1]; values outside the range are clipped.

    Args:
        values: HU (or a.u.), any shape and dtype.
        intensity: The intensity range.

    Returns:
        float32 of the same shape.
    """
    scaled: NDArray[np.float32] = (
        values.astype(np.float32) - np.float32(intensity.low)
    ) / np.float32(intensity.high - intensity.low)
    np.clip(scaled, 0, 1, out=scaled)
    return scaled


def from_unit(values: NDArray[np.float32], intensity: Intensity) -> NDArray[np.int16]:
    """Scale [0, 1] to rounded intensities.

    Args:
        values: float32, any shape.
        intensity: The intensity range.

    Returns:
        HU (or a.u.), int16 of the same shape.
    """
    hu: NDArray[np.int16] = np.rint(
        values * np.float32(intensity.high - intensity.low) + intensity.low
    ).astype(np.int16)
    return hu
