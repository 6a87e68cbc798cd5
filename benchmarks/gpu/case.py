"""What all checks on a GPU share: the case, what may be absent, the comparison with the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.bare import require
from benchmarks.gpu.model import draw, hu, reference
from runtime.core.manifest import Manifest
from runtime.engines.gpu.probe import why_no_gpu

BATCH = 4
FP16 = {"mean": 1.0, "p99.9": 10.0, "max": float("inf")}  # HU: export's limits
FP32 = {"mean": 1.0, "p99.9": 1.0, "max": 1.0}
Run = Callable[[dict[str, NDArray[Any]]], NDArray[np.uint8]]  # inputs by name → uint8 (N, H, W, 2)


class Absent(Exception):
    """A package, a file or a module of ours is missing, so that the check says nothing."""


@dataclass(frozen=True)
class Case:
    """What a check works on.

    Attributes:
        model: A model folder with FP32 and FP16 graphs; checks may add to it.
        work: Where checks leave files for later ones.
        quick: Fewer rounds.
    """

    model: Path
    work: Path
    quick: bool

    @property
    def manifest(self) -> Manifest:
        """The model's manifest."""
        return Manifest.load(self.model)


def need_gpu() -> None:
    """Raise `Absent` without a GPU."""
    if reason := why_no_gpu():
        raise Absent(reason)


def module(name: str) -> Any:
    """Import a module.

    Args:
        name: Its name.

    Raises:
        Absent: It is not installed.
    """
    if find_spec(name) is None:
        raise Absent(f"{name} is not installed")
    return import_module(name)


def lean_module() -> str:
    """The name of the lean runtime's module.

    Raises:
        Absent: It, cuda-bindings or the GPU is missing.
    """
    need_gpu()
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        raise Absent("cuda-bindings is not installed")
    for name in ("tensorrt_lean", "tensorrt_lean_bindings"):
        if find_spec(name) is not None:
            return name
    raise Absent("tensorrt_lean is not installed")


def graph_of(case: Case, precision: str = "fp16") -> Path:
    """The model's graph.

    Args:
        case: The model.
        precision: "fp32" or "fp16".

    Raises:
        Absent: The model holds no such graph.
    """
    name = case.manifest.file_of("onnx", precision)
    if name is None:
        raise Absent(f"{case.model} holds no {precision} graph")
    return case.model / name


def against_cpu(case: Case, run: Run, limits: dict[str, float] = FP16) -> str:
    """Compare what runs on the GPU with the FP32 graph on the CPU.

    Args:
        case: The model.
        run: What runs on the GPU.
        limits: The allowed differences in HU.

    Returns:
        The differences as text.

    Raises:
        RuntimeError: A difference is too large.
    """
    inputs = draw(case.manifest, BATCH, seed=2)
    return parity(hu(run(inputs)), reference(case.manifest, case.model, inputs), limits)


def parity(
    generated: NDArray[np.int16], expected: NDArray[np.int16], limits: dict[str, float]
) -> str:
    """Compare two images.

    Args:
        generated: int16 HU.
        expected: int16 HU of the same shape.
        limits: The allowed differences in HU.

    Returns:
        The differences as text.

    Raises:
        RuntimeError: A difference is too large.
    """
    delta = np.abs(generated.astype(np.int32) - expected)
    differences = {
        "mean": float(delta.mean()),
        "p99.9": float(np.percentile(delta, 99.9)),
        "max": float(delta.max()),
    }
    text = ", ".join(f"{name} {value:.3g}" for name, value in differences.items()) + " HU"
    require(
        all(differences[name] <= limit for name, limit in limits.items()),
        f"{text}; allowed are {limits}",
    )
    require(
        len(np.unique(expected)) > 16, "the reference has too few different values to compare with"
    )
    return text
