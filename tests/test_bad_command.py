"""Bad models, commands and output folders: one screen that says fact, expectation, remedy and
file; the stated exit code; no debris.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from samples import results, synth, write_mask


def broken_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    change(data)
    (folder / "manifest.json").write_text(json.dumps(data))


BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "does not exist"),
    "no manifest": (lambda m: (m / "manifest.json").unlink(), "holds no manifest.json"),
    "not JSON": (lambda m: (m / "manifest.json").write_text("{"), "cannot be used"),
    "a key is missing": (
        lambda m: broken_manifest(m, lambda d: d.pop("grid")),
        "has no key 'grid'",
    ),
    "another schema": (
        lambda m: broken_manifest(m, lambda d: d.update(schema_version=99)),
        "'schema_version' is 99",
    ),
    "impossible grid": (
        lambda m: broken_manifest(m, lambda d: d["grid"].update(slices=2)),
        "odd number",
    ),
    "label twice": (
        lambda m: broken_manifest(m, lambda d: d["labels"][1].update(value=0)),
        "occurs twice",
    ),
    "path in a file name": (
        lambda m: broken_manifest(
            m, lambda d: d["files"].update({"../x": d["files"]["model.onnx"]})
        ),
        "../x",
    ),
    "infinite label": (
        lambda m: broken_manifest(m, lambda d: d["labels"][1].update(value=float("inf"))),
        "cannot be used",
    ),
    "one spacing": (
        lambda m: broken_manifest(m, lambda d: d["grid"].update(pixel_spacing=[3.0])),
        "cannot be used",
    ),
    "nested too deep": (lambda m: (m / "manifest.json").write_text("[" * 100000), "cannot be used"),
    "broken range": (
        lambda m: broken_manifest(m, lambda d: d["intensity"].update(low=-1000.5)),
        "'low' of 'intensity'",
    ),
    "parity is a list": (
        lambda m: broken_manifest(m, lambda d: d.update(parity=[])),
        "'parity' is not an object",
    ),
    "altered file": (
        lambda m: (m / "model.onnx").write_bytes(bytes(len((m / "model.onnx").read_bytes()))),
        "not the file its manifest describes",
    ),
    "truncated file": (
        lambda m: os.truncate(m / "model.onnx", 1000),
        "not the file its manifest describes",
    ),
    "file is gone": (lambda m: (m / "model.onnx").unlink(), "is missing from the model folder"),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_a_bad_model_starts_nothing(
    kind: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, fact = BAD_MODELS[kind]
    spoilt, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model, spoilt)
    spoil(spoilt)
    assert synth(spoilt, out, write_mask(tmp_path / "m.nii.gz"), backend=None) == 2
    error = capsys.readouterr().err
    assert fact in error and "remedy" in error and str(spoilt) in error and "Traceback" not in error
    assert not out.exists()


def test_invalid_onnx_graph_is_refused(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that holds no graph is refused even when the manifest agrees with it."""
    from runtime.core.atomic_files import sha256_of

    spoilt = tmp_path / "model"
    shutil.copytree(model, spoilt)
    (spoilt / "model.onnx").write_bytes(b"not a graph")
    broken_manifest(
        spoilt,
        lambda d: d["files"]["model.onnx"].update(
            bytes=11, sha256=sha256_of(spoilt / "model.onnx")
        ),
    )
    for backend in ("onnx", "openvino"):
        assert (
            synth(spoilt, tmp_path / "out", write_mask(tmp_path / "m.nii.gz"), backend=backend) == 2
        )
        assert "model.onnx is not a graph" in capsys.readouterr().err


WITHOUT_ENGINES = """
import importlib.util, sys
hidden = ("onnxruntime", "openvino")
sys.modules.update(dict.fromkeys(hidden))  # importing one raises, looking for it finds nothing
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in hidden else find(name, *rest)
from runtime.__main__ import main
from runtime.core.console import run
sys.exit(run(main))
"""


def test_missing_backend_is_exit_3(root: Path, tmp_path: Path, model: Path) -> None:
    """The message has the command that installs the backend."""
    mask, out = write_mask(tmp_path / "m.nii.gz"), tmp_path / "out"
    arguments = [
        sys.executable,
        "-c",
        WITHOUT_ENGINES,
        "synth",
        mask,
        "--model",
        model,
        "--output",
        out,
    ]
    done = subprocess.run(arguments, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    for package, extra in (("onnxruntime", "onnx"), ("openvino", "openvino")):
        assert f'{package} is not installed (pip install "mask2ct[{extra}]")' in done.stderr
    assert "remedy" in done.stderr and not out.exists()


@pytest.mark.parametrize("place", ["under a file", "in /proc"])
def test_unwritable_output_folder_is_exit_4(
    place: str, tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An output folder that cannot be made ends the command with exit code 4."""
    mask = write_mask(tmp_path / "m.nii.gz")
    (tmp_path / "file").write_text("")
    out = {"under a file": tmp_path / "file" / "out", "in /proc": Path("/proc/out")}[place]
    assert synth(fake_model, out, mask) == 4
    error = capsys.readouterr().err
    assert "cannot be written" in error and "remedy" in error and "Traceback" not in error


def test_file_size_limit_is_exit_4(root: Path, tmp_path: Path, fake_model: Path) -> None:
    """A file that outgrows the limit leaves nothing behind.

    RLIMIT_FSIZE makes every write past 64 KiB fail, as a full disk does.
    """
    rng = np.random.default_rng(0)
    mask = write_mask(
        tmp_path / "m.nii.gz",
        rng.choice(np.array([0, 205, 420, 500], np.uint16), (40, 64, 64)),
        spacing=(3.0, 3.0, 3.0),
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "runtime",
            "synth",
            mask,
            "--model",
            fake_model,
            "--backend",
            "fake",
            "--output",
            tmp_path / "out",
            "--quiet",
        ],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
    )
    assert done.returncode == 4, done.stderr
    assert "cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0, reason="mounting a small file system needs root"
)
def test_full_disk_is_exit_4(root: Path, tmp_path: Path, fake_model: Path) -> None:
    """Results that were complete before the disk was full stay."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk], check=False, capture_output=True
    ).returncode:
        pytest.skip("this system lets nobody mount a tmpfs")
    try:
        rng = np.random.default_rng(0)
        small = write_mask(tmp_path / "a.nii.gz")
        large = write_mask(
            tmp_path / "b.nii.gz",
            rng.choice(np.array([0, 205, 420, 500], np.uint16), (60, 64, 64)),
            spacing=(3.0, 3.0, 3.0),
        )
        arguments = [
            sys.executable,
            "-m",
            "runtime",
            "synth",
            small,
            large,
            "--model",
            fake_model,
            "--backend",
            "fake",
            "--output",
            disk / "out",
            "--quiet",
        ]
        done = subprocess.run(arguments, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 4, done.stderr
        assert "the disk is full" in done.stderr and "Traceback" not in done.stderr
        assert list(results(disk / "out")) == ["a_ct.nii.gz"]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["--batch", "0"], "--batch is 0"),
        (["--variants", "0"], "0 variants"),
        (["--labels", "nope.json"], "label map cannot be read"),
    ],
)
def test_a_wrong_command_is_exit_2(
    arguments: list[str],
    fact: str,
    tmp_path: Path,
    fake_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert synth(fake_model, tmp_path / "out", write_mask(tmp_path / "m.nii.gz"), *arguments) == 2
    assert fact in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        "[1]",
        "{}",
        '{"5": "liver"}',
        '{"5": 17}',
        '{"": "left ventricle"}',
        '{"5": true}',
        "no json",
    ],
)
def test_wrong_label_map_is_exit_2(
    content: str, tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message shows a right label map."""
    (tmp_path / "map.json").write_text(content)
    assert (
        synth(
            fake_model,
            tmp_path / "out",
            write_mask(tmp_path / "m.nii.gz"),
            "--labels",
            tmp_path / "map.json",
        )
        == 2
    )
    error = capsys.readouterr().err
    assert "label" in error and "remedy" in error and str(tmp_path / "map.json") in error


def test_masks_of_equal_name_are_refused(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two masks of one name are refused before anything is written."""
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    masks = write_mask(tmp_path / "x" / "m.nii.gz"), write_mask(tmp_path / "y" / "m.mha")
    assert synth(fake_model, tmp_path / "out", *masks) == 2
    assert "written as m" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--list", "--report", "r.json"], "--report has no effect beside --list"),
        (["--list", "--ray"], "--ray has no effect beside --list"),
        (["--list", "--ray-workers", "2"], "--ray-workers has no effect beside --list"),
        (["--list", "--dry-run"], "--dry-run has no effect beside --list"),
        (["--dry-run", "--report", "r.json"], "--report has no effect beside --dry-run"),
    ],
)
def test_option_without_effect_is_refused(
    options: list[str],
    says: str,
    fake_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    mask = write_mask(tmp_path / "m.nii.gz")
    assert synth(fake_model, tmp_path / "out", mask, *options) == 2
    said = capsys.readouterr()
    assert (
        says in said.err
        and "remedy" in said.err
        and said.out == ""
        and [*tmp_path.iterdir()] == [mask]
    )
