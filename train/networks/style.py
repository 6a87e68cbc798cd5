"""The style: a vector for what differs between patients whose masks agree.

Contrast timing, dose and the like show in the organs' intensities; the patient's build shows in
the outline of the body. Both are known in training. A patient's style is the principal components
of these numbers over the cohort, each scaled to a deviation of 1 / `spread`. The style of a new
patient is a draw from N(0, 1), which reaches `spread` times as far as the cohort
(docs/decisions/0027-styles-reach-further-than-the-cohort.md). There is no encoder to train, and the
generator does not learn to ignore the style: the reconstruction loss rewards its use
(docs/decisions/0007-what-a-style-means.md).

The generator could also recognise a few dozen patients by their masks. Therefore every training
slice moves to a style near its patient's: its organs' intensities shift, and the surroundings of
the labels stretch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from runtime.core.errors import UsageError
from runtime.core.manifest import Intensity

from ..data.dataset import Slices, stream
from ..metrics.scores import body_mask
from ..metrics.volume_metrics import medians

# The share of a training style's deviation that is drawn for each slice; the rest is its patient's.
STYLE_JITTER = 0.6
# The directions from the labels' centre to an outline, at equal angles from the columns' axis
# towards the rows'.
DIRECTIONS = 12
# The most labelled slices of a patient that measure its outline.
OUTLINES = 16
# The distance from the labels, as a share of the image's width, from which the surroundings
# stretch in full.
MARGIN = 0.09
# A smaller deviation counts as 0.
ROUNDING = 1e-6
# A component with a smaller share of the strongest one's deviation counts as rounding.
LEAST_SHARE = 1e-3


def organ_medians(patients: Sequence[Slices], classes: int) -> NDArray[np.float64]:
    """Measure the median intensity of each label in each patient.

    Args:
        patients: The patients.
        classes: The number of labels, with the background.

    Returns:
        (patients, classes - 1), for the labels 1, 2, ...; NaN for labels with (almost) no voxels.
    """
    return np.stack(
        [medians(p.image, p.labels[:, p.labels.shape[1] // 2], classes) for p in patients]
    )


def outlines(patients: Sequence[Slices]) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Measure the outline of the body about the labels of each patient.

    Args:
        patients: The patients, in HU.

    Returns:
        The log of the distance in pixels from the labels' centre to the body's outline in each of
        the `DIRECTIONS`, (patients, 12), NaN where unknown; and the centres (patients, 2), x and y
        in [-1, 1] across the image.
    """
    logs = np.full((len(patients), DIRECTIONS), np.nan)
    centres = np.zeros((len(patients), 2), np.float32)
    angles = 2 * np.pi / DIRECTIONS * np.arange(DIRECTIONS)
    for n, patient in enumerate(patients):
        masks = patient.labels[:, patient.labels.shape[1] // 2]
        labelled = np.flatnonzero(masks.any((1, 2)))
        if not len(labelled):
            continue
        count = min(len(labelled), OUTLINES)
        chosen = labelled[np.linspace(0, len(labelled) - 1, count).round().astype(int)]
        _, rows, columns = np.nonzero(masks[chosen])
        x, y = columns.mean(), rows.mean()
        h, w = masks.shape[1:]
        centres[n] = (2 * x + 1) / w - 1, (2 * y + 1) / h - 1
        away = np.arange(0, h + w, 0.5)
        ray_x, ray_y = (
            np.rint(at + np.outer(f(angles), away)).astype(int)
            for at, f in ((x, np.cos), (y, np.sin))
        )
        within = (ray_x >= 0) & (ray_x < w) & (ray_y >= 0) & (ray_y < h)
        ray_x, ray_y = np.clip(ray_x, 0, w - 1), np.clip(ray_y, 0, h - 1)
        reach = [
            ((body[ray_y, ray_x] & within) * away).max(1)
            for body in body_mask(patient.image[chosen])
            if body.any()
        ]
        if reach:
            logs[n] = np.log(np.maximum(np.median(reach, 0), 1))
    return logs, centres


def patient_styles(
    table: NDArray[np.float64], size: int, spread: float = 1.0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Compute styles as the scores of the first principal components.

    The scores have zero mean and a deviation of 1 / `spread`, and are uncorrelated. `table` is
    about its mean + styles @ effects. An unknown median counts as the cohort's mean.

    Args:
        table: Measurements (patients, columns), NaN where unknown.
        size: The length S of a style.
        spread: How many deviations of the cohort a style of 1 stands for.

    Returns:
        Styles (patients, S) and effects (S, columns), float32.

    Raises:
        UsageError: The patients differ in fewer than S dimensions.
    """
    mean = np.where(np.isnan(table), 0, table).sum(0) / np.maximum((~np.isnan(table)).sum(0), 1)
    scores, deviations, axes = np.linalg.svd(np.nan_to_num(table - mean), full_matrices=False)
    dimensions = (
        int((deviations > LEAST_SHARE * max(deviations[0], 1e-9)).sum()) if deviations.size else 0
    )
    if size > dimensions:
        raise UsageError(
            f"generator.style is {size}, but the organs and outlines of the {len(table)} training"
            f" patients differ in {dimensions} dimension(s)",
            expected="at most that many",
            remedy=f"set generator.style={dimensions}, or add patients",
        )
    # LAPACK may return either sign of an axis, so each axis' largest entry becomes positive.
    signs = np.sign(axes[np.arange(size), np.abs(axes[:size]).argmax(1)])
    scale = np.sqrt(len(table)) / spread
    effects = (signs * deviations[:size] / scale)[:, None] * axes[:size]
    return (scores[:, :size] * signs * scale).astype(np.float32), effects.astype(np.float32)


class StyleEdits(NamedTuple):
    """What the styles of a batch change in its slices, float32.

    Attributes:
        shifts: (N, classes), of the labels' intensities as a share of the range
            (`shift_intensity`).
        warp_outline: (N, 12), logs of the stretch in the `DIRECTIONS` (`warp_outline`).
        centres: (N, 2), the labels' centres, x and y in [-1, 1].
    """

    shifts: NDArray[np.float32]
    warp_outline: NDArray[np.float32]
    centres: NDArray[np.float32]


class Styles:
    """The styles of the training slices.

    Args:
        train: The patients, in the order of `Batches`.
        classes: The number of labels, with the background.
        size: The length S of a style, at least 1.
        seed: The seed of the run.
        intensity: The intensity range.
        spread: See `patient_styles`.
    """

    def __init__(
        self,
        train: Sequence[Slices],
        classes: int,
        size: int,
        seed: int,
        intensity: Intensity,
        spread: float = 1.0,
    ):
        table = organ_medians(train, classes)
        logs, centres = outlines(train)
        # The outline of the body is only known in HU.
        if intensity.unit != "HU":
            logs[:] = 0
        # With this scale, outlines count as much as organs.
        scale = _deviation(table) / _deviation(logs)
        styles, effects = patient_styles(np.concatenate([table, scale * logs], 1), size, spread)
        lengths = [len(p) for p in train]
        self._of_slice = np.repeat(styles, lengths, 0)
        self._centres = np.repeat(centres, lengths, 0)
        # The background's shift is 0.
        organ_shifts = np.pad(effects[:, :-DIRECTIONS], ((0, 0), (1, 0)))
        self._shifts = organ_shifts / np.float32(intensity.high - intensity.low)
        self._outline_weights = effects[:, -DIRECTIONS:] / np.float32(scale)
        self._seed = seed

    def __call__(
        self, slices: NDArray[np.intp], step: int
    ) -> tuple[NDArray[np.float32], StyleEdits]:
        """Draw the styles of a batch.

        Args:
            slices: The numbers of its slices, counted through all patients.
            step: The number of the batch.

        Returns:
            Styles float32 (N, S), and what they change.
        """
        base = self._of_slice[slices]
        drawn = stream(self._seed, "style", step).standard_normal(base.shape, np.float32)
        styles = np.float32(np.sqrt(1 - STYLE_JITTER**2)) * base + np.float32(STYLE_JITTER) * drawn
        away = styles - base
        return styles, StyleEdits(
            away @ self._shifts, away @ self._outline_weights, self._centres[slices]
        )


def _deviation(table: NDArray[np.float64]) -> float:
    """Root of the sum over columns of the rows' variance, without NaN; 1 where it is 0."""
    valid = ~np.isnan(table)
    mean = np.where(valid, table, 0).sum(0) / np.maximum(valid.sum(0), 1)
    centred = np.where(valid, table - mean, 0)
    deviation = float(np.sqrt((centred**2).sum()))
    return deviation if deviation > ROUNDING else 1.0


def shift_intensity(image: Tensor, labels: Tensor, shifts: Tensor) -> Tensor:
    """Add a shift to the intensities of each label.

    Args:
        image: (N, 1, H, W) in [0, 1].
        labels: (N, Z, H, W) model indices; the middle slice counts.
        shifts: (N, classes), as a share of the range.

    Returns:
        (N, 1, H, W), clipped to [0, 1].
    """
    middle = labels[:, labels.shape[1] // 2].long()
    return (image + shifts.gather(1, middle.flatten(1)).view_as(image)).clamp(0, 1)


def warp_outline(image: Tensor, labels: Tensor, factors: Tensor, centres: Tensor) -> Tensor:
    """Stretch the surroundings of the labels away from the centres; labels stay where they are.

    The stretch grows from nothing at the labels to all of it `MARGIN` away. Between two directions
    it is interpolated.

    Args:
        image: (N, 1, H, W) in [0, 1].
        labels: (N, Z, H, W) model indices; the middle slice counts.
        factors: (N, 12), logs of the stretch in the `DIRECTIONS`.
        centres: (N, 2), x and y in [-1, 1].

    Returns:
        (N, 1, H, W), clipped to [0, 1].
    """
    h, w = image.shape[-2:]
    reach = max(1, round(MARGIN * w / 2))
    inside = (labels[:, labels.shape[1] // 2, None] != 0).to(image.dtype)
    wide = functional.max_pool2d(
        functional.max_pool2d(inside, (1, 2 * reach + 1), 1, (0, reach)),
        (2 * reach + 1, 1),
        1,
        (reach, 0),
    )
    # (N, H, W)
    near = functional.avg_pool2d(wide, 2 * reach + 1, 1, reach, count_include_pad=False)[:, 0]
    share = 1 - near
    identity = torch.eye(2, 3, device=image.device, dtype=image.dtype).expand(len(image), 2, 3)
    # (N, H, W, 2)
    grid = functional.affine_grid(identity, list(image.shape), align_corners=False)
    away = grid - centres[:, None, None]
    place = torch.atan2(away[..., 1] * h, away[..., 0] * w) * (DIRECTIONS / (2 * torch.pi))
    lower = place.floor()
    first, second = (
        factors.gather(1, ((lower + n).long() % DIRECTIONS).flatten(1)).view_as(place)
        for n in (0, 1)
    )
    shrink = torch.exp(-share * torch.lerp(first, second, place - lower))
    source = centres[:, None, None] + away * shrink[..., None]
    return functional.grid_sample(
        image, source, mode="bicubic", padding_mode="border", align_corners=False
    ).clamp(0, 1)
