"""The engine protocol: what the synthesizer needs from the code that runs the graph.

An engine runs one graph on host arrays. The tensors are those of `runtime.core.manifest`; the
library, the device and the memory behind them are the engine's business alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..core.errors import Mask2CTError, ModelError
from ..core.manifest import Manifest, TensorSpec
from .memory import MemoryBudget, Pool, PoolStats, Stream

Inputs = Mapping[str, NDArray[Any]]


class EngineError(Mask2CTError):
    """A call broke the engine's contract, came after `close()`, or failed in the library."""

    exit_code = 1


@dataclass(frozen=True)
class EngineSpec:
    """The shapes, batch size and streams of an engine.

    Attributes:
        inputs: the input tensors of `runtime.core.manifest`.
        output: the output tensor.
        batch: the batch size N of every call. Kernels may round differently from one batch size
            to another, so N never varies; the caller pads the last batch.
        streams: the number of streams that keep the engine busy. The caller fills and reads the
            tensors of one stream while the engine computes on the others.
        largest: (H, W) of the largest canvas; None for any.
    """

    inputs: tuple[TensorSpec, ...]
    output: TensorSpec
    batch: int
    streams: int = 2
    largest: tuple[int, int] | None = None


@dataclass(frozen=True)
class EngineOptions:
    """The options that every engine accepts.

    Attributes:
        max_memory: the cap of the engine's pool in bytes, on the GPU or the host, wherever it
            computes; None for as much as the engine needs.
        device: the number of the GPU.
        auto_batch: take the largest batch that fits, where the engine has a choice.
        workers: the number of batches that a CPU engine computes at once; None for one per core,
            up to 16.
        budget: the memory budget that its pool shares with the pools of other engines.
    """

    max_memory: int | None = None
    device: int = 0
    auto_batch: bool = False
    workers: int | None = None
    budget: MemoryBudget | None = None


@runtime_checkable
class Engine(Protocol):
    """Runs the graph on host arrays.

    A stream serves one thread at a time; several streams may be in use at once.
    """

    @property
    def name(self) -> str:
        """Backend, version and device, for people."""

    @property
    def spec(self) -> EngineSpec:
        """The shapes, batch size and streams of this engine."""

    @property
    def pool(self) -> Pool:
        """The pool for the arrays of a call, page-locked for a GPU.

        Arrays from elsewhere work too, but more slowly.
        """

    def open_stream(self) -> Stream:
        """Open a stream for calls that run while the caller does other work.

        Raises:
            EngineError: the engine is closed.
        """

    def run(self, inputs: Inputs, out: NDArray[np.uint8], *, stream: Stream) -> None:
        """Run the graph once.

        Args:
            inputs: C-contiguous arrays by name, as `spec.inputs` describes them, N = `spec.batch`.
            out: uint8 (N, H, W, 2), C-contiguous, little-endian int16 in pairs of bytes.
            stream: on `HOST_STREAM` the call returns when the result is complete. On a stream of
                `open_stream()` the caller leaves the arrays alone until `stream.synchronize()`
                returns, which also raises the errors of the call.

        Raises:
            EngineError: the arrays break the contract, the engine is closed, or its library fails.
            MemoryCapExceeded: memory is short.
        """

    def memory(self) -> dict[str, PoolStats]:
        """The accounting of each kind of memory; it stays readable after `close()`."""

    def close(self) -> None:
        """Wait for the work and release everything; a second call does nothing."""


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_graph(
    manifest: Manifest, inputs: Mapping[str, str | None], signature: str | None, path: Path
) -> None:
    """Check that the manifest describes the graph in `path`.

    Args:
        manifest: the manifest of the model.
        inputs: the dtype of each input of the graph, by name; None for a dtype that no manifest
            knows.
        signature: the graph signature in the file (`Manifest.check_signature`); None where the
            file has none.
        path: the file, for the message.

    Raises:
        ModelError: the inputs or the signature differ from those of the manifest.
    """
    stated = {t.name: t.dtype for t in manifest.inputs}
    if stated != inputs:
        raise ModelError(
            f"{path.name} takes {dict(inputs)}",
            expected=f"the manifest's inputs {stated}",
            remedy="export the run again",
            file=path,
        )
    manifest.check_signature(signature, path)


def check_call(spec: EngineSpec, inputs: Inputs, out: NDArray[np.uint8]) -> None:
    """Check the arrays of a call against `spec`, with the same N, H and W in all of them.

    Args:
        spec: the engine's tensors.
        inputs: the input arrays by name.
        out: the output array.

    Raises:
        EngineError: an array is missing, superfluous, or has a wrong dtype, shape or layout.
    """
    sizes: dict[str, int] = {"N": spec.batch}
    unchecked = dict(inputs)
    for tensor in (*spec.inputs, spec.output):
        array = out if tensor is spec.output else unchecked.pop(tensor.name, None)
        if array is None:
            raise _wrong_tensor(f"the input {tensor.name!r} is missing", tensor)
        fits = len(array.shape) == len(tensor.shape) and all(
            n > 0 and n == (sizes.setdefault(dim, n) if isinstance(dim, str) else dim)
            for n, dim in zip(array.shape, tensor.shape, strict=True)
        )
        if array.dtype != tensor.dtype or not fits or not array.flags.c_contiguous:
            order = "" if array.flags.c_contiguous else ", not contiguous"
            raise _wrong_tensor(
                f"{tensor.name!r} is {array.dtype} of shape {array.shape}{order}", tensor, sizes
            )
    if unchecked:
        raise EngineError(
            f"the graph has no input {sorted(unchecked)[0]!r}",
            expected=str([t.name for t in spec.inputs]),
            remedy="leave it out",
        )


def _wrong_tensor(
    fact: str, tensor: TensorSpec, sizes: Mapping[str, int] | None = None
) -> EngineError:
    """The error for a tensor that breaks the contract; `sizes` are the dimensions set so far."""
    dimensions = ", ".join(f"{name} = {size}" for name, size in (sizes or {}).items())
    return EngineError(
        fact,
        expected=f"{tensor.dtype} of shape {list(tensor.shape)} ({dimensions}), contiguous",
        remedy="give the tensors of the manifest",
    )


def closed(name: str) -> EngineError:
    """Return the error for a call to the engine `name` after it was closed."""
    return EngineError(
        f"the engine {name} is closed", expected="an open engine", remedy="open the model again"
    )
