"""Activation memory that execution contexts share.

One workspace per stream keeps the device busy. More contexts exist than that, but they do not run
at once: those of a second volume in work, of complete volumes (whose slots wait for the next one),
and of callers that use the engine directly. They share the workspaces. A stream that takes a
workspace over waits, on the device, for the work that used it before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...core.errors import MemoryCapExceeded
from ..memory import Buffer, Memory, Stream
from .cuda_driver import Cuda


class Workspace:
    """A block of activation memory that contexts use one after the other.

    Attributes:
        ptr: the device address.
        nbytes: the size in bytes.
        users: the number of contexts that share it.
    """

    def __init__(self, cuda: Cuda, buffer: Buffer):
        """Make a workspace of `buffer`, which it owns."""
        self.ptr, self.nbytes, self.users = buffer.ptr, buffer.nbytes, 0
        self._cuda, self._buffer = cuda, buffer
        self._lock = threading.Lock()
        self._last: Any = None  # the event behind the last work that used it

    @contextmanager
    def exclusive(self, stream: Any, event: Any) -> Iterator[None]:
        """Run the work of a context after all earlier work that used the workspace.

        Args:
            stream: the stream of the work.
            event: the event that the caller records behind the work before this ends. Where that
                fails, the caller leaves nothing on the stream.
        """
        with self._lock:
            if self._last is not None and self._last is not event:
                self._cuda.follow(stream, self._last)
            yield
            self._last = event

    def release(self, event: Any) -> None:
        """Forget the context of `event`, whose work is complete."""
        with self._lock:
            if self._last is event:
                self._last = None

    def close(self) -> None:
        """Return the memory."""
        self._buffer.close()


class WorkspacePool:
    """The workspaces of one engine."""

    def __init__(self, cuda: Cuda, memory: Memory, most: int):
        """Make an empty pool.

        Args:
            cuda: the CUDA driver on the GPU.
            memory: the device memory for the workspaces.
            most: the largest number of workspaces that serve one size.
        """
        self._cuda, self._memory, self._most = cuda, memory, most
        self._lock = threading.Lock()
        self._blocks: list[Workspace] = []

    def acquire(self, nbytes: int, *, stream: Stream) -> Workspace:
        """Return a workspace for a context: a new one below the limit, else the least used one.

        Args:
            nbytes: the least size in bytes.
            stream: the stream of the context.

        Returns:
            A workspace; one that exists where memory is too short for a new one.

        Raises:
            MemoryCapExceeded: memory is short, and no workspace is large enough.
        """
        with self._lock:
            fitting = [block for block in self._blocks if block.nbytes >= nbytes]
            if len(fitting) < self._most:
                try:
                    fitting = [Workspace(self._cuda, self._memory.allocate(nbytes, stream=stream))]
                    self._blocks += fitting
                except MemoryCapExceeded:
                    if not fitting:
                        raise
            chosen = min(fitting, key=lambda block: block.users)
            chosen.users += 1
            return chosen

    def release(self, block: Workspace, event: Any) -> None:
        """Return a workspace after the work before `event`; the last user frees its memory."""
        with self._lock:
            block.release(event)
            block.users -= 1
            if not block.users:
                self._blocks.remove(block)
                block.close()
