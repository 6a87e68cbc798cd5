"""Data sets as people have them: MSD, pictures, one file per class, with synthetic cases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from PIL import Image
from samples import blobs, image, synth, write_mask

from runtime.core.errors import InputError, Mask2CTError, UsageError
from train.config import DataConfig, RunConfig, label_table, resolve
from train.data.dataset import Cohort, assign
from train.data.inference import infer_from_data
from train.data.layouts import find
from train.loop import open_cohort

SMALL = (
    "data.canvas=[32,32]",
    "generator.depth=3",
    "discriminator.patch_size=4",
    "training.threads=1",
)
GREYS = 'intensity={"unit": "a.u.", "low": 0, "high": 255}'


def config_for(path: Path, *settings: str) -> RunConfig:
    return infer_from_data(resolve({}, [*SMALL, *settings], dataset_path=str(path)))[0]


def cohort_of(path: Path, *settings: str) -> Cohort:
    return open_cohort(config_for(path, *settings), path, quiet=True)


def labels_of(*names: str) -> str:
    rows = [{"name": name, "value": n} for n, name in enumerate(("background", *names))]
    return f"data.labels={json.dumps(rows)}"


def write_case(image_file: Path, label_file: Path, n: int, value: int = 1) -> None:
    ct = np.full((3, 32, 32), -1000, np.int16)
    ct[:, 8:24, 8:24] = 10 * n
    labels = np.zeros(ct.shape, np.uint8)
    labels[:, 10:20, 10:20] = value
    for path, values in ((image_file, ct), (label_file, labels)):
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image(values), str(path))


def grey_pair(n: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    grey = np.random.default_rng(n).integers(0, 60, (40, 48)).astype(np.uint8)
    label = np.zeros(grey.shape, np.uint8)
    label[10:30, 12:36] = 1
    return grey + 150 * label, label


def write_pictures(folder: Path, count: int = 5, suffix: str = ".png") -> Path:
    for n in range(count):
        for kind, values in zip(("images", "labels"), grey_pair(n), strict=True):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(folder / kind / f"{n}{suffix}")
    return folder


def write_classes(folder: Path, patients: int = 4) -> Path:
    for n in range(patients):
        place = folder / f"s{n:04d}"
        write_case(place / "ct.nii.gz", place / "segmentations" / "liver.nii.gz", n)
        spleen = np.zeros((3, 32, 32), np.uint8)
        spleen[:, 19:23, 10:20] = 1
        sitk.WriteImage(image(spleen), str(place / "segmentations" / "spleen.nii.gz"))
    return folder


def test_decathlon_layout_is_read(tmp_path: Path) -> None:
    for n in range(4):
        write_case(tmp_path / f"imagesTr/c_{n}.nii.gz", tmp_path / f"labelsTr/c_{n}.nii.gz", n)
    stated = {"name": "Liver", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver"}}
    (tmp_path / "dataset.json").write_text(json.dumps(stated))
    layout = find(tmp_path, DataConfig())
    assert "MSD" in layout.says and (layout.name, layout.modality) == ("Liver", "CT")
    assert cohort_of(tmp_path).summary()["slices"] == {"train": 9, "valid": 3, "test": 0}


def test_own_decathlon_output_is_read(fake_model: Path, tmp_path: Path) -> None:
    """Synthetic cases alone are refused; beside real ones they only train."""
    out, masks = tmp_path / "set", [write_mask(tmp_path / f"p{n}.nii.gz") for n in range(3)]
    assert synth(fake_model, out, *masks, "--format", "msd", "--variants", "2") == 0
    with pytest.raises(UsageError, match="holds synthetic images alone"):
        find(out, DataConfig())
    for n in range(2):
        write_case(out / f"imagesTr/p{n}.nii.gz", out / f"labelsTr/p{n}.nii.gz", n)
    with pytest.raises(UsageError, match=r"holds 2 patient\(s\) besides synthetic cases"):
        find(out, DataConfig())
    write_case(out / "imagesTr/p2.nii.gz", out / "labelsTr/p2.nii.gz", 2)
    layout = find(out, DataConfig())
    assert "6 of these images are synthetic" in layout.says
    made = sorted(pair.who for pair in layout.pairs if pair.synthetic)
    assert made == ["p0", "p0", "p1", "p1", "p2", "p2"]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_picture_folders_are_read(suffix: str, tmp_path: Path) -> None:
    write_pictures(tmp_path, suffix=suffix)
    cohort = cohort_of(tmp_path, GREYS, labels_of("organ"))
    assert cohort.summary()["slices"] == {"train": 4, "valid": 1, "test": 0}
    assert cohort.train[0].labels.max() == 1 and cohort.train[0].image.max() > 150
    with pytest.raises(InputError, match="is a picture, which states no pixel spacing"):
        cohort_of(tmp_path, GREYS, labels_of("organ"), "data.pixel_spacing=[1,1]")


def test_picture_table_is_read(tmp_path: Path) -> None:
    write_pictures(tmp_path / "p", count=6)
    rows = [f"p/images/{n}.png,p/labels/{n}.png,{n // 2}" for n in range(6)]
    (tmp_path / "pairs.csv").write_text("image,label,patient\n" + "\n".join(rows) + "\n")
    cohort = cohort_of(tmp_path / "pairs.csv", GREYS, labels_of("organ"))
    assert cohort.summary()["slices"] == {"train": 4, "valid": 2, "test": 0}


def test_picture_splits_and_patients(tmp_path: Path) -> None:
    """Folders train and val are splits; numbers at the end of names count a patient's slices."""
    for split in ("train", "val"):
        write_pictures(tmp_path / "a" / split, count=4)
    for kind in ("images", "labels"):
        for n, file in enumerate(sorted((tmp_path / "a/val" / kind).iterdir())):
            file.rename(file.with_name(f"v{n}.png"))
    layout = find(tmp_path / "a", DataConfig())
    assert assign(layout.pairs, DataConfig()) == {
        "train": [0, 1, 2, 3],
        "valid": [4, 5, 6, 7],
        "test": [],
    }
    write_pictures(tmp_path / "b", count=8)
    for kind in ("images", "labels"):
        for n in range(8):
            file = tmp_path / "b" / kind / f"{n}.png"
            file.rename(file.with_name(f"p{n // 2}_slice{n:03d}.png"))
    pairs = find(tmp_path / "b", DataConfig()).pairs
    assert {pair.who for pair in pairs} == {"p0", "p1", "p2", "p3"}


def test_picture_pages_and_palettes(tmp_path: Path) -> None:
    """The pages of a TIFF are slices, 16 bits are kept, and a palette's indices are labels."""
    write_pictures(tmp_path, count=3)
    for n in range(3):
        pages = [Image.fromarray(grey_pair(9 * n + k)[0].astype(np.uint16) * 9) for k in range(2)]
        pages[0].save(tmp_path / "images" / f"{n}.tif", save_all=True, append_images=pages[1:])
        labels = [Image.fromarray(grey_pair(9 * n + k)[1]) for k in range(2)]
        labels[0].save(tmp_path / "labels" / f"{n}.tif", save_all=True, append_images=labels[1:])
        for kind in ("images", "labels"):
            (tmp_path / kind / f"{n}.png").unlink()
    grey, label = grey_pair(7)
    palette = Image.fromarray(label).convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putdata(label.ravel().tolist())
    Image.fromarray(grey.astype(np.uint16) * 9).save(tmp_path / "images/x.png")
    palette.save(tmp_path / "labels/x.png")
    wide = 'intensity={"unit": "a.u.", "low": 0, "high": 2000}'
    config = config_for(tmp_path, wide, labels_of("organ"), "data.split_seed=1")
    cohort = open_cohort(config, tmp_path, quiet=True)
    slices = [len(patient) for patient in (*cohort.train, *cohort.valid)]
    assert sorted(slices) == [1, 2, 2, 2]
    assert max(patient.image.max() for patient in cohort.train) > 255
    assert all(patient.labels.max() == 1 for patient in (*cohort.train, *cohort.valid))


def test_unusable_pictures_are_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path, count=4)
    colours = np.zeros((40, 48, 3), np.uint8)
    colours[5:20, :, 0] = 200
    Image.fromarray(colours).save(tmp_path / "labels/1.png")
    (tmp_path / "labels/2.png").unlink()
    Image.fromarray(grey_pair(2)[1]).save(tmp_path / "labels/2.jpg")
    (tmp_path / "images/3.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(Mask2CTError) as caught:
        cohort_of(tmp_path, GREYS, labels_of("organ"))
    text = str(caught.value)
    assert "1.png has colours (2 of them)" in text and "2.jpg is a JPEG" in text
    assert "3.png" in text and "Traceback" not in text


def test_class_folders_are_read(tmp_path: Path) -> None:
    """TotalSegmentator's values are kept, and the first class wins where two overlap."""
    write_classes(tmp_path)
    config = config_for(tmp_path)
    assert str(label_table(config.data)) == "0 background, 1 spleen, 5 liver"
    cohort = open_cohort(config, tmp_path, cache=tmp_path / "cache", quiet=True)
    counts = [int((cohort.train[0].labels == n).sum()) for n in (1, 2)]
    assert counts == [3 * 40, 3 * 90]
    facts = cohort.train[0].facts
    assert facts is not None and {value for value in facts.voxels if value} == {1, 5}
    (tmp_path / "s0001" / "ct.nii.gz").unlink()
    with pytest.raises(UsageError, match=r"s0001 has no ct\.nii\.gz"):
        find(tmp_path, DataConfig())


def test_changed_class_file_is_noticed(tmp_path: Path) -> None:
    """The cache of decoded slices knows every file of the classes."""
    write_classes(tmp_path)
    config = config_for(tmp_path)
    first = open_cohort(config, tmp_path, cache=tmp_path / "cache", quiet=True)
    file = tmp_path / "s0000/segmentations/liver.nii.gz"
    sitk.WriteImage(image(np.zeros((3, 32, 32), np.uint8)), str(file))
    assert open_cohort(config, tmp_path, cache=tmp_path / "cache", quiet=True).digest != (
        first.digest
    )


def write_mixed_set(fake_model: Path, folder: Path, patients: int = 5) -> Path:
    """An nnU-Net set of real cases with two synthetic variants of each."""
    for n in range(patients):
        labels = blobs(values=tuple(range(8)), seed=n).astype(np.uint8)
        ct = np.where(labels, labels.astype(np.int16) * 50, -1000).astype(np.int16)
        for file, values in (
            (folder / f"imagesTr/p{n}_0000.nii.gz", ct),
            (folder / f"labelsTr/p{n}.nii.gz", labels),
        ):
            file.parent.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(image(values), str(file))
    masks = sorted((folder / "labelsTr").iterdir())
    line = ["--format", "nnunet", "--labels", "mm-whs-indices", "--variants", "2"]
    assert synth(fake_model, folder, *masks, *line) == 0
    return folder


def test_synthetic_cases_train_alone(fake_model: Path, tmp_path: Path) -> None:
    """They train with their patient, and are out where that patient is held out."""
    folder = write_mixed_set(fake_model, tmp_path / "Dataset001")
    for seed in range(4):
        data = DataConfig(train_ratio=0.6, valid_ratio=0.2, split_seed=seed)
        layout = find(folder, data)
        parts = assign(layout.pairs, data)
        for name in ("valid", "test"):
            assert len(parts[name]) == 1 and not layout.pairs[parts[name][0]].synthetic
        held_out = {layout.pairs[n].who for name in ("valid", "test") for n in parts[name]}
        assert len(parts["train"]) == 9 and len(held_out) == 2
        assert not held_out & {layout.pairs[n].who for n in parts["train"]}
    counts = cohort_of(folder, "data.train_ratio=0.6", "data.valid_ratio=0.2").summary()
    assert counts["patients"] == {"train": 9, "valid": 1, "test": 1}
    split = cohort_of(folder, "data.split_by=slices", "data.train_ratio=0.6").summary()
    assert split["patients"]["train"] == 5


def test_synthetic_table_row_cannot_validate(fake_model: Path, tmp_path: Path) -> None:
    folder = write_mixed_set(fake_model, tmp_path / "Dataset002", patients=3)
    names = ("p0", "p1", "p2", "p1_v1")
    splits = ("train", "valid", "train", "valid")
    rows = [
        f"imagesTr/{n}_0000.nii.gz,labelsTr/{n}.nii.gz,{s}"
        for n, s in zip(names, splits, strict=True)
    ]
    table = folder / "pairs.csv"
    table.write_text("image,label,split\n" + "\n".join(rows) + "\n")
    with pytest.raises(UsageError, match=r"p1_v1_0000\.nii\.gz is synthetic, and its split is"):
        find(table, DataConfig())
    table.write_text(table.read_text().replace("p1_v1.nii.gz,valid", "p1_v1.nii.gz,train"))
    parts = assign(find(table, DataConfig()).pairs, DataConfig())
    assert parts == {"train": [0, 2], "valid": [1], "test": []}
