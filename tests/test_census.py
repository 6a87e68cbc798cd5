"""Images that were taken for masks: refused in every format, also where the map has "*"; atlases
are not.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_masks import save, slices
from numpy.typing import NDArray
from samples import blobs, image, results, synth, write_mask

from runtime.__main__ import main
from runtime.core.console import run
from runtime.core.errors import UnreadableVolume
from runtime.core.intensity_check import Census
from runtime.core.labels import MM_WHS, to_indices
from runtime.io.case_finding import find_cases
from runtime.io.cases import ReadOptions, read_case

ANY = {0: 0, None: 3}
FORMATS = ("nii.gz", "nii", "nrrd", "mha")


def scan(shape: tuple[int, int, int] = (6, 40, 48), seed: int = 0) -> NDArray[np.int16]:
    """Grey values: air around a body of soft tissue, with noise."""
    rng = np.random.default_rng(seed)
    values = np.full(shape, -1024, np.int16)
    body = (slice(None), slice(6, -6), slice(6, -6))
    values[body] = 40 + rng.normal(0, 30, values[body].shape)
    return values


def atlas() -> NDArray[np.uint16]:
    """150 structures of 2 x 2 x 3 voxels side by side, and 120 vessels of one voxel that lie in
    nothing.
    """
    z, y, x = np.indices((24, 40, 48))
    values = ((z // 3) * 37 + (y // 2) * 11 + x // 2) % 150 + 1
    values[:, :, 30:] = 0
    values[:, ::3, 32::3] = 151 + np.arange(24 * 14 * 6).reshape(24, 14, 6) % 120
    return values.astype(np.uint16)


@pytest.mark.parametrize("suffix", FORMATS)
def test_image_is_refused_as_mask(suffix: str, tmp_path: Path) -> None:
    sitk.WriteImage(image(scan()), str(tmp_path / f"m.{suffix}"))
    (case,) = find_cases([tmp_path / f"m.{suffix}"])
    with pytest.raises(
        UnreadableVolume,
        match=r"m\..* looks like an image, not a mask: \d+ values from -1024 to 1\d\d,",
    ) as caught:
        read_case(case, MM_WHS, ANY)
    assert "--force-labels" in caught.value.remedy and "*" not in caught.value.remedy
    (forced,) = find_cases([tmp_path / f"m.{suffix}"], options=ReadOptions(force_labels=True))
    assert np.array_equal(
        read_case(forced, MM_WHS, {-1024: 0, None: 3}).labels, np.where(scan() == -1024, 0, 3)
    )


def test_integral_floats_are_grey_values(tmp_path: Path) -> None:
    sitk.WriteImage(image(scan().astype(np.float32)), str(tmp_path / "m.nii.gz"))
    with pytest.raises(UnreadableVolume, match="looks like an image"):
        read_case(find_cases([tmp_path / "m.nii.gz"])[0], MM_WHS, ANY)


def test_an_image_in_memory_is_refused() -> None:
    with pytest.raises(UnreadableVolume, match="the mask looks like an image"):
        to_indices(scan(), MM_WHS, ANY)


def test_an_atlas_is_a_mask() -> None:
    values = atlas()
    assert len(np.unique(values)) > 250
    assert np.array_equal(to_indices(values, MM_WHS, ANY), np.where(values == 0, 0, 3))
    coarse = np.kron(
        np.random.default_rng(1).permutation(8 * 10 * 12).reshape(8, 10, 12),
        np.ones((3, 3, 3), int),
    )
    assert np.array_equal(to_indices(coarse, MM_WHS, {None: 3}), np.full(coarse.shape, 3))


def test_the_census_counts_as_numpy_does() -> None:
    for values in (
        blobs((5, 9, 11)),
        atlas()[:4],
        np.zeros((2, 3, 4), np.uint8),
        np.arange(60).reshape(3, 4, 5),
    ):
        census = Census.of(values)
        assert dict(census.voxels) == dict(
            zip(*map(np.ndarray.tolist, np.unique(values, return_counts=True)), strict=True)
        )
        background = max(census.voxels, key=lambda v: census.voxels[v])
        flat = values.reshape(len(values), -1)
        inside = (flat[:, 1:] != background) & (flat[:, :-1] != background)
        part, pairs = census.different()
        assert pairs == inside.sum()
        assert part == pytest.approx((inside & (flat[:, 1:] != flat[:, :-1])).sum() / max(1, pairs))


def test_command_summarizes_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mask(tmp_path / "m.nii.gz", scan())
    assert run(main, ["labels", str(tmp_path / "m.nii.gz")]) == 1
    captured = capsys.readouterr()
    assert (
        captured.out == ""
        and "looks like an image" in captured.err
        and len(captured.err.splitlines()) <= 4
    )
    assert run(main, ["labels", str(tmp_path / "m.nii.gz"), "--force-labels"]) == 1
    assert capsys.readouterr().out.count("UNKNOWN") > 100


def test_forced_mask_changes_resume_key(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mask that is read as such by force has a resume key of its own."""
    mask, labels, out = (
        write_mask(tmp_path / "m.nii.gz", scan()),
        tmp_path / "map.json",
        tmp_path / "out",
    )
    labels.write_text(json.dumps({"-1024": "background", "*": "left ventricle"}))
    assert synth(fake_model, out, mask, "--labels", labels) == 1
    assert "looks like an image" in capsys.readouterr().err and not results(out)
    assert synth(fake_model, out, mask, "--labels", labels, "--force-labels") == 0
    made = results(out)
    assert len(made) == 1
    assert synth(fake_model, out, mask, "--labels", labels, "--resume") == 1  # not taken for done


def test_a_forced_series_is_read(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 400, (4, 40, 40)).astype(np.uint16)
    folder = save(tmp_path / "s", slices(values, Modality="MR"))
    with pytest.raises(UnreadableVolume, match="an MR image, not a mask"):
        read_case(find_cases([folder])[0], MM_WHS, ANY)
    (case,) = find_cases([folder], options=ReadOptions(force_labels=True))
    assert np.array_equal(read_case(case, MM_WHS, ANY).labels, np.where(values == 0, 0, 3))


def test_real_images_are_no_masks(real_data: Path) -> None:
    """Real images are refused as masks, and real masks are not.

    All CTs and MRs of two data sets and of three single ones, and their masks.
    """
    pairs = [
        (kind, path)
        for name in ("head_neck_ct", "hippocampus_mr")
        for kind in ("images", "labels")
        for path in sorted((real_data / name).glob(f"{kind}T?/*.nii.gz"))
    ]
    pairs += [
        ("images", real_data / name)
        for name in (
            "abdomen_3mm/ct.nii.gz",
            "abdomen_3mm_small/ct.nii.gz",
            "lung_mha/Testing/Baselines/3DCT_lung.mha",
        )
    ]
    pairs += [
        ("labels", real_data / name)
        for name in (
            "abdomen_3mm/labels.nii.gz",
            "abdomen_3mm_small/labels.nii.gz",
            "lung_mha/3DCT_lung_baseline_mask.mha",
        )
    ]
    caught = {
        kind: [
            Census.of(sitk.GetArrayFromImage(sitk.ReadImage(os.fspath(path)))).is_image()
            for k, path in pairs
            if k == kind
        ]
        for kind in ("images", "labels")
    }
    assert len(caught["images"]) == len(caught["labels"]) == 223
    assert all(caught["images"]) and not any(caught["labels"])
