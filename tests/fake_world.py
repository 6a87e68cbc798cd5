"""The device behind the fakes: its memory, streams, events and graphs, and what was not given
back.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np

Operation = tuple[
    Callable[[], None], tuple[tuple[int, int], ...]
]  # the work, and the activation blocks it uses


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900


class Refused(Exception):
    def __init__(self, status: CUresult):
        self.status = status
        super().__init__(status.name)


@dataclass
class World:
    """The device. `fail(name, at)`: the at-th call of that name from now on fails, once.

    `calls`: how often each was called.
    """

    memory: int = 1 << 30
    calls: Counter[str] = field(default_factory=Counter)
    blocks: dict[int, tuple[np.ndarray, str]] = field(default_factory=dict)
    streams: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    events: dict[int, tuple[int, int]] = field(
        default_factory=dict
    )  # stream, operations that were on it at `record`
    done: Counter[int] = field(default_factory=Counter)  # operations ever done on a stream
    put: Counter[int] = field(default_factory=Counter)
    graphs: dict[int, list[Operation]] = field(default_factory=dict)
    captures: dict[int, tuple[int, list[Operation]]] = field(
        default_factory=dict
    )  # stream → thread, operations
    uses: dict[int, list[tuple[int, int, int]]] = field(
        default_factory=dict
    )  # stream → operation, activation block of queued work
    after: dict[int, Counter[int]] = field(
        default_factory=dict
    )  # stream → operations of others that its next one comes after
    before: dict[int, Counter[int]] = field(
        default_factory=dict
    )  # event → operations of all streams that are done when it is
    kernels: bytes = b"kernels of this GPU"  # what TensorRT for RTX compiles
    retained: int = 0
    broken: bool = False
    failing: dict[str, int] = field(default_factory=dict)
    contexts: threading.local = field(default_factory=threading.local)
    lock: threading.RLock = field(default_factory=threading.RLock)
    graveyard: list[np.ndarray] = field(default_factory=list)
    number: int = 100

    def fail(self, name: str, at: int = 1) -> None:
        self.failing[name] = at

    def count(self, name: str) -> None:
        """Called first by every function. Raises `Refused` when it is to fail."""
        with self.lock:
            self.calls[name] += 1
            if self.failing.get(name, 0) > 0:
                self.failing[name] -= 1
                if not self.failing[name]:
                    raise Refused(
                        CUresult.CUDA_ERROR_OUT_OF_MEMORY
                        if "Alloc" in name
                        else CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
                    )

    def new(self) -> int:
        self.number += 1
        return self.number

    def stack(self) -> list[int]:
        if not hasattr(self.contexts, "stack"):
            self.contexts.stack = []
        return self.contexts.stack

    def need_context(self) -> None:
        if not self.stack() or not self.retained:
            raise Refused(CUresult.CUDA_ERROR_INVALID_CONTEXT)

    def not_capturing(self) -> None:
        if any(thread == threading.get_ident() for thread, _ in self.captures.values()):
            raise Refused(CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)

    def allocate(self, nbytes: int, kind: str) -> int:
        with self.lock:
            self.need_context()
            self.not_capturing()
            if kind == "device" and self.in_use("device") + nbytes > self.memory:
                raise Refused(CUresult.CUDA_ERROR_OUT_OF_MEMORY)
            raw = np.full(nbytes + 512, 0xCD, np.uint8)
            start = -int(raw.ctypes.data) % 512
            self.blocks[int(raw.ctypes.data) + start] = (raw[start : start + nbytes], kind)
            return int(raw.ctypes.data) + start

    def release(self, ptr: int) -> None:
        with self.lock:
            self.need_context()
            self.not_capturing()
            if ptr not in self.blocks:
                raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
            block, _ = self.blocks.pop(ptr)
            block[...] = 0xDD
            self.graveyard.append(block)  # its address is not used again

    def in_use(self, kind: str) -> int:
        return sum(block.nbytes for block, k in self.blocks.values() if k == kind)

    def at(self, ptr: int, nbytes: int) -> np.ndarray:
        """The device's bytes there.

        Raises what the device would, from then on too, for memory that is not.
        """
        for start, (block, kind) in self.blocks.items():
            if kind == "device" and start <= ptr and ptr + nbytes <= start + block.nbytes:
                return block[ptr - start : ptr - start + nbytes]
        self.broken = True
        raise Refused(CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)

    def enqueue(
        self, stream: int, work: Callable[[], None], activations: Sequence[tuple[int, int]] = ()
    ) -> None:
        """`activations`: the blocks (address, bytes) that nothing else may use while the work is
        done.
        """
        with self.lock:
            if stream not in self.streams:
                raise Refused(CUresult.CUDA_ERROR_INVALID_HANDLE)
            if stream in self.captures:
                thread, captured = self.captures[stream]
                if thread != threading.get_ident():
                    raise Refused(CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
                captured.append((work, tuple(activations)))
                return
            for memory, nbytes in activations:
                for other, queued in self.uses.items():
                    late = [
                        n
                        for n, a, size in queued
                        if a < memory + nbytes and memory < a + size and n >= self.done[other]
                    ]
                    assert other == stream or all(
                        n < self.after.get(stream, Counter())[other] for n in late
                    ), "activations are shared"
                self.uses.setdefault(stream, []).append((self.put[stream], memory, nbytes))
            self.streams[stream].append(work)
            self.put[stream] += 1

    def record(self, event: int, stream: int) -> None:
        self.events[event] = (stream, self.put[stream])
        self.before[event] = self.after.setdefault(stream, Counter()) | Counter(
            {stream: self.put[stream]}
        )

    def follow(self, stream: int, event: int) -> None:
        other, until = self.events[event]
        self.after[stream] = self.after.setdefault(stream, Counter()) | self.before.get(
            event, Counter()
        )
        if other in self.streams:
            self.enqueue(
                stream, lambda: self.drain(other, until) if other in self.streams else None
            )

    def drain(self, stream: int, until: int | None = None) -> None:
        with self.lock:
            if self.broken:
                raise Refused(CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)
            if stream in self.captures:
                raise Refused(CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
            queue = self.streams[stream]
            while queue and (until is None or self.done[stream] < until):
                self.done[stream] += 1
                queue.pop(0)()
            self.uses[stream] = [
                use for use in self.uses.get(stream, []) if use[0] >= self.done[stream]
            ]

    def left(self) -> dict[str, int]:
        """What was not given back."""
        left = {
            "blocks": len(self.blocks),
            "streams": len(self.streams),
            "events": len(self.events),
            "graphs": len(self.graphs),
            "contexts": self.retained,
            "captures": len(self.captures),
        }
        return {name: n for name, n in left.items() if n}


def new_module(name: str) -> Any:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    return made
