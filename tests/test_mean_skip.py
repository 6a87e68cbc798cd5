"""The mean skip: training starts at the classes' means, contrast is met, the noise is bounded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

from export.graph import LabelsToIntensity, to_fp16
from export.parity import draw_inputs
from export.to_onnx import to_onnx
from runtime.core.context import UNKNOWN
from runtime.core.contrast import draw_contrast, parse_requests, requested_classes
from runtime.core.errors import ConfigError, UsageError
from runtime.core.manifest import GridPolicy, Intensity, Label, LabelTable, Manifest
from runtime.core.rng import CaseRandom
from runtime.core.tissue_classes import HU_CONTEXT, context_map
from train.config import AugmentConfig, class_count, resolve
from train.data.class_dropout import drop_classes
from train.data.class_statistics import ClassStatistics, measure_classes
from train.data.dataset import Slices
from train.networks.contrast import ContrastStyles, move_contrast
from train.networks.generator import one_hot, standardise_noise
from train.step import Batch, Step

HU = Intensity("HU", -1024, 1024)
LABELS = 3
CLASSES = LABELS + len(HU_CONTEXT)
LABEL_ROWS = [
    {"name": "background", "value": 0},
    {"name": "wall", "value": 1},
    {"name": "blood", "value": 2},
]
CONFIG = {
    "name": "small",
    "data": {"labels": LABEL_ROWS, "canvas": [32, 32], "context": "auto"},
    "generator": {"kind": "unet", "filters": 8, "depth": 3, "skips": True, "textures": 4},
    "discriminator": {"filters": 8, "patch_size": 8},
    "training": {"batch_size": 4},
}


def patient(blood: float, seed: int, noise: float = 20.0) -> Slices:
    """A body of fat about a wall of muscle and a ball of blood; two slices with lungs."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32] - 15.5
    radius = np.broadcast_to(np.hypot(y, x), (6, 32, 32))
    labels = np.where(radius < 5, 2, np.where(radius < 8, 1, 0)).astype(np.uint8)
    image = np.where(radius < 14, -100.0, -1000.0)
    image[labels == 1], image[labels == 2] = 120, blood
    image[:2, 4:7, 12:20] = -850
    image += rng.normal(0, noise, image.shape) * (radius < 14)
    image = np.clip(np.rint(image), -1024, 1024).astype(np.int16)
    tissues = context_map(image, HU_CONTEXT, LABELS)
    return Slices(labels[:, None], image, tissues=tissues[:, None])


@pytest.fixture(scope="module")
def cohort() -> list[Slices]:
    return [patient(blood, seed) for seed, blood in enumerate((250, 300, 350, 400))]


@pytest.fixture(scope="module")
def statistics(cohort: list[Slices]) -> ClassStatistics:
    return measure_classes(cohort, LABELS, HU_CONTEXT, HU)


def batch(cohort: list[Slices], style: NDArray[np.float32] | None = None) -> Batch:
    labels = torch.from_numpy(np.concatenate([p.condition(slice(2, 3)) for p in cohort]))
    image = np.concatenate([p.image[2:3, None] for p in cohort]).astype(np.float32)
    noise = np.random.default_rng(0).integers(0, 256, image.shape, np.uint8)
    return Batch(
        labels,
        torch.from_numpy((image + 1024) / 2048),
        torch.from_numpy(noise),
        None if style is None else torch.from_numpy(style),
    )


def test_classes_of_a_cohort(statistics: ClassStatistics) -> None:
    fat = HU_CONTEXT.index("fat", LABELS)
    assert abs(statistics.medians[2] - 325) < 12 and abs(statistics.medians[fat] + 100) < 12
    assert 12 < statistics.texture[2] < 24
    assert np.allclose(statistics.by_patient[:, 2], (250, 300, 350, 400), atol=12)


def test_training_starts_at_class_means(cohort: list[Slices], statistics: ClassStatistics) -> None:
    errors = {}
    for context in ("none", "auto"):
        config = resolve({**CONFIG, "data": {**CONFIG["data"], "context": context}})
        step = Step(config, statistics=statistics if context == "auto" else None)
        one = batch(cohort)
        if context == "none":
            one = one._replace(labels=torch.where(one.labels < LABELS, one.labels, 0))
        errors[context] = float(step(0, one)["reconstruction"])
    # 0.025 of the range is 51 HU; the noise alone costs 16, and the steps of these images are sharp.
    assert errors["auto"] < 0.025 < errors["none"] / 3


def test_first_images_have_real_texture(cohort: list[Slices], statistics: ClassStatistics) -> None:
    net = Step(resolve(CONFIG), statistics=statistics).generator.eval()
    one = batch(cohort)
    with torch.no_grad():
        smooth, fake = net(one_hot(one.labels, CLASSES), standardise_noise(one.noise))
    blood = one.labels == 2
    texture = float((fake - smooth)[blood].std()) * 2048
    assert 0.7 < texture / statistics.texture[2] < 1.4


@pytest.mark.parametrize("blur", [0.0, 0.5])
def test_grain_is_the_cohorts(blur: float) -> None:
    """Neighbouring pixels share as much noise as in the training images."""
    rng = np.random.default_rng(3)
    noise = ndimage.gaussian_filter(rng.normal(0, 20, (8, 64, 64)), (0, blur, blur))
    labels = np.ones((8, 1, 64, 64), np.uint8)
    labels[..., :2] = 0
    image = np.rint(100 + noise).astype(np.int16)
    tissues = np.full(labels.shape, HU_CONTEXT.index("soft", LABELS), np.uint8)
    one = Slices(labels, image, tissues=tissues)
    measured = measure_classes([one], LABELS, HU_CONTEXT, HU)
    expected = np.corrcoef(image[:, :, 1:].ravel(), image[:, :, :-1].ravel())[0, 1]
    # What is coarser than the texture was taken off, and some of the correlation with it.
    assert -0.1 < measured.grain - max(expected, 0.02) < 0.02
    net = Step(resolve(CONFIG), statistics=measured).generator
    first = net.texture.filters.weight[:1].detach()
    white = torch.randn(1, 1, 256, 256, generator=torch.Generator().manual_seed(0))
    grain = torch.nn.functional.conv2d(white, first)[0, 0].numpy()
    assert abs(grain.std() - 1) < 0.03
    seen = np.corrcoef(grain[:, 1:].ravel(), grain[:, :-1].ravel())[0, 1]
    assert abs(seen - measured.grain) < 0.03


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.2])
def test_spread_is_the_cohorts(spread: float) -> None:
    """Images whose edges a known point spread blurred give that spread."""
    line = np.array([spread, 1, spread]) / (1 + 2 * spread)
    patients = [patient(blood, seed, noise=0.0) for seed, blood in enumerate((250, 350))]
    blurred = []
    for n, one in enumerate(patients):
        image = ndimage.correlate1d(one.image.astype(float), line, 1)
        image = ndimage.correlate1d(image, line, 2)
        image += np.random.default_rng(n).normal(0, 8, image.shape)
        blurred.append(replace(one, image=np.rint(image).astype(np.int16)))
    measured = measure_classes(blurred, LABELS, HU_CONTEXT, HU).spread
    # Classes that were found in a blurred image have some of its blur.
    assert -0.07 <= measured - spread <= 0.03


def test_edges_lie_between_classes(cohort: list[Slices], statistics: ClassStatistics) -> None:
    """A pixel at an edge holds something of both sides, in intensities and not in logits."""
    skip = Step(resolve(CONFIG), statistics=replace(statistics, spread=0.1)).generator.mean_skip
    assert skip is not None
    labels = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    labels[..., 4:] = 2
    with torch.no_grad():
        row = torch.sigmoid(skip(one_hot(labels, CLASSES), None))[0, 0, 0].numpy()
    air, blood, share = row[0], row[-1], 0.1 / 1.2
    assert blood - air > 0.5 and np.allclose(row[:3], air) and np.allclose(row[5:], blood)
    assert np.isclose(row[3], air + share * (blood - air), atol=1e-4)
    assert np.isclose(row[4], blood - share * (blood - air), atol=1e-4)


def contrast_step(statistics: ClassStatistics) -> Step:
    config = resolve({**CONFIG, "generator": {**CONFIG["generator"], "style": 1}})
    return Step(config, statistics=statistics)


def test_contrast_moves_classes_by_hounsfield(
    cohort: list[Slices], statistics: ClassStatistics
) -> None:
    net = contrast_step(statistics).generator.eval()
    condition = one_hot(batch(cohort).labels, CLASSES)
    style = np.zeros((4, CLASSES), np.float32)
    style[:, 2] = [0, 60 / 2048, -90 / 2048, 200 / 2048]
    with torch.no_grad():
        plain = net(condition)[1][:, 0].numpy() * 2048
        moved = net(condition, style=torch.from_numpy(style))[1][:, 0].numpy() * 2048
    blood = batch(cohort).labels[:, 0].numpy() == 2
    for n, change in enumerate((0, 60, -90, 200)):
        assert abs(np.median((moved - plain)[n][blood[n]]) - change) < 0.15 * abs(change) + 1


def test_noise_stays_within_the_class(cohort: list[Slices], statistics: ClassStatistics) -> None:
    step = Step(resolve(CONFIG), statistics=statistics)
    net = step.generator.eval()
    assert net.top.amplitudes is not None
    with torch.no_grad():
        # A gain that explodes in every label.
        net.top.amplitudes.bias.fill_(50.0)
    one = batch(cohort)
    condition = one_hot(one.labels, CLASSES)
    with torch.no_grad():
        smooth, fake = net(condition, standardise_noise(one.noise))
    blood = one.labels == 2
    texture = float((fake - smooth)[blood].std()) * 2048
    assert texture < 1.7 * statistics.texture[2]


def test_dropped_classes_fall_back(cohort: list[Slices]) -> None:
    condition, tissues = cohort[0].condition(), cohort[0].tissues
    unknown = HU_CONTEXT.index(UNKNOWN, LABELS)

    def dropped(**chances: float) -> NDArray[np.uint8]:
        settings = replace(AugmentConfig(drop_class=0.0, drop_layout=0.0), **chances)
        rng = np.random.default_rng(0)
        return drop_classes(condition, tissues, LABELS, CLASSES, settings, rng)

    assert np.array_equal(dropped(), condition)
    bare = dropped(drop_layout=1.0)
    assert np.array_equal(bare[bare < LABELS], cohort[0].labels[bare < LABELS])
    assert ((bare == unknown) == (cohort[0].labels == 0)).all()
    some = dropped(drop_class=1.0)
    # Every label is its tissue; the half of the tissues that went is unknown; air stays.
    assert not ((some > 0) & (some < LABELS)).any()
    assert ((some == tissues) | (some == unknown)).all() and (some == unknown).any()
    assert (some[tissues == 0] == 0).all()


def test_contrast_of_slices_moves_image(cohort: list[Slices], statistics: ClassStatistics) -> None:
    styles = ContrastStyles(cohort, statistics, HU_CONTEXT, LABELS, 1, 1.5, seed=4)
    numbers = np.arange(4) * 6
    style, change = styles(numbers, 3)
    again = styles(numbers, 3)
    assert np.array_equal(style, again[0]) and not np.array_equal(style, styles(numbers, 4)[0])
    own = (style - change)[:, 2] * 2048
    assert np.allclose(own, np.array((250, 300, 350, 400)) - statistics.medians[2], atol=12)
    one = batch(cohort)
    moved = move_contrast(one.image, one.labels, torch.from_numpy(change))
    blood = ndimage.binary_erosion(one.labels[0, 0].numpy() == 2, iterations=2)
    seen = np.median((moved - one.image)[0, 0].numpy()[blood]) * 2048
    assert abs(seen - change[0, 2] * 2048) < 2


def manifest(statistics: ClassStatistics) -> Manifest:
    table = LabelTable(tuple(Label(row["name"], row["value"]) for row in LABEL_ROWS))
    contrast = np.zeros((1, CLASSES))
    contrast[0, 1:3] = 10, 60
    return Manifest(
        "small",
        table,
        GridPolicy((32, 32), None, 8),
        HU,
        style=CLASSES,
        noise=True,
        files={},
        context=statistics.stated(HU_CONTEXT, contrast),
    )


def test_requests_are_met(statistics: ClassStatistics) -> None:
    model = manifest(statistics)
    assert model.context is not None
    requests = requested_classes(model, parse_requests(["Blood = 350±30", "fat=-90"]))
    drawn = np.array(
        [draw_contrast(model.context, CaseRandom(0, b"case", n), requests) for n in range(400)]
    ) + np.array(model.context.medians)
    blood, fat = drawn[:, 2], drawn[:, HU_CONTEXT.index("fat", LABELS)]
    assert abs(blood.mean() - 350) < 6 and abs(blood.std() - 30) < 4
    assert np.allclose(fat, -90, atol=0.01)
    # The wall moves with the blood, as in the cohort.
    assert np.corrcoef(drawn[:, 1], blood)[0, 1] > 0.9


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("blood", "cannot be read"),
        ("blood=bright", "cannot be read"),
        ("=300", "cannot be read"),
        ("liver=60", "no class 'liver'"),
        ("blood=4000", "beyond the model's range"),
        ("unknown=0", "no class"),
    ],
)
def test_wrong_requests_are_refused(text: str, told: str, statistics: ClassStatistics) -> None:
    with pytest.raises(UsageError, match=told):
        requested_classes(manifest(statistics), parse_requests([text]))


def test_models_without_contrast_refuse_requests(statistics: ClassStatistics) -> None:
    model = replace(manifest(statistics), context=None, style=0)
    with pytest.raises(UsageError, match="takes no intensities"):
        requested_classes(model, parse_requests(["blood=300"]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unet", "edge", "reference"])
def test_graph_with_context_runs_alike(
    kind: str, statistics: ClassStatistics, cohort: list[Slices], tmp_path: Path
) -> None:
    model = manifest(statistics)
    generator = {**CONFIG["generator"], "style": 1, "kind": kind}
    step = Step(resolve({**CONFIG, "generator": generator}), statistics=statistics)
    step.generator.eval()
    graph = LabelsToIntensity(step.generator, model.classes, HU)
    masks = np.concatenate([p.condition(slice(0, 2)) for p in cohort])
    inputs = draw_inputs(model.inputs, masks, context=model.context)
    for name, network, limit in (("fp32", graph, 1), ("fp16", to_fp16(graph), 12)):
        to_onnx(network, model, tmp_path / f"{name}.onnx")
        session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx")
        (out,) = session.run(None, inputs)
        with torch.no_grad():
            expected = graph(**{key: torch.from_numpy(value) for key, value in inputs.items()})
        difference = np.abs(hu(out) - hu(expected.numpy()))
        assert difference.max() <= limit


def hu(pairs: NDArray[np.uint8]) -> NDArray[np.int32]:
    return np.ascontiguousarray(pairs).view("<i2")[..., 0].astype(np.int32)


def test_context_is_off_by_default() -> None:
    config = resolve({"data": {"labels": LABEL_ROWS}})
    assert config.data.context == "none" and class_count(config.data) == LABELS


def test_too_many_classes_are_refused() -> None:
    rows: list[dict[str, Any]] = [{"name": str(n), "value": n} for n in range(253)]
    with pytest.raises(ConfigError, match="context"):
        resolve({"data": {"labels": rows, "context": "auto"}})


def test_noise_of_neighbours_correlates() -> None:
    random = CaseRandom(0, b"case", 0, noise_along_z=0.3)
    slices = np.array([random.noise(k, (64, 64)).ravel() for k in range(4)], float)
    white = CaseRandom(0, b"case", 0)
    assert abs(slices.std() - 73.9) < 3 and abs(slices.mean() - 127.5) < 2
    near, far = (np.corrcoef(slices[0], slices[n])[0, 1] for n in (1, 3))
    assert abs(near - 0.6 / 1.18) < 0.05 and abs(far) < 0.05
    assert (
        white.noise(0, (2, 4)).tolist() == CaseRandom(0, b"case", 0, 0.0).noise(0, (2, 4)).tolist()
    )
