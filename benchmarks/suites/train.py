"""Suite `train`: iterations/s of training against the loop that people write.

Ours is the training's own step on its own batches: slices from the memory-mapped cache,
augmentation in batches on the device, channels_last, fused Adam, running average of the weights.
The plain loop follows the original and pix2pix: a `Dataset` that reads two DICOM files an item at
every step with SimpleITK and augments it with scipy (as Keras' ImageDataGenerator does), float32,
NCHW, Adam, the losses' `.item()` at every step. It runs once with the files read in the main
process (the original), once with DataLoader workers (pix2pix: four; here no more than cores). The
networks, their initial weights, the losses and the batch size are the same: a test checks that the
first step's losses are equal.
"""

from __future__ import annotations

import atexit
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from runtime.core.manifest import Intensity
from runtime.io.readers.volume import simpleitk
from train import config
from train.data import augmentation
from train.data.dataset import Slices, to_unit
from train.loop import Training, open_cohort
from train.losses import discriminator_losses, generator_losses, weighted_sum
from train.networks.generator import standardise_noise
from train.step import Batch, make_discriminator, make_generator

from ..harness.paired import Contender, Ready

OURS, PLAIN, WORKERS = "mask2ct training", "plain loop", "plain loop with workers"
PIX2PIX_WORKERS = 4  # its --num_threads
LOADING = 0.05  # the most of a step's time that our loader may take


class SliceFiles(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Slices as single DICOM files, read and augmented anew for every item.

    Args:
        folder: Where to write an image and a label map for each slice.
        patients: The slices.
        settings: The augmentation.
        intensity: The range of HU.
    """

    def __init__(
        self,
        folder: Path,
        patients: Sequence[Slices],
        settings: config.AugmentConfig,
        intensity: Intensity,
    ):
        self._folder, self._settings, self._intensity = folder, settings, intensity
        self._count = sum(map(len, patients))
        sitk = simpleitk()
        slices = ((p.labels[k], p.image[k]) for p in patients for k in range(len(p)))
        for n, (labels, image) in enumerate(slices):
            sitk.WriteImage(sitk.GetImageFromArray(labels), str(folder / f"{n}_label.dcm"))
            sitk.WriteImage(sitk.GetImageFromArray(image[None]), str(folder / f"{n}_image.dcm"))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """(labels uint8 (Z, H, W), image float32 (1, H, W) in [0, 1], noise uint8 (1, H, W))."""
        sitk = simpleitk()
        labels, image = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(self._folder / f"{n}_{kind}.dcm")))
            for kind in ("label", "image")
        )
        unit = to_unit(image, self._intensity)
        rng = np.random.default_rng()
        if self._settings.active:
            labels, unit = _moved(augmentation.draw(self._settings, 1, rng)[0], labels, unit)
        return (
            torch.from_numpy(labels),
            torch.from_numpy(unit),
            torch.from_numpy(rng.integers(0, 256, unit.shape, np.uint8)),
        )


class PlainLoop:
    """The step that people write: NCHW, float32, Adam, the losses read at every step."""

    def __init__(self, settings: config.RunConfig):
        self._config, self._classes = settings, len(config.label_table(settings.data))
        self.generator, self.discriminator = (
            net.to(memory_format=torch.contiguous_format)
            for net in (make_generator(settings), make_discriminator(settings))
        )
        o = settings.optimizer
        self._adam_g = torch.optim.Adam(self.generator.parameters(), o.lr_g, (o.beta1, o.beta2))
        self._adam_d = torch.optim.Adam(self.discriminator.parameters(), o.lr_d, (o.beta1, o.beta2))

    def __call__(self, batch: Batch) -> dict[str, float]:
        """Optimize both networks once.

        Args:
            batch: The batch.

        Returns:
            The losses by name.
        """
        one_hot = functional.one_hot(batch.labels.long(), self._classes)  # (N, Z, H, W, classes)
        condition = one_hot.permute(0, 1, 4, 2, 3).flatten(1, 2).float().contiguous()
        fake_smooth, fake = self.generator(
            condition, standardise_noise(batch.noise) if self.generator.noisy else None
        )

        self.discriminator.requires_grad_(True)
        self._adam_d.zero_grad()
        d = discriminator_losses(
            self._discriminate(condition, batch.image),
            self._discriminate(condition, fake.detach()),
        )
        weighted_sum(d, dict.fromkeys(d, 1.0)).backward()
        self._adam_d.step()

        self.discriminator.requires_grad_(False)
        self._adam_g.zero_grad()
        discriminator_input = fake_smooth + (fake - fake_smooth).detach()
        g = generator_losses(
            self._discriminate(condition, discriminator_input), fake_smooth, fake, batch.image
        )
        weighted_sum(g, asdict(self._config.loss)).backward()
        self._adam_g.step()
        return {name: value.item() for name, value in {**g, **d}.items()}

    def _discriminate(self, condition: Tensor, image: Tensor) -> Tensor:
        """The scores in the form that people write: image and labels concatenated."""
        x = torch.cat([image, condition], 1) if self.discriminator.conditional else image
        for stage in self.discriminator.stages:
            x = stage(x)
        scores: Tensor = self.discriminator.score(x)
        return scores


class Timed:
    """Runs iterations and keeps the time for batches apart.

    Args:
        steps: Iterations in a call.
        batch: Returns the n-th batch.
        step: Trains on the n-th batch.
    """

    def __init__(
        self, steps: int, batch: Callable[[int], Batch], step: Callable[[int, Batch], object]
    ):
        self._steps, self._batch, self._step, self._done = steps, batch, step, 0
        self.shares: list[float] = []  # the share of each call's time that batches took

    def __call__(self) -> int:
        """Run the iterations; returns how many they were."""
        loading, started = 0.0, time.perf_counter()
        for n in range(self._done, self._done + self._steps):
            before = time.perf_counter()
            batch = self._batch(n)
            loading += time.perf_counter() - before
            self._step(n, batch)
        self._done += self._steps
        self.shares.append(loading / (time.perf_counter() - started))
        return self._steps


def groups(settings: config.RunConfig, quick: bool) -> dict[str, list[Contender]]:
    """Ours and the two plain loops, on the config's own data.

    Args:
        settings: The resolved config. The first contender makes the phantom, if it is one.
        quick: Fewer steps in a round.

    Returns:
        The group "train".
    """
    folder = tempfile.mkdtemp(prefix="mask2ct-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Many steps in a round, so that what workers fetched ahead is a small part of it.
    options: dict[str, Any] = {
        "settings": config.to_json(settings),
        "folder": folder,
        "steps": 4 if quick else 20,
    }
    cost = {"fp32": step_macs(settings)}
    contender = Contender(OURS, "benchmarks.suites.train:ours", options, cost=cost)
    plain = ((PLAIN, 0), (WORKERS, min(PIX2PIX_WORKERS, torch.get_num_threads())))
    return {
        "train": [
            contender,
            *(
                Contender(
                    name, "benchmarks.suites.train:plain", {**options, "workers": n}, cost=cost
                )
                for name, n in plain
            ),
        ]
    }


def step_macs(settings: config.RunConfig) -> int:
    """The multiply-accumulates of one step, forward and backward.

    Args:
        settings: The resolved config.

    Returns:
        What torch counts while the plain loop takes a step.
    """
    n, (h, w) = settings.training.batch_size, settings.data.canvas
    planes = torch.zeros(n, settings.data.slices, h, w, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        PlainLoop(settings)(Batch(planes, torch.zeros(n, 1, h, w), planes[:, :1]))
    return int(counter.get_total_flops()) // 2


def ours(settings: dict[str, Any], folder: str, steps: int) -> Ready:
    """Our training's step.

    Args:
        settings: The resolved config as JSON data.
        folder: Where data and cache lie.
        steps: Iterations in a round.

    Returns:
        The contender; its unit is iterations.
    """
    resolved = config.from_json(settings)
    opening = []
    for _ in range(2):  # without a cache entry, and with
        before = time.perf_counter()
        cohort = open_cohort(
            resolved, Path(folder) / "run", cache=Path(folder) / "slices", quiet=True
        )
        opening.append(round(time.perf_counter() - before, 2))
    training = Training(resolved, Path(folder) / "run", cohort, quiet=True)
    return _ready(
        Timed(steps, training.batch, training.step),
        {"opening_seconds": opening, "at_most": {"loader_share": LOADING}},
    )


def plain(settings: dict[str, Any], folder: str, steps: int, workers: int) -> Ready:
    """The plain loop.

    Args:
        settings: The resolved config as JSON data.
        folder: Where data and cache lie.
        steps: Iterations in a round.
        workers: Processes of the DataLoader.

    Returns:
        The contender; its unit is iterations.
    """
    resolved = config.from_json(settings)
    cohort = open_cohort(resolved, Path(folder) / "run", cache=Path(folder) / "slices", quiet=True)
    file_folder = Path(folder) / f"files-{workers}"
    file_folder.mkdir(exist_ok=True)  # a second launch writes the same files
    files = SliceFiles(file_folder, cohort.train, resolved.augment, config.intensity(resolved))
    loop, batches = PlainLoop(resolved), _endless(files, resolved.training.batch_size, workers)
    return _ready(Timed(steps, lambda _: next(batches), lambda _, batch: loop(batch)), {})


def _ready(timed: Timed, facts: dict[str, Any]) -> Ready:
    def run() -> float:
        steps = float(timed())
        facts["loader_share"] = statistics.median(timed.shares)
        return steps

    return Ready(run, facts=facts)


def _endless(files: SliceFiles, batch_size: int, workers: int) -> Iterator[Batch]:
    loader = DataLoader(
        files,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    while True:
        for labels, image, noise in loader:
            yield Batch(labels, image, noise)


def _moved(
    affine: NDArray[np.float32], labels: NDArray[np.uint8], image: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Move one item as Keras' generator does, plane by plane: labels nearest, image linear."""
    h, w = image.shape[-2:]
    matrix = affine[::-1, 1::-1].astype(np.float64)  # (y, x) order
    offset = (affine[::-1, 2] / 2 + 0.5) * [h, w] - 0.5 - matrix @ [(h - 1) / 2, (w - 1) / 2]

    def planes(volume: NDArray[Any], order: int) -> NDArray[Any]:
        return np.stack(
            [ndimage.affine_transform(plane, matrix, offset, order=order) for plane in volume]
        )

    return planes(labels, 0), planes(image, 1)
