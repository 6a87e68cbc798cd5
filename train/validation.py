"""The held-out patients at one moment of training: painted, measured, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.contract import Intensity, LabelTable

from .dataset import Slices, from_unit, noise_bytes
from .evaluate import evaluate
from .figures import comparison, window
from .generator import Generator, one_hot, standardise_noise


class Validation:
    """Up to `most` slices of `patients`, evenly spaced, with fixed noise: two moments differ by the network alone."""

    def __init__(self, patients: tuple[Slices, ...], most: int, table: LabelTable, intensity: Intensity, seed: int):
        total = sum(map(len, patients))
        share = min(1.0, most / total)
        self._cases = [_evenly(p, max(1, round(share * len(p)))) for p in patients]
        self._table, self._intensity = table, intensity
        self._noise = [noise_bytes(c.image.shape, seed, n) for n, c in enumerate(self._cases)]

    @property
    def labels(self) -> NDArray[np.uint8]:
        """The slices' label maps, uint8 (n, Z, H, W) model indices."""
        return np.concatenate([case.labels for case in self._cases])

    def measure(self, net: Generator, device: torch.device, batch_size: int) -> tuple[dict[str, Any], list[NDArray[np.int16]]]:
        """(metrics of train/evaluate.py, the painted slices of each patient)."""
        painted = [
            paint(net, case.labels, noise, len(self._table), self._intensity, device, batch_size)
            for case, noise in zip(self._cases, self._noise, strict=True)
        ]
        names = [label.name for label in self._table.labels[1:]]
        masks = [case.labels[:, case.labels.shape[1] // 2] for case in self._cases]
        return evaluate(painted, [case.image for case in self._cases], masks, names), painted

    def draw(self, path: Path, painted: list[NDArray[np.int16]], title: str) -> None:
        """The three slices of `_chosen` beside what `measure` painted of them."""
        chosen = self._chosen()
        masks, generated, true = (
            self._masks()[chosen],
            np.concatenate(painted)[chosen],
            np.concatenate([c.image for c in self._cases])[chosen],
        )
        comparison(path, masks, generated, true, classes=len(self._table), window=window(self._intensity), title=title)

    def sample(self, net: Generator, device: torch.device) -> tuple[NDArray[np.uint8], NDArray[np.int16], NDArray[np.int16]]:
        """(masks, painted, true) of the three slices, each (3, H, W)."""
        chosen = self._chosen()
        noise, true = np.concatenate(self._noise)[chosen], np.concatenate([c.image for c in self._cases])[chosen]
        return self._masks()[chosen], paint(net, self.labels[chosen], noise, len(self._table), self._intensity, device), true

    def _masks(self) -> NDArray[np.uint8]:
        return self.labels[:, self.labels.shape[1] // 2]

    def _chosen(self) -> NDArray[np.intp]:
        """Three labelled slices apart from each other, over all patients (any three where none is labelled)."""
        labelled = np.flatnonzero(self._masks().any((1, 2)))
        if not len(labelled):
            labelled = np.arange(len(self.labels))
        return labelled[[len(labelled) // 5, len(labelled) // 2, len(labelled) * 4 // 5]]


def paint(net: Generator, labels: NDArray[np.uint8], noise: NDArray[np.uint8], classes: int, intensity: Intensity,
          device: torch.device, batch_size: int = 8) -> NDArray[np.int16]:  # fmt: skip
    """`labels` uint8 (n, Z, H, W), `noise` uint8 (n, H, W) → HU int16 (n, H, W), with `net` in eval mode."""
    out = []
    for at in range(0, len(labels), batch_size):
        condition = one_hot(torch.from_numpy(labels[at : at + batch_size]).to(device), classes)
        bytes_ = torch.from_numpy(noise[at : at + batch_size, None]).to(device)
        with torch.no_grad():
            image = net(condition.contiguous(memory_format=torch.channels_last), standardise_noise(bytes_) if net.noisy else None)
        out.append(from_unit(image[:, 0].cpu().numpy(), intensity))
    return np.concatenate(out)


def _evenly(patient: Slices, count: int) -> Slices:
    chosen = np.linspace(0, len(patient) - 1, count).round().astype(int)
    return Slices(patient.labels[chosen], patient.image[chosen])
