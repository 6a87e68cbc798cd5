"""How people keep their patients: each layout is recognised, said, and refused when a file is
missing or two fit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from samples import image, write_slices

from runtime.core.errors import ConfigError, UnknownLabels, UsageError
from train.config import DataConfig, intensity, label_table, resolve
from train.data.dataset import assign
from train.data.inference import infer_from_data
from train.data.layouts import find
from train.loop import open_cohort


def write_pair(image_file: Path, label_file: Path, n: int, value: int = 1) -> None:
    ct = np.full((3, 32, 32), -1000, np.int16)
    ct[:, 8:24, 8:24] = n
    labels = np.zeros(ct.shape, np.uint8)
    labels[:, 10:20, 10:20] = value
    for path, values in ((image_file, ct), (label_file, labels)):
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image(values), str(path))


def write_nnunet(
    folder: Path, labels: dict[str, int] | dict[str, str] | None = None, channels: int = 1
) -> Path:
    for n in range(4):
        write_pair(
            folder / "imagesTr" / f"case_{n:03d}_0000.nii.gz",
            folder / "labelsTr" / f"case_{n:03d}.nii.gz",
            n,
        )
    stated = {
        "channel_names": {str(c): "CT" for c in range(channels)},
        "labels": labels or {"background": 0, "liver": 1},
        "numTraining": 4,
    }
    (folder / "dataset.json").write_text(json.dumps({**stated, "file_ending": ".nii.gz"}))
    return folder


def write_table(folder: Path, text: str, pairs: int = 4) -> Path:
    for n in range(pairs):
        write_pair(folder / "ct" / f"{n}.nii.gz", folder / "seg" / f"{n}.nii.gz", n)
    path = folder / "pairs.csv"
    path.write_text(text)
    return path


def rows(*more: str) -> str:
    """A table of four pairs, each row with what `more` adds to it."""
    lines = [
        ",".join([f"ct/{n}.nii.gz", f"seg/{n}.nii.gz", *([extra] if extra else [])])
        for n, extra in enumerate(more)
    ]
    return "\n".join(lines) + "\n"


def config_for(path: Path, *settings: str, **keys: object):
    """A small config with the top-level `keys`."""
    small = [
        "data.canvas=[32,32]",
        "generator.depth=3",
        "discriminator.patch_size=4",
        "training.threads=1",
    ]
    return resolve(keys, [*small, *settings], dataset_path=str(path))


def test_original_slice_folders_are_read(tmp_path: Path) -> None:
    """The folders of single slices of the original system are read."""
    write_slices(tmp_path, 5)
    write_slices(tmp_path, 2, split="testing", seed=1)
    layout = find(tmp_path, DataConfig())
    assert [p.name for p in layout.pairs] == [
        f"training/tr{n}" for n in range(5)
    ] and "single DICOM slices" in layout.says
    config, said = infer_from_data(config_for(tmp_path, TARGET_TRANS="1/255"))
    assert (config.intensity.unit, config.intensity.low, config.intensity.high) == (
        "a.u.",
        0,
        255,
    ) and "a.u. from 0 to 255" in said
    assert label_table(config.data).by_value == {value: value for value in range(8)}
    cohort = open_cohort(config, tmp_path, quiet=True)
    assert cohort.summary()["slices"] == {"train": 4, "valid": 1, "test": 0}
    assert cohort.train[0].labels.shape == (1, 1, 32, 32) and cohort.train[0].image.max() > 150


def test_train_ratio_1_uses_testing_folder(tmp_path: Path) -> None:
    """With a ratio of 1 the test split is the testing folder of the original system."""
    write_slices(tmp_path, 5, hu=True)
    write_slices(tmp_path, 2, split="testing", seed=1, hu=True)
    config, said = infer_from_data(config_for(tmp_path, "data.train_ratio=1", TARGET_TRANS="1/255"))
    assert (
        config.intensity.unit == "HU" and "2 of testing/ to test on" in said
    )  # slices in HU keep them
    layout = find(tmp_path, config.data)
    parts = assign(layout.pairs, config.data)
    assert {name: len(numbers) for name, numbers in parts.items()} == {
        "train": 4,
        "valid": 1,
        "test": 2,
    }
    assert [layout.pairs[n].name for n in parts["test"]] == ["testing/te0", "testing/te1"]


def test_original_file_names_from_config(tmp_path: Path) -> None:
    """Other names of the original system's files come from the config."""
    write_slices(tmp_path, 3)
    with pytest.raises(UsageError, match=r"tr0_ct\.dcm; there is tr0_whs_img\.dcm"):
        find(tmp_path, DataConfig(image_name="ct"))
    for path in tmp_path.glob("training/*/*_whs_img.dcm"):
        path.rename(path.with_name(path.name.replace("whs_img", "ct")))
    assert find(tmp_path, DataConfig(image_name="ct")).pairs[1].image.name == "tr1_ct.dcm"


def test_nnunet_raw_states_labels(tmp_path: Path) -> None:
    write_nnunet(tmp_path)
    config, said = infer_from_data(config_for(tmp_path))
    assert str(label_table(config.data)) == "0 background, 1 liver" and "nnU-Net" in said
    cohort = open_cohort(config, tmp_path, quiet=True)
    assert (
        cohort.summary()["patients"] == {"train": 3, "valid": 1, "test": 0}
        and cohort.train[0].labels.max() == 1
    )


def test_nnunet_old_labels_against_config(tmp_path: Path) -> None:
    """The older form of the labels is read, and a config that contradicts it is refused."""
    write_nnunet(tmp_path, {"0": "background", "1": "liver"})
    assert (
        str(label_table(infer_from_data(config_for(tmp_path))[0].data)) == "0 background, 1 liver"
    )
    listed = [
        {"name": "background", "value": 0},
        {"name": "Liver", "value": 1},
        {"name": "spleen", "value": 2},
    ]
    assert infer_from_data(config_for(tmp_path, data={"labels": listed}))[0].data.labels == listed
    with pytest.raises(ConfigError, match="there 1 is liver"):
        infer_from_data(
            config_for(tmp_path, data={"labels": [listed[0], {"name": "spleen", "value": 1}]})
        )
    with pytest.raises(ConfigError, match="there 1 is liver"):
        infer_from_data(config_for(tmp_path, data={"labels": "mm-whs"}))


@pytest.mark.parametrize(
    "labels", [{"background": [0], "liver": [1]}, {"background": "0", "liver": "1"}, {"liver": 1}]
)
def test_nnunet_labels_in_other_spellings(labels: dict[str, Any], tmp_path: Path) -> None:
    path = write_nnunet(tmp_path, labels) / "dataset.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    config, _ = infer_from_data(config_for(tmp_path))
    assert str(label_table(config.data)) == "0 background, 1 liver"
    assert open_cohort(config, tmp_path, quiet=True).train[0].labels.max() == 1


def test_nnunet_ignore_label(tmp_path: Path) -> None:
    """The label that nnU-Net ignores is not a tissue."""
    write_nnunet(tmp_path, {"background": 0, "liver": 1, "ignore": 2})
    config, said = infer_from_data(config_for(tmp_path))
    assert (
        str(label_table(config.data)) == "0 background, 1 liver"
        and "ignore (2) is not a label" in said
    )
    open_cohort(config, tmp_path, quiet=True)
    path = next((tmp_path / "labelsTr").iterdir())
    volume = sitk.ReadImage(str(path))
    volume[0, 0, 0] = 2
    sitk.WriteImage(volume, str(path))
    with pytest.raises(UnknownLabels, match="holds 2, which the model does not know") as caught:
        open_cohort(config, tmp_path, quiet=True)
    assert "ignore" in caught.value.remedy


def test_unreadable_nnunet_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 channels"):
        find(write_nnunet(tmp_path / "a", channels=2), DataConfig())
    for labels in (
        {"background": 0, "whole": [1, 2]},
        {"background": 0, "liver": 1, "whole": [1, 2]},
    ):
        with pytest.raises(
            UsageError,
            match=r"no usable labels but regions, several labels together: whole \[1, 2\]",
        ):
            find(write_nnunet(tmp_path / "b", labels), DataConfig())
    for labels in (
        {"background": 0, "a": 1, "b": "1"},
        {"background": 0, "a": "one"},
        {"a": None},
        {"a": 1.5},
        {"a": True},
        {"a": []},
        {"a": [[1]]},
    ):
        with pytest.raises(UsageError, match="no usable labels"):
            find(write_nnunet(tmp_path / "b", labels), DataConfig())  # type: ignore[arg-type]
    folder = write_nnunet(tmp_path / "c")
    (folder / "labelsTr" / "case_002.nii.gz").unlink()
    with pytest.raises(UsageError, match=r"case_002 has no labelsTr/case_002\.nii\.gz"):
        find(folder, DataConfig())
    (folder / "dataset.json").unlink()
    with pytest.raises(UsageError, match=r"dataset\.json does not exist"):
        find(folder, DataConfig())


def test_csv_pairs_patients_and_splits(tmp_path: Path) -> None:
    """A table of pairs is read with its patients and splits."""
    path = write_table(
        tmp_path, "image,label,patient,split\n" + rows("a,train", "a,train", "b,valid", "c,test")
    )
    for given in (path, tmp_path):  # the file, or the folder it is in
        layout = find(given, DataConfig())
        assert "3 patients, 4 pairs in the table pairs.csv, its own split" in layout.says
        assert assign(layout.pairs, DataConfig()) == {"train": [0, 1], "valid": [2], "test": [3]}
    with pytest.raises(ConfigError, match=r"data\.labels is not given"):
        infer_from_data(config_for(path))
    config = config_for(
        path, data={"labels": [{"name": "background", "value": 0}, {"name": "liver", "value": 1}]}
    )
    assert open_cohort(infer_from_data(config)[0], tmp_path, quiet=True).summary()["slices"] == {
        "train": 6,
        "valid": 3,
        "test": 3,
    }


def test_patient_parts_share_split(tmp_path: Path) -> None:
    path = write_table(
        tmp_path, "image,label,patient\n" + rows(*(f"p{n // 2}" for n in range(8))), pairs=8
    )
    for seed in range(5):
        data = DataConfig(train_ratio=0.5, valid_ratio=0.25, split_seed=seed)
        for numbers in assign(find(path, data).pairs, data).values():
            assert {n ^ 1 for n in numbers} == set(numbers)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("picture,label\n" + rows("", "", "", ""), "has the columns picture, label"),
        ("", "columns of an empty file"),
        ("image,label,split\n" + rows("train", "valid", "tets", "test"), "line 4"),
        (
            "image,label,split\n" + rows("train", "valid", "", "test"),
            "states a split for 3 of 4 rows",
        ),
        (
            "image,label,split\n" + rows("train", "test", "train", "train"),
            "states a split for 4 of 4 rows: test, train",
        ),
        (
            "image,label,patient,split\n" + rows("a,train", "a,valid", "b,train", "c,test"),
            "patient a is in more than one split",
        ),
        (
            "image,label\n" + rows("", "", "", "") + "ct/9.nii.gz,seg/9.nii.gz\n",
            "line 6 of pairs.csv names 9.nii.gz",
        ),
        (
            "image,label\n" + rows("", "", "", "") + "ct/1.nii.gz,seg/2.nii.gz\n",
            "lists 1.nii.gz twice",
        ),
        ("image,label\n" + rows("", ""), "2 patient"),
        ("image,label\n" + rows("", "", "", "") + "ct/1.nii.gz\n", "line 6"),
    ],
)
def test_bad_csv_line_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        find(write_table(tmp_path, text), DataConfig())
    assert (
        says in str(caught.value)
        and caught.value.exit_code == 2
        and len(str(caught.value).splitlines()) <= 4
    )


def test_two_layouts_in_folder_refused(tmp_path: Path) -> None:
    write_nnunet(tmp_path)
    write_slices(tmp_path, 3)
    with pytest.raises(UsageError, match="can be read as single slices and as nnU-Net"):
        find(tmp_path, DataConfig())


def test_unrelated_csv_is_ignored(tmp_path: Path) -> None:
    for n in range(3):
        write_pair(tmp_path / f"p{n}_image.nii.gz", tmp_path / f"p{n}_label.nii.gz", n, 205)
    (tmp_path / "ages.csv").write_text("patient,age\np0,60\n")
    assert "MM-WHS" in find(tmp_path, DataConfig()).says


def test_dry_run_prints_layout(tmp_path: Path, command) -> None:
    write_nnunet(tmp_path / "data")
    settings = [
        "data.canvas=[32,32]",
        "generator.depth=3",
        "generator.filters=4",
        "discriminator.patch_size=4",
        "discriminator.filters=4",
    ]
    config = tmp_path / "c.json"
    config.write_text("{}")
    done = command(
        "train/run.py",
        "--config",
        config,
        "--dataset_path",
        tmp_path / "data",
        "--dry-run",
        "--set",
        *settings,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "4 patients in nnU-Net's raw layout" in done.stdout
        and "train                 3       9" in done.stdout
    )
    assert '"liver"' in done.stdout


def test_one_patient_split_by_slices(tmp_path: Path) -> None:
    """The volume of a single patient is split by slices only where the config asks for it."""
    path = write_table(tmp_path, "image,label\nct/0.nii.gz,seg/0.nii.gz\n", pairs=1)
    labels = {"labels": [{"name": "background", "value": 0}, {"name": "liver", "value": 1}]}
    with pytest.raises(UsageError, match="1 patient"):
        infer_from_data(config_for(path, data=labels))
    config, said = infer_from_data(
        config_for(
            path,
            "data.split_by=slices",
            "data.train_ratio=0.4",
            "data.valid_ratio=0.3",
            data=labels,
        )
    )
    assert "WARNING: slices of the same patients" in said
    cohort = open_cohort(config, tmp_path, quiet=True)
    assert cohort.summary()["slices"] == {"train": 1, "valid": 1, "test": 1}
    assert cohort.table(label_table(config.data), intensity(config)).count("liver") == 1


def test_real_pair_trains_by_config(real_data: Path, tmp_path: Path, command) -> None:
    source = real_data / "abdomen_3mm"
    if not (source / "ct.nii.gz").is_file():
        pytest.skip(f"{source} is absent")
    names = json.loads((source / "label_names.json").read_text())
    labels = [
        {"name": "background", "value": 0},
        *({"name": name, "value": int(value)} for value, name in names.items()),
    ]
    (tmp_path / "pairs.csv").write_text(
        f"image,label\n{source / 'ct.nii.gz'},{source / 'labels.nii.gz'}\n"
    )
    config = {
        "name": "abdomen",
        "data": {
            "labels": labels,
            "split_by": "slices",
            "train_ratio": 0.8,
            "valid_ratio": 0.1,
            "canvas": [64, 64],
            "pixel_spacing": [6, 6],
        },
        "generator": {"kind": "unet", "filters": 8, "depth": 4, "skips": True},
        "discriminator": {"filters": 8},
        "training": {
            "steps": 3,
            "batch_size": 4,
            "recalibrate": 1,
            "valid_slices": 6,
            "threads": 2,
        },
    }
    (tmp_path / "abdomen.json").write_text(json.dumps(config))
    line = [
        "train/run.py",
        "--config",
        tmp_path / "abdomen.json",
        "--dataset-path",
        tmp_path / "pairs.csv",
        "--output",
        tmp_path / "run",
    ]
    done = command(*line)
    assert done.returncode == 0, done.stderr
    assert "-1207 to 3382 HU" in done.stderr and "WARNING" in done.stderr
    data = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (
        data["data"]["slices"] == {"train": 90, "valid": 11, "test": 11}
        and data["metrics"]["organs"]
    )
