"""The base of GPU engines: slots that move batches between page-locked memory and the device.

Each slot has a CUDA stream, an event and tensors on the device. The tensors stay until the shape
changes, so that a second batch of the same shape allocates nothing. A slot returns its memory only
after its event has passed.
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
STREAMS = 2  # the engine computes one batch while the caller reads and fills the other


def shapes_of(tensors: tuple[TensorSpec, ...], batch: int, size: tuple[int, int]) -> Shapes:
    """Return the shape of each tensor by name.

    Args:
        tensors: the tensors of the graph.
        batch: the batch size N.
        size: (H, W) of the canvas in pixels.
    """
    named = {"N": batch, "H": size[0], "W": size[1]}
    return {t.name: tuple(named[d] if isinstance(d, str) else d for d in t.shape) for t in tensors}


def nbytes_of(tensors: tuple[TensorSpec, ...], shapes: Shapes) -> int:
    """Return an upper bound of the bytes that tensors of these shapes take in a pool."""
    return sum(math.prod(shapes[t.name]) * np.dtype(t.dtype).itemsize + 256 for t in tensors)


class GpuEngine(ABC):
    """Base of GPU engines: a subclass loads its model, opens the pools and makes slots.

    Attributes:
        spec: the tensors, batch size and streams; the subclass sets it.
        pool: the page-locked host memory, for the arrays of a call.
        device_pool: the memory of the GPU.
        tensors: the inputs of the graph, then its output.
        cuda: the CUDA driver on this GPU.
    """

    spec: EngineSpec
    pool: Pool
    device_pool: Pool

    def __init__(self, manifest: Manifest, options: EngineOptions):
        """Open the GPU and its memory.

        Args:
            manifest: the manifest of the model.
            options: the options of the engine.

        Raises:
            MissingComponent: there is no such GPU, or a library is missing.
            GpuError: a call of the CUDA driver failed.
        """
        self.tensors = (*manifest.inputs, manifest.output)
        self._canvas = manifest.grid.canvas
        self._lock = threading.Lock()  # guards the slots and `_closed`
        self._host_lock = threading.Lock()  # guards the slot that all calls on HOST_STREAM share
        self._slots: list[GpuSlot] = []
        self._host_slot: GpuSlot | None = None
        self._closed = False
        self._budget = options.budget
        self._reserved: list[Buffer] = []
        # first, because TensorRT ends the process where there is no driver or device
        self.cuda = Cuda(options.device)
        try:
            self._sources = open_memory(self.cuda)
        except BaseException:
            self.cuda.close()
            raise

    def _open_pools(self, device: int, page_locked: int) -> None:
        """Open both pools with caps in bytes."""
        self.device_pool = Pool(self._sources[0], device, self._budget)
        self.pool = Pool(self._sources[1], page_locked)

    @property
    def name(self) -> str:
        """Library, batch size, device and memory provider, for people."""
        return f"{self._what()}, batch {self.spec.batch}, {self.cuda.device}, {self._sources[2]}"

    @abstractmethod
    def _what(self) -> str:
        """The library, its version and how it works here."""

    @abstractmethod
    def _slot(self) -> GpuSlot:
        """A new slot of this engine's kind."""

    def _release(self) -> None:  # noqa: B027  (nothing to do, by default)
        """Release the model."""

    def open_stream(self) -> Stream:
        """Open a slot.

        Raises:
            EngineError: the engine is closed or its library fails.
        """
        with self._lock:
            if self._closed:
                raise closed(self.name)
            self._slots.append(self._slot())
            return self._slots[-1]

    def run(self, inputs: Inputs, out: NDArray[np.uint8], *, stream: Stream) -> None:
        """Check the arrays and put the batch on the stream; see `Engine.run`."""
        if self._closed:
            raise closed(self.name)
        check_call(self.spec, inputs, out)
        if stream is not HOST_STREAM:
            assert isinstance(stream, GpuSlot), "a stream of another engine"
            stream.enqueue(inputs, out)
            return
        with self._host_lock:
            if self._host_slot is None:
                self._host_slot = self.open_stream()  # type: ignore[assignment]
            assert self._host_slot is not None
            self._host_slot.enqueue(inputs, out)
            self._host_slot.synchronize()

    def memory(self) -> dict[str, PoolStats]:
        """The accounting of the memory of the GPU and of the page-locked memory."""
        return {"device": self.device_pool.stats, "page-locked": self.pool.stats}

    def close(self) -> None:
        """Wait for the queued batches, then release the model and the memory."""
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
        # a caller's open buffer keeps the context alive
        if not (hasattr(self, "pool") and self.pool.stats.in_use + self.device_pool.stats.in_use):
            self.cuda.close()


class GpuSlot(ABC):
    """A `Stream` on the GPU: a CUDA stream, an event, and the tensors of one batch on the device.

    Subclasses bind their model to the tensors and put the computation on the stream.

    Attributes:
        owner: the engine.
        cuda: the CUDA driver on its GPU.
        buffers: the tensors on the device, by name.
    """

    def __init__(self, owner: GpuEngine):
        """Make the CUDA stream and the event.

        Args:
            owner: the engine.

        Raises:
            GpuError: a call of the CUDA driver failed.
        """
        self.owner, self.cuda = owner, owner.cuda
        self._lock = threading.RLock()
        self._open, self._pending = True, False
        self._shapes: Shapes = {}
        self._arrays: tuple[Any, ...] = ()  # must outlive the work on the stream
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

        Args:
            inputs: the input arrays by name, checked; in use until `synchronize`.
            out: the output array, uint8 (N, H, W, 2); in use until `synchronize`.

        Raises:
            EngineError: the slot is closed or the library fails.
            MemoryCapExceeded: the GPU has no room for the tensors.
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
            self._arrays = (inputs, out)
            with self._exclusive_workspace():
                try:
                    self._work(inputs, out)
                    self.cuda.record(self._event, self._handle)
                except BaseException:
                    self._drain()  # after an error the caller may use the arrays again
                    raise
            self._pending = True

    def synchronize(self) -> None:
        """Wait for the batch and raise its errors."""
        with self._lock, self.cuda.current():
            if self._pending:
                self._pending = False
                self._finish()
                self._arrays = ()

    def close(self) -> None:
        """Wait for the stream and release the slot; a second call does nothing."""
        with self._lock:
            if not self._open:
                return
            self._open = self._pending = False
            with self.cuda.current():
                if self._handle is not None:
                    self._drain()
                self._shapes, self._arrays = {}, ()
                self._unbind()
                self._close()
                self.cuda.destroy(event=self._event, stream=self._handle)

    def _bind_to(self, shapes: Shapes) -> None:
        """Replace the tensors; the old ones go first, so that both need not fit."""
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
        """Return the buffers."""
        for buffer in self.buffers.values():
            buffer.close()
        self.buffers.clear()

    def _exclusive_workspace(self) -> AbstractContextManager[None]:
        """Lock what slots share while a batch is put on the stream; nothing by default."""
        return nullcontext()

    @abstractmethod
    def _work(self, inputs: Inputs, out: NDArray[np.uint8]) -> None:
        """Put upload, computation and download on the stream."""

    def _upload(self, inputs: Inputs) -> None:
        for name, array in inputs.items():
            self.cuda.upload(self.buffers[name].ptr, array, self._handle)

    def _download(self, out: NDArray[np.uint8]) -> None:
        self.cuda.download(out, self.buffers[self.owner.spec.output.name].ptr, self._handle)

    def _finish(self) -> None:
        """Wait for the batch and raise its errors."""
        self.cuda.wait(self._event)

    def _drain(self) -> None:
        """Wait for all work on the stream, without raising its errors."""
        self.cuda.drain(self._handle)

    def _close(self) -> None:  # noqa: B027  (nothing to do, by default)
        """Release the slot's part of the model."""


def batches(least: int, most: int) -> list[int]:
    """Return the batch sizes from `least` to `most` to choose from, the largest first."""
    return [n for n in (64, 32, 16, 8, 4, 2, 1) if least <= n <= most]
