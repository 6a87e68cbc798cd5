"""Every arm, seed and test patient once; a result is on the disk before the next one begins."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime.core.append_log import AppendLog
from runtime.core.atomic_files import write_json
from runtime.core.console import Progress
from runtime.core.errors import UsageError, reading
from runtime.core.manifest import Intensity

from .arms import Arm, Generate, Sources, Tissues
from .cohort import Case
from .segmenter import Schedule, agreement, segment, train_segmenter
from .statistics import Scores

RESULTS, PLAN = "results.jsonl", "plan.json"
MEASURES = ("dice", "surface_dice")


@dataclass(frozen=True)
class Experiment:
    """What is compared, and on whom.

    Attributes:
        cases: every patient's images, by the patient's number.
        test: numbers of the patients that are tested on.
        pool: numbers of all others.
        few: training patients of each seed, numbers of the pool.
        classes: labels of the model, the background included.
        intensity: unit and range of the images.
        schedule: of every segmenter.
        variants: images made of every training image.
        device: where segmenters are trained.
    """

    cases: Mapping[int, Sequence[Case]]
    test: Sequence[int]
    pool: Sequence[int]
    few: Mapping[int, Sequence[int]]
    classes: int
    intensity: Intensity
    schedule: Schedule
    variants: int = 3
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def tolerance(self) -> float:
        """mm within which two surfaces agree: the largest voxel spacing of the test images."""
        return max(max(case.spacing) for number in self.test for case in self.cases[number])

    def sources(
        self, seed: int, generate: Generate | None = None, tissues: Tissues | None = None
    ) -> Sources:
        """What the arms of one seed may use."""
        few = [case for number in self.few[seed] for case in self.cases[number]]
        everyone = [case for number in self.pool for case in self.cases[number]]
        return Sources(few, everyone, self.intensity, seed, self.variants, generate, tissues)


class Results:
    """results.jsonl: one line for each arm, seed and test patient. A torn line is passed over."""

    def __init__(self, folder: Path):
        self._log = AppendLog(folder / RESULTS, checksums=False)
        self.rows: dict[tuple[str, int, int], dict[str, Any]] = {}
        for row in self._log.read():
            if {"arm", "seed", "patient", *MEASURES} <= row.keys():
                self.rows[row["arm"], row["seed"], row["patient"]] = row

    def has(self, arm: str, seed: int, patients: Sequence[int]) -> bool:
        """Whether an arm and seed is finished."""
        return all((arm, seed, patient) in self.rows for patient in patients)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append a segmenter's lines; returns when they are on the disk. Raises `OutputError`."""
        self._log.add(*rows)
        self.rows.update({(row["arm"], row["seed"], row["patient"]): row for row in rows})

    def of(self, arm: str, seeds: Sequence[int], patients: Sequence[int]) -> Scores:
        """The results of one arm by (seed, patient)."""
        keys = [(seed, patient) for seed in seeds for patient in patients]
        rows = {(seed, patient): self.rows.get((arm, seed, patient)) for seed, patient in keys}
        return {key: row for key, row in rows.items() if row is not None}


def require_plan(folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Write plan.json, or compare it with the one of an earlier start; returns the folder's.

    Args:
        folder: of the comparison.
        plan: what all results depend on; a value of None takes what the folder's plan has.

    Raises:
        UsageError: where the folder holds a comparison of another plan.
    """
    path = folder / PLAN
    if not path.is_file():
        write_json(path, plan)
        return dict(plan)
    with reading(path, "the plan of a comparison, as it was written", UsageError):
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    stated = {name: value for name, value in plan.items() if value is not None}
    wanted = json.loads(json.dumps(stated))
    decided = {name: value for name, value in wanted.items() if stored.get(name) is None}
    other = sorted(name for name in wanted.keys() - decided if stored[name] != wanted[name])
    if other:
        raise UsageError(
            f"the folder holds a comparison with other values of {', '.join(other)}",
            expected="the values it was begun with, or a new folder",
            remedy="choose another --output, or give the same options to go on",
            file=path,
        )
    if decided:
        stored.update(decided)
        write_json(path, stored)
    return stored


def run(
    experiment: Experiment,
    arms: Mapping[str, Arm],
    results: Results,
    generator: Callable[[int], tuple[Generate, Tissues | None]] | None = None,
    *,
    quiet: bool = False,
) -> None:
    """Train and measure what `results` does not have yet: of every seed all arms, then of the next.

    Args:
        experiment: patients, seeds and the segmenter's schedule.
        arms: what is compared.
        results: takes every finished segmenter.
        generator: gives a seed's generator; only asked where an arm needs it.
        quiet: no progress.
    """
    steps = experiment.schedule.steps
    test = experiment.test
    everything = [(seed, name) for seed in experiment.few for name in arms]
    left = [(seed, name) for seed, name in everything if not results.has(name, seed, test)]
    line = Progress("segmenters", steps * len(left), unit="steps", quiet=quiet or not left)
    for number, (seed, name) in enumerate(left):
        arm, note = arms[name], f"seed {seed}: {arms[name].title}"
        opened = generator(seed) if generator is not None and arm.needs_generator else ()
        cases = arm.build(experiment.sources(seed, *opened))
        network = train_segmenter(
            cases,
            experiment.classes,
            experiment.intensity,
            experiment.schedule,
            seed,
            experiment.device,
            partial(_advance, line, number * steps, note),
        )
        head = {"arm": name, "seed": seed}
        results.add([{**head, **_measured(experiment, network, patient)} for patient in test])
    if left:
        line.close()


def _advance(line: Progress, before: int, note: str, step: int) -> None:
    line.update(before + step, note)


def _measured(experiment: Experiment, network: Any, patient: int) -> dict[str, Any]:
    """What a test patient's line states: of several images of one patient the mean."""
    per_case = [
        agreement(
            segment(network, case, experiment.intensity, experiment.device),
            case,
            experiment.classes,
            experiment.tolerance,
        )
        for case in experiment.cases[patient]
    ]
    row: dict[str, Any] = {"patient": patient}
    for measure in MEASURES:
        by_label = zip(*(values[measure] for values in per_case), strict=True)
        row[measure] = [_mean([v for v in values if v is not None]) for values in by_label]
    return row


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 5) if values else None
