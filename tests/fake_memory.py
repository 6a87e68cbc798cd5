"""cuda-core and PyCUDA on the fake device, as far as `runtime.engines.gpu.cuda_memory` uses
them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from fake_world import Refused, World, new_module


def core_module(world: World) -> ModuleType:
    """The module `cuda.core`, made of fakes."""
    made = new_module("cuda.core")
    made.__version__ = "1.2.2"

    class CUDAError(Exception):
        pass

    def map_dicom_errors(name: str, call: Callable[[], Any]) -> Any:
        try:
            world.count(name)
            return call()
        except Refused as exc:
            raise CUDAError(f"{exc.status.name}: fake") from exc

    class Buffer:
        def __init__(self, ptr: int, size: int):
            self.handle, self.size = ptr, size

        def close(self, stream: Any = None) -> None:
            if self.handle:
                map_dicom_errors("close", lambda: world.release(self.handle))
                self.handle = 0

    class Device:
        def __init__(self, device_id: int | None = None):
            self.device_id = device_id

        def set_current(self) -> None:
            world.need_context()

    class Stream:
        def __init__(self, handle: int):
            self._handle = handle

        @staticmethod
        def from_handle(handle: int) -> Stream:
            assert handle in world.streams
            return Stream(handle)

        def sync(self) -> None:
            map_dicom_errors("sync", lambda: (world.need_context(), world.drain(self._handle)))

    @dataclass
    class DeviceMemoryResourceOptions:
        ipc_enabled: bool = False
        max_size: int = 0

    class DeviceMemoryResource:
        def __init__(self, device_id: int, options: Any = None):
            assert isinstance(options, DeviceMemoryResourceOptions), (
                "without options it is the pool that torch may use too"
            )
            world.need_context()
            self._open = True

        def allocate(self, size: int, *, stream: Any) -> Buffer:
            assert self._open and isinstance(stream, Stream)
            return Buffer(
                map_dicom_errors("cuMemAllocAsync", lambda: world.allocate(size, "device")), size
            )

        def close(self) -> None:
            self._open = False

    class LegacyPinnedMemoryResource:
        def allocate(self, size: int, *, stream: Any = None) -> Buffer:
            return Buffer(
                map_dicom_errors("cuMemAllocHost", lambda: world.allocate(size, "pinned")), size
            )

    for thing in (
        Buffer,
        Device,
        Stream,
        DeviceMemoryResourceOptions,
        DeviceMemoryResource,
        LegacyPinnedMemoryResource,
    ):
        setattr(made, thing.__name__, thing)
    return made


def pycuda_modules(world: World) -> tuple[ModuleType, ModuleType]:
    """pycuda.driver and pycuda.tools.

    Pools serve the thread that made the context and no other, and hold blocks in bins.
    """
    driver, tools = new_module("pycuda.driver"), new_module("pycuda.tools")

    class Error(Exception):
        pass

    class PyCudaMemoryError(Error):
        pass

    class Context:
        def __init__(self) -> None:
            self.thread = threading.get_ident()
            world.retained += 1

        def push(self) -> None:
            assert threading.get_ident() == self.thread, "cannot activate out-of-thread context"
            world.stack().append(7)

        @staticmethod
        def pop() -> None:
            world.stack().pop()

        def detach(self) -> None:
            assert threading.get_ident() == self.thread
            world.retained -= 1

    class Device:
        def __init__(self, ordinal: int):
            self.ordinal = ordinal

        def retain_primary_context(self) -> Context:
            return Context()

    class Allocation:
        def __init__(self, pool: Pool, ptr: int, size: int):
            self._pool, self._ptr, self._size = pool, ptr, size

        def __int__(self) -> int:
            return self._ptr

        def __len__(self) -> int:
            return self._size

        def free(self) -> None:
            self._pool.take_back(self._ptr, self._size)

    class Pool:
        kind, name = "device", "cuMemAlloc"

        def __init__(self) -> None:
            world.need_context()
            self.thread = threading.get_ident()
            self._bins: dict[int, list[int]] = {}
            self.managed_bytes = self.active_bytes = self.held_blocks = self.active_blocks = 0

        def mine(self) -> None:
            assert threading.get_ident() == self.thread, (
                "this pool has no lock and its context no other thread"
            )

        def bin_number(self, size: int) -> int:
            bits = size.bit_length() - 1
            mantissa = size >> (bits - 4) if bits >= 4 else size << (4 - bits)
            return bits << 4 | (mantissa & 15)

        def alloc_size(self, number: int) -> int:
            bits, mantissa = number >> 4, number & 15
            ones = (1 << max(bits - 4, 0)) - 1
            head = (
                (1 << 4 | mantissa) << (bits - 4)
                if bits >= 4
                else (1 << 4 | mantissa) >> (4 - bits)
            )
            return head | ones

        def take(self, size: int) -> int:
            self.mine()
            number = self.bin_number(size)
            held = self._bins.get(number)
            try:
                if held:
                    ptr = held.pop()
                    self.held_blocks -= 1
                else:
                    world.count(self.name)
                    ptr = world.allocate(self.alloc_size(number), self.kind)
                    self.managed_bytes += self.alloc_size(number)
            except Refused as exc:
                raise PyCudaMemoryError(f"memory_pool::allocate failed: {exc.status.name}") from exc
            self.active_blocks += 1
            self.active_bytes += size
            return ptr

        def take_back(self, ptr: int, size: int) -> None:
            self.mine()
            self._bins.setdefault(self.bin_number(size), []).append(ptr)
            self.held_blocks += 1
            self.active_blocks -= 1
            self.active_bytes -= size

        def free_held(self) -> None:
            self.mine()
            for number, held in self._bins.items():
                for ptr in held:
                    world.release(ptr)
                    self.managed_bytes -= self.alloc_size(number)
            self._bins.clear()
            self.held_blocks = 0

        def stop_holding(self) -> None:
            self.free_held()

    class DeviceMemoryPool(Pool):
        def allocate(self, size: int) -> Allocation:
            return Allocation(self, self.take(size), size)

    class PageLockedAllocator:
        def __init__(self, flags: int = 0):
            self.flags = flags

    class PageLockedMemoryPool(Pool):
        kind, name = "pinned", "cuMemHostAlloc"

        def __init__(self, allocator: PageLockedAllocator):
            super().__init__()

        def allocate(self, shape: tuple[int, ...], dtype: Any) -> Any:
            size = math.prod(shape) * np.dtype(dtype).itemsize
            ptr = self.take(size)
            return _Based(
                world.blocks[ptr][0][:size].view(dtype).reshape(shape), Allocation(self, ptr, size)
            )

    driver.init = lambda: None
    driver.Device, driver.Context, driver.Error, driver.MemoryError = (
        Device,
        Context,
        Error,
        PyCudaMemoryError,
    )
    tools.DeviceMemoryPool, tools.PageLockedMemoryPool, tools.PageLockedAllocator = (
        DeviceMemoryPool,
        PageLockedMemoryPool,
        PageLockedAllocator,
    )
    return driver, tools


class _Based:
    """An array whose `base` is what PyCUDA sets: the allocation.

    (numpy allows no such thing from Python.)
    """

    def __init__(self, array: np.ndarray, base: Any):
        self._array, self.base = array, base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._array, name)

    def __getitem__(self, key: Any) -> Any:
        return self._array[key]
