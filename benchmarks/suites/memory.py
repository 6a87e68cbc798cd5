"""Suite `memory`: what a mask file → CT file run holds at its peak, by size, and whether anything
is still allocated in steady state.

Facts of each contender: `base_rss` once the model is open and has synthesized a small mask,
`bytes_per_voxel` that the peak lies above it, `allocations` of the engine's pools after the first
and after the last run. Beside it the loop people write today, which holds whole volumes.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from runtime import Synthesizer
from runtime.core.manifest import Manifest

from ..harness.libraries import network
from ..harness.models import Prepared
from ..harness.paired import Contender, Ready
from ..harness.record import peak_rss
from ..harness.volumes import SIZES, mask, values
from .engine import macs
from .stream import torch_serial

SMALL = (16, 64, 64)


def groups(model: Prepared, backend: str, quick: bool) -> dict[str, list[Contender]]:
    found, cost = {}, {"fp32": macs(model.model)}
    for n, size in enumerate(list(SIZES)[: 2 if quick else None]):
        given = {"model": str(model.model), "size": size}
        some = [
            Contender(
                "mask2ct stream",
                "benchmarks.suites.memory:ours",
                {**given, "backend": backend},
                cost=cost,
            )
        ]
        if model.trained is not None and not (quick and n):
            options = {**given, "trained": str(model.trained)}
            some.append(
                Contender(
                    "nibabel → torch eager → nibabel",
                    "benchmarks.suites.memory:by_torch",
                    options,
                    cost=cost,
                )
            )
        found[f"memory {size}"] = some
    return found


def ours(model: str, size: str, backend: str) -> Ready:
    synth = Synthesizer.open(model, backend=backend)
    kept = tempfile.TemporaryDirectory()
    facts: dict[str, Any] = {"backend": synth.backend, "allocations": []}

    def synthesize_file(source: Path) -> int:
        shutil.rmtree(Path(kept.name) / "out", ignore_errors=True)
        (result,) = synth.stream([source], Path(kept.name) / "out")
        assert result.error is None, result.error
        facts["allocations"] = [
            *facts["allocations"][:1],
            {kind: stats.allocations for kind, stats in synth.memory().items()},
        ]
        return result.slices

    return _watched(synthesize_file, size, Path(model), Path(kept.name), facts)


def by_torch(model: str, size: str, trained: str) -> Ready:
    graph, manifest, kept = (
        network(trained),
        Manifest.load(Path(model)),
        tempfile.TemporaryDirectory(),
    )
    return _watched(
        lambda source: torch_serial(graph, manifest, source, Path(kept.name) / "ct.nii.gz"),
        size,
        Path(model),
        Path(kept.name),
        {},
    )


def _watched(
    synthesize_file: Callable[[Path], int],
    size: str,
    model: Path,
    folder: Path,
    facts: dict[str, Any],
) -> Ready:
    """A small mask is synthesized before: what an engine takes once, for its first slices, is no
    growth.
    """
    source = _write(SIZES[size], model, folder / "mask.nii.gz")
    synthesize_file(_write(SMALL, model, folder / "small.nii.gz"))
    base = facts["base_rss"] = peak_rss()

    def run() -> float:
        done = synthesize_file(source)
        facts["bytes_per_voxel"] = round((peak_rss() - base) / math.prod(SIZES[size]), 2)
        return float(done)

    return Ready(run, facts=facts)


def _write(shape: tuple[int, int, int], model: Path, path: Path) -> Path:
    """The mask's file. It is written by a process of its own: what making it takes is not what
    is measured.
    """
    import multiprocessing

    writer = multiprocessing.get_context("spawn").Process(
        target=_write_mask, args=(shape, str(model), str(path))
    )
    writer.start()
    writer.join()
    return path


def _write_mask(shape: tuple[int, int, int], model: str, path: str) -> None:
    table = Manifest.load(Path(model)).labels
    volume = mask(shape, len(table))
    image = sitk.GetImageFromArray(values(volume, table))
    image.SetSpacing(volume.geometry.spacing)
    sitk.WriteImage(image, path)
