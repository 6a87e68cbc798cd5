"""A layout that is given: the tissues around a mask come from its own CT (`--context`)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from samples import results, synth, write_fake_model

from runtime import Synthesizer
from runtime.core.context import Context
from runtime.core.deformation import DeformationParams, MaskDeformer
from runtime.core.layout import dense_volume
from runtime.core.manifest import Manifest
from runtime.core.tissue_classes import HU_CONTEXT, classes_of_volume
from runtime.core.volume import Geometry, LabelVolume
from runtime.engines.fake import FakeEngine, fake_manifest
from runtime.io.readers.volume import read_volume

SHAPE = (8, 40, 44)
SPACING = (3.0, 3.0, 4.0)


def context_manifest() -> Manifest:
    manifest = fake_manifest(noise=False)
    classes = len(manifest.labels) + len(HU_CONTEXT)
    context = replace(HU_CONTEXT, medians=(0.0,) * classes)
    return replace(manifest, context=context)


def context() -> Context:
    rule = context_manifest().context
    assert rule is not None
    return rule


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_model(tmp_path_factory.mktemp("models") / "dense", context_manifest())


def pair(bone: int = 6) -> tuple[NDArray[np.uint16], NDArray[np.int16]]:
    """A heart in a body with lungs and a spine of `bone` voxels, and its CT."""
    d, h, w = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    body = (((h - 20) / 16) ** 2 + ((w - 22) / 19) ** 2 + 0 * d) < 1
    lung = (((h - 18) / 10) ** 2 + ((w - 22) / 15) ** 2 + 0 * d) < 1
    heart = ((h - 20) ** 2 + (w - 25) ** 2 + (2 * (d - 4)) ** 2) < 49
    spine = (abs(w - 22) < bone / 2) & (abs(h - 31) < 3) & (d >= 0)
    ct = np.where(body, -80, -1000)
    ct = np.where(lung, -820, ct)
    ct = np.where(spine, 600, ct)
    ct = np.where(heart, 250, ct)
    return np.where(heart, 500, 0).astype(np.uint16), ct.astype(np.int16)


def write(path: Path, values: NDArray[Any], axes: tuple[int, int, int] = (0, 1, 2)) -> Path:
    """Write an array; `axes` turns the file's axes and not the patient."""
    moved = sitk.GetImageFromArray(values)
    moved.SetSpacing(SPACING)
    moved = sitk.PermuteAxes(moved, [2 - axes[2 - n] for n in range(3)])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(moved, str(path))
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    mask, ct = pair()
    return write(tmp_path / "m" / "p1.nii.gz", mask), write(tmp_path / "c" / "p1.nii.gz", ct)


def classes_of(path: Path) -> NDArray[np.int64]:
    """The model index of every voxel: the fake engine gives each class a value of its own."""
    values, count = read_volume(path).values, context_manifest().classes
    return np.rint((values + 1024) / (2048 / (count - 1))).astype(np.int64)


def test_ct_decides_tissues_around_mask(
    model: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    mask, ct = files
    assert synth(model, tmp_path / "out", mask, "--context", ct) == 0
    dense, hu, labels = classes_of(tmp_path / "out" / "p1_ct.nii.gz"), read_volume(ct).values, 8
    assert set(dense[read_volume(mask).values == 500]) == {3}
    for value, name in ((600, "dense"), (-820, "gas"), (-80, "fat")):
        expected = context().index(name, labels)
        share = (dense[hu == value] == expected).mean()
        assert share > 0.8, name
    assert not dense[:, 0].any()


def test_one_field_moves_mask_and_tissues(
    model: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    mask, ct = files
    out = tmp_path / "out"
    assert synth(model, out, mask, "--context", ct, "--variants", "3", "--seed", "5") == 0
    volume = read_volume(mask)
    labels = np.where(volume.values == 500, 3, 0).astype(np.uint8)
    source = LabelVolume(labels, volume.geometry)
    tissues = classes_of_volume(
        read_volume(ct).values, volume.geometry, context(), 8, context_manifest().grid
    )
    for number in range(3):
        deformed, field = MaskDeformer(source, DeformationParams(), 5).deformed(number)
        expected = dense_volume(deformed.volume, tissues, field).labels
        dense = classes_of(out / f"p1_v{number}_ct.nii.gz")
        # The CT is resampled from the canvas, so that only edges may differ.
        assert (dense == expected).mean() > 0.85
        heart = read_volume(out / f"p1_v{number}_mask.nii.gz").values == 500
        assert np.array_equal(heart, expected == 3)
        assert (field is None) == (number == 0)


def test_resume_follows_the_ct(model: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    mask, ct = files
    out = tmp_path / "out"
    arguments = (mask, "--context", ct, "--resume")
    assert synth(model, out, *arguments) == 0
    first = results(out)
    state = (out / "p1_ct.nii.gz").stat()
    assert synth(model, out, *arguments) == 0
    assert (out / "p1_ct.nii.gz").stat().st_mtime_ns == state.st_mtime_ns
    write(ct, pair(bone=12)[1])
    assert synth(model, out, *arguments) == 0
    assert results(out) != first


def test_batch_and_workers_keep_bytes(
    model: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    mask, ct = files
    shared = (mask, "--context", ct, "--variants", "2")
    assert synth(model, tmp_path / "a", *shared, "--batch", "1", "--workers", "1") == 0
    assert synth(model, tmp_path / "b", *shared, "--batch", "7", "--workers", "3") == 0
    assert results(tmp_path / "a") == results(tmp_path / "b")


@pytest.mark.parametrize("axes", [(1, 0, 2), (2, 1, 0), (1, 2, 0)])
def test_axis_order_keeps_tissues(axes: tuple[int, int, int]) -> None:
    _, ct = pair()
    # Array axis n of the turned volume is axis axes[n] of the axial one.
    affine = Geometry.from_spacing(SPACING).affine
    turned = affine[:, [*(2 - axes[2 - n] for n in range(3)), 3]]
    expected = classes_of_volume(
        ct, Geometry(affine), context(), 8, context_manifest().grid
    ).transpose(axes)
    tissues = classes_of_volume(
        ct.transpose(axes), Geometry(turned), context(), 8, context_manifest().grid
    )
    assert np.array_equal(tissues, expected)


def test_tissues_do_not_widen_canvas() -> None:
    """The canvas has 96 mm; the body has 114, the heart 42."""
    mask, ct = pair()
    manifest, geometry = context_manifest(), Geometry.from_spacing(SPACING)
    tissues = classes_of_volume(ct, geometry, context(), 8, manifest.grid)
    labels = np.where(mask == 500, 3, 0).astype(np.uint8)
    dense = dense_volume(LabelVolume(labels, geometry), tissues)
    with Synthesizer(manifest, FakeEngine(manifest)) as opened:
        assert opened.grid(dense).size == (32, 32)
        # Expert labels of that extent do widen it.
        assert opened.grid(LabelVolume(np.minimum(dense.labels, 7), geometry)).size > (32, 32)


def test_arrays_give_the_layout_of_files(
    model: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    mask, ct = files
    assert synth(model, tmp_path / "out", mask, "--context", ct, "--seed", "3") == 0
    with Synthesizer.open(model, backend="fake") as opened:
        source = read_volume(mask)
        volume = opened.volume(source.values, source.geometry)
        dense = opened.with_tissues(volume, read_volume(ct).values)
        assert np.array_equal(opened.values(dense), source.values)
        assert np.array_equal(
            opened.synthesize(dense, seed=3), read_volume(tmp_path / "out" / "p1_ct.nii.gz").values
        )


def test_mask_without_ct_fails_alone(
    model: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask, ct = files
    write(mask.parent / "p2.nii.gz", pair()[0])
    assert synth(model, tmp_path / "out", mask.parent, "--context", ct.parent) == 1
    assert "there is no CT for p2.nii.gz" in capsys.readouterr().err
    assert (tmp_path / "out" / "p1_ct.nii.gz").exists()
    assert not (tmp_path / "out" / "p2_ct.nii.gz").exists()


@pytest.mark.parametrize("extra", [["--warp", "ct.nii.gz"], ["--list"], ["--ray"]])
def test_context_beside_other_modes_is_refused(
    model: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    extra: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    mask, ct = files
    assert synth(model, tmp_path / "out", mask, "--context", ct, *extra) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_model_without_context_is_refused(
    fake_model: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mask, ct = files
    assert synth(fake_model, tmp_path / "out", mask, "--context", ct) == 2
    assert "has no context classes" in capsys.readouterr().err


def test_each_ct_has_its_dicom_study(model: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    mask, ct = files
    other = write(tmp_path / "other" / "p1.nii.gz", pair(bone=12)[1])
    instances = []
    for name, image in (("a", ct), ("b", other), ("c", None)):
        extra = () if image is None else ("--context", image)
        assert synth(model, tmp_path / name, mask, "--format", "dicom", *extra) == 0
        first = min((tmp_path / name / "p1").glob("*.dcm"))
        instances.append(pydicom.dcmread(first, stop_before_pixels=True))
    assert len({instance.StudyInstanceUID for instance in instances}) == 3
    assert ["layout of the CT" in i.DerivationDescription for i in instances] == [True, True, False]
    assert {i.SyntheticData for i in instances} == {"YES"}


def test_audit_line_names_the_ct(model: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    mask, ct = files
    log = tmp_path / "audit.jsonl"
    assert synth(model, tmp_path / "out", mask, "--context", ct, "--audit", log) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    digests = [line["image_sha256"] for line in lines if "image_sha256" in line]
    assert len(digests) == 1 and len(digests[0]) == 64


def test_ct_on_another_grid_is_refused(
    model: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask, _ = files
    small = write(tmp_path / "other" / "p1.nii.gz", pair()[1][1:])
    assert synth(model, tmp_path / "out", mask, "--context", small) == 1
    message = capsys.readouterr().err
    assert "are not on one grid" in message and "Traceback" not in message
    assert not results(tmp_path / "out")
