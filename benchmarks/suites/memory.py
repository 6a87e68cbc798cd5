"""Suite `memory`: the peak memory of a run from a mask file to a CT file, by size.

Facts of each contender: `base_rss` once the model is open and has synthesized a small mask,
`bytes_per_voxel` by which the peak is higher, and `allocations` of the engine's pools after the
first and after the last run: in steady state nothing is allocated. Beside it: the loop that people
write today, which holds whole volumes.
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
    """The contenders.

    Args:
        model: The model, and its run folder for PyTorch.
        backend: The backend of our engine.
        quick: Fewer sizes and contenders.

    Returns:
        A group for each size.
    """
    named_groups, cost = {}, {"fp32": macs(model.model)}
    for n, size in enumerate(list(SIZES)[: 2 if quick else None]):
        options = {"model": str(model.model), "size": size}
        contenders = [
            Contender(
                "mask2ct stream",
                "benchmarks.suites.memory:ours",
                {**options, "backend": backend},
                cost=cost,
            )
        ]
        if model.trained is not None and not (quick and n):
            torch_options = {**options, "trained": str(model.trained)}
            contenders.append(
                Contender(
                    "nibabel → torch eager → nibabel",
                    "benchmarks.suites.memory:by_torch",
                    torch_options,
                    cost=cost,
                )
            )
        named_groups[f"memory {size}"] = contenders
    return named_groups


def ours(model: str, size: str, backend: str) -> Ready:
    """`Synthesizer.stream` from file to file.

    Args:
        model: The model folder.
        size: A key of `SIZES`.
        backend: The backend.

    Returns:
        The contender; its unit is slices.
    """
    synth = Synthesizer.open(model, backend=backend)
    folder = tempfile.TemporaryDirectory()
    facts: dict[str, Any] = {"backend": synth.backend, "allocations": []}

    def synthesize_file(source: Path) -> int:
        shutil.rmtree(Path(folder.name) / "out", ignore_errors=True)
        (result,) = synth.stream([source], Path(folder.name) / "out")
        assert result.error is None, result.error
        facts["allocations"] = [
            *facts["allocations"][:1],
            {kind: stats.allocations for kind, stats in synth.memory().items()},
        ]
        return result.slices

    return _watched(synthesize_file, size, Path(model), Path(folder.name), facts)


def by_torch(model: str, size: str, trained: str) -> Ready:
    """The loop that people write: nibabel, PyTorch slice by slice, nibabel.

    Args:
        model: The model folder.
        size: A key of `SIZES`.
        trained: The run folder.

    Returns:
        The contender; its unit is slices.
    """
    graph, manifest = network(trained), Manifest.load(Path(model))
    folder = tempfile.TemporaryDirectory()
    return _watched(
        lambda source: torch_serial(graph, manifest, source, Path(folder.name) / "ct.nii.gz"),
        size,
        Path(model),
        Path(folder.name),
        {},
    )


def _watched(
    synthesize_file: Callable[[Path], int],
    size: str,
    model: Path,
    folder: Path,
    facts: dict[str, Any],
) -> Ready:
    """A contender whose memory is measured.

    It synthesizes a small mask first: what an engine takes once, for its first slices, is no
    growth.
    """
    source = _write(SIZES[size], model, folder / "mask.nii.gz")
    synthesize_file(_write(SMALL, model, folder / "small.nii.gz"))
    base = facts["base_rss"] = peak_rss()

    def run() -> float:
        slices = synthesize_file(source)
        facts["bytes_per_voxel"] = round((peak_rss() - base) / math.prod(SIZES[size]), 2)
        return float(slices)

    return Ready(run, facts=facts)


def _write(shape: tuple[int, int, int], model: Path, path: Path) -> Path:
    """Write the mask's file in a process of its own.

    The memory that it takes to make the mask is not what is measured.
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
