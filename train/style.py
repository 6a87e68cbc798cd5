"""What differs between patients though their masks agree, as a vector: the style that the generator is given.

Contrast timing, dose and the like show in the organs' intensities, and these are known while training. A patient's style is its
organs' median intensities, as principal components of the cohort, each scaled to unit variance: the style of a patient that
was never seen is a draw from N(0, 1). No encoder to train, and nothing to keep from being ignored: the reconstruction loss itself
rewards the network for using it (docs/decisions/0007-what-a-style-means.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.errors import UsageError

from .dataset import Slices, stream

JITTER = 0.25  # share of a training style's deviation that is drawn for each slice: a few dozen patients are points, styles are not
LEAST_VOXELS = 50  # an organ with fewer says nothing of its patient
LEAST_SHARE = 1e-3  # of the strongest component's deviation; what varies less is rounding


def organ_medians(patients: Sequence[Slices], classes: int) -> NDArray[np.float64]:
    """Median intensity (patients, classes - 1) of the labels 1, 2, ... in each patient; NaN where there is (almost) nothing."""
    table = np.full((len(patients), classes - 1), np.nan)
    for row, patient in zip(table, patients, strict=True):
        middle = patient.labels[:, patient.labels.shape[1] // 2]
        for index in range(1, classes):
            values = patient.image[middle == index]
            if values.size >= LEAST_VOXELS:
                row[index - 1] = np.median(values)
    return table


def patient_styles(medians: NDArray[np.float64], size: int) -> NDArray[np.float32]:
    """Medians (patients, organs), NaN where unknown → styles (patients, size), each column of zero mean and unit variance.

    The scores of the first `size` principal components. An unknown median counts as the cohort's mean. Raises `UsageError`
    when the patients differ in fewer dimensions.
    """
    known = np.where(np.isnan(medians), 0, medians).sum(0) / np.maximum((~np.isnan(medians)).sum(0), 1)
    scores, deviations, loadings = np.linalg.svd(np.nan_to_num(medians - known), full_matrices=False)
    dimensions = int((deviations > LEAST_SHARE * max(deviations[0], 1e-9)).sum()) if deviations.size else 0
    if size > dimensions:
        raise UsageError(f"generator.style is {size}, but the organs of the {len(medians)} training patients differ in {dimensions} dimension(s)",
                         expected="at most that many", remedy=f"set generator.style={dimensions}, or add patients")  # fmt: skip
    signs = np.sign(loadings[np.arange(size), np.abs(loadings[:size]).argmax(1)])  # which sign comes out is LAPACK's whim
    return (scores[:, :size] * signs * np.sqrt(len(medians))).astype(np.float32)


class Styles:
    """The training slices' styles. `train`: the patients, in the order of `Batches`; `size`: S, at least 1."""

    def __init__(self, train: Sequence[Slices], classes: int, size: int, seed: int):
        self._of_slice = np.repeat(patient_styles(organ_medians(train, classes), size), [len(p) for p in train], 0)
        self._seed = seed

    def __call__(self, slices: NDArray[np.intp], step: int) -> NDArray[np.float32]:
        """(N, S) float32 for the slices of this step: the patient's, blurred by `JITTER`, of unit variance as before."""
        own = self._of_slice[slices]
        drawn = stream(self._seed, "style", step).standard_normal(own.shape, np.float32)
        mixed: NDArray[np.float32] = np.float32(np.sqrt(1 - JITTER**2)) * own + np.float32(JITTER) * drawn
        return mixed
