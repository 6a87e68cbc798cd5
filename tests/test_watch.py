"""A watched folder: what is complete is painted once, as `synth` paints it, and moved to done/ or failed/, whoever dies meanwhile."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
import zipfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from dicom_masks import save, segmentation, slices
from samples import blobs, mask2ct, results, synth, write_fake_model, write_mask

from runtime.__main__ import main
from runtime.console import run
from runtime.contract import Label, LabelTable
from runtime.engines.fake import fake_manifest
from runtime.files import lock
from runtime.inbox import DONE, FAILED, LOCK, PATIENCE, WORK, Inbox, fingerprint
from runtime.journal import JOURNAL, Journal

KILLS = 20


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "inbox"
    folder.mkdir()
    return folder


def arguments(model: Path, inbox: Path, out: Path, *more: object) -> list[str]:
    return ["watch", str(inbox), "--model", str(model), "--backend", "fake", "--output", str(out), "--stable", "0", "--poll", "0.01", *map(str, more)]


def watch(model: Path, inbox: Path, out: Path, *more: object) -> int:
    return run(main, arguments(model, inbox, out, "--once", *more))


def listed(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def is_tidy(inbox: Path) -> bool:
    return listed(inbox) <= {WORK, DONE, FAILED} and listed(inbox / WORK) <= {LOCK}


def test_what_is_put_in_becomes_what_synth_makes_of_it(fake_model: Path, inbox: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file, a zip, a folder with a SEG and its series, a folder of volumes; each is moved as it came."""
    drawn = slices(blobs((6, 20, 24), seed=4), Modality="CT")
    labels = (blobs((6, 20, 24), seed=4) == 500).astype("uint8")
    save(inbox / "Doe^John", [*drawn, segmentation(drawn, {"left ventricle": labels})] if False else drawn)
    write_mask(inbox / "a.nii.gz", seed_mask := blobs(seed=1))
    write_mask(tmp_path / "b.nrrd", blobs(seed=2))
    with zipfile.ZipFile(inbox / "some.zip", "w") as archive:
        archive.write(tmp_path / "b.nrrd", "b.nrrd")
    (inbox / "two").mkdir()
    write_mask(inbox / "two" / "c.mha", blobs(seed=3))
    write_mask(inbox / "two" / "d.nii", seed_mask)
    shutil.copytree(inbox, tmp_path / "kept")
    items = sorted((tmp_path / "kept").iterdir())
    assert synth(fake_model, tmp_path / "expected", *items, "--variants", "2", "--seed", "5") == 0
    assert watch(fake_model, inbox, tmp_path / "out", "--variants", "2", "--seed", "5") == 0
    assert results(tmp_path / "out") == results(tmp_path / "expected") and len(results(tmp_path / "out")) == 5 * 4
    assert is_tidy(inbox) and not (inbox / FAILED).exists()
    assert results(inbox / DONE) == results(tmp_path / "kept")
    said = capsys.readouterr()
    assert "a.nii.gz: done" in said.out and "4 done, 0 failed" in said.out and "Doe" not in said.out + said.err
