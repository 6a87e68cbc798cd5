"""Bad configs, folders and files given to train/run.py: one screen, the stated exit code, and no
run folder that was begun.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from samples import image, write_slices

from runtime.core.console import run

SMALL = [
    "data.canvas=[32,32]",
    "generator.depth=3",
    "generator.filters=4",
    "discriminator.patch_size=4",
    "discriminator.filters=4",
    "training.batch_size=2",
    "training.recalibrate=1",
    "training.valid_slices=4",
    "training.threads=1",
    "training.steps=1",
]


@pytest.fixture(scope="module")
def train(root: Path):
    """The command's main, called in this process: these errors come before anything that takes
    time.
    """
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("train_run", root / "train" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module.main


def write(
    folder: Path,
    n: int,
    ct: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    **label_grid: object,
) -> None:
    if ct is None:
        ct = np.full((4, 32, 32), -1000, np.int16)
        ct[:, 8:24, 8:24] = 100 + n
    if labels is None:
        labels = np.zeros((4, 32, 32), np.uint16)
        labels[:, 10:20, 10:20] = 500
    sitk.WriteImage(image(ct), str(folder / f"p{n}_image.nii.gz"))
    sitk.WriteImage(image(labels, **label_grid), str(folder / f"p{n}_label.nii.gz"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for n in range(4):
        write(tmp_path / "data", n)
    return tmp_path / "data"


def refused(
    train, capsys: pytest.CaptureFixture[str], code: int, says: str, *arguments: object
) -> None:
    assert run(train, [*map(str, arguments)]) == code
    error = capsys.readouterr().err
    error = error[error.index("error:") :]
    assert (
        says in error
        and "expected" in error
        and "Traceback" not in error
        and len(error.splitlines()) <= 16
    )


CONFIGS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read"),
    "not UTF-8": (b"\xff\xfe{", "cannot be read"),
    "a list": (b"[1]", "does not hold a JSON object"),
    "nested too deep": (b"[" * 100_000, "cannot be read"),
    "infinite": (b'{"optimizer": {"lr_g": Infinity}}', "optimizer.lr_g is inf"),
    "NaN": (b'{"loss": {"texture": NaN}}', "loss.texture is nan"),
    "huge seed": (b'{"training": {"seed": 1e30}}', "training.seed is 1e+30"),
    "negative seed": (b'{"data": {"split_seed": -1}}', "data.split_seed is -1"),
    "name with a path": (b'{"name": "../../x"}', "name is '../../x'"),
    "empty name": (b'{"name": ""}', "name is ''"),
    "labels as an object": (b'{"data": {"labels": {"liver": 1}}}', "data.labels is {'liver': 1}"),
    "label that is no number": (
        b'{"data": {"labels": [{"name": "a", "value": 0}, {"name": "b", "value": "x"}]}}',
        "data.labels",
    ),
    "label NaN": (
        b'{"data": {"labels": [{"name": "a", "value": 0}, {"name": "b", "value": NaN}]}}',
        "data.labels",
    ),
    "canvas of 0": (b'{"data": {"canvas": [0, 0]}}', "data.canvas[0] is 0"),
    "too deep a network": (b'{"generator": {"depth": 40}}', "data.canvas"),
    "too many threads": (b'{"training": {"threads": 100000000}}', "training.threads"),
    "precision": (b'{"training": {"precision": "fp16"}}', "training.precision is 'fp16'"),
    "LABELS": (b'{"LABELS": [[1]]}', "data.keep[0] is [1]"),
    "a range beyond int16": (b'{"intensity": {"high": 100000}}', "intensity"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_bad_config_starts_nothing(
    train, kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, says = CONFIGS[kind]
    (tmp_path / "c.json").write_bytes(content)
    refused(
        train,
        capsys,
        2,
        says,
        "--config",
        tmp_path / "c.json",
        "--dataset-path",
        folder,
        "--output",
        tmp_path / "run",
    )
    assert not (tmp_path / "run").exists()


def volume(
    ct: np.ndarray | None = None, labels: np.ndarray | None = None, **grid: object
) -> Callable[[Path], None]:
    return lambda folder: write(folder, 1, ct, labels, **grid)


def replaced(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


SHAPE = (4, 32, 32)
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: os.truncate(f / "p1_image.nii.gz", 200), "p1_image"),
    "text": (replaced("p1_label.nii.gz", b"hello"), "p1_label.nii.gz is not gzip-compressed"),
    "4-D": (
        lambda f: sitk.WriteImage(
            sitk.GetImageFromArray(np.zeros((2, 4, 8, 8), np.int16), isVector=False),
            str(f / "p1_image.nii.gz"),
        ),
        "4-D",
    ),
    "label 0.5": (volume(labels=np.full(SHAPE, 0.5, np.float32)), "0.5, which is not a label"),
    "image NaN": (volume(ct=np.full(SHAPE, np.nan, np.float32)), "NaN or infinite values"),
    "one value": (
        volume(ct=np.full(SHAPE, -1000, np.int16)),
        "p1_image.nii.gz holds -1000 everywhere",
    ),
    "label map turned": (volume(direction=[0, 1, 0, 1, 0, 0, 0, 0, 1]), "mm off its image"),
    "label map of another size": (
        volume(labels=np.zeros((5, 32, 32), np.uint16)),
        "its image (4, 32, 32)",
    ),
    "8-bit greys": (volume(ct=np.arange(4096).reshape(SHAPE).astype(np.uint8)), "which are not HU"),
    "no label": (volume(labels=np.zeros(SHAPE, np.uint16)), "holds no label at all"),
    "unknown label": (volume(labels=np.full(SHAPE, 77, np.uint16)), "77"),
    "the same image twice": (
        lambda f: [
            shutil.copy(f / "p0_image.nii.gz", f / f"p{n}_image.nii.gz") for n in range(1, 4)
        ],
        "hold the same image",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_bad_patient_starts_nothing(
    train, kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, says = FILES[kind]
    spoil(folder)
    (tmp_path / "c.json").write_text("{}")
    refused(
        train,
        capsys,
        1,
        says,
        "--config",
        tmp_path / "c.json",
        "--dataset-path",
        folder,
        "--output",
        tmp_path / "run",
        "--set",
        *SMALL,
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["generator.style=9"], 2, "differ in 1 dimension"),
        (["data.keep=[2]"], 2, "no patient has a labelled voxel"),
        (["data.pixel_spacing=[1e-6,1e-6]"], 1, "p0_label.nii.gz: its labels span"),
        (["training.steps", "4"], 2, "has no value"),
        (["=4"], 2, "there is no key ''"),
        (["training.device=cuda"], 2, "training.device is cuda"),
    ],
)
def test_config_against_data_starts_nothing(
    train,
    more: list[str],
    code: int,
    says: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A config that asks what the data do not allow starts nothing."""
    import torch

    if "cuda" in says and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    (tmp_path / "c.json").write_text("{}")
    line = [
        "--config",
        tmp_path / "c.json",
        "--dataset-path",
        folder,
        "--output",
        tmp_path / "run",
        "--no-cache",
        "--set",
        *SMALL,
        *more,
    ]
    refused(train, capsys, code, says, *line)
    assert not (tmp_path / "run").exists()  # the same command, corrected, may be given again


@pytest.mark.parametrize(
    "stated",
    ["[]", '{"labels": [1]}', "{}", '{"labels": {}}', '{"labels": {"background": 0, "a": -1}}'],
)
def test_a_bad_dataset_json_starts_nothing(
    train, stated: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "nnunet"
    for name in ("imagesTr", "labelsTr"):
        (data / name).mkdir(parents=True)
    for n in range(4):
        shutil.copy(folder / f"p{n}_image.nii.gz", data / "imagesTr" / f"c{n}_0000.nii.gz")
        shutil.copy(folder / f"p{n}_label.nii.gz", data / "labelsTr" / f"c{n}.nii.gz")
    (data / "dataset.json").write_text(stated)
    (tmp_path / "c.json").write_text("{}")
    code = 1 if "-1" in stated else 2
    refused(
        train,
        capsys,
        code,
        "",
        "--config",
        tmp_path / "c.json",
        "--dataset-path",
        data,
        "--output",
        tmp_path / "run",
        "--set",
        *SMALL,
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["garbage", "another size"])
def test_a_bad_dicom_slice_starts_nothing(
    train, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_slices(tmp_path / "data", 4, side=32, hu=True)
    path = tmp_path / "data" / "training" / "tr1" / "tr1_whs_img_gt.dcm"
    if kind == "garbage":
        path.write_bytes(b"abc")
    else:
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((1, 16, 16), np.uint8)), str(path))
    (tmp_path / "c.json").write_text("{}")
    line = [
        "--config",
        tmp_path / "c.json",
        "--dataset-path",
        tmp_path / "data",
        "--output",
        tmp_path / "run",
        "--set",
        *SMALL,
    ]
    refused(train, capsys, 1, "tr1_whs_img_gt.dcm", *line)
    assert not (tmp_path / "run").exists()


def test_too_little_memory_is_reported(
    train, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"generator": {"filters": 65536}}))
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(
        resource.RLIMIT_AS, (32 << 30, before[1])
    )  # whatever this machine would overcommit
    try:
        small = [setting for setting in SMALL if "generator.filters" not in setting]
        line = [
            "--config",
            tmp_path / "c.json",
            "--dataset-path",
            folder,
            "--output",
            tmp_path / "run",
            "--no-cache",
            "--set",
            *small,
        ]
        refused(train, capsys, 2, "the memory does not suffice", *line)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert not (tmp_path / "run").exists()


def test_phantom_without_thorax_is_refused(tmp_path: Path, command) -> None:
    """A phantom too small to show a thorax is refused."""
    line = [
        "train/run.py",
        "--config",
        "train/configs/phantom.json",
        "--output",
        tmp_path / "run",
        "--set",
        "data.phantom.size=[16,64,64]",
    ]
    done = command(*line)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "16 x 64 x 64" in done.stderr and "data.phantom.size" in done.stderr
