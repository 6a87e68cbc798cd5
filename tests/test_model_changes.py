"""Another model takes the place of the one in use: the page's commands, and what becomes of the
work.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from samples import blobs, results, synth, write_fake_model, write_mask

from runtime import Models, Synthesizer
from runtime.batch.audit_log import AUDIT, AuditTrail
from runtime.batch.plan import Plan
from runtime.core.atomic_files import sha256_of
from runtime.core.manifest import Intensity
from runtime.core.volume import Geometry
from runtime.engines.fake import fake_manifest
from runtime.io.case_finding import find_cases
from runtime.service.watch_folder import FolderWatcher

OLD = replace(fake_manifest(noise=False), name="heart 1.2.0")
NEW = replace(OLD, name="heart 1.3.0", intensity=Intensity("HU", -1000, 1000))


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def switch(link: Path, to: str) -> None:
    (link.parent / "next").symlink_to(to)
    os.replace(link.parent / "next", link)


def versions(folder: Path) -> Path:
    """Two versions and the link, which leads to the old one."""
    write_fake_model(folder / "heart-1.2.0", OLD)
    write_fake_model(folder / "heart-1.3.0", NEW)
    (folder / "current").symlink_to("heart-1.2.0")
    return folder / "current"


def test_documented_model_change_commands(root: Path, tmp_path: Path) -> None:
    """The commands of the page do what it says.

    `mask2ct` is this checkout's, with the engine that needs no network.
    """
    write_fake_model(tmp_path / "heart-1.2.0", OLD)
    write_fake_model(tmp_path / "heart-1.3.0", NEW)
    for name in ("inbox", "models", "bin"):
        (tmp_path / name).mkdir()
    write_mask(tmp_path / "sample.nii.gz")
    program = tmp_path / "bin" / "mask2ct"
    fake = 'case $1 in watch|synth) set -- "$@" --backend fake;; esac'
    quick = 'case $1 in watch) set -- "$@" --stable 0 --poll 0.01;; esac'
    program.write_text(f'#!/bin/sh\n{fake}\n{quick}\nexec {sys.executable} -m runtime "$@"\n')
    program.chmod(0o755)
    env = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(root)}
    output = []
    for n, block in enumerate(
        re.findall(
            r"```sh\n(.*?)```",
            (root / "docs" / "how-to" / "model-changes.md").read_text(),
            re.DOTALL,
        )
    ):
        write_mask(tmp_path / "inbox" / f"mask{n}.nii.gz", blobs(seed=n))
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        output.append(done.stdout)
    assert len(output) == 4
    made = {
        line["case"]: line["model_name"]
        for line in lines(tmp_path / "out" / AUDIT)
        if line["action"] == "synthesized"
    }
    assert made == {"mask0": OLD.name, "mask1": NEW.name, "mask2": NEW.name, "mask3": OLD.name}
    assert '"model switched"' in output[2] and "heart 1.3.0" in output[2]
    assert {*re.findall(r'"case": "(\w+)"', output[3])} == {"mask1", "mask2"}  # what was withdrawn


def test_queue_uses_opened_model(tmp_path: Path) -> None:
    """Until the restart, whatever the link says; after it the new model makes also what was made
    already.
    """
    link, inbox, out = versions(tmp_path / "models"), tmp_path / "inbox", tmp_path / "out"
    inbox.mkdir()

    class Listener:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

    def opened() -> tuple[Models, FolderWatcher]:
        models = Models.open([f"heart={link}"], backend="fake")
        trail = AuditTrail(out / AUDIT, "watch")
        plans = {name: Plan(out) for name in models}
        watcher = FolderWatcher(
            inbox,
            models,
            plans,
            find=lambda path, say: find_cases([path]),
            stable=0,
            listener=Listener(),
            audit=trail,
        )
        trail.load(models)
        return models, watcher

    models, watcher = opened()
    write_mask(inbox / "a.nii.gz", blobs(seed=1))
    watcher.run(poll=0, once=True)
    switch(link, "heart-1.3.0")
    write_mask(inbox / "b.nii.gz", blobs(seed=2))
    watcher.run(poll=0, once=True)
    models.close()
    old = results(out)
    models, watcher = opened()
    write_mask(inbox / "b.nii.gz", blobs(seed=2))
    watcher.run(poll=0, once=True)
    models.close()
    made = [line for line in lines(out / AUDIT) if line["action"] == "synthesized"]
    assert [(line["case"], line["model_name"]) for line in made] == [
        ("a", OLD.name),
        ("b", OLD.name),
        ("b", NEW.name),
    ]
    assert (
        results(out)["a_ct.nii.gz"] == old["a_ct.nii.gz"]
        and results(out)["b_ct.nii.gz"] != old["b_ct.nii.gz"]
    )
    (switched,) = [line for line in lines(out / AUDIT) if line["action"] == "model switched"]
    before, after = (
        sha256_of(tmp_path / "models" / name / "manifest.json")
        for name in ("heart-1.2.0", "heart-1.3.0")
    )
    assert (switched["before_manifest_sha256"], switched["manifest_sha256"]) == (before, after)


def test_resume_redoes_foreign_model_results(tmp_path: Path) -> None:
    """Results of another model are synthesized anew on `--resume`."""
    link, mask = versions(tmp_path / "models"), write_mask(tmp_path / "a.nii.gz")
    assert synth(link, tmp_path / "out", mask) == 0
    old = results(tmp_path / "out")
    switch(link, "heart-1.3.0")
    assert synth(link, tmp_path / "out", mask, "--resume") == 0
    assert results(tmp_path / "out") != old
    assert synth(link, tmp_path / "new", mask) == 0 and results(tmp_path / "new") == results(
        tmp_path / "out"
    )


def test_reopened_engine_is_unchanged(model: Path, tmp_path: Path) -> None:
    """Though the link leads to another model by then."""
    shutil.copytree(model, tmp_path / "heart-1.2.0")
    shutil.copytree(model, tmp_path / "heart-1.3.0")
    for graph in (tmp_path / "heart-1.3.0").glob("*.onnx"):
        graph.write_bytes(b"another model's")
    (tmp_path / "current").symlink_to("heart-1.2.0")
    with Synthesizer.open(tmp_path / "current", backend="onnx") as opened:
        volume = opened.volume(blobs((2, 24, 24)), Geometry.from_spacing((2.0, 2.0, 2.0)))
        first = opened.synthesize(volume)
        switch(tmp_path / "current", "heart-1.3.0")
        assert opened.release()
        assert np.array_equal(opened.synthesize(volume), first)
