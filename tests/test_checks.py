"""The data, looked at before the first step: what the table says, and what cannot be trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from samples import image

from runtime.core.errors import InputError, UsageError
from runtime.core.labels import MM_WHS
from runtime.core.manifest import GridPolicy, Intensity
from train.config import DataConfig
from train.data.dataset import find_pairs, load_cohort

HU = Intensity("HU", -1024, 1024)


def write(
    folder: Path,
    n: int,
    *,
    ct: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    spacing=(2.0, 2.0, 3.0),
) -> None:
    if ct is None:
        ct = np.full((4, 32, 32), -1000, np.int16)
        ct[:, 8:24, 8:24] = 100 + n
    if labels is None:
        labels = np.zeros(ct.shape, np.uint16)
        labels[:, 10:20, 10:20] = 500
    sitk.WriteImage(image(ct, spacing=spacing), str(folder / f"p{n}_image.nii.gz"))
    sitk.WriteImage(image(labels, spacing=spacing), str(folder / f"p{n}_label.nii.gz"))


def cohort(folder: Path, intensity: Intensity = HU):
    return load_cohort(
        find_pairs(folder), DataConfig(), MM_WHS, GridPolicy((32, 32), None, 8), intensity
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n in range(4):
        write(tmp_path, n)
    return tmp_path


def test_data_table_counts_file_contents(folder: Path) -> None:
    ct = np.full((4, 32, 32), -1000, np.int16)
    ct[:, 0] = -3024  # 128 voxels of padding
    ct[0, 5, 5] = 1500
    labels = np.zeros(ct.shape, np.uint16)
    labels[0, :2, :10] = 420
    labels[0, 2, :3] = 421
    write(folder, 1, ct=ct, labels=labels, spacing=(1.5, 2.0, 3.0))
    loaded = cohort(folder)
    text = loaded.table(MM_WHS, HU)
    for line in (
        "train                 3      12",
        "valid                 1       4",
        "1.5..2 x 2 x 3 mm",
        (
            "-3024 to 1500 HU, trained on -1024 to 1024; clipped: 128 voxels below -1024, 1 voxels"
            " above 1024"
        ),
        "420 left atrium                1           23",
        "500 left ventricle             3         1200",
        "3 voxels hold 421, which is read as 420 left atrium",
        (
            "no patient has myocardium, right atrium, right ventricle, ascending aorta, pulmonary"
            " artery"
        ),
    ):
        assert line in text, text


def test_padding_is_clipped_in_training(folder: Path) -> None:
    ct = np.full((4, 32, 32), -2048, np.int16)
    ct[:, 8:24, 8:24] = 40
    write(folder, 0, ct=ct)
    from train.data.dataset import Batches

    loaded = cohort(folder)
    batch = Batches([*loaded.train, *loaded.valid], 16, 0, HU)[0][1]
    assert batch.min() == 0 and batch.max() < 1


def test_eight_bit_greys_refused_as_hu(folder: Path) -> None:
    """Eight-bit grey values are refused where HU are expected, and the message has the remedy."""
    grey = np.zeros((4, 32, 32), np.uint8)
    grey[:, 8:24, 8:24] = 200
    write(folder, 2, ct=grey)
    with pytest.raises(InputError, match=r"p2_image.* from 0 to 200, which are not HU") as caught:
        cohort(folder)
    assert "8-bit greys" in caught.value.remedy and '"a.u."' in caught.value.remedy


def test_intensities_outside_the_range_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="all outside the range"):
        cohort(folder, Intensity("a.u.", 2000, 3000))


def test_unlabelled_volume_is_refused(folder: Path) -> None:
    """The message names the volume."""
    write(folder, 3, labels=np.zeros((4, 32, 32), np.uint16))
    with pytest.raises(InputError, match=r"p3_label\.nii\.gz holds no label"):
        cohort(folder)
    for n in range(3):
        write(folder, n, labels=np.zeros((4, 32, 32), np.uint16))
    with pytest.raises(UsageError, match="no patient has a labelled voxel"):
        cohort(folder)


def test_unusable_patients_are_named_together(folder: Path) -> None:
    """All patients that cannot be used are named in one message."""
    write(folder, 0, ct=np.full((4, 32, 32), np.nan, np.float32))
    write(folder, 2, ct=np.zeros((4, 32, 32), np.uint8))
    (folder / "p3_label.nii.gz").write_text("no volume")
    with pytest.raises(InputError, match="3 of 4 patients cannot be trained on") as caught:
        cohort(folder)
    text = str(caught.value)
    assert (
        "p0_image" in text
        and "p2_image" in text
        and "p3_label" in text
        and "p1" not in text
        and len(text.splitlines()) <= 7
    )
    for n in (1, 3):
        write(folder, n, labels=np.zeros((4, 32, 32), np.uint16))
    for n in (0, 2):
        write(folder, n)
    with pytest.raises(
        InputError,
        match=(
            r"2 of 4 patients cannot be trained on:\n.*p1_label.*holds no label at all\n.*p3_label"
        ),
    ):
        cohort(folder)


def test_image_in_two_splits_is_refused(folder: Path) -> None:
    for n in range(1, 4):
        write(
            folder,
            n,
            ct=np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "p0_image.nii.gz")))),
        )
    with pytest.raises(InputError, match=r"\(train\) and .* \(valid\) hold the same image"):
        cohort(folder)


def test_data_table_precedes_first_step(folder: Path, tmp_path: Path, command) -> None:
    """The table is printed before the first step."""
    config = tmp_path / "c.json"
    config.write_text("{}")
    settings = [
        "data.canvas=[32,32]",
        "generator.depth=3",
        "generator.filters=4",
        "discriminator.patch_size=4",
        "discriminator.filters=4",
        "training.steps=1",
        "training.recalibrate=1",
        "training.batch_size=2",
    ]
    done = command(
        "train/run.py",
        "--config",
        config,
        "--dataset_path",
        folder,
        "--output",
        tmp_path / "run",
        "--set",
        *settings,
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.index("4 patients as MM-WHS volumes")
        < done.stderr.index("500 left ventricle")
        < done.stderr.index("training on")
    )
