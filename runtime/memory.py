"""Pools of memory: capped, every byte counted, nothing allocated in steady state.

A pool hands out a `Buffer` and takes it back at `close()`; a block that came back serves the next request of its size.
`stream` is required: on a device it orders reuse after the work that used the block. Host memory has no streams, so host
pools and CPU engines are given `HOST_STREAM`.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .errors import MemoryCapExceeded

ALIGNMENT = 256  # bytes; what TensorRT asks of activation memory, and a multiple of every cache line
DEFAULT_CAP = 1 << 30  # bytes of host memory for one synthesizer's slices


class Stream:
    """The order work is done in. The host has one, `HOST_STREAM`, on which everything is done when a call returns."""


HOST_STREAM = Stream()


class Buffer(Protocol):
    """A block of memory: `nbytes` asked for, its address `ptr`; `close()` returns it to its pool (twice is harmless)."""

    nbytes: int
    ptr: int

    def close(self) -> None: ...


class Pool(Protocol):
    """Raises `MemoryCapExceeded` when `nbytes` more would pass the cap."""

    def allocate(self, nbytes: int, *, stream: Stream) -> Buffer: ...


@dataclass(frozen=True)
class PoolStats:
    """Bytes handed out now (`in_use`), the most ever (`peak`), held from the system (`held`), the `cap`, and how often
    the system was asked (`allocations`: constant in steady state)."""

    in_use: int
    peak: int
    held: int
    cap: int
    allocations: int


class HostBuffer:
    """Page-aligned-enough host memory with a numpy view. Made by `HostPool.allocate`."""

    def __init__(self, pool: HostPool, block: NDArray[np.uint8], nbytes: int):
        self._pool, self._block, self.nbytes = pool, block, nbytes
        self.ptr = int(block.ctypes.data)
        self._open = True

    def array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A view of the first bytes as `shape` and `dtype`; not to be used after `close()`."""
        wanted = np.dtype(dtype)
        return self._block[: math.prod(shape) * wanted.itemsize].view(wanted).reshape(shape)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._pool._take_back(self._block, self.nbytes)


class HostPool:
    """Host memory by `Pool`'s protocol, at most `cap` bytes held. Safe to use from several threads."""

    def __init__(self, cap: int = DEFAULT_CAP):
        self._cap = cap
        self._free: dict[int, list[NDArray[np.uint8]]] = {}
        self._in_use = self._peak = self._held = self._allocations = 0
        self._lock = threading.Lock()

    def allocate(self, nbytes: int, *, stream: Stream) -> HostBuffer:
        """A block of at least `nbytes` bytes, aligned to ALIGNMENT; its content is whatever was there."""
        size = max(ALIGNMENT, math.ceil(nbytes / ALIGNMENT) * ALIGNMENT)
        with self._lock:
            free = self._free.get(size)
            if free:
                block = free.pop()
            else:
                if self._held + size > self._cap:  # give back what is free in other sizes before refusing
                    self._held -= sum(s * len(blocks) for s, blocks in self._free.items())
                    self._free.clear()
                if self._held + size > self._cap:
                    raise MemoryCapExceeded(
                        f"{size} more bytes would pass the pool's cap: {self._in_use} of {self._cap} bytes are in use",
                        expected=f"at most {self._cap} bytes",
                        remedy="use a smaller --batch, or raise the cap",
                    )
                block = _aligned(size)
                self._held += size
                self._allocations += 1
            self._in_use += size
            self._peak = max(self._peak, self._in_use)
        return HostBuffer(self, block, nbytes)

    @property
    def stats(self) -> PoolStats:
        with self._lock:
            return PoolStats(self._in_use, self._peak, self._held, self._cap, self._allocations)

    def close(self) -> None:
        """Give back everything that is not in use."""
        with self._lock:
            self._held -= sum(size * len(blocks) for size, blocks in self._free.items())
            self._free.clear()

    def _take_back(self, block: NDArray[np.uint8], nbytes: int) -> None:
        with self._lock:
            self._in_use -= block.nbytes
            self._free.setdefault(block.nbytes, []).append(block)


def _aligned(size: int) -> NDArray[np.uint8]:
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -int(raw.ctypes.data) % ALIGNMENT
    return raw[start : start + size]
