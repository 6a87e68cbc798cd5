"""Style: what it means, that the network uses it, and that it reaches the synthesized file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import export_run, image, train_small

from export.graph import LabelsToIntensity
from export.parity import LIMITS, compare, draw_inputs, random_labels, reference, run_engine
from runtime import Synthesizer
from runtime.core.errors import UsageError
from runtime.core.manifest import Intensity, Manifest
from runtime.engines.cpu.onnxruntime import OnnxEngine
from train.checkpoint import load_generator, load_run
from train.data.dataset import Slices, to_unit
from train.networks.blocks import ARCHITECTURES
from train.networks.generator import Generator
from train.networks.style import (
    STYLE_JITTER,
    Styles,
    organ_medians,
    outlines,
    patient_styles,
    shift_intensity,
    warp_outline,
)


def patients(medians: np.ndarray) -> list[Slices]:
    """One slice a patient: label v holds `medians`[patient, v - 1]."""
    labels = np.arange(medians.shape[1] + 1, dtype=np.uint8).repeat(64).reshape(1, 1, -1, 64)
    return [
        Slices(labels, np.append(0, row).astype(np.int16).repeat(64).reshape(1, -1, 64))
        for row in medians
    ]


def test_style_medians_come_from_middle_slice() -> None:
    """Medians are of the middle slice, and unknown where an organ is absent."""
    labels = np.zeros((2, 3, 16, 16), np.uint8)
    labels[:, 0] = 2  # a neighbour
    labels[:, 1, :8] = 1
    values = np.arange(512).reshape(2, 16, 16).astype(np.int16)
    (row,) = organ_medians([Slices(labels, values)], 3)
    assert row[0] == np.median(values[:, :8]) and np.isnan(row[1])


def test_styles_are_unit_variance_principal_components() -> None:
    """Styles are the principal components of the cohort, with unit variance."""
    rng = np.random.default_rng(0)
    timing, dose = rng.standard_normal((2, 40))
    medians = 400 + np.outer(timing, [40, 40, 30, 5]) + np.outer(dose, [0, 3, -8, 20])
    styles, effects = patient_styles(medians, 2)
    assert styles.shape == (40, 2) and styles.dtype == np.float32
    assert np.allclose(styles.mean(0), 0, atol=1e-5) and np.allclose(
        np.cov(styles.T, bias=True), np.eye(2), atol=1e-4
    )
    assert (
        abs(np.corrcoef(styles[:, 0], timing)[0, 1]) > 0.95
        and abs(np.corrcoef(styles[:, 1], dose)[0, 1]) > 0.95
    )
    assert np.allclose(
        medians.mean(0) + styles @ effects, medians, atol=0.01
    )  # two factors, two components
    lost = medians.copy()
    lost[3] = np.nan
    assert np.allclose(
        patient_styles(lost, 2)[0][3], 0, atol=1e-5
    )  # nothing known: the mean patient


def test_style_draw_exceeds_cohort_by_spread() -> None:
    """A drawn style reaches as far beyond the cohort as the spread says."""
    medians = np.random.default_rng(0).normal((400, 300, 100), (60, 40, 5), (40, 3))
    (styles, effects), (wide, reach) = (patient_styles(medians, 3, spread) for spread in (1, 1.5))
    assert np.allclose(wide, styles / 1.5, atol=1e-5) and np.allclose(
        wide @ reach, styles @ effects, atol=0.01
    )  # patients are who they were
    drawn = np.random.default_rng(1).standard_normal((20000, 3)) @ reach
    assert np.allclose(drawn.std(0), 1.5 * medians.std(0), rtol=0.03)


def test_excess_style_dimensions_are_refused() -> None:
    """More styles than the patients differ in are refused, with the possible number."""
    medians = np.outer([1.0, 2, 4], [10, 20, 30])
    with pytest.raises(UsageError, match=r"generator\.style is 2.*in 1 dimension") as caught:
        patient_styles(medians, 2)
    assert "generator.style=1" in caught.value.remedy
    with pytest.raises(UsageError, match=r"in 0 dimension"):
        patient_styles(np.full((3, 2), 7.0), 1)


UNIT = Intensity("HU", -1024, 1024)


def test_slice_style_near_patient_and_seeded() -> None:
    """A slice's style is near its patient's and depends on seed and step alone."""
    medians = np.array([[100.0], [200], [600]])
    styles, own = Styles(patients(medians), 2, 1, 3, UNIT), patient_styles(medians, 1)[0][:, 0]
    many = np.concatenate([styles(np.arange(3), n)[0] for n in range(2000)]).reshape(2000, 3)
    assert np.allclose(many.mean(0), own * np.sqrt(1 - STYLE_JITTER**2), atol=0.05) and np.allclose(
        many.std(0), STYLE_JITTER, rtol=0.1
    )
    assert abs(many.std() - 1) < 0.03
    again, other = (
        Styles(patients(medians), 2, 1, seed, UNIT)(np.arange(3), 5)[0] for seed in (3, 4)
    )
    assert np.array_equal(styles(np.arange(3), 5)[0], again) and not np.array_equal(again, other)


def test_style_shifts_organ_and_keeps_background() -> None:
    """An organ moves to the value that its slice's style states; the background stays."""
    medians = np.array([[100.0, 50], [200, 60], [600, 100]])
    cohort = patients(medians)
    styles, (shifts, _, _) = Styles(cohort, 3, 1, 3, UNIT)(np.arange(3), 0)
    image = torch.from_numpy(np.stack([to_unit(p.image, UNIT) for p in cohort]))
    labels = torch.from_numpy(np.concatenate([p.labels for p in cohort]))
    moved = shift_intensity(image, labels, torch.from_numpy(shifts)).numpy() * 2048 - 1024
    said = medians.mean(0) + styles @ patient_styles(medians, 1)[1]
    for index in (1, 2):
        assert np.allclose(
            moved[labels.numpy() == index].reshape(3, -1)[:, 0], said[:, index - 1], atol=0.5
        )  # HU
    assert np.allclose(moved[labels.numpy() == 0], 0, atol=0.01)


def builds(wide: Sequence[int], hu: int = 400) -> list[Slices]:
    """Bodies of so many columns to the left of a label, 30 to its right, 20 rows before and
    behind it.
    """
    labels = np.zeros((4, 1, 96, 160), np.uint8)
    labels[1:, :, 43:53, 75:85] = 1
    cohort = []
    for left in wide:
        image = np.full((4, 96, 160), -1000, np.int16)
        image[:, 28:68, 80 - left : 110] = 40
        image[labels[:, 0] == 1] = hu
        cohort.append(Slices(labels, image))
    return cohort


def test_style_outline_measures_body_beyond_labels() -> None:
    """An outline is the distance that the body reaches from the labels."""
    empty = Slices(np.zeros((2, 1, 96, 160), np.uint8), np.zeros((2, 96, 160), np.int16))
    logs, centres = outlines([*builds([40, 50]), empty])
    found = np.exp(logs[:2])
    assert (
        np.allclose(
            found[:, [6, 0, 9, 3]], [[39.5, 29.5, 19.5, 19.5], [49.5, 29.5, 19.5, 19.5]], atol=1
        )
        and np.isnan(logs[2]).all()
    )
    assert np.allclose(
        found[:, 1] * np.sin(np.pi / 6), 29.5 * np.tan(np.pi / 6), atol=1
    )  # 30 degrees down to the right, where the body ends at the right
    assert np.allclose(centres[0], [0, 0], atol=0.01)


def test_style_outline_warps_surroundings_not_labels() -> None:
    """The surroundings are warped to the outline that the style states; the labels stay."""
    cohort = builds([36, 40, 50])  # nothing else differs
    styles, edits = Styles(cohort, 2, 1, 3, UNIT)(np.arange(0, 12, 4), 0)
    image = torch.from_numpy(np.stack([to_unit(p.image[:1], UNIT) for p in cohort]))
    labels = torch.from_numpy(np.stack([p.labels[1] for p in cohort]))
    away, factors, centres = (
        torch.from_numpy(array) for array in (edits.shifts, edits.warp_outline, edits.centres)
    )
    assert away.abs().max() * 2048 < 0.5
    moved = warp_outline(image, labels, factors, centres)
    inside = labels[:, 0] == 1
    torch.testing.assert_close(moved[:, 0][inside], image[:, 0][inside], atol=1e-4, rtol=0)
    said = outlines(cohort)[0].mean(0) + styles @ patient_styles(outlines(cohort)[0], 1)[1]
    hu = (moved[:, 0] * 2048 - 1024).numpy().astype(np.int16)
    found = outlines(
        [Slices(label[None], plane[None]) for label, plane in zip(labels.numpy(), hu, strict=True)]
    )[0]
    assert np.allclose(np.exp(found), np.exp(said), atol=1.5)  # pixels


def test_style_without_body_has_organs_alone() -> None:
    cohort, greys = builds([36, 40, 50], hu=0) + builds([40], hu=90), Intensity("a.u.", 0, 1000)
    assert not Styles(cohort, 2, 1, 3, greys)(np.arange(3), 0)[1].warp_outline.any()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_missing_style_is_zero_per_sample(kind: str) -> None:
    """No style is the style zero, and each sample has its own."""
    torch.manual_seed(0)
    net = Generator(8, kind=kind, filters=8, depth=3, skips=True, style=3).eval()
    condition, zero = torch.rand(1, 8, 16, 16).repeat(3, 1, 1, 1), torch.zeros(3, 3)
    plain, styled = net(condition)[1], net(condition, style=torch.randn(3, 3))[1]
    assert torch.equal(plain, styled)  # before training it says nothing
    for name, parameter in net.named_parameters():
        if "modulation" in name or "contrast" in name:
            torch.nn.init.normal_(parameter)
    assert torch.equal(net(condition)[1], net(condition, style=zero)[1])
    _, generated = net(condition, style=torch.tensor([[1.0, 0, 0], [-1, 0, 0], [1, 0, 0]]))
    torch.testing.assert_close(generated[0], generated[2])
    assert (generated[0] - generated[1]).abs().max() > 0.01


@pytest.fixture(scope="module")
def styled(cohort: Path, command, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run folder, model folder) of a small edge network with a style of 2 numbers, 30 steps."""
    folder = tmp_path_factory.mktemp("styled")
    settings = [
        "training.steps=30",
        "generator.kind=edge",
        "generator.depth=4",
        "generator.style=2",
        "training.ema_decay=0.5",
        "training.threads=1",
    ]
    run = train_small(command, cohort, folder / "run", *settings)
    return run, export_run(command, run, folder / "model")


@pytest.mark.slow
def test_training_uses_the_style(styled: tuple[Path, Path]) -> None:
    net = load_generator(styled[0])
    assert json.loads((styled[0] / "run.json").read_text())["style"] == 2 == net.style
    weights = [
        parameter
        for name, parameter in net.named_parameters()
        if "modulation" in name or "contrast" in name
    ]
    assert len(weights) == 5 and all(w.abs().max() > 0 for w in weights)


@pytest.mark.slow
def test_exported_graph_takes_random_styles(
    styled: tuple[Path, Path],
) -> None:
    """The exported graph takes a style and is validated with random ones."""
    run, manifest = load_run(styled[0]), Manifest.load(styled[1])
    assert manifest.style == 2 and [t.name for t in manifest.inputs] == ["labels", "style", "noise"]
    engine = OnnxEngine(styled[1] / "model.onnx", manifest)
    graph = LabelsToIntensity(load_generator(styled[0]), len(run.labels), run.intensity)
    with torch.no_grad():
        graph.generator.top.modulation.factors.weight.add_(
            0.5
        )  # a graph that read its style otherwise would be found out
    truth = reference(
        graph, draw_inputs(manifest.inputs, random_labels(4, manifest.grid.slices, (64, 64), 8))
    )
    assert (
        compare(truth, run_engine(engine, truth.inputs)[0], manifest)["max"] > LIMITS["fp32"]["max"]
    )
    for numbers in manifest.parity["model.onnx"]["onnx"].values():
        assert not isinstance(numbers, dict) or numbers["max"] <= LIMITS["fp32"]["max"]


@pytest.mark.slow
def test_style_variants_differ_and_repeat_exactly(
    styled: tuple[Path, Path],
) -> None:
    """Variants of one mask differ, and the same variant has the same bytes."""
    import SimpleITK as sitk

    values = np.zeros((3, 40, 40), np.uint16)
    values[:, 10:30, 10:30] = 500
    mask = image(values, spacing=(6.0, 6.0, 5.0))
    with Synthesizer.open(styled[1]) as synth:
        one, again, other = (
            sitk.GetArrayFromImage(synth(mask, seed=1, variant=v)) for v in (0, 0, 1)
        )
    assert np.array_equal(one, again) and not np.array_equal(one, other)
