"""Our own engines on a GPU, through the protocol that the synthesizer uses.

Checks: they are right, their memory stays flat, and they are as fast as a bare engine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.bare import Bare, require
from benchmarks.gpu.case import BATCH, Absent, Case, against_cpu, lean_module, module, need_gpu
from benchmarks.gpu.model import draw
from benchmarks.gpu.torch_engine import torch_engine

LEAST_OF_BARE = 0.95
CHANGES = 1000  # between torch and our engine


def runtime_parity(case: Case, backend: str) -> str:
    """Compare our engine, opened as in a hospital, with the CPU.

    Args:
        case: The model and the folder to work in.
        backend: The backend.

    Returns:
        A line about what was seen.

    Raises:
        Absent: A package, a file or the GPU is missing.
        RuntimeError: The check fails.
    """
    engine = _engine(case, backend)
    from runtime.engines.memory import HOST_STREAM

    batch = engine.spec.batch
    out = np.empty((batch, *case.manifest.grid.canvas, 2), np.uint8)

    def run(inputs: dict[str, NDArray[Any]]) -> NDArray[np.uint8]:
        rows = []
        for start in range(0, BATCH, batch):
            picked = [min(n, BATCH - 1) for n in range(start, start + batch)]
            engine.run(
                {name: np.ascontiguousarray(a[picked]) for name, a in inputs.items()},
                out,
                stream=HOST_STREAM,
            )
            rows.append(out[: BATCH - start].copy())
        return np.concatenate(rows)

    differences = against_cpu(case, run)
    engine.close()
    return f"{engine.name}: {differences}"


def runtime_steady(case: Case, backend: str) -> str:
    """Nothing is allocated after the second batch of a shape, and closing frees everything.

    Args:
        case: The model and the folder to work in.
        backend: The backend.

    Returns:
        A line about what was seen.

    Raises:
        Absent: A package, a file or the GPU is missing.
        RuntimeError: The check fails.
    """
    engine = _engine(case, backend)
    step = Pipeline(case, engine)
    for _ in range(2 * engine.spec.streams):
        step()
    before = {name: stats.allocations for name, stats in engine.memory().items()}
    for _ in range(20 if case.quick else 200):
        step()
    after = {name: stats.allocations for name, stats in engine.memory().items()}
    require(before == after, f"allocations went from {before} to {after}")
    step.close()
    engine.close()
    still_in_use = {name: stats.in_use for name, stats in engine.memory().items() if stats.in_use}
    require(not still_in_use, f"bytes in use after close: {still_in_use}")
    return f"allocations stay at {after}, 0 bytes in use after close"


def runtime_beside_torch(case: Case, backend: str) -> str:
    """Alternate torch's CUDA work and our engine in one process: right, and flat in memory.

    Args:
        case: The model and the folder to work in.
        backend: The backend.

    Returns:
        A line about what was seen.

    Raises:
        Absent: A package, a file or the GPU is missing.
        RuntimeError: The check fails.
    """
    torch = _cuda_torch()
    engine = _engine(case, backend)
    step = Pipeline(case, engine)
    square = torch.randn(512, 512, device="cuda")
    first, free, rounds = step.result(), [], 50 if case.quick else CHANGES
    expected = (square @ square).sum().item()
    for n in range(rounds):
        require(
            (square @ square).sum().item() == expected, f"torch computes otherwise in round {n}"
        )
        require(
            np.array_equal(step.result(), first), f"our engine synthesizes otherwise in round {n}"
        )
        if n in (rounds // 10, rounds - 1):
            free.append(torch.cuda.mem_get_info()[0])
    lost = free[0] - free[-1]
    step.close()
    engine.close()
    require(lost <= 1 << 20, f"{lost} bytes of device memory are gone after {rounds} rounds")
    return f"{rounds} rounds, {lost} bytes lost"


def runtime_throughput(case: Case, backend: str) -> str:
    """Compare the throughput of the pipelined engine with a baseline.

    The baseline of TensorRT is the bare engine, otherwise the engine called batch after batch.

    Args:
        case: The model and the folder to work in.
        backend: The backend.

    Returns:
        A line about what was seen.

    Raises:
        Absent: A package, a file or the GPU is missing.
        RuntimeError: The check fails.
    """
    from runtime.engines.memory import HOST_STREAM

    engine = _engine(case, backend)
    step = Pipeline(case, engine)
    batch, rounds, calls = engine.spec.batch, 5 if case.quick else 15, 50
    if backend == "tensorrt":
        name = case.manifest.file_of("engine", "fp16")
        loader = (
            lean_module()
            if case.manifest.files[str(name)].facts["version_compatible"]
            else "tensorrt"
        )
        bare = Bare(
            loader, (case.model / str(name)).read_bytes(), case.manifest, batch, captured=True
        )

        def baseline() -> None:
            for _ in range(calls):
                bare.launch()
            bare.wait()

    else:
        inputs, out = (
            draw(case.manifest, batch),
            np.empty((batch, *case.manifest.grid.canvas, 2), np.uint8),
        )

        def baseline() -> None:
            for _ in range(calls):
                engine.run(inputs, out, stream=HOST_STREAM)

    def pipelined() -> None:
        for _ in range(calls):
            step()
        step.wait()

    ratios, rates = [], []
    for n in range(rounds + 1):  # the first round warms up
        seconds = []
        order = (pipelined, baseline) if n % 2 else (baseline, pipelined)
        for contender in order:
            began = time.perf_counter()
            contender()
            seconds.append(time.perf_counter() - began)
        pipelined_seconds, baseline_seconds = seconds if n % 2 else seconds[::-1]
        if n:
            ratios.append(baseline_seconds / pipelined_seconds)
            rates.append(batch * calls / pipelined_seconds)
    ratio = statistics.median(ratios)
    require(
        ratio >= LEAST_OF_BARE,
        f"only {ratio:.3f} of the throughput without a pipeline ({min(ratios):.3f} to"
        f" {max(ratios):.3f})",
    )
    what = "the bare engine" if backend == "tensorrt" else "one batch after the other"
    return (
        f"{ratio:.3f} of {what} ({min(ratios):.3f} to {max(ratios):.3f}),"
        f" {statistics.median(rates):.0f} slices/s"
    )


class Pipeline:
    """Calls an engine on all of its streams in turn, with tensors of the engine's pool.

    Args:
        case: The model.
        engine: An open engine.
    """

    def __init__(self, case: Case, engine: Any):
        self._engine = engine
        self._inputs: list[dict[str, NDArray[Any]]] = []
        self._outs: list[NDArray[Any]] = []
        self._buffers: list[Any] = []
        self._streams = [engine.open_stream() for _ in range(engine.spec.streams)]
        self._next = 0
        drawn = draw(case.manifest, engine.spec.batch)
        shape = (engine.spec.batch, *case.manifest.grid.canvas, 2)
        for stream in self._streams:
            inputs = {
                name: self._array(array.shape, array.dtype, stream) for name, array in drawn.items()
            }
            for name, array in drawn.items():
                inputs[name][...] = array
            self._inputs.append(inputs)
            self._outs.append(self._array(shape, np.dtype(np.uint8), stream))

    def _array(self, shape: tuple[int, ...], dtype: np.dtype[Any], stream: Any) -> NDArray[Any]:
        self._buffers.append(
            self._engine.pool.allocate(int(np.prod(shape)) * dtype.itemsize, stream=stream)
        )
        return self._buffers[-1].array(shape, dtype)

    def __call__(self) -> int:
        """Queue a batch on the next stream; returns the stream's index."""
        n, self._next = self._next, (self._next + 1) % len(self._streams)
        self._streams[n].synchronize()
        self._engine.run(self._inputs[n], self._outs[n], stream=self._streams[n])
        return n

    def result(self) -> NDArray[np.uint8]:
        """Synthesize a batch; returns uint8 (N, H, W, 2), a copy."""
        n = self()
        self._streams[n].synchronize()
        return self._outs[n].copy()

    def wait(self) -> None:
        """Wait for all streams."""
        for stream in self._streams:
            stream.synchronize()

    def close(self) -> None:
        """Close streams and buffers."""
        for resource in (*self._streams, *self._buffers):
            resource.close()


def _engine(case: Case, backend: str) -> Any:
    need_gpu()
    from runtime.core.errors import MissingComponent
    from runtime.engines.registry import CHOICES, open_engine

    try:
        if backend == "torch":
            _cuda_torch()
            return torch_engine(case)
        if backend not in CHOICES:
            raise Absent(f"this mask2ct has no backend {backend!r}")
        engine, *_ = open_engine(backend, case.manifest, case.model)
    except MissingComponent as exc:
        raise Absent(exc.fact) from exc
    return engine


def _cuda_torch() -> Any:
    need_gpu()
    torch = module("torch")
    if not torch.cuda.is_available():
        raise Absent("this torch has no CUDA")
    return torch


RUNTIME: dict[str, tuple[str, Callable[[Case, str], str]]] = {
    "parity": ("synthesizes what the CPU synthesizes", runtime_parity),
    "steady": ("allocates nothing in steady state", runtime_steady),
    "torch": (f"beside torch, {CHANGES} changes", runtime_beside_torch),
    "throughput": (f"pipelined at least {LEAST_OF_BARE} of bare", runtime_throughput),
}
