"""Paired differences between two arms, with intervals over patients and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
RESAMPLES = 4000
# Of one arm: (seed, patient) to lists by label.
Scores = Mapping[tuple[int, int], Mapping[str, Any]]


@dataclass(frozen=True)
class Interval:
    """A mean difference, the ends of its interval, and the mean of each seed."""

    mean: float
    low: float
    high: float
    by_seed: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Numbers of four decimals."""
        numbers = {"mean": self.mean, "low": self.low, "high": self.high}
        rounded = {name: round(value, 4) for name, value in numbers.items()}
        return {**rounded, "by_seed": [round(value, 4) for value in self.by_seed]}


def interval(differences: NDArray[np.float64], seed: int = 0) -> Interval:
    """Bootstrap interval of a mean difference, over seeds and patients at once.

    Rows and columns are resampled independently (Owen, The pigeonhole bootstrap, Annals of Applied
    Statistics 1(2), 2007). Few units resampled claim too much: three seeds that agree by chance,
    as one time in four, would exclude 0. So the deviations of seeds and of patients are widened
    first, as Student's t is wider than the normal distribution.

    Args:
        differences: (seeds, patients), every one of them present. One seed tells nothing of the
            spread between seeds.
        seed: of the resampling.
    """
    mean, by_seed = float(differences.mean()), differences.mean(1)
    of_seeds, of_patients = by_seed - mean, differences.mean(0) - mean
    rest = differences - mean - of_seeds[:, None] - of_patients
    rows, columns = differences.shape
    free = max(rows - 1, 1) * max(columns - 1, 1)
    widened = mean + rest * np.sqrt(differences.size / free)
    widened = widened + (_widening(of_seeds, rest) * of_seeds)[:, None]
    widened = widened + _widening(of_patients, rest) * of_patients
    rng = np.random.default_rng(seed)
    of_rows, of_columns = (_weights(rng, count) for count in (rows, columns))
    means = np.einsum("br,rc,bc->b", of_rows, widened, of_columns)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(mean, float(low), float(high), tuple(by_seed.tolist()))


def _weights(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """How often each of `count` units is drawn, as a share, (RESAMPLES, count)."""
    return rng.multinomial(count, np.full(count, 1 / count), RESAMPLES) / count


def _widening(deviations: NDArray[np.float64], rest: NDArray[np.float64]) -> float:
    """What the deviations of seeds, or of patients, are multiplied with before they are resampled.

    A part of them is chance that `rest`, which is resampled as well, accounts for: the analysis of
    variance says how much. What is left is widened as Student's t is, for these are few units.

    Args:
        deviations: from the mean, of each seed or each patient.
        rest: (seeds, patients), what neither explains.
    """
    count, others = len(deviations), rest.size // len(deviations)
    own = others * float((deviations**2).sum())
    if count < 2 or own == 0:
        return 1.0
    chance = float((rest**2).sum()) / max(others - 1, 1)
    quantile = (1 + LEVEL) / 2
    student = float(stats.t.ppf(quantile, count - 1) / stats.norm.ppf(quantile))
    return float(np.sqrt(max(1 - chance / own, 0) * count / (count - 1))) * student


def table_of(scores: Scores, measure: str, label: int | None = None) -> NDArray[np.float64]:
    """One arm's values (seeds, patients); NaN where a patient has none of the labels.

    Args:
        scores: of every seed and patient.
        measure: "dice" or "surface_dice".
        label: index of a label; None: the mean over those that the patient has.
    """
    seeds, patients = (sorted({key[n] for key in scores}) for n in (0, 1))

    def value(row: Mapping[str, Any]) -> float:
        values = row[measure] if label is None else [row[measure][label - 1]]
        present = [v for v in values if v is not None]
        return float(np.mean(present)) if present else np.nan

    return np.array([[value(scores[seed, patient]) for patient in patients] for seed in seeds])


def difference(
    one: Scores,
    other: Scores,
    measure: str,
    label: int | None = None,
    *,
    these_seeds: bool = False,
) -> Interval | None:
    """`one` minus `other`, paired by seed and patient; None where they share no whole seed.

    Args:
        one: scores of an arm.
        other: scores of another.
        measure: "dice" or "surface_dice".
        label: index of a label; None: the mean over those that a patient has.
        these_seeds: an interval over patients alone: what holds for the segmenters at hand.
    """
    shared = one.keys() & other.keys()
    seeds = {seed for seed, _ in shared}
    patients = {patient for _, patient in shared}
    complete = {seed for seed in seeds if all((seed, patient) in shared for patient in patients)}
    keys = [key for key in shared if key[0] in complete]
    if not keys:
        return None
    first = table_of({key: one[key] for key in keys}, measure, label)
    differences = first - table_of({key: other[key] for key in keys}, measure, label)
    differences = differences[:, ~np.isnan(differences).any(0)]
    if these_seeds:
        differences = differences.mean(0, keepdims=True)
    return interval(differences) if differences.size else None
