"""Fixtures: a phantom cohort, a run of a few steps and its model folder, made once by the
commands people type.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from samples import export_run, train_small, write_fake_model

from runtime.engines.fake import fake_manifest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def command():
    """Run `python …` from the repository and return the finished process, text captured."""

    def run(
        *arguments: object, env: dict[str, str] | None = None, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        whole = [sys.executable, *map(str, arguments)]
        return subprocess.run(
            whole,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env={**os.environ, **(env or {})},
        )

    return run


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four phantom patients of 32 x 64 x 64 in the raw MM-WHS layout."""
    from train.phantom.cohort import generate_cohort

    folder = tmp_path_factory.mktemp("cohort")
    generate_cohort(folder, 4, seed=5, size=(32, 64, 64), workers=1)
    return folder


@pytest.fixture(scope="session")
def trained(cohort: Path, command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after 6 steps of a small network."""
    return train_small(command, cohort, tmp_path_factory.mktemp("run") / "tiny")


@pytest.fixture(scope="session")
def model(trained: Path, command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder exported from `trained`."""
    return export_run(command, trained, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def fake_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder for `--backend fake`: the MM-WHS labels, 3 mm pixels, no noise."""
    return write_fake_model(tmp_path_factory.mktemp("models") / "fake", fake_manifest(noise=False))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images, when there is one: `$MASK2CT_REAL_DATA`, or shared/data beside
    the checkout.
    """
    folder = Path(os.environ.get("MASK2CT_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "README.md").is_file():
        pytest.skip(f"no real images: {folder} is absent (set MASK2CT_REAL_DATA)")
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A training config that leaves everything at its default."""
    path = tmp_path / "tiny.json"
    path.write_text('{"name": "tiny"}')
    return path


@pytest.fixture
def collected() -> Iterator[None]:
    """The garbage of a test is collected before the next one."""
    yield
    gc.collect()
