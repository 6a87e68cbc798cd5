"""The comparison is validated: it finds the gain of more patients, none of copies or of noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.core.manifest import Intensity
from train.usefulness.arms import ALL_REAL, ARMS, REAL, SYNTHETIC, Arm, Sources
from train.usefulness.cohort import Case
from train.usefulness.experiment import Experiment, Results, run
from train.usefulness.report import verdict
from train.usefulness.segmenter import Schedule
from train.usefulness.statistics import Interval, difference

GREYS = Intensity("a.u.", 0, 1000)
TEST, POOL, SEEDS = range(10), range(10, 34), range(4)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small are slower on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def toy_case(number: int) -> Case:
    """Slices of a disc, the organ, beside a square that is none; each slice has its own greys."""
    rng = np.random.default_rng([7, number])
    labels, image = np.zeros((6, 32, 32), np.uint8), np.zeros((6, 32, 32))
    rows, columns = np.ogrid[:32, :32]
    for k in range(len(labels)):
        row, column = rng.uniform(9, 23, 2)
        labels[k] = (rows - row) ** 2 + (columns - column) ** 2 < rng.uniform(4, 8) ** 2
        top, left = rng.integers(0, 22, 2)
        image[k, top : top + 10, left : left + 10] = _contrast(rng)
        image[k][labels[k] == 1] = _contrast(rng)
    image += 500 + rng.normal(0, 30, labels.shape)
    return Case(np.clip(image, 0, 1000).astype(np.int16), labels)


def _contrast(rng: np.random.Generator) -> float:
    return float(rng.choice((-1, 1)) * rng.uniform(80, 350))


def noise_cases(sources: Sources) -> Sequence[Case]:
    """The training patients' masks, and noise for images."""
    rng = np.random.default_rng(sources.seed)
    masks = [*sources.few] * 3
    images = [rng.integers(0, 1000, case.image.shape).astype(np.int16) for case in masks]
    noise = [replace(case, image=image) for case, image in zip(masks, images, strict=True)]
    return [*sources.few, *noise]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Results]:
    """Four seeds, two training patients each, ten test patients: few and all real ones compared."""
    split = np.random.default_rng(1)
    few = {seed: tuple(split.choice(POOL, 2, replace=False).tolist()) for seed in SEEDS}
    cases = {number: [toy_case(number)] for number in (*TEST, *POOL)}
    features = (8, 8, 16, 16, 32, 8)
    schedule = Schedule(steps=220, batch_size=8, learning_rate=4e-3, features=features)
    experiment = Experiment(cases, TEST, POOL, few, 2, GREYS, schedule)
    results = Results(tmp_path_factory.mktemp("proof"))
    run(experiment, {name: ARMS[name] for name in (REAL, ALL_REAL)}, results, quiet=True)
    return experiment, results


def verdict_of(compared: tuple[Experiment, Results], arm: Arm) -> tuple[Interval, str]:
    """The gain and the verdict with `arm` in the place of the synthetic images."""
    experiment, results = compared
    run(experiment, {arm.title: arm}, results, quiet=True)
    names = {REAL: REAL, ALL_REAL: ALL_REAL, SYNTHETIC: arm.title}
    scores = {name: results.of(key, SEEDS, TEST) for name, key in names.items()}
    gain = difference(scores[SYNTHETIC], scores[REAL], "dice")
    assert gain is not None
    return gain, verdict(scores)


@pytest.mark.slow
def test_more_real_patients_help(compared: tuple[Experiment, Results]) -> None:
    gain, text = verdict_of(compared, Arm("more", lambda s: [*s.few, *s.everyone[:16]]))
    assert gain.low > 0 and "worth it" in text, (gain, text)


@pytest.mark.slow
def test_copied_images_make_no_difference(compared: tuple[Experiment, Results]) -> None:
    gain, text = verdict_of(compared, Arm("copies", lambda s: [*s.few] * 4))
    assert gain.low <= 0 <= gain.high and text.startswith("No difference seen"), (gain, text)


@pytest.mark.slow
def test_noise_images_never_help(compared: tuple[Experiment, Results]) -> None:
    gain, text = verdict_of(compared, Arm("noise", noise_cases))
    assert gain.mean < 0 and "worth it" not in text and "concluded" not in text, (gain, text)


@pytest.mark.slow
def test_untrained_segmenters_are_noticed(
    compared: tuple[Experiment, Results],
    tmp_path: Path,
) -> None:
    experiment = replace(compared[0], schedule=replace(compared[0].schedule, steps=3))
    results = Results(tmp_path)
    run(experiment, {name: ARMS[name] for name in (REAL, ALL_REAL)}, results, quiet=True)
    text = verdict_of((experiment, results), Arm("copies", lambda s: [*s.few] * 4))[1]
    assert text.startswith("Nothing can be concluded"), text
