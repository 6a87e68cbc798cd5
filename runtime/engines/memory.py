"""Memory pools with a cap, with usage by tag, and without allocations in the steady state.

A `Source` talks to a system (the host here, a GPU in `runtime.engines.gpu.cuda_memory`) and reuses
free blocks. A `Pool` caps one source and counts its usage. `Pool.tag("labels")` puts a `Counted` on
the pool, which passes requests on and counts the usage of its tag. All three share one interface,
`allocate(nbytes, *, stream) -> Buffer`.

`stream` is required: on a device it orders the reuse of a block after the work that used it. The
caller frees a block only after the stream has completed that work, because a pool cannot find that
out by itself.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..core.errors import MemoryCapExceeded, UsageError

# bytes; TensorRT requires it for activation memory, and it is a multiple of every cache line
ALIGNMENT = 256
DEFAULT_CAP = 1 << 30  # bytes of host memory for one engine's tensors


class Stream(Protocol):
    """A queue of work: an engine runs the calls on one stream one after the other."""

    def synchronize(self) -> None:
        """Wait for all work on the stream.

        Raises:
            EngineError: some work failed since the last call.
        """

    def close(self) -> None:
        """Wait for the work without raising its errors; a second call does nothing."""


class HostStream:
    """The calling thread itself: a call returns when its work is complete."""

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work` in the calling thread."""
        work()

    def synchronize(self) -> None:
        """Do nothing: all work is complete."""

    def close(self) -> None:
        """Do nothing: the stream holds nothing."""


HOST_STREAM = HostStream()


class Buffer:
    """A block of memory that `close()` returns to its source.

    Attributes:
        ptr: the address; 0 for memory that a library allocates for itself.
        nbytes: the size in bytes.
    """

    def __init__(
        self,
        ptr: int,
        nbytes: int,
        release: Callable[[], None],
        block: NDArray[np.uint8] | None = None,
    ):
        self.ptr, self.nbytes = ptr, nbytes
        self._release: Callable[[], None] | None = release
        self._block = block

    def array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """View the first bytes of a block that the CPU can reach.

        Args:
            shape: the shape of the view.
            dtype: its dtype.

        Returns:
            A view, valid until `close()`.
        """
        dtype = np.dtype(dtype)
        assert self._block is not None, "device memory has no view"
        return self._block[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

    def close(self) -> None:
        """Return the block; a second call does nothing."""
        release, self._release, self._block = self._release, None, None
        if release is not None:
            release()


class Memory(Protocol):
    """Anything that allocates buffers: a source, a pool or a tag of a pool."""

    def allocate(self, nbytes: int, *, stream: Stream) -> Buffer:
        """Allocate a block.

        Args:
            nbytes: the size in bytes.
            stream: the stream that will use the block.

        Returns:
            A buffer of at least `nbytes` bytes with undefined content.

        Raises:
            MemoryCapExceeded: `nbytes` more would exceed a cap, or the system has no more. A
                `Source` raises MemoryError instead.
        """


class Source(Memory, Protocol):
    """The memory of one system; it keeps free blocks for reuse.

    A `Pool` makes all calls, one at a time. `kind` names the memory for people.
    """

    kind: str

    @property
    def held(self) -> int:
        """Bytes allocated from the system, free blocks included."""

    @property
    def blocks(self) -> int:
        """How often the source has asked the system for memory."""

    @property
    def free(self) -> int | None:
        """Bytes that the system has left; None where that has no meaning."""

    def growth(self, nbytes: int) -> int:
        """Return how many bytes more the source may allocate to serve `nbytes`."""

    def trim(self) -> None:
        """Return the free blocks to the system."""

    def close(self) -> None:
        """Release the source after all of its buffers were closed."""


@dataclass(frozen=True)
class Usage:
    """The usage of one tag or pool.

    Attributes:
        in_use: bytes allocated now.
        peak: the largest `in_use` so far.
        buffers: the number of buffers so far.
    """

    in_use: int = 0
    peak: int = 0
    buffers: int = 0

    def plus(self, nbytes: int) -> Usage:
        """Return the usage after a buffer of `nbytes` bytes; negative for one that was closed."""
        return Usage(
            self.in_use + nbytes, max(self.peak, self.in_use + nbytes), self.buffers + (nbytes > 0)
        )


@dataclass(frozen=True)
class PoolStats:
    """The accounting of one pool, in bytes.

    Attributes:
        in_use: bytes allocated now.
        peak: the largest `in_use` so far.
        held: bytes allocated from the system, free blocks included.
        cap: the limit on `held`.
        allocations: how often the pool asked the system for memory; constant in the steady state.
        tags: the usage by tag.
    """

    in_use: int
    peak: int
    held: int
    cap: int
    allocations: int
    tags: Mapping[str, Usage] = field(default_factory=dict)


class Counted:
    """Passes requests on to `upstream` and counts their usage."""

    def __init__(self, upstream: Memory):
        self._upstream = upstream
        self._lock = threading.Lock()
        self.usage = Usage()

    def allocate(self, nbytes: int, *, stream: Stream) -> Buffer:
        """Allocate a block from `upstream` and count it; see `Memory.allocate`."""
        buffer = self._upstream.allocate(nbytes, stream=stream)
        self._count(buffer.nbytes)

        def release() -> None:
            buffer.close()
            self._count(-buffer.nbytes)

        return Buffer(buffer.ptr, nbytes, release, buffer._block)

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.usage = self.usage.plus(nbytes)


class MemoryBudget:
    """A shared cap for several pools, whose sources are called one at a time.

    Attributes:
        cap: the limit on the sum of what the pools hold, in bytes; None for as much as the system
            gives.
        evict: called when memory is short, in the thread that allocates. It releases memory if it
            can, and returns whether it did.
    """

    def __init__(self, cap: int | None, evict: Callable[[], bool]):
        self.cap, self.evict = cap, evict
        self.lock = threading.Lock()
        self.pools: set[Pool] = set()

    @property
    def held(self) -> int:
        """Bytes that all of the pools hold together."""
        return sum(pool._held for pool in tuple(self.pools))


class Pool:
    """A source with a cap. Several threads may use it: one call at a time reaches the source."""

    def __init__(self, source: Source, cap: int, budget: MemoryBudget | None = None):
        """Put a cap on a source.

        Args:
            source: the memory of the system, which this pool alone uses.
            cap: the limit on the bytes that it holds.
            budget: the cap that this pool shares with others; None for a pool by itself.
        """
        self._source, self._cap = source, cap
        self._budget = budget or MemoryBudget(None, lambda: False)
        self._budget.pools.add(self)
        self._lock = self._budget.lock
        self._usage = Usage()
        self._reserved = 0
        self._closing = self._closed = False
        self._active: dict[int, int] = {}
        self._tags: dict[str, Counted] = {}

    def tag(self, name: str) -> Counted:
        """Return the part of this pool whose usage is counted under `name`."""
        with self._lock:
            return self._tags.setdefault(name, Counted(self))

    def allocate(self, nbytes: int, *, stream: Stream) -> Buffer:
        """Allocate a block of at least `nbytes` bytes, aligned to ALIGNMENT.

        Args:
            nbytes: the size in bytes.
            stream: the stream that will use the block.

        Returns:
            A buffer with undefined content.

        Raises:
            MemoryCapExceeded: the cap, the budget or the system leaves no room for the block.
        """
        size = max(ALIGNMENT, math.ceil(nbytes / ALIGNMENT) * ALIGNMENT)
        return self._with_eviction(lambda: self._allocate(size, stream))

    def _with_eviction(self, allocate: Callable[[], Buffer]) -> Buffer:
        """Call `allocate`, and again after each eviction from the budget, until it succeeds."""
        while True:
            try:
                return allocate()
            except MemoryCapExceeded:
                if not self._budget.evict():
                    raise

    def _allocate(self, size: int, stream: Stream) -> Buffer:
        with self._lock:
            # free blocks of other sizes go back to the system before the pool refuses a request
            if self._past_cap(self._source.growth(size)):
                self._source.trim()
            if self._past_cap(self._source.growth(size)):
                raise self.exceeded(size)
            try:
                block = self._source.allocate(size, stream=stream)
            except MemoryError as exc:
                raise self.exceeded(size, refused=True) from exc
            self._usage = self._usage.plus(size)
            self._active[block.ptr] = size

        def release() -> None:
            with self._lock:
                self._usage = self._usage.plus(-size)
                del self._active[block.ptr]
                block.close()
                self._end()

        return Buffer(block.ptr, size, release, block._block)

    def reserve(self, nbytes: int, tag: str) -> Buffer:
        """Count memory that a library allocates for itself against the cap.

        Args:
            nbytes: the size in bytes.
            tag: the tag to count it under.

        Returns:
            A buffer without an address; `close()` ends the reservation.

        Raises:
            MemoryCapExceeded: the cap or the budget leaves no room for it.
        """
        return self._with_eviction(lambda: self._reserve(nbytes, tag))

    def _reserve(self, nbytes: int, tag: str) -> Buffer:
        with self._lock:
            if self._past_cap(nbytes):
                raise self.exceeded(nbytes)
            self._reserved += nbytes
            self._usage = self._usage.plus(nbytes)

        def release() -> None:
            with self._lock:
                self._reserved -= nbytes
                self._usage = self._usage.plus(-nbytes)
            counted._count(-nbytes)

        counted = self.tag(tag)
        counted._count(nbytes)
        return Buffer(0, nbytes, release)

    def owns(self, ptr: int) -> bool:
        """Return whether an open buffer of this pool begins at the address `ptr`."""
        return ptr in self._active

    def exceeded(self, nbytes: int, *, refused: bool = False) -> MemoryCapExceeded:
        """Return the error for `nbytes` bytes that the pool cannot allocate.

        Args:
            nbytes: the size of the request in bytes.
            refused: whether the system refused it, and not the cap.

        Returns:
            The error, with the cap (of the pool or of the budget) that the request exceeds.
        """
        source, shared = self._source, self._budget
        cap, in_use = self._cap, self._usage.in_use
        if shared.cap is not None and shared.held + nbytes > shared.cap:
            cap, in_use = shared.cap, shared.held
        return MemoryCapExceeded.of(
            source.kind, nbytes, cap=cap, in_use=in_use, free=source.free, refused=refused
        )

    def _past_cap(self, nbytes: int) -> bool:
        shared = self._budget
        return self._held + nbytes > self._cap or (
            shared.cap is not None and shared.held + nbytes > shared.cap
        )

    @property
    def stats(self) -> PoolStats:
        """The accounting of this pool now."""
        with self._lock:
            tags = {name: counted.usage for name, counted in self._tags.items()}
            return PoolStats(
                self._usage.in_use,
                self._usage.peak,
                self._held,
                self._cap,
                self._source.blocks,
                tags,
            )

    def close(self) -> None:
        """Return all free blocks; the source is closed with the last open buffer."""
        with self._lock:
            self._source.trim()
            self._closing = True
            self._end()

    def _end(self) -> None:
        if self._closing and not self._active and not self._closed:
            self._closed = True
            self._source.trim()
            self._source.close()
            self._budget.pools.discard(self)

    @property
    def _held(self) -> int:
        return self._source.held + self._reserved


class HostMemory:
    """Pageable memory of this process; see `Source`."""

    kind = "host memory"
    free = None

    def __init__(self) -> None:
        self._free: dict[int, list[NDArray[np.uint8]]] = {}
        self.held = self.blocks = 0

    def allocate(self, nbytes: int, *, stream: Stream) -> Buffer:
        """Allocate an aligned block, or reuse a free one of the same size."""
        spare = self._free.get(nbytes)
        if spare:
            block = spare.pop()
        else:
            raw = np.empty(nbytes + ALIGNMENT, np.uint8)
            start = -int(raw.ctypes.data) % ALIGNMENT
            block = raw[start : start + nbytes]
            self.held += nbytes
            self.blocks += 1
        return Buffer(
            int(block.ctypes.data),
            nbytes,
            lambda: self._free.setdefault(nbytes, []).append(block),
            block,
        )

    def growth(self, nbytes: int) -> int:
        """Return 0 where a free block serves the request, else `nbytes`."""
        return 0 if self._free.get(nbytes) else nbytes

    def trim(self) -> None:
        """Drop the free blocks."""
        self.held -= sum(size * len(blocks) for size, blocks in self._free.items())
        self._free.clear()

    def close(self) -> None:
        """Do nothing: `trim` has dropped the blocks."""


UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_bytes(text: str | int) -> int:
    """Parse an amount of memory: 1073741824, "1GiB", "1.5 GB" or "512m".

    Args:
        text: a number with a unit; the units are powers of 1024, as in `nvidia-smi`.

    Returns:
        The number of bytes.

    Raises:
        UsageError: the text is not a positive amount of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([bkmgt]?)(?:i?b)?\s*", str(text).lower())
    nbytes = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if nbytes <= 0:
        raise UsageError(
            f"{text!r} is not an amount of memory",
            expected='bytes, or "512MiB", "2GiB"',
            remedy="write a number and a unit",
        )
    return nbytes
