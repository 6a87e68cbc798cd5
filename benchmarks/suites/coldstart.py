"""Suite `coldstart`: from an empty process to the first synthesized slab, in starts a second.

PyTorch does the same for one slice beside it. A second program goes on to the first slab that
`mask2ct synth` hands to the result's file, from a mask of 300 x 512 x 512 in .nii.gz, which it
reads and checks before. Each run is a new Python process. The page cache is warm, as on a machine
that synthesizes now and then. What the engine and the codecs import when they are first needed
counts as opening, not as import.
"""

from __future__ import annotations

import atexit
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from runtime.core.manifest import Manifest

from ..harness.models import Prepared
from ..harness.paired import ROOT, Contender, Ready
from .stream import SIDE, write_mask

SLICES = 300
_CLOCK = """import sys, time, json; sys.path.insert(0, {root!r}); t = [time.perf_counter()]
def say():
    t.append(time.perf_counter())
    from benchmarks.harness.record import peak_rss
    facts = [*(b - a for a, b in zip(t, t[1:])), peak_rss()]
    print(json.dumps(facts), file=sys.__stdout__, flush=True)
"""
_OURS = """
import numpy as np
from runtime import Geometry, LabelVolume, Synthesizer
t.append(time.perf_counter())
synth = Synthesizer.open({model!r}, backend={backend!r})
t.append(time.perf_counter())
h, w = synth.manifest.grid.canvas
a, b = synth.manifest.grid.pixel_spacing or (1.0, 1.0)
next(synth.slabs(LabelVolume(np.ones((16, h, w), np.uint8), Geometry(np.diag([b, a, 3.0, 1.0])))))
say()
"""
_WRITTEN = """
import os
from runtime import Synthesizer
from runtime.__main__ import main
from runtime.synthesizer import DEFAULT_BATCH
t.append(time.perf_counter())
import runtime.io.writers.volume as volumes
planes_of = volumes.planes_of
def until_written(*arguments):
    for n, plane in enumerate(planes_of(*arguments)):
        if n == DEFAULT_BATCH:  # the planes of the first slab are with the file
            say()
            os._exit(0)
        yield plane
volumes.planes_of = until_written
files = [{mask!r}, "--model", {model!r}, "--output", {output!r}]
main(["synth", *files, "--backend", {backend!r}, "--quiet"])
"""
_TORCH = """
import torch
from pathlib import Path
from export.graph import LabelsToIntensity
from train.checkpoint import load_generator, load_run
t.append(time.perf_counter())
facts = load_run(Path({run!r}))
graph = LabelsToIntensity(load_generator(Path({run!r})), facts.classes, facts.intensity)
t.append(time.perf_counter())
h, w = facts.grid.canvas
with torch.inference_mode():
    labels = torch.ones(1, facts.grid.slices, h, w, dtype=torch.uint8)
    style = torch.zeros(1, facts.style) if facts.style else None
    graph(labels, style, labels[:, 0] if facts.noise else None)
say()
"""
_PROGRAMS = {
    "synthesized": (_OURS, ("import", "open", "first slab")),
    "written": (_WRITTEN, ("import", "first written slab")),
    "torch": (_TORCH, ("import", "open", "first slice")),
}


def groups(model: Prepared, backend: str) -> dict[str, list[Contender]]:
    """The contenders.

    Args:
        model: The model, and its run folder for PyTorch.
        backend: The backend of our engine.

    Returns:
        The group "coldstart".
    """
    folder = Path(tempfile.mkdtemp(prefix="mask2ct-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    mask = write_mask(folder / "mask.nii.gz", Manifest.load(model.model), (SLICES, SIDE, SIDE))
    options = {"model": str(model.model), "backend": backend}
    programs: dict[str, dict[str, Any]] = {
        "mask2ct: first slab of 16": {"program": "synthesized", **options},
        "mask2ct synth: first written slab": {
            "program": "written",
            **options,
            "mask": str(mask),
            "output": str(folder / "out"),
        },
    }
    if model.trained is not None:
        programs["PyTorch eager: first slice"] = {"program": "torch", "run": str(model.trained)}
    return {
        "coldstart": [
            Contender(name, "benchmarks.suites.coldstart:start", program_options, cost={"start": 1})
            for name, program_options in programs.items()
        ]
    }


def start(program: str, **values: str) -> Ready:
    """A program that is started anew in each round.

    A round takes longer than the sum of its parts: Python also starts and, except for "written",
    ends.

    Args:
        program: A key of `_PROGRAMS`.
        **values: The values that its text is formatted with.

    Returns:
        The contender. Its facts are the seconds of each part.
    """
    code, parts = _PROGRAMS[program]
    code, facts = (_CLOCK + code).format(root=str(ROOT), **values), dict[str, Any]()

    def run() -> float:
        child = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        # the program's peak stands in place of this process'
        *seconds, facts["peak_rss"] = json.loads(child.stdout.splitlines()[-1])
        facts["seconds"] = dict(zip(parts, seconds, strict=True))
        return 1.0

    return Ready(run, facts=facts)
