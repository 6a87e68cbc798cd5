"""What engines on an NVIDIA GPU share: slots on streams of their own, between page-locked tensors
and the device.

A slot's buffers live as long as its shape does: nothing is allocated for a second batch of it.
Nothing is given back before the slot's event has passed.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.manifest import Manifest, TensorSpec
from ..base import EngineOptions, EngineSpec, Inputs, check_call, closed
from ..memory import HOST_STREAM, Buffer, Pool, PoolStats, Stream
from .cuda_driver import Cuda
from .cuda_memory import open_memory

Shapes = dict[str, tuple[int, ...]]
STREAMS = 2  # one batch is computed while the other one's tensors are emptied and filled


def shapes_of(tensors: tuple[TensorSpec, ...], batch: int, size: tuple[int, int]) -> Shapes:
    """The tensors' shapes for a batch on a canvas of `size` (H, W)."""
    named = {"N": batch, "H": size[0], "W": size[1]}
    return {t.name: tuple(named[d] if isinstance(d, str) else d for d in t.shape) for t in tensors}


def nbytes_of(tensors: tuple[TensorSpec, ...], shapes: Shapes) -> int:
    """Bytes that the tensors take in blocks of a pool, at most."""
    return sum(math.prod(shapes[t.name]) * np.dtype(t.dtype).itemsize + 256 for t in tensors)


class GpuEngine(ABC):
    """Base of engines on a GPU.

    A subclass loads its model, calls `_open_pools`, sets `spec` and makes slots.
    """

    spec: EngineSpec
    pool: Pool
    device_pool: Pool

    def __init__(self, manifest: Manifest, options: EngineOptions):
        self.tensors = (*manifest.inputs, manifest.output)
        self._canvas = manifest.grid.canvas
        self._lock = threading.Lock()  # of what is open
        self._turn = threading.Lock()  # of the slot that HOST_STREAM's callers share
        self._slots: list[GpuSlot] = []
        self._own: GpuSlot | None = None
        self._closed = False
        self._budget = options.budget
        self._reserved: list[Buffer] = []
        self.cuda = Cuda(
            options.device
        )  # the gate: nothing of CUDA's or TensorRT's is touched before
        try:
            self._sources = open_memory(self.cuda)
        except BaseException:
            self.cuda.close()
            raise

    def _open_pools(self, device: int, page_locked: int) -> None:
        """The pools, capped at so many bytes."""
        self.device_pool = Pool(self._sources[0], device, self._budget)
        self.pool = Pool(self._sources[1], page_locked)

    @property
    def name(self) -> str:
        return f"{self._what()}, batch {self.spec.batch}, {self.cuda.device}, {self._sources[2]}"

    @abstractmethod
    def _what(self) -> str:
        """The library, its version and how it works here."""

    @abstractmethod
    def _slot(self) -> GpuSlot:
        """A new slot of this engine's kind."""

    def _release(self) -> None:  # noqa: B027  (nothing to do, by default)
        """Let go of the model."""

    def open_stream(self) -> Stream:
        with self._lock:
            if self._closed:
                raise closed(self.name)
            self._slots.append(self._slot())
            return self._slots[-1]

    def run(self, inputs: Inputs, out: NDArray[np.uint8], *, stream: Stream) -> None:
        if self._closed:
            raise closed(self.name)
        check_call(self.spec, inputs, out)
        if stream is not HOST_STREAM:
            assert isinstance(stream, GpuSlot), "a stream of another engine"
            stream.enqueue(inputs, out)
            return
        with self._turn:
            if self._own is None:
                self._own = self.open_stream()  # type: ignore[assignment]
            assert self._own is not None
            self._own.enqueue(inputs, out)
            self._own.synchronize()

    def memory(self) -> dict[str, PoolStats]:
        return {"device": self.device_pool.stats, "page-locked": self.pool.stats}

    def close(self) -> None:
        """Wait for what is queued, then give everything back."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for slot in self._slots:
                slot.close()
            self._slots.clear()
        with self.cuda.current():
            self._release()
        for buffer in self._reserved:
            buffer.close()
        if hasattr(self, "pool"):
            self.device_pool.close()
            self.pool.close()
        else:
            for source in self._sources[:2]:
                source.close()
        if not (hasattr(self, "pool") and self.pool.stats.in_use + self.device_pool.stats.in_use):
            self.cuda.close()  # what a caller still holds keeps the context


class GpuSlot(ABC):
    """One batch's way over the GPU and back: a stream, an event, and the tensors on the device.

    A `Stream`.

    Subclasses bind their model to the tensors and put the computation on the stream.
    """

    def __init__(self, owner: GpuEngine):
        self.owner, self.cuda = owner, owner.cuda
        self._lock = threading.RLock()
        self._open, self._pending = True, False
        self._shapes: Shapes = {}
        self._busy: tuple[
            Any, ...
        ] = ()  # the arrays of the work on the stream, which must outlive it
        self.buffers: dict[str, Buffer] = {}
        self._handle: Any = None
        self._event: Any = None
        try:
            with self.cuda.current():
                self._handle = self.cuda.stream()
                self._event = self.cuda.event()
        except BaseException:
            self.close()
            raise

    def enqueue(self, inputs: Inputs, out: NDArray[np.uint8]) -> None:
        """Put a batch on the stream: upload, computation, download.

        The arrays are in use until `synchronize`.
        """
        with self._lock, self.cuda.current():
            if not self._open:
                raise closed(self.owner.name)
            shapes = {
                **{name: array.shape for name, array in inputs.items()},
                self.owner.spec.output.name: out.shape,
            }
            if shapes != self._shapes:
                self._bind_to(shapes)
            self._busy = (inputs, out)
            with self._turn():
                try:
                    self._work(inputs, out)
                    self.cuda.record(self._event, self._handle)
                except BaseException:
                    self._drain()  # the arrays are the caller's again when this is raised
                    raise
            self._pending = True

    def synchronize(self) -> None:
        with self._lock, self.cuda.current():
            if self._pending:
                self._pending = False
                self._finish()
                self._busy = ()

    def close(self) -> None:
        with self._lock:
            if not self._open:
                return
            self._open = self._pending = False
            with self.cuda.current():
                if self._handle is not None:
                    self._drain()
                self._shapes, self._busy = {}, ()
                self._unbind()
                self._close()
                self.cuda.destroy(event=self._event, stream=self._handle)

    def _bind_to(self, shapes: Shapes) -> None:
        """Tensors of other shapes: the old ones go first, so that both need not fit."""
        self._drain()
        self._shapes = {}
        self._unbind()
        try:
            pool = self.owner.device_pool
            for tensor in self.owner.tensors:
                nbytes = math.prod(shapes[tensor.name]) * np.dtype(tensor.dtype).itemsize
                self.buffers[tensor.name] = pool.tag(tensor.name).allocate(nbytes, stream=self)
            self._bind(shapes)
        except BaseException:
            self._unbind()
            raise
        self._shapes = shapes

    @abstractmethod
    def _bind(self, shapes: Shapes) -> None:
        """Point the model to `buffers`, by tensor name."""

    def _unbind(self) -> None:
        """Give the buffers back."""
        for buffer in self.buffers.values():
            buffer.close()
        self.buffers.clear()

    def _turn(self) -> AbstractContextManager[None]:
        """What it takes to have what slots share to itself, while a batch is put on the stream."""
        return nullcontext()

    @abstractmethod
    def _work(self, inputs: Inputs, out: NDArray[np.uint8]) -> None:
        """Put a batch on the stream: its tensors up, the computation, the result down."""

    def _upload(self, inputs: Inputs) -> None:
        for name, array in inputs.items():
            self.cuda.upload(self.buffers[name].ptr, array, self._handle)

    def _download(self, out: NDArray[np.uint8]) -> None:
        self.cuda.download(out, self.buffers[self.owner.spec.output.name].ptr, self._handle)

    def _finish(self) -> None:
        """Wait for the batch, and raise what went wrong in it."""
        self.cuda.wait(self._event)

    def _drain(self) -> None:
        """Wait for whatever is on the stream."""
        self.cuda.drain(self._handle)

    def _close(self) -> None:  # noqa: B027  (nothing to do, by default)
        """Let go of what the slot holds of the model."""


def batches(least: int, most: int) -> list[int]:
    """The batch sizes to choose from, the largest first."""
    return [n for n in (64, 32, 16, 8, 4, 2, 1) if least <= n <= most]
