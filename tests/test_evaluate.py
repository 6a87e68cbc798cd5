"""Metrics on arrays whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from samples import image

from train.metrics.scores import (
    body,
    body_mask,
    diversity,
    evaluate,
    organ,
    real_baseline,
    table,
    texture,
)
from train.metrics.volume_metrics import scales_of, similarity, steps_along_z, wasserstein
from train.validation import neighbours


def thorax(shape: tuple[int, int, int] = (3, 64, 64)) -> tuple[np.ndarray, np.ndarray]:
    """(HU, mask): a soft body with a lung inside it, a table under it and one organ."""
    ct = np.full(shape, -1000, np.int16)
    ct[:, 10:50, 10:54] = 40
    ct[:, 20:40, 14:24] = -850  # lung
    ct[:, 54:56, 5:60] = 200  # table
    mask = np.zeros(shape, np.uint8)
    mask[:, 20:40, 30:50] = 1
    ct[mask == 1] = 400
    return ct, mask


def test_body_mask_excludes_the_table() -> None:
    """The body is its filled outline without the table."""
    ct, _ = thorax()
    inside = body_mask(ct)
    assert inside[:, 30, 18].all() and inside[:, 15, 30].all()  # lung and fat
    assert not inside[:, 54:56].any() and not inside[:, 5].any()
    assert not body_mask(np.full((1, 16, 16), -1000)).any()


def test_a_perfect_synthesis_has_no_error() -> None:
    ct, mask = thorax()
    ct[:, 12] = 60  # label means is not perfect
    metrics = evaluate([ct], [ct], [mask], ["heart"])
    assert (
        metrics["cases"] == 1 and metrics["body"]["mae"] == 0 and metrics["body"]["mae_ratio"] == 0
    )
    heart = metrics["organs"]["heart"]
    assert (heart["median"], heart["median_true"], heart["median_error"], heart["iqr"]) == (
        400,
        400,
        0,
        0,
    )


def test_medians_are_pooled_over_cases() -> None:
    """Medians and quartiles are pooled over the cases."""
    mask = np.ones((1, 10, 10), np.uint8)
    generated = [np.full((1, 10, 10), 100), np.full((1, 10, 10), 300)]
    true = [np.arange(100).reshape(1, 10, 10), np.arange(100, 200).reshape(1, 10, 10)]
    result = organ(generated, true, [mask, mask], 1)
    assert result is not None
    assert (result["voxels"], result["median"], result["median_true"]) == (200, 200, 99.5)
    assert (
        result["median_error"] == 100.5
        and result["iqr"] == 200
        and result["iqr_true"] == pytest.approx(99.5)
    )


def test_an_absent_organ_is_null() -> None:
    ct, mask = thorax()
    assert evaluate([ct], [ct], [mask], ["heart", "aorta"])["organs"]["aorta"] is None


def test_mean_synthesis_has_ratio_one() -> None:
    """The error of mean synthesis is the mean deviation."""
    ct, mask = thorax()
    rng = np.random.default_rng(0)
    ct = ct + rng.normal(0, 30, ct.shape).astype(np.int16)
    inside = body_mask(ct)
    generated = np.zeros(ct.shape)
    for region in (inside & (mask == 0), inside & (mask == 1)):
        generated[region] = ct[region].mean()
    result = body([generated], [ct], [mask], 2)
    assert result is not None and result["mae_ratio"] == pytest.approx(1, abs=1e-4)
    assert result["mae"] == pytest.approx(np.abs(generated - ct)[inside].mean(), abs=1e-3)
    shifted = body([ct + 10], [ct], [mask], 2)
    assert shifted is not None and shifted["mae"] == 10


def test_texture_is_gaussian_residual_deviation() -> None:
    """Texture is the deviation that is left when a Gaussian is subtracted."""
    rng = np.random.default_rng(0)
    region = np.ones((8, 64, 64), bool)
    noise = rng.normal(0, 20, region.shape)
    # white noise less its Gaussian of sigma 2 keeps 1 - 2 g(0) + sum g^2 of its variance, g(0) = 1
    # / (8 pi), sum g^2 = 1 / (16 pi)
    expected = 20 * np.sqrt(1 - 2 / (8 * np.pi) + 1 / (16 * np.pi))
    assert texture([noise], [region]) == pytest.approx(expected, rel=0.02)
    assert texture([noise + 500], [region]) == pytest.approx(texture([noise], [region]), rel=1e-3)
    assert texture([3 * noise], [region]) == pytest.approx(3 * texture([noise], [region]), rel=1e-3)
    assert np.isnan(texture([noise], [np.zeros_like(region)]))


def test_organ_border_is_no_texture() -> None:
    flat = np.zeros((2, 64, 64))
    mask = np.zeros(flat.shape, bool)
    mask[:, 16:48, 16:48] = True
    assert texture([flat], [mask]) == 0
    noisy = flat.copy()
    noisy[:, 16, 16:48] = 500  # on the border row only
    assert texture([noisy], [mask]) < 60


def test_metrics_table_is_readable() -> None:
    ct, mask = thorax()
    text = table(evaluate([ct], [ct + 1], [mask], ["heart", "aorta"]))
    assert "heart" in text and "absent, or almost: aorta" in text and "ratio" in text


def test_evaluate_command_compares_folders(tmp_path: Path, command) -> None:
    ct, mask = thorax()
    for name in ("masks", "truth", "synthetic"):
        (tmp_path / name).mkdir()
    for case in ("a", "b"):
        sitk.WriteImage(
            image(mask.astype(np.uint16) * 500), str(tmp_path / "masks" / f"{case}.nii.gz")
        )
        sitk.WriteImage(image(ct), str(tmp_path / "truth" / f"{case}.nii.gz"))
        sitk.WriteImage(
            image((ct + 25).astype(np.int16)), str(tmp_path / "synthetic" / f"{case}_ct.nii.gz")
        )
    arguments = [
        "-m",
        "train.evaluate",
        *(
            part
            for name in ("synthetic", "truth", "masks")
            for part in (f"--{name}", tmp_path / name)
        ),
    ]
    done = command(*arguments, "--json", tmp_path / "metrics.json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == metrics
    assert (
        metrics["cases"] == 2
        and metrics["organs"]["left ventricle"]["median_error"] == 25
        and metrics["body"]["mae"] == 25
    )
    (tmp_path / "synthetic" / "b_ct.nii.gz").unlink()
    done = command(*arguments)
    assert done.returncode == 1 and "b_ct.nii.gz" in done.stderr and "Traceback" not in done.stderr


def test_wasserstein_distance_in_hu() -> None:
    """The Wasserstein distance is how far the HU must move."""
    rng = np.random.default_rng(0)
    a = rng.integers(-100, 100, 5000)
    assert wasserstein(a, a) == 0 and wasserstein(a, a + 37) == pytest.approx(37)
    assert wasserstein(np.array([0, 10]), np.array([0])) == 5  # of unlike sizes
    assert np.isnan(wasserstein(a, np.array([], int)))
    ct, mask = thorax()
    assert evaluate([ct + 12], [ct], [mask], ["heart"])["organs"]["heart"]["wasserstein"] == 12


def test_slice_step_detects_flicker() -> None:
    """Slices that flicker are told from slices that agree."""
    ct, mask = thorax((4, 64, 64))
    ct += (np.arange(4) * 10).astype(np.int16)[:, None, None]
    flicker = ct.copy()
    flicker[1::2] += 50  # the true step is 10, the synthesized ones 60, 40, 60
    result = body([flicker], [ct], [mask], 2)
    assert result is not None and result["z_difference"] == pytest.approx((50 + 30 + 50) / 3, abs=1)
    same = body([ct + 500], [ct], [mask], 2)
    assert (
        same is not None and same["z_difference"] == 0
    )  # a shift of all is another metric's matter
    inside = np.zeros((2, 2, 2), bool)
    inside[:, 0, 0] = True
    assert steps_along_z(np.arange(8).reshape(2, 2, 2), inside, np.arange(2)).tolist() == [4]


def test_slice_step_compares_adjacent_slices() -> None:
    """Only slices that follow each other in the volume are compared."""
    ct, mask = thorax((4, 64, 64))
    ct[2:] += 300  # other anatomy, far from slice 1
    generated = ct.copy()
    generated[3] += 20
    place = np.array([4, 5, 20, 21])
    result = evaluate([generated], [ct], [mask], ["heart"], [place])
    assert (
        result["body"]["z_difference"] == 10 and result["organs"]["heart"]["z_difference"] == 10
    )  # steps 0 and 20, for 0 and 0
    generated[2:] -= 300  # between slices 1 and 2 there is nothing to compare
    assert evaluate([generated], [ct], [mask], ["heart"], [place])["body"]["z_difference"] == 10
    assert evaluate([generated], [ct], [mask], ["heart"])["body"]["z_difference"] > 50


def test_misplaced_slice_step_counts_as_error() -> None:
    """A step in one place does not stand in for one that is missing in another."""
    ct, mask = thorax((4, 64, 64))
    true, generated = ct.copy(), ct.copy()
    true[1::2, 20:24, 30:34] += (
        60  # the true steps are here, the synthesized ones as large elsewhere
    )
    generated[1::2, 40:44, 30:34] += 60
    found = evaluate([generated], [true], [mask], ["heart"])["body"]
    inside = int(body_mask(true)[0].sum())
    assert found["z_difference"] == 0 and found["z_error"] == pytest.approx(
        60 * 32 / inside, rel=0.01
    )
    rising, falling = ct.copy(), ct.copy()
    rising[2:] += 10
    falling[2:] -= 10
    found = evaluate([falling], [rising], [mask], ["heart"])["body"]  # up is not down
    assert found["z_difference"] == 0 and found["z_error"] == pytest.approx(20 / 3, rel=0.01)
    apart = evaluate([generated], [true], [mask], ["heart"], [np.array([0, 2, 4, 6])])["body"]
    assert apart["z_error"] is None  # nothing follows anything


def test_outline_flicker_counts_pixels() -> None:
    ct, mask = thorax((4, 64, 64))
    generated = ct.copy()
    generated[1, 10:12, 10:54] = -1000  # two rows of 44 pixels less
    found = evaluate([generated], [ct], [mask], ["heart"])["body"]
    assert (found["outline_step"], found["outline_step_true"]) == (
        pytest.approx(2 * 88 / 3, abs=3),
        0,
    )
    apart = evaluate([generated], [ct], [mask], ["heart"], [np.array([0, 1, 9, 10])])["body"]
    assert apart["outline_step"] == pytest.approx(44, abs=3)


def test_organ_slice_steps_are_separate() -> None:
    ct, mask = thorax((4, 64, 64))
    generated = ct.copy()
    generated[1::2][mask[1::2] == 1] += 40
    result = evaluate([generated], [ct], [mask], ["heart"])
    assert result["organs"]["heart"]["z_difference"] == 40 and result["body"]["z_difference"] < 20
    assert (
        real_baseline([generated], [mask], [ct], [mask], ["heart"])["organs"]["heart"][
            "z_difference"
        ]
        == 40
    )


@pytest.mark.parametrize(
    ("total", "count"), [(48, 24), (48, 47), (30, 2), (9, 5), (7, 6), (5, 4), (100, 98)]
)
def test_validation_takes_spread_slice_pairs(total: int, count: int) -> None:
    """Validation takes pairs of neighbours that are spread over the volume."""
    chosen = neighbours(total, count)
    assert (
        len(chosen) == count // 2 * 2
        and (np.diff(chosen) > 0).all()
        and chosen[0] >= 0
        and chosen[-1] < total
    )
    assert (chosen[1::2] - chosen[::2] == 1).all()
    assert np.diff(chosen[::2]).max(initial=0) <= np.ceil(2 * total / count) + 1
    assert neighbours(total, total).tolist() == list(range(total)) and neighbours(
        total, 1
    ).tolist() == [total // 2]


def test_ms_ssim_scales_fit_slices() -> None:
    """MS-SSIM takes as many scales as the size of the slices allows."""
    assert [scales_of(side) for side in (8, 11, 64, 128, 176, 512)] == [0, 1, 3, 4, 5, 5]
    ct = np.random.default_rng(0).integers(-500, 500, (2, 64, 64)).astype(np.int16)
    same, other = similarity([ct], [ct]), similarity([ct], [ct[::-1]])
    assert same == {"ssim": pytest.approx(1), "ms_ssim": pytest.approx(1), "scales": 3}
    assert other["ssim"] < 0.1 and other["ms_ssim"] < 0.3
    assert similarity([ct - 5000], [ct - 9000])["ssim"] == pytest.approx(
        1
    )  # beyond the limits all is the same


def test_diversity_relates_variants_to_patients() -> None:
    """Diversity is the spread over variants against that between patients."""
    mask = np.ones((1, 16, 16), np.uint8)
    variants = [[np.full(mask.shape, 300 + shift) for shift in (-20, 0, 20)]]
    real = [np.array([value, np.nan]) for value in (200.0, 240, 280)]
    result = diversity(variants, [mask], real, ["heart", "aorta"])
    assert result["variants"] == 3 and result["organs"]["heart"] == {
        "spread": 20,
        "spread_true": 40,
        "ratio": 0.5,
        "median_error": 60,
    }
    assert set(result["organs"]["aorta"].values()) == {None}


def test_ms_ssim_among_variants_and_patients() -> None:
    """Variants are compared with each other, and patients with patients."""
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(-500, 500, (3, 12, 64, 64)).astype(np.int16)
    mask = np.zeros((12, 64, 64), np.uint8)
    mask[3:9, 20:40, 20:40] = 1
    real = [np.array([0.0]), np.array([1.0])]
    alike, third, unlike = (
        diversity([variants], [mask], real, ["heart"])["ms_ssim"]
        for variants in ([a, a], [a, a, b], [a, b, c])
    )
    assert (
        alike == pytest.approx(1)
        and unlike < 0.3
        and third == pytest.approx((1 + 2 * unlike) / 3, abs=0.05)
    )
    below = np.roll(a, -2, 0)  # the same patient, lying two slices lower
    assert real_baseline([a], [mask], [below], [np.roll(mask, -2, 0)], ["heart"])["similarity"][
        "ms_ssim"
    ] == pytest.approx(1)
    assert real_baseline([a], [mask], [below], [mask], ["heart"])["similarity"]["ms_ssim"] < 0.3
    assert (
        real_baseline([a], [mask], [b[:, :32]], [mask[:, :32]], ["heart"])["similarity"]["ms_ssim"]
        is None
    )


def test_diversity_ceiling_from_real_patients() -> None:
    """The ceiling is the distance between real patients."""
    ct, mask = thorax()
    other = ct.copy()
    other[mask == 1] += 30
    result = real_baseline([ct], [mask], [other], [mask], ["heart"])
    assert result["organs"]["heart"]["wasserstein"] == 30 and result["body"]["z_difference"] == 0


def test_evaluate_command_measures_variants(tmp_path: Path, cohort: Path, command) -> None:
    """The command measures variants and a reference."""
    for name in ("masks", "truth", "synthetic"):
        (tmp_path / name).mkdir()
    for path in sorted(cohort.glob("*_label.nii.gz"))[:2]:
        case = path.name.removesuffix("_label.nii.gz")
        (tmp_path / "masks" / f"{case}.nii.gz").write_bytes(path.read_bytes())
        (tmp_path / "truth" / f"{case}.nii.gz").write_bytes(
            (cohort / f"{case}_image.nii.gz").read_bytes()
        )
        ct = sitk.ReadImage(str(cohort / f"{case}_image.nii.gz"))
        for variant in range(2):
            sitk.WriteImage(
                sitk.Cast(ct + 40 * variant, sitk.sitkInt16),
                str(tmp_path / "synthetic" / f"{case}_v{variant}_ct.nii.gz"),
            )
    folders = [
        part for name in ("synthetic", "truth", "masks") for part in (f"--{name}", tmp_path / name)
    ]
    done = command("-m", "train.evaluate", *folders, "--reference", cohort)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["body"]["mae"] == 0 and result["similarity"]["ssim"] == 1
    assert result["diversity"]["organs"]["left ventricle"]["spread"] == pytest.approx(
        40 / np.sqrt(2), abs=0.01
    )
    assert result["ceiling"]["organs"]["left ventricle"]["wasserstein"] > 0


@pytest.mark.parametrize("side", [88, 96, 98])
def test_every_canvas_has_its_scales(side: int) -> None:
    """torchmetrics asks more of four scales than that the window fits into the coarsest."""
    ct = np.random.default_rng(0).normal(0, 100, (2, side, side)).astype(np.float32)
    assert similarity([ct], [ct])["ms_ssim"] == pytest.approx(1)
