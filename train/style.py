"""What differs between patients though their masks agree, as a vector: the style that the generator is given.

Contrast timing, dose and the like show in the organs' intensities, and these are known while training. A patient's style is its
organs' median intensities, as principal components of the cohort, each scaled to unit variance: the style of a patient that
was never seen is a draw from N(0, 1). There is no encoder to train, and nothing to keep from being ignored: the reconstruction
loss itself rewards the network for using the style (docs/decisions/0007-what-a-style-means.md).

A few dozen patients could be told by their masks instead. So every training slice is moved to a style of its own near its patient's,
and its organs' intensities with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from runtime.contract import Intensity
from runtime.errors import UsageError

from .dataset import Slices, stream
from .metrics import medians

FRESH = 0.6  # share of a training style's deviation that is drawn for each slice, the rest being its patient's
LEAST_SHARE = 1e-3  # of the strongest component's deviation; what varies less is rounding


def organ_medians(patients: Sequence[Slices], classes: int) -> NDArray[np.float64]:
    """Median intensity (patients, classes - 1) of the labels 1, 2, ... in each patient; NaN where there is (almost) nothing."""
    return np.stack([medians(p.image, p.labels[:, p.labels.shape[1] // 2], classes) for p in patients])


def patient_styles(table: NDArray[np.float64], size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Medians `table` (patients, organs), NaN where unknown → styles (patients, size), and what they do (size, organs).

    Styles are the scores of the first `size` principal components: zero mean, unit variance, uncorrelated. table is about its
    mean + styles @ what they do. An unknown median counts as the cohort's mean. Raises `UsageError` when the patients differ in fewer
    dimensions.
    """
    known = np.where(np.isnan(table), 0, table).sum(0) / np.maximum((~np.isnan(table)).sum(0), 1)
    scores, deviations, axes = np.linalg.svd(np.nan_to_num(table - known), full_matrices=False)
    dimensions = int((deviations > LEAST_SHARE * max(deviations[0], 1e-9)).sum()) if deviations.size else 0
    if size > dimensions:
        raise UsageError(f"generator.style is {size}, but the organs of the {len(table)} training patients differ in {dimensions} dimension(s)",
                         expected="at most that many", remedy=f"set generator.style={dimensions}, or add patients")  # fmt: skip
    signs = np.sign(axes[np.arange(size), np.abs(axes[:size]).argmax(1)])  # which sign comes out is LAPACK's whim
    scale = np.sqrt(len(table))
    effects = (signs * deviations[:size] / scale)[:, None] * axes[:size]
    return (scores[:, :size] * signs * scale).astype(np.float32), effects.astype(np.float32)


class Styles:
    """The training slices' styles. `train`: the patients, in the order of `Batches`; `size`: S, at least 1."""

    def __init__(self, train: Sequence[Slices], classes: int, size: int, seed: int, intensity: Intensity):
        styles, effects = patient_styles(organ_medians(train, classes), size)
        self._of_slice = np.repeat(styles, [len(p) for p in train], 0)
        self._effects = np.pad(effects, ((0, 0), (1, 0))) / np.float32(intensity.high - intensity.low)  # none on the background
        self._seed = seed

    def __call__(self, slices: NDArray[np.intp], step: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(styles (N, S), by how much each label's intensity moves with them (N, classes), as share of the range) of this step."""
        own = self._of_slice[slices]
        drawn = stream(self._seed, "style", step).standard_normal(own.shape, np.float32)
        styles = np.float32(np.sqrt(1 - FRESH**2)) * own + np.float32(FRESH) * drawn
        return styles, (styles - own) @ self._effects


def move(image: Tensor, labels: Tensor, shifts: Tensor) -> Tensor:
    """`image` (N, 1, H, W) in [0, 1] with `shifts` (N, classes) added where its label, in the middle of `labels` (N, Z, H, W), is."""
    middle = labels[:, labels.shape[1] // 2].long()
    return (image + shifts.gather(1, middle.flatten(1)).view_as(image)).clamp(0, 1)
