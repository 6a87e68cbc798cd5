"""The held-out patients at one moment of training: synthesized, measured, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.core.manifest import Intensity, LabelTable

from .data.dataset import Slices, from_unit, noise_bytes
from .figures import comparison, window
from .metrics.scores import diversity, evaluate, real_baseline
from .networks.generator import Generator, one_hot, standardise_noise
from .networks.style import organ_medians

STYLES = 16  # in which the held-out masks are synthesized to measure diversity
DIVERSE_SLICES = 24  # of them, at most
MASKS_KEPT = 64  # slices of each kind that a run folder keeps for export


class Validation:
    """Up to `most` slices of `patients`, as evenly spaced pairs of neighbours, with fixed noise:
    two moments differ by the network alone.

    A network that takes a style synthesizes the mean patient's, and for its diversity `STYLES` of
    them, fixed too.
    """

    def __init__(
        self,
        patients: tuple[Slices, ...],
        most: int,
        table: LabelTable,
        intensity: Intensity,
        seed: int,
    ):
        total = sum(map(len, patients))
        self._share = min(1.0, most / total)
        self.places = [neighbours(len(p), max(1, round(self._share * len(p)))) for p in patients]
        self._cases = [
            Slices(p.labels[chosen], p.image[chosen])
            for p, chosen in zip(patients, self.places, strict=True)
        ]
        self.masks = [_middle(case) for case in self._cases]
        self._table, self._intensity, self._seed = table, intensity, seed
        self._names = [label.name for label in table.labels[1:]]
        self._noise = [noise_bytes(c.image.shape, seed, n) for n, c in enumerate(self._cases)]

    @property
    def labels(self) -> NDArray[np.uint8]:
        """The slices' label maps, uint8 (n, Z, H, W) model indices."""
        return np.concatenate([case.labels for case in self._cases])

    @property
    def images(self) -> list[NDArray[np.int16]]:
        """The true slices of each patient, HU int16 (n, H, W)."""
        return [case.image for case in self._cases]

    def measure(
        self, net: Generator, device: torch.device, batch_size: int
    ) -> tuple[dict[str, Any], list[NDArray[np.int16]]]:
        """(metrics of train/metrics/scores.py, the synthetic slices of each patient)."""
        synthetic = [
            generate(net, case.labels, noise, len(self._table), self._intensity, device, batch_size)
            for case, noise in zip(self._cases, self._noise, strict=True)
        ]
        return (
            evaluate(synthetic, self.images, self.masks, self._names, self.places, self._intensity),
            synthetic,
        )

    def diversity(
        self, net: Generator, device: torch.device, batch_size: int, train: Sequence[Slices]
    ) -> dict[str, Any] | None:
        """train/metrics/volume_metrics.py's `diversity` of a network with a style: the labelled
        slices of the first patient with any, in many styles, each with noise of its own, as
        variants have.

        None where none is labelled.
        """
        first = next((n for n, mask in enumerate(self.masks) if mask.any()), None)
        if first is None:
            return None
        case = self._cases[first]
        labelled = np.flatnonzero(self.masks[first].any((1, 2)))
        chosen = labelled[
            np.linspace(0, len(labelled) - 1, min(len(labelled), DIVERSE_SLICES))
            .round()
            .astype(int)
        ]
        styles = np.random.default_rng(self._seed).standard_normal((STYLES, net.style), np.float32)
        variants = [
            generate(
                net,
                case.labels[chosen],
                noise_bytes((len(chosen), *case.image.shape[1:]), self._seed, n),
                len(self._table),
                self._intensity,
                device,
                batch_size,
                style,
            )
            for n, style in enumerate(styles)
        ]
        return diversity(
            [variants],
            [self.masks[first][chosen]],
            list(organ_medians(train, len(self._table))),
            self._names,
            self._intensity,
        )

    def real_baseline(self, train: Sequence[Slices]) -> dict[str, Any]:
        """What lies between the held-out and the training patients:
        train/metrics/volume_metrics.py's `ceiling`, on as many slices of each.
        """
        others = [neighbours(len(p), max(1, round(self._share * len(p)))) for p in train]
        images, masks = (
            [p.image[n] for p, n in zip(train, others, strict=True)],
            [_middle(p)[n] for p, n in zip(train, others, strict=True)],
        )
        return real_baseline(
            self.images,
            self.masks,
            images,
            masks,
            self._names,
            (self.places, others),
            self._intensity,
        )

    def draw(self, path: Path, synthetic: list[NDArray[np.int16]], title: str) -> None:
        """The three slices of `_chosen` beside what `measure` synthesized of them."""
        chosen = self._chosen()
        masks, generated, true = (
            np.concatenate(self.masks)[chosen],
            np.concatenate(synthetic)[chosen],
            np.concatenate(self.images)[chosen],
        )
        comparison(
            path,
            masks,
            generated,
            true,
            classes=len(self._table),
            window=window(self._intensity),
            title=title,
        )

    def sample(
        self, net: Generator, device: torch.device
    ) -> tuple[NDArray[np.uint8], NDArray[np.int16], NDArray[np.int16]]:
        """(masks, synthesized, true) of the three slices, each (3, H, W)."""
        chosen = self._chosen()
        masks, noise, true = (
            np.concatenate(self.masks)[chosen],
            np.concatenate(self._noise)[chosen],
            np.concatenate(self.images)[chosen],
        )
        return (
            masks,
            generate(net, self.labels[chosen], noise, len(self._table), self._intensity, device),
            true,
        )

    def _chosen(self) -> NDArray[np.intp]:
        """Three labelled slices apart from each other, over all patients (any three where none
        is labelled).
        """
        labelled = np.flatnonzero(np.concatenate(self.masks).any((1, 2)))
        if not len(labelled):
            labelled = np.arange(len(self.labels))
        return labelled[[len(labelled) // 5, len(labelled) // 2, len(labelled) * 4 // 5]]


def generate(
    net: Generator,
    labels: NDArray[np.uint8],
    noise: NDArray[np.uint8],
    classes: int,
    intensity: Intensity,
    device: torch.device,
    batch_size: int = 8,
    style: NDArray[np.float32] | None = None,
) -> NDArray[np.int16]:
    """`labels` uint8 (n, Z, H, W), `noise` uint8 (n, H, W) → HU int16 (n, H, W), with `net` in eval
    mode.

    `style` (S,): of all slices, as of one patient; None: 0.
    """
    out = []
    for at in range(0, len(labels), batch_size):
        condition = one_hot(torch.from_numpy(labels[at : at + batch_size]).to(device), classes)
        bytes_ = torch.from_numpy(noise[at : at + batch_size, None]).to(device)
        vector = (
            None if style is None else torch.from_numpy(style).to(device).expand(len(condition), -1)
        )
        with torch.no_grad():
            image = net(
                condition.contiguous(memory_format=torch.channels_last),
                standardise_noise(bytes_) if net.noisy else None,
                vector,
            )
        out.append(from_unit(image[:, 0].cpu().numpy(), intensity))
    return np.concatenate(out)


def label_maps(patients: Sequence[Slices], most: int) -> NDArray[np.uint8]:
    """Up to `most` label maps, uint8 (n, Z, H, W), evenly spaced over the slices of all
    `patients`.
    """
    all_slices = [(patient, k) for patient in patients for k in range(len(patient))]
    chosen = np.linspace(0, len(all_slices) - 1, min(most, len(all_slices))).round().astype(int)
    return np.stack([patient.labels[k] for patient, k in (all_slices[n] for n in chosen)])


def _middle(patient: Slices) -> NDArray[np.uint8]:
    return patient.labels[:, patient.labels.shape[1] // 2]


def neighbours(total: int, count: int) -> NDArray[np.intp]:
    """Numbers of `count` of `total` slices, as evenly spaced pairs of neighbours (an odd one is
    left out): rising, none twice.
    """
    if count >= total:
        return np.arange(total)
    if count < 2:
        return np.array([total // 2])
    middles = (np.arange(count // 2) + 0.5) * total / (count // 2)
    first: NDArray[np.intp] = np.floor(middles - 1).astype(np.intp)
    return np.stack([first, first + 1], 1).ravel()
