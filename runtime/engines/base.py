"""The engine protocol: what the synthesizer needs of whatever runs the graph, and nothing else."""

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
    """An engine was given tensors that break the contract or was used after `close()`, or what
    it runs on failed.
    """

    exit_code = 1


@dataclass(frozen=True)
class EngineSpec:
    """The tensors of `runtime.core.manifest`, the batch the engine is always given, and how many
    streams keep it busy.

    `batch`: kernels may round differently from one batch size to another, so N never varies; the
    last batch is padded. `streams`: with as many, tensors are filled and emptied for one while the
    engine works on the others. `largest`: (H, W) of the largest canvas it takes; None: any.
    """

    inputs: tuple[TensorSpec, ...]
    output: TensorSpec
    batch: int
    streams: int = 2
    largest: tuple[int, int] | None = None


@dataclass(frozen=True)
class EngineOptions:
    """What may be asked of any engine.

    `max_memory`: bytes its pool may hold where it computes (the GPU, or the host), None for what
    the engine needs. `device`: which GPU. `auto_batch`: take the largest batch that fits, where the
    engine has a choice. `workers`: batches that an engine on the CPU computes at once, None for one
    a core, up to 16. `allowance`: what its pool shares with those of other engines.
    """

    max_memory: int | None = None
    device: int = 0
    auto_batch: bool = False
    workers: int | None = None
    budget: MemoryBudget | None = None


@runtime_checkable
class Engine(Protocol):
    """Runs the graph on host arrays.

    `name`: backend, version and device, for people. `pool`: where the arrays should come from,
    page-locked for a GPU; others work, more slowly. `run` reads C-contiguous `inputs` (by name, as
    in `spec.inputs`) and fills `out`, uint8 (N, H, W, 2), with N = `spec.batch`, on `stream`:
    `HOST_STREAM`, and it is done when it returns, or one of `open_stream()`, and the arrays are
    left alone until that stream's `synchronize()`, which also raises what went wrong. One stream
    serves one thread at a time; several may be in use at once. `memory()`: the accounting by kind
    of memory, which stays readable after `close()`.

    Raises `EngineError` for tensors that break the contract, after `close()`, and where what it
    runs on fails; `MemoryCapExceeded` where memory is short.
    """

    @property
    def name(self) -> str: ...

    @property
    def spec(self) -> EngineSpec: ...

    @property
    def pool(self) -> Pool: ...

    def open_stream(self) -> Stream: ...

    def run(self, inputs: Inputs, out: NDArray[np.uint8], *, stream: Stream) -> None: ...

    def memory(self) -> dict[str, PoolStats]: ...

    def close(self) -> None: ...


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_graph(
    manifest: Manifest, inputs: Mapping[str, str | None], signature: str | None, path: Path
) -> None:
    """Raise `ModelError` unless the graph in `path`, of `inputs` (name → dtype), is one that the
    manifest can describe.

    `statement`: what the file says it was exported for (`Manifest.statement`), None when it says
    nothing.
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
    """Raise `EngineError` unless the arrays are what `spec` states, with one N, H and W
    throughout.
    """
    sizes: dict[str, int] = {"N": spec.batch}
    given = dict(inputs)
    for tensor in (*spec.inputs, spec.output):
        array = out if tensor is spec.output else given.pop(tensor.name, None)
        if array is None:
            raise _broken(f"the input {tensor.name!r} is missing", tensor)
        fits = len(array.shape) == len(tensor.shape) and all(
            n > 0 and n == (sizes.setdefault(dim, n) if isinstance(dim, str) else dim)
            for n, dim in zip(array.shape, tensor.shape, strict=True)
        )
        if array.dtype != tensor.dtype or not fits or not array.flags.c_contiguous:
            order = "" if array.flags.c_contiguous else ", not contiguous"
            raise _broken(
                f"{tensor.name!r} is {array.dtype} of shape {array.shape}{order}", tensor, sizes
            )
    if given:
        raise EngineError(
            f"the graph has no input {sorted(given)[0]!r}",
            expected=str([t.name for t in spec.inputs]),
            remedy="leave it out",
        )


def _broken(fact: str, tensor: TensorSpec, sizes: Mapping[str, int] | None = None) -> EngineError:
    known = ", ".join(f"{k} = {v}" for k, v in (sizes or {}).items())
    return EngineError(
        fact,
        expected=f"{tensor.dtype} of shape {list(tensor.shape)} ({known}), contiguous",
        remedy="give the tensors of the manifest",
    )


def closed(name: str) -> EngineError:
    return EngineError(
        f"the engine {name} is closed", expected="an open engine", remedy="open the model again"
    )
