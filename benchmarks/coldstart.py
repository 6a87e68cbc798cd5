"""Suite `coldstart`: from an empty process to the first painted slab, beside PyTorch doing the same for one slice. Units: starts.

Each run is a new Python process; the page cache is warm, as it is on a machine that paints now and then.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from .models import Prepared
from .paired import ROOT, Contender, Ready

_CLOCK = "import sys, time, json; sys.path.insert(0, {root!r}); t = [time.perf_counter()]\n"
_SAY = """t.append(time.perf_counter())
from benchmarks.record import peak_rss
print(json.dumps([*(b - a for a, b in zip(t, t[1:])), peak_rss()]))
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
"""
_TORCH = """
import torch
from pathlib import Path
from export.graph import LabelsToIntensity
from train.checkpoint import load_generator, load_run
t.append(time.perf_counter())
facts = load_run(Path({run!r}))
graph = LabelsToIntensity(load_generator(Path({run!r})), len(facts.labels), facts.intensity)
t.append(time.perf_counter())
h, w = facts.grid.canvas
with torch.inference_mode():
    labels = torch.ones(1, facts.grid.slices, h, w, dtype=torch.uint8)
    graph(labels, torch.zeros(1, facts.style) if facts.style else None, labels[:, 0] if facts.noise else None)
"""


def groups(model: Prepared, backend: str) -> dict[str, list[Contender]]:
    given = {"code": _OURS, "model": str(model.model), "backend": backend}
    found = [Contender("mask2ct: first slab of 16", "benchmarks.coldstart:start", given, cost={"start": 1})]
    if model.trained is not None:
        given = {"code": _TORCH, "run": str(model.trained)}
        found.append(Contender("PyTorch eager: first slice", "benchmarks.coldstart:start", given, cost={"start": 1}))
    return {"coldstart": found}


def start(code: str, **names: str) -> Ready:
    program = _CLOCK.format(root=str(ROOT)) + code.format(**names) + _SAY
    facts: dict[str, Any] = {}

    def run() -> float:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        *seconds, facts["peak_rss"] = json.loads(done.stdout.splitlines()[-1])  # the program's own, in the place of ours
        facts["seconds"] = dict(zip(("import", "open", "first"), seconds, strict=True))
        return 1.0

    return Ready(run, facts=facts)
