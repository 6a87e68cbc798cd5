"""Real patients on the training canvas, and which of them train and test a segmenter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.core.errors import UsageError
from runtime.core.manifest import GridPolicy, Intensity, LabelTable
from runtime.core.resampling import axial_axes
from runtime.core.volume import Geometry, LabelVolume, Volume

from .. import config as configs
from ..config import RunConfig
from ..data.dataset import Slices, grid_of, load_cohort
from ..data.layouts import LEAST_PATIENTS, Pair
from ..data.slice_cache import SliceCache

TEST_SHARE, MOST_TESTED = 3, 20  # a third of the patients is tested on, 20 at most


@dataclass(frozen=True)
class Case:
    """One labelled image on the training canvas, its slices from the feet to the head.

    Attributes:
        image: int16 (D, H, W), HU or arbitrary units.
        labels: uint8 (D, H, W), model indices.
        spacing: mm along (D, H, W).
    """

    image: NDArray[np.int16]
    labels: NDArray[np.uint8]
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def geometry(self) -> Geometry:
        """A grid along the patient's axes, as axial slices have it."""
        return Geometry.from_spacing(self.spacing[::-1])

    @cached_property
    def mask(self) -> LabelVolume:
        """The labels as a volume."""
        return LabelVolume(np.ascontiguousarray(self.labels), self.geometry)

    @property
    def volume(self) -> Volume:
        """The image as a volume."""
        return Volume(self.image, self.geometry)


@dataclass(frozen=True)
class Patient:
    """One patient: `pairs` of files and the `cases` read from them, one each."""

    pairs: tuple[Pair, ...]
    cases: tuple[Case, ...]

    def items(self) -> Iterator[tuple[Pair, Case]]:
        """Every pair of files with what was read from it."""
        return zip(self.pairs, self.cases, strict=True)


@dataclass(frozen=True)
class Split:
    """Numbers of the patients that are tested on, and of all others."""

    test: tuple[int, ...]
    pool: tuple[int, ...]

    def few(self, count: int, seed: int) -> tuple[int, ...]:
        """The `count` training patients of a seed, drawn from the pool."""
        drawn = np.random.default_rng([seed, 2]).permutation(len(self.pool))[:count]
        return tuple(sorted(self.pool[n] for n in drawn))


def read_patients(
    config: RunConfig,
    pairs: Sequence[Pair],
    cache: Path,
) -> tuple[list[Patient], str]:
    """Read every pair onto the canvas of `config`, with the checks that training makes.

    Args:
        config: labels, canvas and intensities, with nothing left open.
        pairs: the pairs of a data set.
        cache: folder for the decoded slices.

    Returns:
        The patients by name, and the SHA-256 of all slices, which is the one in a run's run.json.

    Raises:
        InputError: for files that cannot be trained on.
        UsageError: where nobody has a label.
    """
    table, policy = configs.label_table(config.data), configs.grid_policy(config)
    slices_of: dict[Pair, Slices] = {}
    load_slices = SliceCache(cache)

    def load(pair: Pair, table: LabelTable, policy: GridPolicy, intensity: Intensity) -> Slices:
        slices_of[pair] = load_slices(pair, table, policy, intensity)
        return slices_of[pair]

    cohort = load_cohort(pairs, config.data, table, policy, configs.intensity(config), load)
    patients = []
    for name in sorted({pair.who for pair in pairs}):
        own = tuple(pair for pair in pairs if pair.who == name)
        cases = tuple(_case(slices_of[pair], *grid_of(pair.image), policy) for pair in own)
        patients.append(Patient(own, cases))
    return patients, cohort.digest


def split_patients(count: int, few: int, tested: int | None, seed: int) -> Split:
    """Draw the patients to test on; the others are the pool that training patients come from.

    Args:
        count: patients in all.
        few: training patients of one segmenter.
        tested: patients to test on; None: a third of them, `MOST_TESTED` at most.
        seed: of the draw.

    Raises:
        UsageError: where there are too few patients for that.
    """
    most = max(1, min(MOST_TESTED, count // TEST_SHARE)) if tested is None else tested
    if few < LEAST_PATIENTS or most < 1 or few + most > count:
        raise UsageError(
            f"{few} patients to train on and {most} to test on were asked of {count}",
            expected=f"at least {LEAST_PATIENTS} to train on, 1 to test on, and no patient in both",
            remedy="lower --patients or --test-patients, or add patients",
        )
    order = [int(n) for n in np.random.default_rng([seed, 1]).permutation(count)]
    return Split(tuple(sorted(order[:most])), tuple(sorted(order[most:])))


def _case(slices: Slices, geometry: Geometry, shape: tuple[int, ...], policy: GridPolicy) -> Case:
    axis, rows, columns = axial_axes(geometry)
    spacing = [geometry.spacing[2 - n] for n in (axis, rows, columns)]
    if policy.pixel_spacing is not None:
        spacing[1:] = policy.pixel_spacing
    else:
        extents = (shape[rows], shape[columns])
        for n, (extent, side) in enumerate(zip(extents, policy.canvas, strict=True), 1):
            spacing[n] *= extent / side
    up = slice(None, None, 1 if geometry.direction[2, 2 - axis] > 0 else -1)
    middle = slices.labels.shape[1] // 2
    return Case(slices.image[up], slices.labels[up, middle], (spacing[0], spacing[1], spacing[2]))
