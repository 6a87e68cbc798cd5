"""The simulated cohort: its anatomy, its statistics, its physics, and what its files promise."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from runtime.core.console import run
from train.phantom import cohort as phantom
from train.phantom.anatomy import LABELS, heart_pose
from train.phantom.physics import enhancement, noise_field, noise_level

ROOT = Path(__file__).resolve().parent.parent
SMALL = (32, 96, 80)
CHAMBERS = ("lv", "rv", "la", "ra")
MEDIAN_HU = {
    "myo": (100, 150),
    "lv": (450, 500),
    "la": (450, 500),
    "rv": (330, 420),
    "ra": (330, 420),
    "ao": (450, 470),
    "pa": (400, 540),
}  # of the cohort's mean


@dataclass(frozen=True)
class Cohort:
    folder: Path
    images: list[NDArray[np.int16]]
    labels: list[NDArray[np.uint16]]

    def medians(self, name: str) -> NDArray[np.float64]:
        pairs = zip(self.images, self.labels, strict=True)
        return np.array([np.median(image[label == LABELS[name]]) for image, label in pairs])


def read(path: Path) -> NDArray[np.generic]:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    folder = tmp_path_factory.mktemp("cohort") / "made" / "here"
    paths = phantom.generate_cohort(folder, 24, seed=0)
    assert [path.name for path in paths] == [f"ct_train_{1001 + k}_image.nii.gz" for k in range(24)]
    labels = [read(path.with_name(path.name.replace("image", "label"))) for path in paths]
    return Cohort(folder, [read(path) for path in paths], labels)


def spread(values: NDArray[np.float64]) -> float:
    return float(np.std(values, ddof=1) / np.mean(values))


def body_area_mm2(image: NDArray[np.int16]) -> float:
    """Mean cross-section of the filled body outline; opening removes the thin table."""
    areas = []
    for plane in ndimage.binary_opening(image > -300, np.ones((1, 3, 3)), iterations=2):
        parts, _ = ndimage.label(plane)
        body = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
        areas.append(9.0 * ndimage.binary_fill_holes(body).sum())
    return float(np.mean(areas))


# Statistics of the cohort


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAMBERS)
def test_chamber_enhancement_differs_between_patients(cohort: Cohort, name: str) -> None:
    assert 30 <= np.std(cohort.medians(name), ddof=1) <= 48


@pytest.mark.slow
@pytest.mark.parametrize(("name", "low", "high"), [("ao", 30, 50), ("pa", 30, 50), ("myo", 6, 15)])
def test_vessel_wall_enhancement_differs_between_patients(
    cohort: Cohort, name: str, low: int, high: int
) -> None:
    assert low <= np.std(cohort.medians(name), ddof=1) <= high


@pytest.mark.slow
@pytest.mark.parametrize("name", MEDIAN_HU)
def test_mean_enhancement_of_phantoms(cohort: Cohort, name: str) -> None:
    low, high = MEDIAN_HU[name]
    assert low <= cohort.medians(name).mean() <= high


@pytest.mark.slow
def test_heart_body_sizes_differ_between_patients(cohort: Cohort) -> None:
    volume = np.array([(label == LABELS["lv"]).sum() * 0.027 for label in cohort.labels])  # ml
    area = np.array([body_area_mm2(image) for image in cohort.images])
    assert spread(volume) >= 0.15 and 50 <= volume.mean() <= 120
    assert spread(area) >= 0.08 and 45_000 <= area.mean() <= 75_000


@pytest.mark.parametrize("seed", range(6))
def test_phantom_seeds_cover_every_factor(seed: int) -> None:
    """Every seed, and every first part of its patients, covers the range of each factor."""
    drawn = [phantom.draw(seed, index) for index in range(24)]
    for chamber in CHAMBERS:
        assert 30 <= np.std([p.blood[chamber] for p in drawn], ddof=1) <= 50
    volume = np.array(
        [p.heart**3 * (1 - 0.16 * p.phase) ** 2 * (1 - 0.08 * p.phase) for p in drawn]
    )
    assert spread(volume) >= 0.15
    for count, bias, gap in ((12, 0.3, 0.6), (24, 0.15, 0.27)):  # random draws would exceed these
        for factor in phantom.FACTORS:
            values = np.sort([phantom.factors(seed, index)[factor] for index in range(count)])
            assert abs(values.mean()) < bias and np.diff(values, prepend=-1, append=1).max() < gap


def test_contrast_timing_separates_right_left_heart() -> None:
    early, late = enhancement(23.8, 1.0), enhancement(25.2, 1.0)
    assert early["rv"] - late["rv"] > 40 and late["lv"] - early["lv"] > 10
    weak, strong = enhancement(24.5, 0.9), enhancement(24.5, 1.1)
    assert all((strong[c] - 45) / (weak[c] - 45) == pytest.approx(1.1 / 0.9) for c in weak)


# Topology and anatomy


@pytest.mark.slow
def test_phantom_labels_equal_mm_whs(cohort: Cohort) -> None:
    assert all(
        np.unique(label).tolist() == [0, 205, 420, 500, 550, 600, 820, 850]
        for label in cohort.labels
    )


@pytest.mark.slow
def test_phantom_structures_are_one_piece(cohort: Cohort) -> None:
    for label in cohort.labels:
        for value in LABELS.values():
            parts, _ = ndimage.label(label == value, np.ones((3, 3, 3)))
            sizes = np.bincount(parts.ravel())[1:]
            assert sizes.max() >= 0.98 * sizes.sum()


@pytest.mark.slow
def test_left_ventricle_opens_at_valves_only(cohort: Cohort) -> None:
    for label in cohort.labels:
        faces: list[NDArray[np.uint16]] = []
        for axis in range(3):
            for step in (-1, 1):
                other = np.roll(label, step, axis)
                faces.append(other[(label == LABELS["lv"]) & (other != LABELS["lv"])])
        values, counts = np.unique(np.concatenate(faces), return_counts=True)
        share = dict(zip(values.tolist(), (counts / counts.sum()).tolist(), strict=True))
        assert (
            share[LABELS["myo"]] > 0.8
            and share[LABELS["la"]] > 0.005
            and share[LABELS["ao"]] > 0.005
        )
        assert LABELS["rv"] not in share
        assert sum(share.get(value, 0) for value in (205, 420, 820)) >= 0.99


@pytest.mark.slow
def test_heart_position_within_chest(cohort: Cohort) -> None:
    for image, label in zip(cohort.images, cohort.labels, strict=True):
        at = {
            name: np.array(ndimage.center_of_mass(label == value)) for name, value in LABELS.items()
        }
        assert at["lv"][2] > at["rv"][2] > at["ra"][2]  # columns run to the patient's left
        assert at["la"][1] > at["lv"][1] > at["rv"][1]  # rows run to the back
        assert at["ao"][0] > at["la"][0] > at["lv"][0]  # slices run upwards
        assert at["pa"][2] > at["ao"][2]
        tip = np.argwhere(label == LABELS["myo"])[:, 2].argmax()
        assert (
            np.argwhere(label == LABELS["myo"])[tip][1] < at["lv"][1]
        )  # the apex points left and forwards
        lowest = image[0, 40:80].astype(int)
        assert np.mean(np.abs(lowest[:, 25:60] - 90) < 60) > np.mean(
            np.abs(lowest[:, 68:103] - 90) < 60
        )  # the liver


@pytest.mark.slow
def test_heart_visible_and_varies_between_slices(cohort: Cohort) -> None:
    """Most slices show the heart, and its place varies."""
    share = np.array([(label > 0).any((1, 2)).mean() for label in cohort.labels])
    assert (
        0.9 <= share.mean() <= 0.98 and share.min() > 0.8
    )  # some slices above and below it stay in view
    centre = np.array([2.75, 3.0, 3.0]) * np.array(
        [ndimage.center_of_mass(label > 0) for label in cohort.labels]
    )  # mm
    assert (np.std(centre, axis=0) > [1.5, 2, 3]).all() and (np.ptp(centre, axis=0) < 60).all()


@pytest.mark.slow
def test_phantom_tissue_values_around_heart(cohort: Cohort) -> None:
    lung, fat, bone = [], [], []
    for index, image in enumerate(cohort.images):
        p = phantom.draw(0, index)
        lung.append(np.median(image[(image > -940) & (image < -650)]))
        fat.append(np.median(image[(image > -150) & (image < -60)]))
        row, column = ((p.body[1] + 50 * p.skeleton + 192) / 3, (p.body[0] + 192) / 3)
        bone.append(
            np.median(
                image[:, round(row - 2) : round(row + 2), round(column - 2) : round(column + 2)]
            )
        )
    assert (
        -860 <= np.mean(lung) <= -800
        and -112 <= np.mean(fat) <= -92
        and 160 <= np.mean(bone) <= 260
    )
    edges = np.concatenate([image[:, [0, -1]].ravel() for image in cohort.images])
    assert np.median(edges) == pytest.approx(-1000, abs=5)
    assert all(image.min() >= -1024 and image.max() <= 3071 for image in cohort.images)


def test_pose_rotates_about_heart() -> None:
    pose = heart_pose(phantom.draw(3, 5))
    assert (
        np.allclose(pose.rotation @ pose.rotation.T, np.eye(3))
        and np.linalg.det(pose.rotation) > 0.999
    )
    assert np.allclose(pose.place([0, 0, 0]), pose.origin)
    assert np.linalg.norm(pose.place([30, 0, 0]) - pose.origin) == pytest.approx(30 * pose.scale)


# Physics


def test_noise_spectrum_of_filtered_backprojection() -> None:
    field = noise_field((24, 128, 128), (3.0, 3.0, 3.0), np.random.default_rng(0))
    assert field.std() == pytest.approx(1, abs=0.03)
    frequency = np.hypot(np.fft.fftfreq(128, 3.0)[:, None], np.fft.fftfreq(128, 3.0)[None, :])
    power = (np.abs(np.fft.fft2(field)) ** 2).mean(0)
    low = power[(frequency > 0) & (frequency < 0.02)].mean()
    middle = power[(frequency > 0.08) & (frequency < 0.12)].mean()
    assert low < 0.3 * middle
    neighbour = np.mean(field[1:] * field[:-1])
    assert 0.05 < neighbour < 0.5  # slices overlap slightly
    fine = noise_field((8, 256, 256), (3.0, 1.5, 1.5), np.random.default_rng(0))
    assert 1.2 < fine.std() < 3  # smaller pixels average less of the noise away


def test_noise_peaks_inside_large_patients() -> None:
    """Noise is strongest in the middle of large patients."""
    y, x = np.mgrid[-63.5:64, -63.5:64] * 3.0

    def level(diameter: float) -> NDArray[np.float32]:
        water = np.where(np.hypot(x, y) < diameter / 2, 0.0, -1000.0)
        return noise_level(np.tile(water, (4, 1, 1)), (3.0, 3.0, 3.0), 17.0)[2]

    average = level(250)
    assert average[64, 64] == pytest.approx(17, rel=0.05)
    assert average[64, 64 + 38] < 0.85 * average[64, 64]
    assert level(320)[64, 64] > 1.2 * average[64, 64]


@pytest.mark.slow
def test_phantom_noise_level_in_hu(cohort: Cohort) -> None:
    for index, (image, label) in enumerate(zip(cohort.images, cohort.labels, strict=True)):
        level = noise_level(image.astype(np.float32), (3.0, 3.0, 3.0), phantom.draw(0, index).noise)
        assert 12 <= np.median(level[label > 0]) <= 25
        lung = (image > -940) & (image < -700)
        assert np.median(level[lung]) < np.median(level[label > 0])
        core = ndimage.binary_erosion(label == LABELS["rv"], iterations=3)
        assert 9 <= 1.4826 * np.median(np.abs(image[core] - np.median(image[core]))) <= 30


# Reproducibility, sizes and files


@pytest.mark.slow
def test_phantom_depends_on_seed_index_size(cohort: Cohort, tmp_path: Path) -> None:
    """A patient depends on the seed, the index and the size only."""
    again = phantom.make_patient(0, 3)
    assert np.array_equal(again.hu, cohort.images[3]) and np.array_equal(
        again.labels, cohort.labels[3]
    )
    alone = phantom.generate_cohort(tmp_path / "one", 1, seed=7, size=SMALL, workers=1)
    shared = phantom.generate_cohort(tmp_path / "two", 2, seed=7, size=SMALL, workers=2)
    assert np.array_equal(read(alone[0]), read(shared[0]))
    assert not np.array_equal(read(shared[0]), read(shared[1]))
    other = phantom.make_patient(8, 0, SMALL)
    assert (other.labels != read(tmp_path / "one" / "ct_train_1001_label.nii.gz")).mean() > 0.005


def test_phantom_size_keeps_field_of_view() -> None:
    """A phantom of any size covers the same field of view."""
    small, full = phantom.make_patient(0, 1, SMALL), phantom.make_patient(0, 1)
    assert small.hu.shape == small.labels.shape == SMALL
    assert small.hu.dtype == np.int16 and small.labels.dtype == np.uint16
    assert small.spacing == pytest.approx((4.8, 4.0, 4.125)) and full.spacing == pytest.approx(
        (3, 3, 2.75)
    )
    for value in LABELS.values():
        volumes = [(p.labels == value).sum() * np.prod(p.spacing) for p in (small, full)]
        assert volumes[0] == pytest.approx(volumes[1], rel=0.12)


@pytest.mark.slow
def test_phantom_files_carry_geometry(cohort: Cohort) -> None:
    names = {f"ct_train_{1001 + k}_{kind}.nii.gz" for k in range(24) for kind in ("image", "label")}
    assert {path.name for path in cohort.folder.iterdir()} == names | {"cohort.json"}
    for kind, pixel in (("image", sitk.sitkInt16), ("label", sitk.sitkUInt16)):
        volume = sitk.ReadImage(str(cohort.folder / f"ct_train_1024_{kind}.nii.gz"))
        assert volume.GetPixelID() == pixel and volume.GetSize() == (128, 128, 48)
        assert volume.GetSpacing() == pytest.approx((3, 3, 2.75))
        assert volume.GetDirection() == pytest.approx((1, 0, 0, 0, 1, 0, 0, 0, 1))
        middle = volume.TransformContinuousIndexToPhysicalPoint([63.5, 63.5, 23.5])
        assert middle == pytest.approx((0, 0, 0), abs=1e-4)
    summary = json.loads((cohort.folder / "cohort.json").read_text())
    assert (
        summary["seed"] == 0
        and summary["size"] == [48, 128, 128]
        and len(summary["patients"]) == 24
    )
    assert summary["patients"][5]["case"] == "ct_train_1006"
    assert summary["patients"][5]["heart"] == phantom.draw(0, 5).heart


def test_phantom_command_makes_cohort_quietly(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "train.phantom",
        str(tmp_path / "out"),
        "--patients",
        "1",
        "--quiet",
    ]
    done = subprocess.run(
        [*command, "--size", "32", "32", "32"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert read(tmp_path / "out" / "ct_train_1001_label.nii.gz").shape == (32, 32, 32)


@pytest.mark.parametrize(
    "bad",
    [
        ["--patients", "0"],
        ["--patients", "2", "--size", "16", "128", "128"],
        ["--patients", "2", "--seed", "-1"],
        ["--patients", "many"],
        [],
    ],
)
def test_phantom_bad_arguments_exit_2(bad: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.phantom", str(tmp_path / "out"), *bad]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_phantom_unwritable_folder_exits_4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert run(phantom.main, [str(tmp_path / "file" / "out"), "--patients", "1", "--quiet"]) == 4
    message = capsys.readouterr().err
    assert (
        "out cannot be written: a part of the path is a file" in message
        and "choose another output folder" in message
    )


def test_phantom_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.nii.gz").mkdir()  # a folder where the file should go
    with pytest.raises(OSError, match=r"x\.nii\.gz"):
        phantom.write_volume(tmp_path / "x.nii.gz", np.zeros((4, 4, 4), np.int16), (1.0, 1.0, 1.0))
    assert [path.name for path in tmp_path.iterdir()] == ["x.nii.gz"]
