"""Activation memory of contexts: a block each for those that run at once, one in turn for those
that need not.

As many blocks as there are streams keep the device busy. More contexts than that exist, but never
run at once: those of a second volume in work, of volumes that are done (their slots wait for the
next one), of callers that use the engine themselves. They share the blocks; a stream that takes a
block over waits, on the device, for the work that had it before.
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
    """Memory of `nbytes` at `ptr` that contexts use in turn."""

    def __init__(self, cuda: Cuda, buffer: Buffer):
        self.ptr, self.nbytes, self.users = buffer.ptr, buffer.nbytes, 0
        self._cuda, self._buffer = cuda, buffer
        self._lock = threading.Lock()
        self._last: Any = None  # event behind the work that used it last

    @contextmanager
    def exclusive(self, stream: Any, event: Any) -> Iterator[None]:
        """What is put on `stream` meanwhile runs after all work that had the block before.

        `event` is recorded behind it before this ends; where that fails, nothing is left on the
        stream.
        """
        with self._lock:
            if self._last is not None and self._last is not event:
                self._cuda.follow(stream, self._last)
            yield
            self._last = event

    def release(self, event: Any) -> None:
        """The context whose work `event` followed is done with it for good."""
        with self._lock:
            if self._last is event:
                self._last = None

    def close(self) -> None:
        self._buffer.close()


class WorkspacePool:
    """The blocks of one engine, from `memory`: of each size at most `most`."""

    def __init__(self, cuda: Cuda, memory: Memory, most: int):
        self._cuda, self._memory, self._most = cuda, memory, most
        self._lock = threading.Lock()
        self._blocks: list[Workspace] = []

    def acquire(self, nbytes: int, *, stream: Stream) -> Workspace:
        """A block of `nbytes` or more for a context: a new one while there are few, then the one
        with the fewest users.

        Where memory is short one that is there serves too. Raises `MemoryCapExceeded` when there is
        none.
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
        """Give a block back, when the work that `event` follows is done; the last user's memory
        goes to the pool.
        """
        with self._lock:
            block.release(event)
            block.users -= 1
            if not block.users:
                self._blocks.remove(block)
                block.close()
