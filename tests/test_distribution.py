"""Measures of two sets of volumes, on sets whose answers are known."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from runtime.core.errors import MissingComponent
from runtime.core.manifest import Intensity
from train.metrics.class_table import OUTSIDE, coloured_tissues, tissue_classes
from train.metrics.distribution import Sample, distribution, feature_distances
from train.metrics.features import (
    density_coverage,
    features,
    frechet_distance,
    kernel_distance,
    standardised,
)
from train.metrics.memory import memory
from train.metrics.scores import HU

SPACING = (3.0, 2.0, 2.0)


def patient(seed: int, *, bone: float = 700, noise: float = 15) -> Sample:
    """A body with a lung, bone and one organ, in a place of its own and with smooth tissue."""
    rng = np.random.default_rng(seed)
    shape = (12, 64, 64)
    z, y, x = np.ogrid[:12, :64, :64]
    y = y - 32 - rng.uniform(-2, 2)
    x = x - 32 - rng.uniform(-2, 2)
    height, width = rng.uniform(21, 26), rng.uniform(24, 29)
    body = (y / height) ** 2 + (x / width) ** 2 + 0 * z < 1
    image = np.where(body, 40.0, -1000.0)
    image += body * gaussian_filter(rng.standard_normal(shape), (2, 4, 4)) * 600
    image[np.broadcast_to(y**2 + (x + 12) ** 2 < 49, shape)] = -850
    image[np.broadcast_to((y - 16) ** 2 + x**2 < 16, shape)] = bone
    labels = np.broadcast_to((y / 7) ** 2 + ((x - 12) / 7) ** 2 < 1, shape).astype(np.uint8)
    image[labels == 1] = 400
    image += rng.normal(0, noise, shape)
    return Sample(np.rint(image).astype(np.int16), labels, SPACING)


def cohort(first: int, count: int = 4, **how: float) -> list[Sample]:
    return [patient(first + n, **how) for n in range(count)]


def test_equal_sets_have_no_distance() -> None:
    real = cohort(0)
    result = distribution(real, real, ["heart"])
    for plane in ("axial", "coronal", "sagittal"):
        assert result["frechet"][plane] == pytest.approx(0, abs=1e-4)
        assert result["kernel"][plane] <= 0  # unbiased: it takes the diagonal's share off
    assert result["gradient"] == 0
    assert result["organs"]["heart"] == {
        "median_error": 0,
        "iqr_ratio": 1,
        "texture_ratio": 1,
        "clipped": 0,
        "clipped_true": 0,
    }


def test_real_groups_are_near_blurred_are_far() -> None:
    real, other = cohort(0), cohort(10)
    smooth = [Sample(gaussian_filter(s.image, (0, 2, 2)), *s[1:]) for s in other]
    between, blurred = (feature_distances(group, real) for group in (other, smooth))
    for plane in ("axial", "coronal", "sagittal"):
        assert blurred["frechet"][plane] > 2 * between["frechet"][plane]
    assert blurred["kernel"]["axial"] > 10 * abs(between["kernel"]["axial"])


def test_frechet_matches_normal_distributions() -> None:
    """The closed form for normal distributions with diagonal covariances."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, [1, 2], (200_000, 2)), rng.normal([3, 0], [2, 2], (200_000, 2))
    assert frechet_distance(a, b) == pytest.approx(9 + 1, rel=0.02)
    assert abs(kernel_distance(a[:2000], a[2000:4000])) < 0.05 < kernel_distance(a[:500], b[:500])
    assert np.isnan(frechet_distance(a[:1], b))


def test_features_are_the_same_everywhere() -> None:
    """Figures of two machines compare: the weights come from a fixed seed."""
    planes = cohort(0, 1)[0].image
    one, other = features(planes), features(planes[:5])
    assert one.shape == (12, 112) and np.allclose(one[:5], other, atol=1e-6)
    assert standardised(one, one).std(0).max() == pytest.approx(1)


def test_gradients_are_in_hu_per_pixel() -> None:
    ramp = np.tile(np.arange(64) * 30.0, (4, 64, 1))
    flat = np.full(ramp.shape, 100.0)
    labels = np.zeros(ramp.shape, np.uint8)
    result = distribution([(ramp, labels, SPACING)], [(flat, labels, SPACING)], [])
    assert result["gradient"] == pytest.approx(30, abs=2)  # the first column is air


def test_bone_outside_labels_is_missed() -> None:
    real, soft = cohort(0), cohort(10, bone=100)
    outside = distribution(soft, real, ["heart"])["outside"]
    voxels = [int((s.image[s.labels == 0] > 300).sum()) for s in real]
    body = [
        int(((s.image > -500) | (s.image < -800) & (s.image > -900))[s.labels == 0].sum())
        for s in real
    ]
    assert outside["bone_true"] == pytest.approx(100 * sum(voxels) / sum(body), rel=0.1)
    assert outside["bone"] < 0.5 * outside["bone_true"]
    assert outside["gas"] == pytest.approx(outside["gas_true"], rel=0.2)


def test_lung_vessels_count_in_the_lung() -> None:
    real = cohort(0)
    for sample in real:
        sample.image[:, 32, 16:24] = 50  # one voxel wide
    without = distribution(cohort(0), real, ["heart"])["outside"]
    assert without["vessels"] < 0.5 and without["vessels_true"] > 3


def test_arbitrary_units_take_quantiles() -> None:
    unit = Intensity("a.u.", 0, 500)
    real = [Sample(np.clip((s.image + 1000) // 5, 0, 500), *s[1:]) for s in cohort(0)]
    dim = [Sample(s.image * 3 // 4, *s[1:]) for s in real]
    outside = distribution(dim, real, ["heart"], intensity=unit)["outside"]
    assert outside["bone_true"] == pytest.approx(5, abs=1) and outside["bone"] < 3
    assert outside["vessels"] is None


def test_class_table_has_lungs_of_its_own() -> None:
    real = cohort(0)
    classes = tissue_classes(real[0].image, real[0].labels, HU)
    assert classes[6, 0, 0] == OUTSIDE and classes[6, 32, 20] == 0
    table = coloured_tissues(real, HU, 0, (0, 1))
    assert len(table) == 2 * len(real) and np.array_equal(table[0].labels, real[0].labels)
    assert not np.array_equal(table[1].labels, real[0].labels)
    lung = [np.median(s.image[:, 30:34, 18:22]) for s in (real[0], table[0])]
    assert lung[1] == pytest.approx(lung[0], abs=10)
    near = feature_distances(table[::2], cohort(20))["frechet"]["axial"]
    smooth = [Sample(gaussian_filter(s.image, (0, 2, 2)), *s[1:]) for s in real]
    assert near < feature_distances(smooth, cohort(20))["frechet"]["axial"]


def test_planted_copies_are_caught() -> None:
    """20 training slices, as they are and with noise and another gain, among 60 others."""
    train, held_out, others = cohort(0, 8), cohort(20, 4), cohort(40, 5)
    slices = np.concatenate([sample.image for sample in train])
    rng = np.random.default_rng(0)
    planted = slices[rng.permutation(len(slices))[:20]].astype(np.float32)
    for copies in (
        planted,
        planted + rng.normal(0, 25, planted.shape),
        planted * 1.03 + 5,
    ):
        result = memory(
            [*(s.image for s in others), copies],
            [s.image for s in train],
            [s.image for s in held_out],
        )
        assert result["copied"] == [0, 0, 0, 0, 0, 20]
        assert result["copies"] == 20 and result["slices"] == 80


def test_new_patients_are_no_copies() -> None:
    train, held_out, others = cohort(0, 8), cohort(20, 8), cohort(40, 8)
    images = [[s.image for s in group] for group in (others, train, held_out)]
    result = memory(*images)
    assert result["copies"] == 0 and 0.75 < result["ratio"] < 1.3
    assert memory(images[1], images[1], images[2])["ratio"] < 0.1


def test_density_coverage_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(30, 3))
    monkeypatch.setitem(sys.modules, "prdc", None)
    with pytest.raises(MissingComponent) as caught:
        density_coverage(rows, rows)
    assert "[metrics]" in caught.value.remedy


def test_density_coverage_finds_lost_modes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("prdc")
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.normal(place, 1, (100, 4)) for place in (0, 50)])
    alike, half = (rng.normal(0, 1, (200, 4)) + shift for shift in (0, 0))
    alike[100:] += 50
    assert density_coverage(alike, real)["coverage"] > 0.9
    assert density_coverage(half, real)["coverage"] < 0.6
    assert capsys.readouterr().out == ""
