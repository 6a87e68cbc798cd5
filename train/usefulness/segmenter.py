"""The segmenter: one small 2-D U-Net, trained alike in every arm of a comparison.

MONAI's BasicUNet on axial slices, Dice and cross-entropy loss, ordinary augmentation (affine maps,
contrast, brightness, noise), a fixed number of steps. It is small, since many of them are trained.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.core.errors import UsageError, importing
from runtime.core.manifest import Intensity

from ..config import AugmentConfig
from ..data import augmentation
from ..data.dataset import to_unit
from .cohort import Case

FEATURES = (16, 16, 32, 64, 128, 16)
DIVISOR = 16  # of the canvas: four times the network halves it
AFFINE = AugmentConfig(rotation=12, shear=4, shift_width=0.06, shift_height=0.06, zoom=0.12)
CONTRAST, BRIGHTNESS = 0.2, 0.08  # half-widths of uniform draws, of the intensity range
NOISE = 0.02  # of the intensity range: the largest standard deviation
TIMED_STEPS = 6


@dataclass(frozen=True)
class Schedule:
    """How long a segmenter is trained; the same in every arm.

    Attributes:
        steps: batches, each one step of AdamW.
        batch_size: slices of a batch.
        learning_rate: the peak of a one-cycle schedule.
        foreground: share of a batch that is drawn from the slices with a label.
        features: channels of the network's stages, as MONAI's BasicUNet takes them.
    """

    steps: int = 600
    batch_size: int = 8
    learning_rate: float = 2e-3
    foreground: float = 0.7
    features: tuple[int, int, int, int, int, int] = FEATURES


def train_segmenter(
    cases: Sequence[Case],
    classes: int,
    intensity: Intensity,
    schedule: Schedule,
    seed: int,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
) -> Any:
    """Train one segmenter. The same cases and seed give the same batches and first weights.

    Args:
        cases: labelled images of one canvas.
        classes: labels of the model, the background included.
        intensity: the range that becomes [0, 1].
        schedule: steps, batch size, learning rate.
        seed: of weights, batches and augmentation.
        device: where it is trained.
        progress: is told how many steps are done, after each.

    Returns:
        The network in eval mode: float32 (N, 1, H, W) in [0, 1] to logits (N, classes, H, W).
    """
    with importing(
        "monai",
        "MONAI, whose network the segmenter is",
        "pip install 'mask2ct[train]'",
    ):
        from monai.losses import DiceCELoss
        from monai.networks.nets import BasicUNet

    torch.manual_seed(seed)
    network = BasicUNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=classes,
        features=schedule.features,
        upsample="nontrainable",
    ).to(device)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True)
    optimizer = torch.optim.AdamW(network.parameters(), schedule.learning_rate)
    total = max(schedule.steps, 2)  # of one step no cycle can be made
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, schedule.learning_rate, total)
    rng = np.random.default_rng([seed, 3])
    network.train()
    draw = _BatchSource(cases, schedule, intensity, rng)
    for step in range(schedule.steps):
        image, target = (tensor.to(device) for tensor in draw())
        optimizer.zero_grad(set_to_none=True)
        loss_of(network(image), target).backward()
        optimizer.step()
        rate.step()
        if progress is not None:
            progress(step + 1)
    return network.eval()


class _BatchSource:
    """Draws augmented batches from the slices of some cases."""

    def __init__(
        self,
        cases: Sequence[Case],
        schedule: Schedule,
        intensity: Intensity,
        rng: np.random.Generator,
    ):
        self._slices = [(case, k) for case in cases for k in range(len(case.image))]
        labelled = np.concatenate([np.any(case.labels, (1, 2)) for case in cases])
        self._labelled = np.flatnonzero(labelled)
        if not len(self._labelled):
            raise UsageError(
                "no training image has a label",
                expected="labelled images",
                remedy="check the label maps",
            )
        self._schedule, self._intensity, self._rng = schedule, intensity, rng

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Image float32 in [0, 1] and labels, (N, 1, H, W) each."""
        count, rng = self._schedule.batch_size, self._rng
        with_label = rng.random(count) < self._schedule.foreground
        labelled = rng.choice(self._labelled, count)
        anywhere = rng.integers(0, len(self._slices), count)
        numbers = np.where(with_label, labelled, anywhere)
        chosen = [self._slices[n] for n in numbers]
        labels = np.stack([case.labels[k] for case, k in chosen])[:, None]
        image = to_unit(np.stack([case.image[k] for case, k in chosen]), self._intensity)[:, None]
        return _augmented(torch.from_numpy(image), torch.from_numpy(labels), rng)


def _augmented(image: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A batch moved by affine maps, with other contrast, brightness and noise."""
    target, image = augmentation.augment(AFFINE, labels, image, rng)
    shape = (len(image), 1, 1, 1)
    gain = rng.uniform(1 - CONTRAST, 1 + CONTRAST, shape).astype(np.float32)
    shift = rng.uniform(-BRIGHTNESS, BRIGHTNESS, shape).astype(np.float32)
    noise = rng.standard_normal(image.shape, np.float32)
    noise *= rng.uniform(0, NOISE, shape).astype(np.float32)
    mean = image.mean((1, 2, 3), keepdim=True)
    image = (image - mean) * torch.from_numpy(gain) + mean + torch.from_numpy(shift + noise)
    return image.clamp(0, 1), target


def segment(
    network: Any,
    case: Case,
    intensity: Intensity,
    device: torch.device,
) -> NDArray[np.uint8]:
    """The labels that the network gives to every slice of an image, uint8 (D, H, W)."""
    image = torch.from_numpy(to_unit(case.image, intensity)[:, None])
    with torch.no_grad():
        parts = [network(part.to(device)).argmax(1).cpu() for part in image.split(16)]
    return torch.cat(parts).numpy().astype(np.uint8)


def agreement(
    predicted: NDArray[np.uint8],
    case: Case,
    classes: int,
    tolerance: float,
) -> dict[str, list[float | None]]:
    """Dice and surface Dice of every label but the background.

    Args:
        predicted: uint8 (D, H, W).
        case: the true labels and their spacing.
        classes: labels of the model, the background included.
        tolerance: mm within which two surfaces agree.

    Returns:
        Lists `dice` and `surface_dice`, by label from 1; None where the patient lacks a label.
    """
    from monai.metrics.surface_dice import compute_surface_dice

    dice: list[float | None] = []
    surface: list[float | None] = []
    for label in range(1, classes):
        truth, guess = case.labels == label, predicted == label
        if not truth.any():
            dice.append(None)
            surface.append(None)
            continue
        dice.append(2.0 * float((truth & guess).sum()) / float(truth.sum() + guess.sum()))
        if not guess.any():
            surface.append(0.0)
            continue
        one, other = (torch.from_numpy(np.stack([~v, v])[None]) for v in (guess, truth))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of MONAI, about a call of its own
            value = compute_surface_dice(one, other, [tolerance], spacing=case.spacing)
        surface.append(float(value))
    return {"dice": dice, "surface_dice": surface}


def seconds_per_step(
    cases: Sequence[Case],
    classes: int,
    intensity: Intensity,
    schedule: Schedule,
    device: torch.device,
) -> float:
    """Seconds that a training step takes here, the first two left out."""
    moments: list[float] = []
    timed = replace(schedule, steps=TIMED_STEPS + 2)

    def note(step: int) -> None:
        moments.append(time.monotonic())

    train_segmenter(cases, classes, intensity, timed, 0, device, note)
    return (moments[-1] - moments[1]) / (len(moments) - 2)
