"""Usefulness: the arms' images, intervals, verdicts; a comparison that was killed goes on."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from samples import train_small
from scipy.ndimage import binary_erosion

from runtime.core.deformation import DeformationParams, MaskDeformer, move_labels
from runtime.core.errors import UsageError
from runtime.core.layout import dense_volume
from runtime.core.manifest import Intensity
from runtime.core.volume import LabelVolume
from train.checkpoint import load_run
from train.config import DataConfig, RunConfig, resolve
from train.data.dataset import assign
from train.data.layouts import find
from train.usefulness import statistics
from train.usefulness.__main__ import duration
from train.usefulness.arms import ALL_REAL, ARMS, REAL, SYNTHETIC, TABLE, WARP_JITTER, Arm, Sources
from train.usefulness.cohort import Case, read_patients, split_patients
from train.usefulness.comparison import LEAST_STEPS, MOST_STEPS, _affordable_steps
from train.usefulness.experiment import RESULTS, Experiment, Results, require_plan, run
from train.usefulness.generator import open_generator, train_generator
from train.usefulness.report import draw, summarise, text_table, verdict
from train.usefulness.segmenter import Schedule, agreement
from train.usefulness.statistics import Scores, difference, interval

GREYS = Intensity("a.u.", 0, 1000)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small are slower on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ball(seed: int = 0, shape: tuple[int, int, int] = (6, 32, 32)) -> Case:
    """A bright ball (1) in a dark body, with noise."""
    d, h, w = np.ogrid[: shape[0], : shape[1], : shape[2]]
    labels = ((d - 3) ** 2 * 4 + (h - 15) ** 2 + (w - 17) ** 2 < 60).astype(np.uint8)
    noise = np.random.default_rng(seed).normal(0, 20, shape)
    return Case(
        np.rint(np.where(labels, 700, 300) + noise).astype(np.int16),
        labels,
        (2.0, 1.0, 1.0),
    )


def sources(count: int = 2) -> Sources:
    """Two training patients, and a generator that gives every voxel the number of its variant."""
    few = [ball(seed) for seed in range(count)]

    def generate(mask: LabelVolume, seed: int, variant: int) -> NDArray[np.int16]:
        return np.full(mask.labels.shape, variant, np.int16)

    return Sources(few, [*few, ball(9)], GREYS, 5, 3, generate)


def made_scores(
    gain: float,
    spread: float = 0.02,
    seeds: int = 3,
    patients: int = 12,
    seed: int = 0,
) -> Scores:
    """Dice of about 0.7 + `gain`, the same for every label."""
    rng = np.random.default_rng(seed)
    rows = {}
    for repetition in range(seeds):
        for patient in range(patients):
            value = 0.7 + gain + rng.normal(0, spread)
            rows[repetition, patient] = {"dice": [value, value], "surface_dice": [value, None]}
    return rows


@pytest.mark.parametrize("name", ARMS)
def test_arms_give_labelled_images(name: str) -> None:
    given = sources()
    cases = ARMS[name].build(given)
    made = 2 * 3
    count = {REAL: 2, ALL_REAL: 3, "synthetic": made, "real+both": 2 + 2 * made}.get(name, 2 + made)
    assert len(cases) == count
    for case in cases:
        assert case.image.dtype == np.int16 and case.labels.dtype == np.uint8
        assert case.image.shape == case.labels.shape and case.labels.any()
        assert case.spacing == (2.0, 1.0, 1.0)


def test_synthetic_masks_are_the_warps() -> None:
    synthetic = ARMS["synthetic"].build(sources())
    warped = ARMS["real+warp"].build(sources())[2:]
    assert [case.image.max() for case in synthetic] == [1, 2, 3, 1, 2, 3]
    for one, other in zip(synthetic, warped, strict=True):
        assert np.array_equal(one.labels, other.labels)
    assert not np.array_equal(synthetic[0].labels, ball().labels)


def test_layout_moves_with_the_mask() -> None:
    """A generator with a context sees the patient's tissues under the field of the mask."""

    def stripes(case: Case) -> NDArray[np.uint8]:
        return np.broadcast_to(2 + np.arange(32, dtype=np.uint8) // 4, case.labels.shape).copy()

    def dense_map(mask: LabelVolume, seed: int, variant: int) -> NDArray[np.int16]:
        return mask.labels.astype(np.int16)

    given = replace(sources(1), generate=dense_map, tissues=stripes)
    deformer = MaskDeformer(ball().mask, DeformationParams(), given.seed)
    for number, case in enumerate(ARMS["synthetic"].build(given), 1):
        _, field = deformer.deformed(number)
        assert field is not None and (case.image > 0).all()
        moved = move_labels(stripes(ball()), field)
        assert not np.array_equal(moved, stripes(ball()))
        assert np.array_equal(case.image, np.where(case.labels, case.labels, moved))


@pytest.mark.parametrize("name", ["real+warp", TABLE])
def test_moved_images_follow_their_labels(name: str) -> None:
    for case in ARMS[name].build(sources())[2:]:
        inside, outside = (np.median(case.image[case.labels == label]) for label in (1, 0))
        assert abs(inside - 700) < 30 and abs(outside - 300) < 30


def test_class_table_knows_medians_alone() -> None:
    table, warped = ARMS[TABLE].build(sources())[2], ARMS["real+warp"].build(sources())[2]
    inside = binary_erosion(warped.labels, np.ones((1, 7, 7)))  # far from the blurred edge
    correlation = np.corrcoef(table.image[inside], warped.image[inside])[0, 1]
    assert inside.sum() > 50 and abs(correlation) < 0.5


@pytest.mark.parametrize("of_seeds", [0.0, 0.02])
def test_interval_holds_true_gain(of_seeds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """About nineteen of twenty times, with three seeds, whether seeds differ or not."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        seeds, patients = rng.normal(0, of_seeds, (3, 1)), rng.normal(0, 0.02, (1, 12))
        value = interval(0.01 + seeds + patients + rng.normal(0, 0.02, (3, 12)), trial)
        covered += value.low <= 0.01 <= value.high
    assert 0.91 * 300 < covered < 0.99 * 300


def test_interval_narrows_with_patients() -> None:
    rng = np.random.default_rng(1)
    widths = [np.ptp([(v := interval(rng.normal(0, 0.1, (4, n)))).low, v.high]) for n in (5, 80)]
    assert widths[1] < widths[0] / 2


def test_dice_differences_are_paired() -> None:
    rng = np.random.default_rng(2)
    hard = {key: rng.uniform(0, 0.6) for key in made_scores(0)}  # patients differ more than arms
    one = {key: {"dice": [value + 0.02], "surface_dice": [None]} for key, value in hard.items()}
    other = {key: {"dice": [value], "surface_dice": [None]} for key, value in hard.items()}
    gain = difference(one, other, "dice")
    assert gain is not None and np.allclose([gain.mean, gain.low, gain.high], 0.02)
    assert difference(one, other, "surface_dice") is None


def test_unfinished_seeds_do_not_count() -> None:
    one, other = made_scores(0.1, seeds=3), made_scores(0, seeds=2)
    gain = difference(one, other, "dice")
    assert gain is not None and len(gain.by_seed) == 2


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        (0.05, "worth it"),
        (-0.05, "leave them out"),
        (0.0, r"No difference seen \([+-]0.0\d\d Dice\); -0.0\d\d to \+0.0\d\d could have been"),
    ],
)
def test_verdict_states_gain_or_no_difference(gain: float, expected: str) -> None:
    scores = {
        REAL: made_scores(0),
        SYNTHETIC: made_scores(gain, seed=1),
        ALL_REAL: made_scores(0.1, seed=2),
    }
    assert re.search(expected, verdict(scores))


def test_undertrained_segmenters_conclude_nothing() -> None:
    scores = {
        REAL: made_scores(0),
        SYNTHETIC: made_scores(0.05, seed=1),
        ALL_REAL: made_scores(-0.05, seed=2),
    }
    assert verdict(scores).startswith("Nothing can be concluded") and "undertrained" in verdict(
        scores,
    )


def test_warp_that_does_better_is_named() -> None:
    scores = {
        REAL: made_scores(0),
        SYNTHETIC: made_scores(0.05, seed=1),
        WARP_JITTER: made_scores(0.08, seed=3),
    }
    scores[ALL_REAL] = made_scores(0.1, seed=2)
    assert "without a network, adds" in verdict(scores)


def test_verdict_mentions_one_seed() -> None:
    arms = {REAL: 0.0, SYNTHETIC: 0.1, ALL_REAL: 0.2}
    assert "one seed alone" in verdict(
        {name: made_scores(gain, seeds=1) for name, gain in arms.items()},
    )


def test_agreement_counts_voxels_and_surfaces() -> None:
    case = ball()
    assert agreement(case.labels, case, 2, 2.0) == {"dice": [1.0], "surface_dice": [1.0]}
    moved = agreement(np.roll(case.labels, 1, 1), case, 2, 2.0)
    assert moved["surface_dice"] == [1.0]
    assert moved["dice"][0] is not None and 0.7 < moved["dice"][0] < 1
    assert agreement(np.zeros_like(case.labels), case, 2, 2.0) == {
        "dice": [0.0],
        "surface_dice": [0.0],
    }
    absent = Case(case.image, np.zeros_like(case.labels))
    assert agreement(case.labels, absent, 2, 2.0) == {"dice": [None], "surface_dice": [None]}


def test_usefulness_patients_train_or_test() -> None:
    split = split_patients(30, 4, None, 3)
    assert len(split.test) == 10 and not set(split.test) & set(split.pool)
    assert {*split.test, *split.pool} == {*range(30)}
    few = [split.few(4, seed) for seed in range(3)]
    assert all(len(set(numbers)) == 4 and set(numbers) <= set(split.pool) for numbers in few)
    assert len(set(few)) == 3 and few[1] == split_patients(30, 4, None, 3).few(4, 1)


@pytest.mark.parametrize(
    ("count", "few", "tested"),
    [(3, 4, None), (10, 2, 2), (10, 4, 7), (10, 4, 0)],
)
def test_too_few_patients_are_refused(count: int, few: int, tested: int | None) -> None:
    with pytest.raises(UsageError, match="patients to train on"):
        split_patients(count, few, tested, 0)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30min", 1800), ("1.5h", 5400)])
def test_budget_text_is_parsed_as_time(text: str, seconds: float) -> None:
    assert duration(text) == seconds


def small_experiment(seeds: int) -> tuple[Experiment, dict[str, Arm], list[str]]:
    """Two arms of one-step segmenters, and a list that notes which of them was trained."""
    built: list[str] = []

    def noting(name: str) -> Arm:
        def build(given: Sources) -> Sequence[Case]:
            built.append(f"{name} {given.seed}")
            return given.few

        return Arm(name, build)

    cases = {n: [ball(n, (2, 16, 32))] for n in range(4)}
    schedule = Schedule(steps=1, batch_size=2, features=(4, 4, 4, 4, 4, 4))
    experiment = Experiment(
        cases,
        (0, 1),
        (2, 3),
        dict.fromkeys(range(seeds), (2,)),
        2,
        GREYS,
        schedule,
    )
    return experiment, {name: noting(name) for name in (REAL, SYNTHETIC)}, built


def test_budget_decides_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    experiment, _, _ = small_experiment(1)
    assert _affordable_steps(-1, experiment, 8, quiet=False) == LEAST_STEPS
    assert "more than the budget" in capsys.readouterr().err
    assert _affordable_steps(1e6, experiment, 8, quiet=True) == MOST_STEPS
    assert not capsys.readouterr().err


def test_killed_comparison_resumes(tmp_path: Path) -> None:
    experiment, arms, built = small_experiment(1)
    run(experiment, arms, Results(tmp_path), quiet=True)
    whole = (tmp_path / RESULTS).read_bytes()
    assert built == [f"{REAL} 0", f"{SYNTHETIC} 0"] and whole.count(b"\n") == 4
    (tmp_path / RESULTS).write_bytes(whole[:-20])  # as a power cut leaves it

    longer, arms, built = small_experiment(2)
    run(longer, arms, Results(tmp_path), quiet=True)
    assert built == [f"{SYNTHETIC} 0", f"{REAL} 1", f"{SYNTHETIC} 1"]
    results = Results(tmp_path)
    assert len(results.rows) == 8
    again = [json.loads(line) for line in whole.splitlines()]
    assert [results.rows[row["arm"], row["seed"], row["patient"]] for row in again] == again


def test_finished_comparison_trains_nothing(tmp_path: Path) -> None:
    experiment, arms, built = small_experiment(1)
    run(experiment, arms, Results(tmp_path), quiet=True)
    run(experiment, arms, Results(tmp_path), quiet=True)
    assert len(built) == 2


def test_other_comparison_plan_is_refused(tmp_path: Path) -> None:
    plan = {"data": "abc", "patients": 4, "steps": None}
    require_plan(tmp_path, plan)
    assert require_plan(tmp_path, {**plan, "steps": 300}) == {**plan, "steps": 300}
    with pytest.raises(UsageError, match="other values of patients"):
        require_plan(tmp_path, {**plan, "patients": 5})


def test_damaged_comparison_plan_is_named(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UsageError, match=r"plan\.json cannot be read"):
        require_plan(tmp_path, {"patients": 4})


def test_usefulness_report_has_every_arm(tmp_path: Path) -> None:
    experiment, arms, _ = small_experiment(1)
    results = Results(tmp_path)
    run(experiment, arms, results, quiet=True)
    summary = summarise(results, arms, [0], experiment.test, ["ball"])
    assert summary["arms"][SYNTHETIC]["minus_real"]["dice"]["mean"] == 0
    assert summary["arms"][REAL]["labels"]["ball"]["dice"] is not None
    table = text_table(summary, ["ball"]).splitlines()
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1
    draw(tmp_path / "plot.png", summary, "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


CONFIG = {
    "data": {"canvas": [64, 64], "pixel_spacing": [6, 6]},
    "generator": {"kind": "unet", "filters": 8, "depth": 4, "skips": True, "textures": 2},
    "discriminator": {"filters": 8, "patch_size": 16},
    "training": {
        "steps": 2,
        "batch_size": 4,
        "recalibrate": 1,
        "valid_slices": 8,
        "valid_every": 2,
        "checkpoint_every": 1,
    },
}


def config_of(cohort: Path, steps: int) -> RunConfig:
    """The small config on the cohort."""
    overrides = [f"training.steps={steps}", "data.labels=mm-whs"]
    return resolve(CONFIG, overrides, dataset_path=str(cohort))


@pytest.mark.slow
def test_command_trains_on_few_patients(cohort: Path, command, tmp_path: Path) -> None:
    """Of four phantom patients one is tested on, and no generator sees it."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    out = tmp_path / "out"
    line = [
        "-m",
        "train.usefulness",
        cohort,
        "--config",
        tmp_path / "config.json",
        "--patients",
        3,
        "--seeds",
        1,
        "--steps",
        2,
        "--output",
        out,
    ]
    done = command(*line)
    assert done.returncode == 0, done.stderr
    assert "was not checked" in done.stdout and "one seed alone" in done.stdout
    assert "segmenters 14/14" in done.stderr

    plan = json.loads((out / "plan.json").read_text())
    with open(out / "generators" / "seed-0-patients.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    everyone = sorted(cohort.glob("*_image.nii.gz"))
    tested = {everyone[n].name for n in plan["test_patients"]}
    assert [row["split"] for row in rows] == ["train", "train", "valid"]
    assert len(tested) == 1 and not tested & {Path(row["image"]).name for row in rows}

    result = json.loads((out / "usefulness.json").read_text())
    assert {*result["arms"]} == {*ARMS} - {ALL_REAL}
    names = re.compile(
        "|".join(re.escape(path.name.removesuffix("_image.nii.gz")) for path in everyone),
    )
    assert not names.search((out / RESULTS).read_text() + (out / "usefulness.json").read_text())

    before = (out / RESULTS).read_bytes()
    again = command(*line, "--quiet")
    assert again.returncode == 0 and again.stderr == "" and (out / RESULTS).read_bytes() == before
    other = command(*line, "--variants", 2)
    assert other.returncode == 2 and "other values of variants" in other.stderr


@pytest.mark.slow
def test_generator_is_planned_from_data(cohort: Path, command, tmp_path: Path) -> None:
    """Without a config, every class has an intensity of its own, and the plan stays."""
    out = tmp_path / "out"
    line = ["-m", "train.usefulness", cohort, "--patients", 3, "--seeds", 1, "--steps", 2]
    line += ["--arms", "real,synthetic", "--output", out]
    line += ["--set", "training.steps=2", "generator.filters=8", "training.valid_slices=4"]
    done = command(*line)
    assert done.returncode == 0, done.stderr
    planned = json.loads((out / "config.json").read_text())
    assert planned["data"]["context"] == "auto" and planned["generator"]["style"] == 1
    generate, tissues = open_generator(out / "generators" / "seed-0")
    assert tissues is not None
    case = read_patients(resolve(planned), find(cohort, DataConfig()).pairs[:1], tmp_path)[0][0]
    layout = tissues(case.cases[0])
    dense = dense_volume(case.cases[0].mask, layout)
    image = generate(dense, 0, 0)
    means = [image[layout == number].mean() for number in np.unique(layout[layout > 0])]
    assert len(means) > 3 and max(means) - min(means) > 500  # HU: gas and bone
    before = (out / RESULTS).read_bytes()
    again = command(*line, "--quiet")
    assert again.returncode == 0 and again.stderr == "" and (out / RESULTS).read_bytes() == before


@pytest.mark.slow
def test_killed_generator_training_resumes(cohort: Path, tmp_path: Path) -> None:
    config = config_of(cohort, 1)
    pairs = find(cohort, config.data).pairs
    patients, _ = read_patients(config, pairs, tmp_path / ".slices")
    folder = tmp_path / "seed-0"
    train_generator(config, patients, folder, quiet=True)
    (folder / "run.json").unlink()  # as if it had been killed after its first checkpoint
    train_generator(config_of(cohort, 2), patients, folder, quiet=True)
    assert load_run(folder).step == 2

    generate, _ = open_generator(folder)
    mask = patients[0].cases[0].mask
    image = generate(mask, 0, 1)
    assert image.shape == mask.labels.shape and np.array_equal(image, generate(mask, 0, 1))
    assert not np.array_equal(image, generate(mask, 0, 2))


@pytest.mark.slow
def test_run_is_tested_on_other_patients(cohort: Path, command, tmp_path: Path) -> None:
    """Two patients trained the run, one validated it: the fourth is tested on."""
    run_folder, out = tmp_path / "run", tmp_path / "out"
    train_small(command, cohort, run_folder, "data.train_ratio=0.5", "data.valid_ratio=0.25")
    line = ["-m", "train.usefulness", cohort, "--run", run_folder, "--steps", 2, "--seeds", 1]
    done = command(*line, "--output", out, "--arms", "real,synthetic")
    assert done.returncode == 0, done.stderr
    pairs = find(cohort, DataConfig()).pairs
    expected = assign(pairs, DataConfig(train_ratio=0.5, valid_ratio=0.25))["test"]
    assert json.loads((out / "plan.json").read_text())["test_patients"] == expected
    assert not (out / "generators").exists()


@pytest.mark.slow
def test_run_trained_on_everybody_refused(
    cohort: Path, trained: Path, command, tmp_path: Path
) -> None:
    done = command("-m", "train.usefulness", cohort, "--run", trained, "--output", tmp_path)
    assert done.returncode == 2 and "nobody is left to test on" in done.stderr
