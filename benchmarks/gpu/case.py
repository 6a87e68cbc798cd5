"""What every check on a GPU shares: the case, what may be absent, and the comparison with the
CPU.
"""

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
    """A package, a file or a module of ours is not here: nothing can be said."""


@dataclass(frozen=True)
class Case:
    """`model`: a model folder of ours to add to, with FP32 and FP16 graphs; `work`: where checks
    leave things for the next ones.
    """

    model: Path
    work: Path
    quick: bool

    @property
    def manifest(self) -> Manifest:
        return Manifest.load(self.model)


def need_gpu() -> None:
    if reason := why_no_gpu():
        raise Absent(reason)


def module(name: str) -> Any:
    if find_spec(name) is None:
        raise Absent(f"{name} is not installed")
    return import_module(name)


def lean_module() -> str:
    """The lean runtime's module name, where it and cuda-bindings are there."""
    need_gpu()
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        raise Absent("cuda-bindings is not installed")
    for name in ("tensorrt_lean", "tensorrt_lean_bindings"):
        if find_spec(name) is not None:
            return name
    raise Absent("tensorrt_lean is not installed")


def graph_of(case: Case, precision: str = "fp16") -> Path:
    name = case.manifest.file_of("onnx", precision)
    if name is None:
        raise Absent(f"{case.model} holds no {precision} graph")
    return case.model / name


def against_cpu(case: Case, run: Run, limits: dict[str, float] = FP16) -> str:
    inputs = draw(case.manifest, BATCH, seed=2)
    return parity(hu(run(inputs)), reference(case.manifest, case.model, inputs), limits)


def parity(found: NDArray[np.int16], expected: NDArray[np.int16], limits: dict[str, float]) -> str:
    delta = np.abs(found.astype(np.int32) - expected)
    seen = {
        "mean": float(delta.mean()),
        "p99.9": float(np.percentile(delta, 99.9)),
        "max": float(delta.max()),
    }
    text = ", ".join(f"{name} {value:.3g}" for name, value in seen.items()) + " HU"
    require(
        all(seen[name] <= limit for name, limit in limits.items()), f"{text}; allowed are {limits}"
    )
    require(len(np.unique(expected)) > 16, "the reference is too plain to prove anything")
    return text
