"""The model folder: graph files, their proof and the manifest, whole or absent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.contract import MANIFEST, Manifest, ModelFile
from runtime.engines.onnx import OnnxEngine
from runtime.files import atomic_folder, sha256_of, write_json
from train.checkpoint import Run

from .graph import LabelsToIntensity
from .parity import measure, random_inputs, require
from .to_onnx import to_onnx

RANDOM_SLICES = 8


def describe_file(path: Path, kind: str, precision: str) -> ModelFile:
    return ModelFile(kind, precision, path.stat().st_size, sha256_of(path))


def write_model(run: Run, graph: LabelsToIntensity, masks: NDArray[np.uint8], folder: Path, *, say: Callable[[str], None]) -> Manifest:
    """Export `graph`, prove it on `masks` (validation slices, uint8 (n, Z, H, W)) and on random labels, write `folder`.

    Nothing is written, and a folder that was there stays as it was, when the proof fails (`ParityError`).
    """
    manifest = Manifest(
        name=str(run.data["name"]), labels=run.labels, grid=run.grid, intensity=run.intensity, style=run.style, noise=run.noise,
        files={}, training=provenance(run), license=str(run.data.get("license", "")),
    )  # fmt: skip
    with atomic_folder(folder) as part:
        path = part / "model.onnx"
        say(f"exporting {path.name}")
        to_onnx(graph, manifest.inputs, run.grid.divisor, path)
        say(f"proving {path.name} on {len(masks)} validation slices and {RANDOM_SLICES} of random labels")
        engine = OnnxEngine(path, manifest)
        proof: dict[str, Any] = {}
        random = random_inputs(RANDOM_SLICES, run.grid.slices, run.grid.canvas, len(run.labels))
        for what, labels in (("validation masks", masks), ("random labels", random)):
            parity = measure(graph, engine, labels)
            require(parity, path.name, what)
            proof[what] = parity.to_json()
            say(f"  {what}: max {parity.max} HU, mean {parity.mean:.5f} HU, {100 * parity.differing:.4f} % of the pixels differ")
        name = engine.name.split(",")[0]
        engine.close()
        whole = Manifest(
            **{**vars(manifest), "files": {path.name: describe_file(path, "onnx", "fp32")}, "parity": {path.name: {name: proof}}}
        )
        write_json(part / MANIFEST, whole.to_json())
    return whole


def provenance(run: Run) -> Mapping[str, Any]:
    """What the manifest says of the training: no path, no patient's name."""
    kept = ("step", "metrics", "data", "versions", "commit")
    return {"weights_sha256": run.data["weights"]["sha256"], **{key: run.data[key] for key in kept if key in run.data}}
