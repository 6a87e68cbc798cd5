"""Learned layouts: fitted to a cohort, drawn around a mask that comes without tissues."""

from __future__ import annotations

import io
import json
import pickle
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from samples import results, synth, write_fake_model
from scipy import ndimage
from test_given_layout import classes_of, context_manifest

from export.model_folder import copy_layouts
from runtime import Synthesizer
from runtime.core.atomic_files import sha256_of
from runtime.core.errors import ModelError
from runtime.core.layout_model import LAYOUT_FILE, LAYOUT_KIND, LayoutModel
from runtime.core.learned_layout import learned_layout
from runtime.core.manifest import Manifest, ModelFile
from runtime.core.rng import CaseRandom
from runtime.core.tissue_classes import HU_CONTEXT
from runtime.core.volume import Geometry, LabelVolume
from train.checkpoint import load_layouts, load_run
from train.data.pairs import Pair
from train.layouts.cohort import fit_pairs

SHAPE, SPACING = (20, 48, 56), (5.0, 5.0, 5.0)
LABELS, CLASSES = 8, 15  # of the fake model: 7 structures; 7 context classes
GAS, DENSE = 8, 12


def thorax(seed: int) -> tuple[NDArray[np.uint16], NDArray[np.int16]]:
    """A body whose size follows its heart's, with lungs, their vessels, a spine and ribs."""
    rng = np.random.default_rng(seed)
    size = 1 + 0.08 * rng.uniform(-1, 1)
    y0, x0, z0 = 24 + rng.uniform(-1, 1), 28 + rng.uniform(-1, 1), 10 + rng.uniform(-0.7, 0.7)
    z, y, x = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    z, y, x = z - z0, (y - y0) / size, (x - x0) / size
    around = np.hypot(y / 17, x / 23) + 0 * z
    lung = np.hypot(y / 11, x / 17) + 0 * z < 1
    heart = (y + 3) ** 2 + (x - 2) ** 2 + (1.4 * z) ** 2 < 36
    ct = np.where(around < 1, -90, -1000)
    ct = np.where(around < 0.86, 50, ct)
    ct = np.where((abs(around - 0.8) < 0.05) & (np.mod(z + z0, 5) < 2.2), 600, ct)
    ct = np.where(lung, -820, ct)
    for _ in range(30):
        column, row = rng.integers(14, 42), rng.integers(16, 32)
        ct[:, row, column] = np.where(lung[:, row, column], 40, ct[:, row, column])
    spine = (abs(x) < 3) & (abs(y - 13) < 2.5) & (z > -99)
    ct = np.where(spine, 600, ct)
    ct = np.where(heart, 250, ct)
    return np.where(heart, 500, 0).astype(np.uint16), ct.astype(np.int16)


def write(path: Path, values: NDArray[Any]) -> Path:
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(SPACING)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


def grid_of_model() -> Manifest:
    manifest = context_manifest()
    grid = replace(manifest.grid, canvas=(64, 64), pixel_spacing=SPACING[:2])
    return replace(manifest, grid=grid)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> LayoutModel:
    folder, manifest, pairs = tmp_path_factory.mktemp("cohort"), grid_of_model(), []
    for n in range(6):
        mask, ct = thorax(n)
        image, label = write(folder / f"{n}_ct.nii.gz", ct), write(folder / f"{n}.nii.gz", mask)
        pairs.append(Pair(str(n), image, label))
    fitted = fit_pairs(pairs, manifest.labels, manifest.grid, manifest.intensity, HU_CONTEXT)
    assert fitted is not None
    return fitted


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, layouts: LayoutModel) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "drawn", layouts.to_bytes())


def write_model(folder: Path, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LAYOUT_FILE
    path.write_bytes(content)
    stated = ModelFile(LAYOUT_KIND, "fp32", len(content), sha256_of(path))
    return write_fake_model(folder, replace(grid_of_model(), files={LAYOUT_FILE: stated}))


def mask_of(seed: int) -> LabelVolume:
    labels = np.where(thorax(seed)[0] == 500, 3, 0).astype(np.uint8)
    return LabelVolume(labels, Geometry.from_spacing(SPACING))


def drawn(layouts: LayoutModel, mask: LabelVolume, seed: int = 0) -> NDArray[np.uint8]:
    dense = learned_layout(mask, layouts, CaseRandom(seed, b"case", 0))
    assert dense is not None
    return dense.labels


def test_unseen_mask_gets_a_body(layouts: LayoutModel) -> None:
    mask, (_, ct) = mask_of(9), thorax(9)
    dense = drawn(layouts, mask)
    assert np.array_equal(dense[mask.labels > 0], mask.labels[mask.labels > 0])
    assert set(np.unique(dense)) <= {0, 3, *range(LABELS, CLASSES - 1)}
    bone, true = dense == DENSE, ct == 600
    assert 0.75 < bone.sum() / true.sum() < 1.3
    assert 2 * (bone & true).sum() / (bone.sum() + true.sum()) > 0.6
    assert ((dense == 0) == (ct == -1000)).mean() > 0.96


def test_spine_and_ribs_stay_whole(layouts: LayoutModel) -> None:
    """Every slice shows the spine; the lungs' vessels are thin, and there are some."""
    dense = drawn(layouts, mask_of(11), seed=3)
    parts, _ = ndimage.label(dense == DENSE)
    largest = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    assert largest.any((1, 2)).all()
    gas = dense == GAS
    closed = np.stack([ndimage.binary_closing(plane, iterations=2) for plane in gas])
    share = (closed & ~gas & (dense > 3)).sum() / closed.sum()
    assert 0.01 < share < 0.15


def test_seed_and_variant_decide_layout(layouts: LayoutModel) -> None:
    mask = mask_of(9)
    first = drawn(layouts, mask)
    assert np.array_equal(first, drawn(layouts, mask))
    assert 0.005 < (first != drawn(layouts, mask, seed=1)).mean() < 0.3


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("flip", [False, True])
def test_axis_order_keeps_layout(
    layouts: LayoutModel, axes: tuple[int, int, int], flip: bool
) -> None:
    mask = mask_of(9)
    expected = drawn(layouts, mask).transpose(axes)
    affine = mask.geometry.affine[:, [*(2 - axes[2 - n] for n in range(3)), 3]].copy()
    labels = mask.labels.transpose(axes)
    if flip:
        affine[:3, 3] += affine[:3, 0] * (labels.shape[2] - 1)
        affine[:3, 0] *= -1
        labels, expected = labels[:, :, ::-1], expected[:, :, ::-1]
    turned = LabelVolume(np.ascontiguousarray(labels), Geometry(affine))
    assert np.array_equal(drawn(layouts, turned), expected)


def test_other_fields_of_view_are_filled(layouts: LayoutModel) -> None:
    mask = mask_of(9)
    full = drawn(layouts, mask)
    wide = LabelVolume(np.pad(mask.labels, ((6, 9), (10, 4), (3, 8))), mask.geometry)
    inner = drawn(layouts, wide)[6:-9, 10:-4, 3:-8]
    host = (full == GAS) | (inner == GAS)  # vessels are drawn anew
    assert (inner == full)[~host].mean() > 0.97
    fine = LabelVolume(mask.labels.repeat(2, 1).repeat(2, 2), Geometry.from_spacing((2.5, 2.5, 5)))
    assert drawn(layouts, fine).shape == fine.labels.shape
    assert (drawn(layouts, fine)[:, ::2, ::2] == full)[~host].mean() > 0.9


def test_mask_without_label_has_no_layout(layouts: LayoutModel) -> None:
    empty = LabelVolume(np.zeros(SHAPE, np.uint8), Geometry.from_spacing(SPACING))
    assert learned_layout(empty, layouts, CaseRandom(0, b"", 0)) is None


def test_masks_alone_are_synthesized_with_layouts(model: Path, tmp_path: Path) -> None:
    mask = write(tmp_path / "p1.nii.gz", thorax(9)[0])
    out = tmp_path / "out"
    assert synth(model, out, mask, "--resume") == 0
    dense = classes_of(out / "p1_ct.nii.gz")
    assert (dense == DENSE).sum() > 100 and (dense == GAS).sum() > 1000
    first = results(out)
    assert synth(model, out, mask, "--resume") == 0
    assert results(out) == first
    # Another layout is another result: --resume makes it anew.
    assert synth(model, out, mask, "--resume", "--layout", "none") == 0
    assert set(np.unique(classes_of(out / "p1_ct.nii.gz"))) == {3, CLASSES - 1}


def test_batch_and_workers_keep_layouts(model: Path, tmp_path: Path) -> None:
    mask = write(tmp_path / "p1.nii.gz", thorax(9)[0])
    shared = (mask, "--variants", "2", "--seed", "5")
    assert synth(model, tmp_path / "a", *shared, "--batch", "1", "--workers", "1") == 0
    assert synth(model, tmp_path / "b", *shared, "--batch", "7", "--workers", "3") == 0
    assert results(tmp_path / "a") == results(tmp_path / "b")
    one, two = (classes_of(tmp_path / "a" / f"p1_v{n}_ct.nii.gz") for n in range(2))
    assert (one != two).any()


@pytest.mark.parametrize("option", [["--context", "ct.nii.gz"], ["--list"], ["--ray"]])
def test_layout_none_beside_others_is_refused(
    model: Path, tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    mask = write(tmp_path / "p1.nii.gz", thorax(9)[0])
    assert synth(model, tmp_path / "out", mask, "--layout", "none", *option) == 2
    assert "has no effect beside" in capsys.readouterr().err


def test_pickled_model_keeps_its_choice(model: Path) -> None:
    with Synthesizer.open(model, backend="fake") as opened:
        for expected in (True, False):
            with pickle.loads(pickle.dumps(opened)) as again:
                assert again.has_layouts is expected
                assert again.engine == opened.engine
            opened.omit_layouts()


def altered(layouts: LayoutModel, **changes: Any) -> bytes:
    return replace(layouts, **changes).to_bytes()


def repacked(content: bytes, name: str, data: bytes) -> bytes:
    """An npz file with other bytes in one member."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for member in old.namelist():
            new.writestr(member, data if member == f"{name}.npy" else old.read(member))
    return buffer.getvalue()


def header(shape: str, descr: str = "'|u1'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def test_crafted_files_are_refused(layouts: LayoutModel, tmp_path: Path) -> None:
    good = layouts.to_bytes()
    crafted = {
        "torn": good[: len(good) // 2],
        "empty": b"",
        "text": b"no zip at all",
        "huge": repacked(good, "template", header("(99999, 99999, 99999, 6)")),
        "pickled": repacked(good, "modes", header("(1,)", "'|O'") + b"cos\nsystem\n."),
        "deep": repacked(good, "modes", header("(" * 90 + ")" * 90)),
        "unknown class": altered(layouts, classes=layouts.classes + np.uint8(90)),
        "label as tissue": altered(layouts, classes=np.minimum(layouts.classes, 3)),
        "no number": altered(layouts, shared=layouts.shared * np.nan),
        "no spacing": altered(layouts, step=layouts.step * 0),
        "not definite": altered(layouts, covariance=-100 * np.eye(len(layouts.covariance))),
        "too certain": altered(layouts, shared=layouts.shared * 1e3),
        "other labels": altered(layouts, centroids=layouts.centroids[:-1]),
        "flat lattice": altered(layouts, modes=layouts.modes[:, :, :2]),
    }
    for name, content in crafted.items():
        path = tmp_path / LAYOUT_FILE
        path.write_bytes(content)
        with pytest.raises(ModelError, match="cannot be used") as caught:
            LayoutModel.load(path, LABELS, CLASSES)
        assert caught.value.remedy, name
    path.write_bytes(good)
    assert LayoutModel.load(path, LABELS, CLASSES).to_bytes() == good


def test_altered_layout_file_is_noticed(
    layouts: LayoutModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model", layouts.to_bytes())
    (model / LAYOUT_FILE).write_bytes(layouts.to_bytes()[:-1] + b"x")
    mask = write(tmp_path / "p1.nii.gz", thorax(9)[0])
    assert synth(model, tmp_path / "out", mask) != 0
    message = capsys.readouterr().err
    assert "is not the file its manifest describes" in message and "Traceback" not in message


def test_large_mask_takes_little_memory(layouts: LayoutModel) -> None:
    """Beside the mask and the dense map there are a few slices, whatever the volume's depth."""
    labels = np.zeros((100, 512, 512), np.uint8)
    labels[30:70, 180:300, 200:320] = 3
    mask = LabelVolume(labels, Geometry.from_spacing((0.7, 0.7, 1.0)))
    tracemalloc.start()
    try:
        dense = learned_layout(mask, layouts, CaseRandom(0, b"", 0), pixel=SPACING[0])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert dense is not None and set(np.unique(dense.labels)) >= {0, 3, GAS, DENSE}
    assert peak < labels.nbytes + (30 << 20)


def test_few_patients_give_no_layouts(tmp_path: Path) -> None:
    manifest = grid_of_model()
    mask, ct = thorax(0)
    pair = Pair("0", write(tmp_path / "ct.nii.gz", ct), write(tmp_path / "m.nii.gz", mask))
    arguments = (manifest.labels, manifest.grid, manifest.intensity, HU_CONTEXT)
    assert fit_pairs([pair, replace(pair, name="1", synthetic=True)], *arguments) is None
    anywhere = replace(manifest.grid, pixel_spacing=None)
    assert fit_pairs([pair] * 4, manifest.labels, anywhere, *arguments[2:]) is None


def test_equal_patients_give_one_layout(tmp_path: Path) -> None:
    """Nothing differs in such a cohort, so that only the fine branches may."""
    manifest, (mask, ct) = grid_of_model(), thorax(0)
    pair = Pair("0", write(tmp_path / "ct.nii.gz", ct), write(tmp_path / "m.nii.gz", mask))
    pairs = [replace(pair, name=str(n)) for n in range(4)]
    fitted = fit_pairs(pairs, manifest.labels, manifest.grid, manifest.intensity, HU_CONTEXT)
    assert fitted is not None
    dense = drawn(fitted, mask_of(0))
    assert ((dense == DENSE) == (ct == 600)).mean() > 0.98


def test_run_states_its_layouts(layouts: LayoutModel, tmp_path: Path) -> None:
    from train.checkpoint import RUN, TrainedRun, write_layouts

    def run() -> TrainedRun:
        data = json.loads((tmp_path / RUN).read_text())
        return TrainedRun(tmp_path, *([None] * 7), data)  # type: ignore[arg-type]

    (tmp_path / RUN).write_text('{"schema_version": 1}')
    assert load_layouts(run()) is None
    write_layouts(tmp_path, layouts.to_bytes())
    path = load_layouts(run())
    assert path is not None and path.read_bytes() == layouts.to_bytes()
    (tmp_path / "model").mkdir()
    stated = copy_layouts(run(), tmp_path / "model", grid_of_model())
    assert stated is not None and stated.sha256 == sha256_of(tmp_path / "model" / LAYOUT_FILE)
    path.write_bytes(b"other")
    with pytest.raises(ModelError, match="is not the file"):
        load_layouts(run())


@pytest.mark.slow
def test_training_fits_layouts(tmp_path: Path) -> None:
    """From volumes on disk to a run with layouts, which draw a body around a new mask."""
    from train.run import main

    data, run = tmp_path / "data", tmp_path / "run"
    for n in range(6):
        mask, ct = thorax(n)
        write(data / f"p{n}_image.nii.gz", ct)
        write(data / f"p{n}_label.nii.gz", mask)
    settings = ["name=small", "data.context=auto", "data.labels=mm-whs", "data.canvas=[64,64]"]
    settings += ["data.pixel_spacing=[5,5]", "generator.depth=3", "generator.filters=4"]
    settings += ["discriminator.patch_size=4", "training.steps=2", "training.threads=1"]
    config = tmp_path / "config.json"
    config.write_text("{}")
    arguments = ["--config", config, "--dataset-path", data, "--output", run, "--quiet"]
    assert main([*map(str, arguments), "--set", *settings]) == 0
    path = load_layouts(load_run(run))
    assert path is not None
    fitted = LayoutModel.load(path, LABELS, CLASSES)
    dense = drawn(fitted, mask_of(9))
    assert ((dense == 0) == (thorax(9)[1] == -1000)).mean() > 0.95
