"""What the classes of a cohort look like: their intensities, texture and contrast.

The statistics start the mean skip, bound the noise, and tell the runtime how contrast differs
between patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from runtime.core.context import TABLE, UNKNOWN, Context
from runtime.core.manifest import Intensity

from ..metrics.scores import TEXTURE_SIGMA
from ..metrics.volume_metrics import LEAST_VOXELS, medians
from .dataset import Slices

# The least and the most correlation of neighbouring pixels: white noise, and blobs of 3 pixels.
GRAIN = (0.02, 0.6)
# The spreads that are tried, from a pixel alone to blurred edges, and the slices of each patient.
SPREADS = np.linspace(0, 0.3, 16)
SPREAD_SLICES = 6
# From the interquartile range of a normal distribution to its standard deviation.
IQR_PER_DEVIATION = 1.349
# The most slices of a patient that are measured.
MEASURED_SLICES = 96


@dataclass(frozen=True)
class ClassStatistics:
    """The classes of the training patients, in the image's unit.

    Attributes:
        means: The mean intensity of each class, float64 (classes,).
        medians: The median over patients of each class's median.
        texture: The standard deviation of the texture inside each class, from its quartiles: a
            vessel in the lung or a tube in the air is no texture.
        by_patient: The median intensity of each class in each patient, (patients, classes); NaN
            where the patient (almost) lacks it.
        intensity: The intensity range.
        grain: The correlation of the texture inside the labels between neighbouring pixels.
        spread: The point spread function between the classes is (spread, 1, spread).
    """

    means: NDArray[np.float64]
    medians: NDArray[np.float64]
    texture: NDArray[np.float64]
    by_patient: NDArray[np.float64]
    intensity: Intensity
    grain: float = GRAIN[1]
    spread: float = 0.0

    def shares(self) -> tuple[NDArray[np.float32], ...]:
        """Means and medians in [0, 1], and the texture as a share of the range, float32."""
        low, span = self.intensity.low, self.intensity.high - self.intensity.low
        means, middles = (
            np.clip((values - low) / span, 0, 1).astype(np.float32)
            for values in (self.means, self.medians)
        )
        return means, middles, (self.texture / span).astype(np.float32)

    def stated(self, context: Context, contrast: NDArray[np.floating]) -> Context:
        """The context as run.json and the manifest state it.

        Args:
            context: The rule.
            contrast: (K, classes) in the image's unit.
        """
        return replace(
            context,
            medians=tuple(round(float(m), 2) for m in self.medians),
            contrast=tuple(tuple(round(float(c), 3) for c in row) for row in contrast),
        )


def measure_classes(
    patients: Sequence[Slices], labels: int, context: Context, intensity: Intensity
) -> ClassStatistics:
    """Measure the classes of the training patients.

    A class that no patient has is as what has no label. So is "unknown".

    Args:
        patients: The patients, with tissues.
        labels: The number of rows of the label table, with the background.
        context: The rule of the context classes.
        intensity: The intensity range.

    Returns:
        The statistics.
    """
    classes = labels + len(context)
    unknown = context.index(UNKNOWN, labels)
    sums, counts, squares, inner = np.zeros((4, classes))
    grain = np.zeros(2)
    rows = []
    for patient in patients:
        step = slice(None, None, 1 + len(patient) // MEASURED_SLICES)
        condition = patient.condition(step)
        dense = condition[:, condition.shape[1] // 2]
        image = np.clip(patient.image[step].astype(np.float32), intensity.low, intensity.high)
        flat = dense.ravel()
        counts += np.bincount(flat, minlength=classes)
        sums += np.bincount(flat, image.ravel(), minlength=classes)
        without_label = flat >= labels
        without_label |= flat == 0
        counts[unknown] += without_label.sum()
        sums[unknown] += image.ravel()[without_label].sum()
        class_medians = np.append(np.nan, medians(image, dense, classes))
        rows.append(class_medians)
        # Without the edges between the classes, which the Gaussian would count as texture.
        flattened = image - np.where(np.isnan(class_medians), image.mean(), class_medians)[
            dense
        ].astype(np.float32)
        texture = flattened - ndimage.gaussian_filter(flattened, (0, TEXTURE_SIGMA, TEXTURE_SIGMA))
        core = _cores(dense)
        for number in np.unique(dense[core]).tolist():
            values = texture[core & (dense == number)]
            low, high = np.percentile(values, (25, 75))
            inner[number] += values.size
            squares[number] += values.size * ((high - low) / IQR_PER_DEVIATION) ** 2
        pair = (core & (dense > 0) & (dense < labels))[:, :, :-1] & core[:, :, 1:]
        left, right = texture[:, :, :-1][pair], texture[:, :, 1:][pair]
        grain += (left * right).sum(), (left**2).sum()
    by_patient = np.stack(rows)
    present = counts > 0
    means = np.where(present, sums / np.maximum(counts, 1), sums[unknown] / counts[unknown])
    middles = means.copy()
    has_median = ~np.isnan(by_patient).all(0)
    middles[has_median] = np.nanmedian(by_patient[:, has_median], 0)
    measured = inner >= LEAST_VOXELS
    typical = np.sqrt(squares[1:labels].sum() / max(inner[1:labels].sum(), 1))
    deviations = np.where(measured, np.sqrt(squares / np.maximum(inner, 1)), typical)
    correlation = float(np.clip(grain[0] / grain[1], *GRAIN)) if grain[1] else GRAIN[1]
    spread = _spread(patients, middles, deviations, intensity)
    return ClassStatistics(means, middles, deviations, by_patient, intensity, correlation, spread)


def _spread(
    patients: Sequence[Slices],
    middles: NDArray[np.float64],
    deviations: NDArray[np.float64],
    intensity: Intensity,
) -> float:
    """The spread with which images of the classes have edges as steep as the real ones.

    The gradients' magnitudes in the body are compared, by the distance (W1) of their distributions.
    """
    random = np.random.default_rng(0)
    shares = np.linspace(0, 1, 101)
    real: list[NDArray[np.float64]] = []
    drawn: list[list[NDArray[np.float64]]] = [[] for _ in SPREADS]
    for patient in patients:
        some = np.linspace(0, len(patient) - 1, SPREAD_SLICES).astype(int)
        condition = patient.condition(some)
        dense = condition[:, condition.shape[1] // 2]
        body = dense > 0
        if not body.any():
            continue
        image = np.clip(patient.image[some].astype(np.float64), intensity.low, intensity.high)
        real.append(_gradient(image)[body])
        noise = deviations[dense] * random.standard_normal(dense.shape)
        for spread, gradients in zip(SPREADS, drawn, strict=True):
            line = np.array([spread, 1, spread]) / (1 + 2 * spread)
            smooth = ndimage.correlate1d(middles[dense], line, 1, mode="nearest")
            smooth = ndimage.correlate1d(smooth, line, 2, mode="nearest")
            gradients.append(_gradient(smooth + noise)[body])
    if not real:
        return 0.0
    truth = np.quantile(np.concatenate(real), shares)
    distances = [
        np.abs(np.quantile(np.concatenate(gradients), shares) - truth).mean() for gradients in drawn
    ]
    return float(SPREADS[int(np.argmin(distances))])


def _gradient(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """The magnitude of the gradient in each slice, (n, H, W)."""
    rows, columns = np.gradient(image, axis=(1, 2))
    return np.hypot(rows, columns)


def drawn_classes(labels: int, context: Context) -> NDArray[np.intp]:
    """The classes whose contrast differs between patients: all but air, table and unknown.

    Args:
        labels: The number of rows of the label table, with the background.
        context: The rule of the context classes.
    """
    still = {0, context.index(TABLE, labels), context.index(UNKNOWN, labels)}
    return np.array([c for c in range(labels + len(context)) if c not in still])


def _cores(dense: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The pixels (n, H, W) whose neighbours in the slice have the same class."""
    core = np.ones(dense.shape, bool)
    for axis in (1, 2):
        for shift in (1, -1):
            core &= np.roll(dense, shift, axis) == dense
    return core
