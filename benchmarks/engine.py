"""Suite `engine`: slices/s of the synthesizer (mask in, HU on the mask's grid out) beside whatever else could run the same network.

Beside it: the backend called in a tight loop on prepared tensors, which is its ceiling; every other backend and precision that the
model holds and this machine has; and the network in PyTorch (eager, channels_last, compiled), which is what people run today.
All paint the same slices with the same noise, and are compared before they are timed. Shares are of the measured roof at the
same precision: multiply-accumulates of the graph times slices/s.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import Synthesizer
from runtime.contract import Manifest
from runtime.engines.registry import BACKENDS, open_engine
from runtime.grid import SliceGrid
from runtime.memory import HOST_STREAM
from runtime.randomness import CaseRandom
from runtime.volume import Geometry, LabelVolume

from .paired import Contender, Measured, Ready
from .roof import CONV_FP32, FP32, INT8, ROOF
from .roof import contenders as roofs
from .volumes import mask

SAME_HU = 0.05  # mean difference of two float32 computations; they may fall on either side of a half
HU = {"fp32": SAME_HU, "fp16": 1.0, "int8": 20.0}  # the proof in the manifest is stricter


def groups(model: Path, trained: Path | None, backend: str, slices: int, compiled: bool) -> dict[str, list[Contender]]:
    manifest = Manifest.load(model)
    given: dict[str, Any] = {"model": str(model), "slices": slices}
    ours = Contender("mask2ct synthesizer", "benchmarks.engine:synthesizer", {**given, "backend": backend})
    found = [ours, Contender("its backend, tight loop", "benchmarks.engine:bare", {**given, "backend": backend}, SAME_HU)]
    found += [
        Contender(f"{b.name}, tight loop", "benchmarks.engine:bare", {**given, "backend": b.name}, HU[b.file[1]])
        for b in BACKENDS
        if manifest.file_of(*b.file)
    ]
    if trained is not None:
        ways = ["eager", "channels_last", *(["compile"] if compiled else [])]
        found += [
            Contender(f"PyTorch {way}", "benchmarks.engine:pytorch", {**given, "trained": str(trained), "way": way}, SAME_HU)
            for way in ways
        ]
    return {"engine": [*found, *roofs(FP32, INT8, CONV_FP32)]}


def shares(model: Path, measured: Mapping[str, Measured]) -> dict[str, float]:
    """Each contender's multiply-accumulates per second as a share of the fastest matrix product at its precision."""
    from .macs import count

    manifest = Manifest.load(model)
    file = manifest.file_of("onnx", "fp32")
    if file is None:
        return {}
    h, w = manifest.grid.canvas
    macs = count(model / file, {"N": 1, "H": h, "W": w})
    found = {}
    for name, m in measured.items():
        roof = measured[INT8 if "model.int8.onnx" in str(m.facts.get("backend", "")) else FP32]
        if m.rates and roof.rates and not name.startswith(ROOF):
            found[name] = float(np.median([macs * rate / limit for rate, limit in zip(m.rates, roof.rates, strict=True)]))
    return found


def _slices(manifest: Manifest, slices: int) -> tuple[LabelVolume, dict[str, NDArray[Any]]]:
    """A mask on the model's own grid, and the tensors that the synthesizer makes of it (N = all its slices)."""
    (h, w), spacing = manifest.grid.canvas, manifest.grid.pixel_spacing or (1.0, 1.0)
    labels = mask((slices, h, w), len(manifest.labels)).labels
    volume = LabelVolume(labels, Geometry(np.diag([spacing[1], spacing[0], manifest.grid.slice_spacing or 3.0, 1.0])))
    grid, random = SliceGrid(manifest.grid, volume.geometry, (slices, h, w), labels), CaseRandom(0, volume.digest, 0)
    inputs: dict[str, NDArray[Any]] = {"labels": np.stack([grid.labels(labels, k) for k in range(slices)])}
    if manifest.style:
        inputs["style"] = np.repeat(random.style(manifest.style)[None], slices, 0)
    if manifest.noise:
        inputs["noise"] = np.stack([random.noise(k, (h, w)) for k in range(slices)])
    return volume, inputs


def synthesizer(model: str, slices: int, backend: str, planted: float = 0.0) -> Ready:
    """`planted`: makes every round slower by that share of itself; for benchmarks/selfcheck.py."""
    synth = Synthesizer.open(model, backend=backend)
    volume, _ = _slices(synth.manifest, slices)

    def run() -> float:
        started = time.perf_counter()
        synth.paint(volume)
        until = time.perf_counter() + planted * (time.perf_counter() - started)
        while time.perf_counter() < until:
            pass
        return float(slices)

    return Ready(run, lambda: synth.paint(volume), {"backend": synth.backend})


def bare(model: str, slices: int, backend: str) -> Ready:
    manifest = Manifest.load(Path(model))
    engine = open_engine(backend, manifest, Path(model))[0]
    batch, (h, w) = engine.spec.batch, manifest.grid.canvas
    _, inputs = _slices(manifest, slices)
    slices -= slices % batch
    out = np.empty((slices, h, w, 2), np.uint8)

    def run() -> float:
        for n in range(0, slices, batch):
            engine.run({name: array[n : n + batch] for name, array in inputs.items()}, out[n : n + batch], stream=HOST_STREAM)
        return float(slices)

    def output() -> NDArray[Any]:
        run()
        return out.view("<i2")[..., 0]

    return Ready(run, output, {"backend": engine.name})


def pytorch(model: str, slices: int, trained: str, way: str) -> Ready:
    import torch

    from export.graph import LabelsToIntensity
    from train.checkpoint import load_generator, load_run

    facts = load_run(Path(trained))
    graph = LabelsToIntensity(load_generator(Path(trained)), len(facts.labels), facts.intensity)
    if way == "channels_last":
        graph = graph.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    call: Any = torch.compile(graph) if way == "compile" else graph
    _, inputs = _slices(Manifest.load(Path(model)), slices)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    batch = min(8, slices)  # its best on two cores

    def paint() -> NDArray[Any]:
        with torch.inference_mode():
            return np.concatenate([call(**{k: t[n : n + batch] for k, t in tensors.items()}).numpy() for n in range(0, slices, batch)])

    def run() -> float:
        return float(len(paint()))

    return Ready(run, lambda: paint().view("<i2")[..., 0], {"batch": batch})
