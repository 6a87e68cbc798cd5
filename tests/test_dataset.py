"""Patients in, slices out: the split, the canvas, the batches, and folders that cannot be
trained on.
"""

from __future__ import annotations

import functools
import operator
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from samples import image

from runtime.core.errors import InputError, Mask2CTError, UnknownLabels, UsageError
from runtime.core.labels import MM_WHS
from runtime.core.manifest import GridPolicy, Intensity
from train.config import DataConfig
from train.data.dataset import (
    Batches,
    Cohort,
    Slices,
    find_pairs,
    fit,
    from_unit,
    load_cohort,
    load_patient,
    noise_bytes,
    slice_counts,
    split,
    to_unit,
)

HU = Intensity("HU", -1024, 1024)
POLICY = GridPolicy((32, 32), None, 8)


def write_patient(
    folder: Path,
    name: str,
    *,
    shape=(4, 32, 32),
    low=-1000,
    value=500,
    spacing=(2.0, 2.0, 3.0),
    label_spacing=None,
) -> None:
    ct = np.full(shape, low, np.int16)
    ct[:, 8:24, 8:24] = 300
    ct[:, -1, -1] += int(name[1:])  # nobody's image is another's
    labels = np.zeros(shape, np.uint16)
    labels[:, 10:20, 10:20] = value
    sitk.WriteImage(image(ct, spacing=spacing), str(folder / f"{name}_image.nii.gz"))
    sitk.WriteImage(
        image(labels, spacing=label_spacing or spacing), str(folder / f"{name}_label.nii.gz")
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n in range(3):
        write_patient(tmp_path, f"p{n}")
    return tmp_path


def load(folder: Path) -> Cohort:
    return load_cohort(find_pairs(folder), DataConfig(), MM_WHS, POLICY, HU)


def test_cohort_is_read_onto_canvas(folder: Path) -> None:
    cohort = load(folder)
    assert cohort.summary()["patients"] == {"train": 2, "valid": 1, "test": 0}
    assert cohort.summary()["slices"] == {"train": 8, "valid": 4, "test": 0}
    slices = cohort.valid[0]
    assert slices.labels.dtype == np.uint8 and slices.labels.shape == (4, 1, 32, 32)
    assert slices.image.dtype == np.int16 and slices.image.shape == (4, 32, 32)
    assert set(np.unique(slices.labels)) == {0, MM_WHS.by_name["left ventricle"]}
    assert slices.image[0, 0, 0] == -1000 and slices.image[0, 16, 16] == 300
    assert cohort.digest == load(folder).digest and len(cohort.digest) == 64


def test_slices_are_counted_from_headers(folder: Path) -> None:
    write_patient(folder, "p3", shape=(7, 32, 32))
    assert slice_counts(find_pairs(folder), POLICY) == [4, 4, 4, 7]


def test_split_by_patient_has_no_leakage() -> None:
    """The split is by patient and seeded, and no patient is in two of its parts."""
    data = DataConfig(train_ratio=0.7, valid_ratio=0.2)
    parts = split(20, data)
    assert {name: len(numbers) for name, numbers in parts.items()} == {
        "train": 14,
        "valid": 4,
        "test": 2,
    }
    assert sorted(functools.reduce(operator.iadd, parts.values(), [])) == list(range(20))
    assert split(20, data) == parts != split(20, replace(data, split_seed=1))
    for count in range(
        3, 30
    ):  # the original's ratios leave nobody to validate with below 25 patients
        assert min(len(split(count, DataConfig())[name]) for name in ("train", "valid")) >= 1


def test_fit_is_about_the_centre() -> None:
    """Slices are cropped and padded about the centre."""
    plane = np.arange(16).reshape(4, 4)
    assert fit(plane, (2, 2), 0).tolist() == [[5, 6], [9, 10]]
    padded = fit(plane, (6, 8), -1)
    assert (
        padded.shape == (6, 8)
        and np.array_equal(padded[1:5, 2:6], plane)
        and (padded == -1).sum() == 48 - 16
    )
    assert fit(np.zeros((3, 5, 4)), (2, 6), 0).shape == (3, 2, 6)
    assert np.array_equal(fit(plane, (4, 4), 0), plane)


def test_intensities_survive_unit_range() -> None:
    """Intensities go to the unit range and back."""
    values = np.array([-3000, -1024, 0, 17, 1024, 3000], np.int16)
    unit = to_unit(values, HU)
    assert unit.dtype == np.float32 and unit.tolist()[:3] == [0, 0, 0.5]
    assert from_unit(unit, HU).tolist() == [-1024, -1024, 0, 17, 1024, 1024]


def plans(count: int) -> Slices:
    """Slices that can be told apart by their value."""
    planes = np.arange(count, dtype=np.int16)
    return Slices(
        np.zeros((count, 1, 2, 2), np.uint8), np.broadcast_to(planes[:, None, None], (count, 2, 2))
    )


def test_seed_and_step_determine_batches() -> None:
    one, other = (Batches([plans(10)], 4, 7, HU) for _ in range(2))
    for step in (0, 5, 1000):
        for a, b in zip(one[step], other[step], strict=True):
            assert np.array_equal(a, b)
    assert not np.array_equal(one[0][2], one[1][2]) and not np.array_equal(
        one[0][2], Batches([plans(10)], 4, 8, HU)[0][2]
    )
    labels, ct, noise = one[0]
    assert (labels.dtype, ct.dtype, noise.dtype) == (np.uint8, np.float32, np.uint8)
    assert labels.shape == ct.shape == noise.shape == (4, 1, 2, 2)


def test_an_epoch_shows_every_slice_once() -> None:
    batches = Batches([plans(6), plans(4)], 4, 0, HU)  # 10 slices, batches straddle epochs
    seen = [from_unit(batches[step][1], HU)[:, 0, 0, 0] for step in range(5)]
    shown = np.concatenate(seen)
    expected = sorted([*range(6), *range(4)])
    assert (
        sorted(shown[:10]) == expected
        and sorted(shown[10:]) == expected
        and list(shown[:10]) != list(shown[10:])
    )


def test_noise_is_white_and_uniform() -> None:
    noise = noise_bytes((4, 64, 64), 3, 9).astype(float)
    assert abs(noise.mean() - 127.5) < 2 and abs(noise.std() - 73.9) < 1
    assert abs(np.corrcoef(noise[:, :, 1:].ravel(), noise[:, :, :-1].ravel())[0, 1]) < 0.03


def test_policy_takes_neighbouring_slices(folder: Path) -> None:
    """Neighbouring slices are taken when the grid policy asks for them."""
    policy = GridPolicy((32, 32), None, 8, slices=3, slice_spacing=3.0)
    assert load_patient(find_pairs(folder)[0], MM_WHS, policy, HU).labels.shape == (4, 3, 32, 32)


def bad_folder_empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def bad_folder_lonely(folder: Path) -> None:
    (folder / "p1_label.nii.gz").unlink()


def bad_folder_two(folder: Path) -> None:
    for path in folder.glob("p2*"):
        path.unlink()


def bad_folder_missing(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (bad_folder_empty, "no pair"),
        (bad_folder_lonely, "p1_label.nii.gz"),
        (bad_folder_two, "2 patient"),
        (bad_folder_missing, "does not exist"),
    ],
)
def test_a_folder_without_patients_is_refused(folder: Path, spoil, says: str) -> None:
    spoil(folder)
    with pytest.raises(UsageError) as caught:
        load(folder)
    assert (
        says in str(caught.value)
        and caught.value.exit_code == 2
        and len(str(caught.value).splitlines()) <= 4
    )


def test_patient_with_bad_file_is_named(folder: Path) -> None:
    cases: list[tuple[dict, type[Mask2CTError], str]] = [
        ({"label_spacing": (2.0, 2.0, 3.1)}, InputError, "mm off its image"),
        ({"low": 0}, InputError, "not HU"),
        ({"value": 7}, UnknownLabels, "7"),
    ]
    for settings, error, says in cases:
        write_patient(folder, "p1", **settings)
        with pytest.raises(error) as caught:
            load(folder)
        assert (
            says in str(caught.value) and "p1" in str(caught.value) and caught.value.exit_code == 1
        )
        assert len(str(caught.value).splitlines()) <= 4


def test_label_map_of_other_size(folder: Path) -> None:
    """A label map whose size differs from its image's is named."""
    sitk.WriteImage(
        image(np.zeros((4, 32, 30), np.uint16), spacing=(2.0, 2.0, 3.0)),
        str(folder / "p1_label.nii.gz"),
    )
    with pytest.raises(InputError, match="p1_label"):
        load(folder)


def test_cohort_without_labels_is_refused(folder: Path) -> None:
    for n in range(3):
        write_patient(folder, f"p{n}", value=0)
    with pytest.raises(UsageError, match="no patient has a labelled voxel"):
        load(folder)


def test_arbitrary_units_are_accepted(folder: Path) -> None:
    """Intensities that are not HU are accepted as arbitrary units."""
    write_patient(folder, "p1", low=0)
    assert (
        load_cohort(
            find_pairs(folder), DataConfig(), MM_WHS, POLICY, Intensity("a.u.", -1000, 1000)
        ).summary()["patients"]["train"]
        == 2
    )
