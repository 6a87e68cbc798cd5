"""Names that programs use: `mask2ct` and `runtime`, and those of mask2ct 0.1."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from samples import synth

OLD = Path(__file__).resolve().parent / "files_of_0.1"
DIGESTS = {
    "case_v0_ct.nii.gz": "8df41acad47a56c79b91719f4ff66f2e0cf15d385b0d801222d34ed0c6402ff6",
    "case_v0_mask.nii.gz": "7d598ca17a5a83d273087807f3f540b950d91be027cf8eab736242d67f91f679",
}


def python(
    code: str, *, cwd: Path, interpreter: Path | str = sys.executable
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(interpreter), "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )


def linked(folder: Path, root: Path) -> Path:
    """A folder in which the package goes by both names, as in a clone with mask2ct installed."""
    folder.mkdir()
    (folder / "runtime").symlink_to(root / "runtime")
    (folder / "mask2ct").symlink_to(root / "runtime")
    return folder


def test_old_names_work_and_warn(root: Path) -> None:
    code = """
import warnings
warnings.simplefilter("error")
from runtime import DeformationParams, deform
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    from runtime import Ranges, vary
    from runtime.scale import RaySynthesizer
    from runtime.errors import InputError
    import runtime
assert Ranges is DeformationParams and vary is deform
assert InputError is runtime.InputError
for one in caught:
    print(one.category.__name__, one.message)
"""
    done = python(code, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "DeprecationWarning Ranges is called DeformationParams now" in done.stdout
    assert "DeprecationWarning vary is called deform now" in done.stdout
    assert "DeprecationWarning runtime.scale is runtime.batch.ray_runner now" in done.stdout


def test_old_method_synthesizes_the_same(fake_model: Path) -> None:
    from runtime import Geometry, Synthesizer

    values = np.zeros((2, 8, 8), np.uint16)
    values[:, 2:5, 2:5] = 205
    with Synthesizer.open(fake_model, backend="fake") as synthesizer:
        volume = synthesizer.volume(values, Geometry.from_spacing((3.0, 3.0, 3.0)))
        with pytest.warns(DeprecationWarning, match=r"Synthesizer\.synthesize"):
            old = synthesizer.paint(volume, seed=1)
        assert np.array_equal(old, synthesizer.synthesize(volume, seed=1))


@pytest.mark.parametrize(("first", "second"), [("runtime", "mask2ct"), ("mask2ct", "runtime")])
def test_one_process_uses_one_name(first: str, second: str, root: Path, tmp_path: Path) -> None:
    here = linked(tmp_path / "both", root)
    code = f"""
import pathlib, sys
real = str(pathlib.Path({str(root / "runtime")!r}))
import {first}
{first}.__path__[:] = [real]
sys.path_importer_cache.clear()
try:
    import importlib.util
    spec = importlib.util.spec_from_file_location({second!r}, real + "/__init__.py", submodule_search_locations=[real])
    module = importlib.util.module_from_spec(spec)
    sys.modules[{second!r}] = module
    spec.loader.exec_module(module)
except ImportError as exc:
    print(exc)
"""
    done = python(code, cwd=here)
    assert done.returncode == 0, done.stderr
    assert f"imported as {first!r} already" in done.stdout and repr(second) in done.stdout


def test_runs_of_0_1_load() -> None:
    """A run folder of commit 678c47a: the same weights give the same image."""
    import torch

    from train.checkpoint import load_generator, load_run

    network = load_generator(OLD / "run")
    assert load_run(OLD / "run").step == 2
    places = np.arange(network.channels * 256).reshape(1, network.channels, 16, 16)
    condition = torch.from_numpy(((places * 7919) % 5 == 0).astype(np.float32))
    noise = torch.from_numpy(
        (((np.arange(256) * 31) % 17 - 8) / 8).astype(np.float32).reshape(1, 1, 16, 16)
    )
    with torch.no_grad():
        image = network(condition, noise, torch.tensor([[0.5, -1.0]]))[1].numpy()
    np.testing.assert_allclose(image, np.load(OLD / "expected.npy"), rtol=0, atol=1e-5)


def test_journals_of_0_1_are_resumed(tmp_path: Path) -> None:
    """What was complete is not made again, and what is made again has the bytes it had."""
    import shutil

    out = tmp_path / "out"
    shutil.copytree(OLD / "out", out)
    (out / "case_v0_ct.nii.gz").unlink()
    untouched = (out / "case_v1_ct.nii.gz").stat().st_mtime_ns
    options = ["--variants", "2", "--seed", "5", "--resume"]
    assert synth(OLD / "model", out, OLD / "case.nii.gz", *options) == 0
    assert (out / "case_v1_ct.nii.gz").stat().st_mtime_ns == untouched
    for name, digest in DIGESTS.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_an_installation_is_called_mask2ct(editable: bool, root: Path, tmp_path: Path) -> None:
    """Neither puts a top-level `runtime` onto the path, which another project on the index has."""
    import shutil

    source = tmp_path / "source"
    source.mkdir()
    for name in ("runtime", "pyproject.toml", "README.md", "LICENSE"):
        place = root / name
        if place.is_dir():
            shutil.copytree(place, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(place, source / name)
    # the packages of this environment are seen, mask2ct's own installation here is not
    venv.create(tmp_path / "venv", with_pip=False)
    interpreter = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    packages = [path for path in sys.path if path.endswith("site-packages")]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(interpreter),
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
    ]
    (site / "others.pth").write_text("\n".join(packages) + "\n")
    done = subprocess.run(
        [*pip, *(["-e"] if editable else []), str(source)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (site / "others.pth").unlink()
    code = f"""
import importlib.util, sys
print(importlib.util.find_spec("runtime"))
sys.path[len(sys.path):] = {packages!r}
import mask2ct
from mask2ct import Synthesizer
print(mask2ct.__name__, Synthesizer.__module__, mask2ct.__path__[0])
"""
    seen = python(code, cwd=tmp_path, interpreter=interpreter)
    assert seen.returncode == 0, seen.stderr
    assert seen.stdout.splitlines()[0] == "None"
    assert seen.stdout.splitlines()[1].startswith("mask2ct mask2ct.api ")
    assert str(source if editable else site) in seen.stdout
    version = subprocess.run(
        [str(tmp_path / "venv" / "bin" / "mask2ct"), "--help"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join(packages)},
        cwd=tmp_path,
    )
    assert version.returncode == 0 and "synth" in version.stdout, version.stderr
