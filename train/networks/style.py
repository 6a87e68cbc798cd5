"""What differs between patients though their masks agree, as a vector: the style that the generator
is given.

Contrast timing, dose and the like show in the organs' intensities, the patient's build in the
outline of the body about them, and both are known while training. A patient's style is these
numbers as principal components of the cohort, each scaled to a deviation of 1 / `spread`: the style
of a patient that was never seen is a draw from N(0, 1), which reaches `spread` times as far as the
cohort (docs/decisions/0027-styles-reach-further-than-the-cohort.md). There is no encoder to train,
and nothing to keep from being ignored: the reconstruction loss itself rewards the network for using
the style (docs/decisions/0007-what-a-style-means.md).

A few dozen patients could be told by their masks instead. So every training slice is moved to a
style of its own near its patient's: its organs' intensities are shifted, and what surrounds the
labels is stretched.
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

# share of a training style's deviation that is drawn for each slice, the rest being its patient's
STYLE_JITTER = 0.6
# from the labels' centre to an outline, at equal angles from the columns' axis towards the rows'
DIRECTIONS = 12
OUTLINES = 16  # labelled slices of a patient, at most, that its outline is measured on
MARGIN = 0.09  # of the image's width: as far from the labels the surroundings are stretched in full
ROUNDING = 1e-6  # a smaller deviation is none
LEAST_SHARE = 1e-3  # of the strongest component's deviation; what varies less is rounding


def organ_medians(patients: Sequence[Slices], classes: int) -> NDArray[np.float64]:
    """Median intensity (patients, classes - 1) of the labels 1, 2, ... in each patient; NaN
    where there is (almost) nothing.
    """
    return np.stack(
        [medians(p.image, p.labels[:, p.labels.shape[1] // 2], classes) for p in patients]
    )


def outlines(patients: Sequence[Slices]) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """(log of the distance in pixels from the labels' centre to the body's outline in each of the
    `DIRECTIONS` (patients, 12), NaN where unknown; the centres (patients, 2), x and y in [-1, 1]
    across the image), of patients in HU.
    """
    logs, centres = (
        np.full((len(patients), DIRECTIONS), np.nan),
        np.zeros((len(patients), 2), np.float32),
    )
    angles = 2 * np.pi / DIRECTIONS * np.arange(DIRECTIONS)
    for n, patient in enumerate(patients):
        masks = patient.labels[:, patient.labels.shape[1] // 2]
        labelled = np.flatnonzero(masks.any((1, 2)))
        if not len(labelled):
            continue
        chosen = labelled[
            np.linspace(0, len(labelled) - 1, min(len(labelled), OUTLINES)).round().astype(int)
        ]
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
    """Medians `table` (patients, organs), NaN where unknown → styles (patients, size), and what
    they do (size, organs).

    Styles are the scores of the first `size` principal components: zero mean, deviation 1 /
    `spread`, uncorrelated. table is about its mean + styles @ what they do. An unknown median
    counts as the cohort's mean. Raises `UsageError` when the patients differ in fewer dimensions.
    """
    known = np.where(np.isnan(table), 0, table).sum(0) / np.maximum((~np.isnan(table)).sum(0), 1)
    scores, deviations, axes = np.linalg.svd(np.nan_to_num(table - known), full_matrices=False)
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
    signs = np.sign(
        axes[np.arange(size), np.abs(axes[:size]).argmax(1)]
    )  # which sign comes out is LAPACK's whim
    scale = np.sqrt(len(table)) / spread
    effects = (signs * deviations[:size] / scale)[:, None] * axes[:size]
    return (scores[:, :size] * signs * scale).astype(np.float32), effects.astype(np.float32)


class StyleEdits(NamedTuple):
    """What a batch's styles change in its slices, float32: `shifts` (N, classes) of the labels'
    intensities, as share of the range; `stretch` (N, 12), logs of the factors in the `DIRECTIONS`
    from `centres` (N, 2); see `move` and `stretch`.
    """

    shifts: NDArray[np.float32]
    warp_outline: NDArray[np.float32]
    centres: NDArray[np.float32]


class Styles:
    """The training slices' styles.

    `train`: the patients, in the order of `Batches`; `size`: S, at least 1; `spread`: see
    `patient_styles`.
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
        if intensity.unit != "HU":  # where the body ends is not known
            logs[:] = 0
        scale = _deviation(table) / _deviation(logs)  # outlines count as much as organs
        styles, effects = patient_styles(np.concatenate([table, scale * logs], 1), size, spread)
        lengths = [len(p) for p in train]
        self._of_slice, self._centres = (
            np.repeat(styles, lengths, 0),
            np.repeat(centres, lengths, 0),
        )
        self._shifts = np.pad(effects[:, :-DIRECTIONS], ((0, 0), (1, 0))) / np.float32(
            intensity.high - intensity.low
        )  # none on the background
        self._outline_weights = effects[:, -DIRECTIONS:] / np.float32(scale)
        self._seed = seed

    def __call__(
        self, slices: NDArray[np.intp], step: int
    ) -> tuple[NDArray[np.float32], StyleEdits]:
        """(styles (N, S), what they change) of this step's slices."""
        own = self._of_slice[slices]
        drawn = stream(self._seed, "style", step).standard_normal(own.shape, np.float32)
        styles = np.float32(np.sqrt(1 - STYLE_JITTER**2)) * own + np.float32(STYLE_JITTER) * drawn
        away = styles - own
        return styles, StyleEdits(
            away @ self._shifts, away @ self._outline_weights, self._centres[slices]
        )


def _deviation(table: NDArray[np.float64]) -> float:
    """Root of the sum over columns of the rows' variance, NaN left out; 1 where there is none."""
    known = ~np.isnan(table)
    centred = np.where(
        known, table - np.where(known, table, 0).sum(0) / np.maximum(known.sum(0), 1), 0
    )
    found = float(np.sqrt((centred**2).sum()))
    return found if found > ROUNDING else 1.0


def shift_intensity(image: Tensor, labels: Tensor, shifts: Tensor) -> Tensor:
    """`image` (N, 1, H, W) in [0, 1] with `shifts` (N, classes) added where its label, in the
    middle of `labels` (N, Z, H, W), is.
    """
    middle = labels[:, labels.shape[1] // 2].long()
    return (image + shifts.gather(1, middle.flatten(1)).view_as(image)).clamp(0, 1)


def warp_outline(image: Tensor, labels: Tensor, factors: Tensor, centres: Tensor) -> Tensor:
    """`image` (N, 1, H, W) with its surroundings stretched away from `centres` (N, 2) by
    exp(`factors` (N, 12)); labels stay where they are.

    The stretch grows from nothing at the labels of the middle of `labels` (N, Z, H, W) to the whole
    `MARGIN` away. Between two directions it is interpolated.
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
    share = (
        1 - functional.avg_pool2d(wide, 2 * reach + 1, 1, reach, count_include_pad=False)[:, 0]
    )  # (N, H, W)
    same = torch.eye(2, 3, device=image.device, dtype=image.dtype).expand(len(image), 2, 3)
    away = (
        functional.affine_grid(same, list(image.shape), align_corners=False)
        - centres[:, None, None]
    )  # (N, H, W, 2)
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
