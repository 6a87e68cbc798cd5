"""Memory: capped, every byte counted by what it is for, nothing allocated in steady state.

A `Source` talks to a system (the host here, a GPU in `runtime.engines.gpu.cuda_memory`) and reuses
what came back. A `Pool` caps one and counts; `Pool.purpose("labels")` stacks a `Counted` on it,
which hands on and keeps figures of its own. All of them, and all that is asked of them, is
`allocate(nbytes, *, stream) -> Buffer`.

`stream` is required: on a device it orders reuse after the work that used the block. A pool is told
that a block is free when the stream that used it is known to have passed, which no pool below could
find out by itself.
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

ALIGNMENT = (
    256  # bytes; what TensorRT asks of activation memory, and a multiple of every cache line
)
DEFAULT_CAP = 1 << 30  # bytes of host memory for one engine's tensors


class Stream(Protocol):
    """The order in which an engine works: what is given to it is done, one after the other, by the
    time `synchronize()` returns.

    `synchronize()` raises what went wrong since the last one. `close()` waits for the work and
    raises nothing; twice is harmless.
    """

    def synchronize(self) -> None: ...

    def close(self) -> None: ...


class HostStream:
    """The calling thread itself: work is done when the call returns."""

    def submit(self, work: Callable[[], None]) -> None:
        work()

    def synchronize(self) -> None:
        """Nothing is ever left to wait for."""

    def close(self) -> None:
        """Nothing to give back."""


HOST_STREAM = HostStream()


class Buffer:
    """`nbytes` bytes at the address `ptr`; `close()` returns them to where they came from (twice is
    harmless).

    `array` gives a numpy view where the processor can reach the block, which on a GPU it cannot.
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
        """A view of the first bytes as `shape` and `dtype`; not to be used after `close()`."""
        wanted = np.dtype(dtype)
        assert self._block is not None, "device memory has no view"
        return self._block[: math.prod(shape) * wanted.itemsize].view(wanted).reshape(shape)

    def close(self) -> None:
        release, self._release, self._block = self._release, None, None
        if release is not None:
            release()


class Memory(Protocol):
    """Whatever hands out buffers.

    Raises `MemoryCapExceeded` when `nbytes` more would pass a cap or are not there.
    """

    def allocate(self, nbytes: int, *, stream: Stream) -> Buffer: ...


class Source(Memory, Protocol):
    """A system's memory, with blocks that came back kept for reuse.

    A `Pool` makes every call, one at a time.

    `kind`: for people. `held`: bytes taken from the system, free ones included; `blocks`: how often
    it was asked for them. `growth(nbytes)`: how many more it might take to serve a request. `trim`
    gives back what nobody uses. `free`: bytes the system has left, None where that has no meaning.
    `allocate` raises MemoryError when the system has no more.
    """

    kind: str

    @property
    def held(self) -> int: ...

    @property
    def blocks(self) -> int: ...

    @property
    def free(self) -> int | None: ...

    def growth(self, nbytes: int) -> int: ...

    def trim(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Usage:
    """Bytes handed out now (`in_use`), the most ever (`peak`), and the number of buffers ever
    (`buffers`).
    """

    in_use: int = 0
    peak: int = 0
    buffers: int = 0

    def plus(self, nbytes: int) -> Usage:
        return Usage(
            self.in_use + nbytes, max(self.peak, self.in_use + nbytes), self.buffers + (nbytes > 0)
        )


@dataclass(frozen=True)
class PoolStats:
    """One pool's accounting, in bytes: handed out now, the most ever, held from the system, the
    cap; how often the system was asked (`allocations`: constant in steady state); and the same by
    purpose.
    """

    in_use: int
    peak: int
    held: int
    cap: int
    allocations: int
    tags: Mapping[str, Usage] = field(default_factory=dict)


class Counted:
    """The statistics adaptor: hands on to `upstream` and counts what passes."""

    def __init__(self, upstream: Memory):
        self._upstream = upstream
        self._lock = threading.Lock()
        self.usage = Usage()

    def allocate(self, nbytes: int, *, stream: Stream) -> Buffer:
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
    """What several pools may hold together: `cap` bytes, None for what the system gives.

    Their sources are called one at a time.

    `make_room` is asked when that is short, in the thread that allocates: it gives something back,
    if it can, and says whether it did.
    """

    def __init__(self, cap: int | None, evict: Callable[[], bool]):
        self.cap, self.evict = cap, evict
        self.lock = threading.Lock()
        self.pools: set[Pool] = set()

    @property
    def held(self) -> int:
        """Bytes that all of its pools hold."""
        return sum(pool._held for pool in tuple(self.pools))


class Pool:
    """A `source` of which at most `cap` bytes are ever held.

    Safe to use from several threads: one call at a time reaches it.

    `allowance`: what it shares with other pools, whose sum is capped too.
    """

    def __init__(self, source: Source, cap: int, budget: MemoryBudget | None = None):
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
        """The part of this pool that `name` uses."""
        with self._lock:
            return self._tags.setdefault(name, Counted(self))

    def allocate(self, nbytes: int, *, stream: Stream) -> Buffer:
        """A block of `nbytes` bytes, at least, aligned to ALIGNMENT; its content is whatever was
        there.
        """
        size = max(ALIGNMENT, math.ceil(nbytes / ALIGNMENT) * ALIGNMENT)
        return self._with_room(lambda: self._allocate(size, stream))

    def _with_room(self, take: Callable[[], Buffer]) -> Buffer:
        """What `take` returns, when the others have made room for it if need be."""
        while True:
            try:
                return take()
            except MemoryCapExceeded:
                if not self._budget.evict():
                    raise

    def _allocate(self, size: int, stream: Stream) -> Buffer:
        with self._lock:
            if self._past_cap(
                self._source.growth(size)
            ):  # what is free in other sizes goes back before anything is refused
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
        """Count `nbytes` that a library takes for itself beside the pool: they lessen what the
        cap leaves. Has no address.
        """
        return self._with_room(lambda: self._reserve(nbytes, tag))

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
        """Whether a buffer of this pool that is in use begins at `ptr`."""
        return ptr in self._active

    def exceeded(self, nbytes: int, *, refused: bool = False) -> MemoryCapExceeded:
        """The error that says that `nbytes` more are too many: past the cap, or `refused` by the
        system.
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
        """Give back everything that is not in use; what is, when its buffer is closed, and with
        the last of them the source.
        """
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
    """Memory of this process, page-able. See `Source`."""

    kind = "host memory"
    free = None

    def __init__(self) -> None:
        self._free: dict[int, list[NDArray[np.uint8]]] = {}
        self.held = self.blocks = 0

    def allocate(self, nbytes: int, *, stream: Stream) -> Buffer:
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
        return 0 if self._free.get(nbytes) else nbytes

    def trim(self) -> None:
        self.held -= sum(size * len(blocks) for size, blocks in self._free.items())
        self._free.clear()

    def close(self) -> None:
        """The system has it back already."""


UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_bytes(text: str | int) -> int:
    """1073741824, "1GiB", "1.5 GB" or "512m": a number of bytes.

    The units are powers of 1024, as `nvidia-smi` counts.
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
