"""The style of a generator with a mean skip: the contrast, an intensity change for each class.

A patient's contrast is known in training: how far the median of each class lies from the cohort's.
Every slice moves to a contrast near its patient's, along the directions in which the cohort differs
and for each class alone, and its image moves with it. The network then cannot recognise a patient,
and any intensity can be asked of any class.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from runtime.core.context import Context

from ..data.class_statistics import ClassStatistics, drawn_classes
from ..data.dataset import Slices, stream
from .style import patient_styles

# The deviation of a drawn change along the cohort's directions, relative to the cohort's.
COHORT_JITTER = 0.6
# That of a change of one class alone: in HU, or in 2000ths of the range.
CLASS_JITTER, STABLE_JITTER = 22.0, 9.0
# Sigma in pixels, so that a change draws no edge.
EDGE_BLUR = 0.7


class ContrastStyles:
    """The contrast of the training slices.

    Args:
        train: The patients, in the order of `Batches`.
        statistics: Their classes.
        context: The rule of the context classes.
        labels: The number of rows of the label table, with the background.
        size: The number of directions in which contrast is drawn, at least 1.
        spread: How many deviations of the cohort a drawn number of 1 stands for.
        seed: The seed of the run.

    Attributes:
        contrast: The directions, float32 (size, classes), in the image's unit.
    """

    def __init__(
        self,
        train: Sequence[Slices],
        statistics: ClassStatistics,
        context: Context,
        labels: int,
        size: int,
        spread: float,
        seed: int,
    ):
        chosen = drawn_classes(labels, context)
        away = statistics.by_patient - statistics.medians
        _, effects = patient_styles(away[:, chosen], size, 1.0)
        self.contrast = np.zeros((size, away.shape[1]), np.float32)
        self.contrast[:, chosen] = spread * effects
        self._effects = self.contrast / np.float32(spread)
        intensity = statistics.intensity
        self._span = np.float32(intensity.high - intensity.low)
        of_patient = np.zeros_like(away)
        of_patient[:, chosen] = np.nan_to_num(away[:, chosen])
        self._of_slice = np.repeat(of_patient, [len(p) for p in train], 0).astype(np.float32)
        unit = 1.0 if intensity.unit == "HU" else float(self._span) / 2000
        self._alone = np.zeros(away.shape[1], np.float32)
        self._alone[chosen] = CLASS_JITTER * unit
        if intensity.unit == "HU":
            # Gas and fat hardly differ between patients.
            self._alone[labels : labels + 2] = STABLE_JITTER
        self._seed = seed

    def __call__(
        self, slices: NDArray[np.intp], step: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Draw the contrast of a batch.

        Args:
            slices: The numbers of its slices, counted through all patients.
            step: The number of the batch.

        Returns:
            The contrast, and how far it lies from that of the slice's patient; both float32
            (N, classes), as shares of the range.
        """
        rng = stream(self._seed, "style", step)
        together = rng.standard_normal((len(slices), len(self._effects)), np.float32)
        alone = rng.standard_normal((len(slices), len(self._alone)), np.float32)
        away = np.float32(COHORT_JITTER) * together @ self._effects + alone * self._alone
        return (self._of_slice[slices] + away) / self._span, away / self._span


def move_contrast(image: Tensor, condition: Tensor, change: Tensor) -> Tensor:
    """Change the intensity of each class, without an edge where two classes meet.

    Args:
        image: (N, 1, H, W) in [0, 1].
        condition: (N, Z, H, W) model indices; the middle slice counts.
        change: (N, classes), as a share of the range.

    Returns:
        (N, 1, H, W), clipped to [0, 1].
    """
    middle = condition[:, condition.shape[1] // 2].long()
    field = change.gather(1, middle.flatten(1)).view_as(image)
    places = torch.arange(-3, 4, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (places / EDGE_BLUR) ** 2)
    kernel = kernel / kernel.sum()
    for shape, pads in (((1, 1, 7, 1), (0, 0, 3, 3)), ((1, 1, 1, 7), (3, 3, 0, 0))):
        padded = functional.pad(field, pads, mode="replicate")
        field = functional.conv2d(padded, kernel.view(shape))
    return (image + field).clamp(0, 1)
