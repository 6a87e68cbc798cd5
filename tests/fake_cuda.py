"""A GPU made of host memory, behind the real signatures of cuda-bindings, cuda-core, PyCUDA, TensorRT and ONNX Runtime as used.

Work is done when somebody waits for it and not before, so that a missing wait shows as wrong bytes. Freed memory, foreign threads,
calls without a context, captures that allocate and graphs over freed blocks are refused as the real ones refuse them, or harder.
Networks are computed by ONNX Runtime on the CPU, slice by slice, so that results can be compared bit for bit.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as real
import pytest

from runtime.contract import Manifest
from runtime.driver import Device

MAGIC = b"fake plan\n"
ACTIVATION = 40  # bytes of activations for a pixel of a slice


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
    """The device. `fail(name, at)`: the at-th call of that name from now on fails, once. `calls`: how often each was called."""

    memory: int = 1 << 30
    calls: Counter[str] = field(default_factory=Counter)
    blocks: dict[int, tuple[np.ndarray, str]] = field(default_factory=dict)
    streams: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    events: dict[int, tuple[int, int]] = field(default_factory=dict)  # stream, operations that were on it at `record`
    done: Counter[int] = field(default_factory=Counter)  # operations ever done on a stream
    put: Counter[int] = field(default_factory=Counter)
    graphs: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    captures: dict[int, tuple[int, list[Callable[[], None]]]] = field(default_factory=dict)  # stream → thread, operations
    busy: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # stream → activation blocks of queued work
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
                    raise Refused(CUresult.CUDA_ERROR_OUT_OF_MEMORY if "Alloc" in name else CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)

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
        """The device's bytes there. Raises what the device would, from then on too, for memory that is not."""
        for start, (block, kind) in self.blocks.items():
            if kind == "device" and start <= ptr and ptr + nbytes <= start + block.nbytes:
                return block[ptr - start : ptr - start + nbytes]
        self.broken = True
        raise Refused(CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        with self.lock:
            if stream not in self.streams:
                raise Refused(CUresult.CUDA_ERROR_INVALID_HANDLE)
            if stream in self.captures:
                thread, captured = self.captures[stream]
                if thread != threading.get_ident():
                    raise Refused(CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
                captured.append(work)
                return
            self.streams[stream].append(work)
            self.put[stream] += 1

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
            if not queue:
                self.busy.pop(stream, None)

    def left(self) -> dict[str, int]:
        """What was not given back."""
        left = {"blocks": len(self.blocks), "streams": len(self.streams), "events": len(self.events), "graphs": len(self.graphs),
                "contexts": self.retained, "captures": len(self.captures)}  # fmt: skip
        return {name: n for name, n in left.items() if n}


def driver_module(world: World) -> ModuleType:
    """cuda.bindings.driver: every function returns a tuple that begins with its CUresult."""
    made = _module("cuda.bindings.driver")
    made.CUresult = CUresult
    made.CUstream_flags = IntEnum("CUstream_flags", {"CU_STREAM_DEFAULT": 0, "CU_STREAM_NON_BLOCKING": 1})
    made.CUevent_flags = IntEnum("CUevent_flags", {"CU_EVENT_DEFAULT": 0, "CU_EVENT_BLOCKING_SYNC": 1, "CU_EVENT_DISABLE_TIMING": 2})
    made.CUstreamCaptureMode = IntEnum(
        "CUstreamCaptureMode",
        {"CU_STREAM_CAPTURE_MODE_GLOBAL": 0, "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL": 1, "CU_STREAM_CAPTURE_MODE_RELAXED": 2},
    )

    def call(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> tuple[Any, ...]:
            try:
                with world.lock:
                    world.count(function.__name__)
                    value = function(*arguments)
            except Refused as exc:
                return (exc.status,)
            return (
                (CUresult.CUDA_SUCCESS,) if value is None else (CUresult.CUDA_SUCCESS, *(value if isinstance(value, tuple) else (value,)))
            )

        setattr(made, function.__name__, wrapped)
        return wrapped

    @call
    def cuInit(Flags: int) -> None:
        assert Flags == 0

    @call
    def cuDeviceGet(ordinal: int) -> int:
        return ordinal

    @call
    def cuDevicePrimaryCtxRetain(dev: int) -> int:
        world.retained += 1
        return 7

    @call
    def cuDevicePrimaryCtxRelease(dev: int) -> None:
        world.retained -= 1
        assert world.retained >= 0

    @call
    def cuCtxPushCurrent(ctx: int) -> None:
        if ctx != 7 or not world.retained:
            raise Refused(CUresult.CUDA_ERROR_INVALID_CONTEXT)
        world.stack().append(ctx)

    @call
    def cuCtxPopCurrent() -> int:
        return world.stack().pop()

    @call
    def cuMemGetInfo() -> tuple[int, int]:
        world.need_context()
        return world.memory - world.in_use("device"), world.memory

    @call
    def cuStreamCreate(Flags: int) -> int:
        world.need_context()
        assert Flags == 1, "a blocking stream waits for other libraries' work"
        stream = world.new()
        world.streams[stream] = []
        return stream

    @call
    def cuStreamDestroy(hStream: int) -> None:
        world.need_context()
        assert not world.streams.pop(hStream) or world.broken, "a stream was destroyed with work on it"

    @call
    def cuStreamSynchronize(hStream: int) -> None:
        world.need_context()
        world.drain(hStream)

    @call
    def cuEventCreate(Flags: int) -> int:
        world.need_context()
        event = world.new()
        world.events[event] = (0, 0)
        return event

    @call
    def cuEventDestroy(hEvent: int) -> None:
        world.need_context()
        del world.events[hEvent]

    @call
    def cuEventRecord(hEvent: int, hStream: int) -> None:
        world.need_context()
        if hStream not in world.streams or hEvent not in world.events:
            raise Refused(CUresult.CUDA_ERROR_INVALID_HANDLE)
        world.events[hEvent] = (hStream, world.put[hStream])

    @call
    def cuEventSynchronize(hEvent: int) -> None:
        world.need_context()
        stream, until = world.events[hEvent]
        if stream:
            world.drain(stream, until)

    @call
    def cuMemcpyHtoDAsync(dstDevice: int, srcHost: int, ByteCount: int, hStream: int) -> None:
        world.need_context()
        world.enqueue(hStream, lambda: _copy(int(world.at(dstDevice, ByteCount).ctypes.data), srcHost, ByteCount))

    @call
    def cuMemcpyDtoHAsync(dstHost: int, srcDevice: int, ByteCount: int, hStream: int) -> None:
        world.need_context()
        world.enqueue(hStream, lambda: _copy(dstHost, int(world.at(srcDevice, ByteCount).ctypes.data), ByteCount))

    @call
    def cuStreamBeginCapture(hStream: int, mode: int) -> None:
        world.need_context()
        assert mode == 1, "a capture that is not thread-local fails when another thread allocates"
        world.captures[hStream] = (threading.get_ident(), [])

    @call
    def cuStreamEndCapture(hStream: int) -> int:
        thread, captured = world.captures.pop(hStream)
        assert thread == threading.get_ident()
        graph = world.new()
        world.graphs[graph] = captured
        return graph

    @call
    def cuGraphInstantiate(hGraph: int, flags: int) -> int:
        executable = world.new()
        world.graphs[executable] = world.graphs[hGraph]
        return executable

    @call
    def cuGraphLaunch(hGraphExec: int, hStream: int) -> None:
        world.need_context()
        world.enqueue(hStream, lambda: [work() for work in world.graphs[hGraphExec]] and None)

    @call
    def cuGraphDestroy(hGraph: int) -> None:
        del world.graphs[hGraph]

    @call
    def cuGraphExecDestroy(hGraphExec: int) -> None:
        del world.graphs[hGraphExec]

    return made


def core_module(world: World) -> ModuleType:
    """cuda.core"""
    made = _module("cuda.core")
    made.__version__ = "1.2.2"

    class CUDAError(Exception):
        pass

    def guarded(name: str, call: Callable[[], Any]) -> Any:
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
                guarded("close", lambda: world.release(self.handle))
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
            guarded("sync", lambda: (world.need_context(), world.drain(self._handle)))

    @dataclass
    class DeviceMemoryResourceOptions:
        ipc_enabled: bool = False
        max_size: int = 0

    class DeviceMemoryResource:
        def __init__(self, device_id: int, options: Any = None):
            assert isinstance(options, DeviceMemoryResourceOptions), "without options it is the pool that torch may use too"
            world.need_context()
            self._open = True

        def allocate(self, size: int, *, stream: Any) -> Buffer:
            assert self._open and isinstance(stream, Stream)
            return Buffer(guarded("cuMemAllocAsync", lambda: world.allocate(size, "device")), size)

        def close(self) -> None:
            self._open = False

    class LegacyPinnedMemoryResource:
        def allocate(self, size: int, *, stream: Any = None) -> Buffer:
            return Buffer(guarded("cuMemAllocHost", lambda: world.allocate(size, "pinned")), size)

    for thing in (Device, Stream, DeviceMemoryResourceOptions, DeviceMemoryResource, LegacyPinnedMemoryResource):
        setattr(made, thing.__name__, thing)
    return made


def pycuda_modules(world: World) -> tuple[ModuleType, ModuleType]:
    """pycuda.driver and pycuda.tools. Pools serve the thread that made the context and no other, and hold blocks in bins."""
    driver, tools = _module("pycuda.driver"), _module("pycuda.tools")

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

        def __del__(self) -> None:
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
            assert threading.get_ident() == self.thread, "this pool has no lock and its context no other thread"

        def bin_number(self, size: int) -> int:
            bits = size.bit_length() - 1
            mantissa = size >> (bits - 4) if bits >= 4 else size << (4 - bits)
            return bits << 4 | (mantissa & 15)

        def alloc_size(self, number: int) -> int:
            bits, mantissa = number >> 4, number & 15
            ones = (1 << max(bits - 4, 0)) - 1
            head = (1 << 4 | mantissa) << (bits - 4) if bits >= 4 else (1 << 4 | mantissa) >> (4 - bits)
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
            return _Based(world.blocks[ptr][0][:size].view(dtype).reshape(shape), Allocation(self, ptr, size))

    driver.init = lambda: None
    driver.Device, driver.Context, driver.Error, driver.MemoryError = Device, Context, Error, PyCudaMemoryError
    tools.DeviceMemoryPool, tools.PageLockedMemoryPool, tools.PageLockedAllocator = (
        DeviceMemoryPool,
        PageLockedMemoryPool,
        PageLockedAllocator,
    )
    return driver, tools


class _Based:
    """An array whose `base` is what PyCUDA sets: the allocation. (numpy allows no such thing from Python.)"""

    def __init__(self, array: np.ndarray, base: Any):
        self._array, self.base = array, base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._array, name)

    def __getitem__(self, key: Any) -> Any:
        return self._array[key]


def tensorrt_module(world: World, name: str = "tensorrt_lean", version: str = "11.4.0.106") -> ModuleType:
    made = _module(name)
    made.__version__ = version
    made.DataType = IntEnum("DataType", ["FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8"])
    made.TensorIOMode = IntEnum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
    made.ExecutionContextAllocationStrategy = IntEnum("ExecutionContextAllocationStrategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"])

    class ILogger:
        Severity = IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])

        def __init__(self) -> None:
            self.initialised = True

    def said_no(name: str) -> bool:
        try:
            world.count(name)
        except Refused:
            return True
        return False

    class Context:
        def __init__(self, engine: Engine):
            self._engine = engine
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._memory, self._size = 0, 0
            self._warm: Any = None

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            low, _, high = self._engine.get_tensor_profile_shape(name, 0)
            if said_no("set_input_shape") or not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
                return False
            self._shapes[name] = tuple(shape)
            return True

        def infer_shapes(self) -> list[str]:
            return [n for n, mode in self._engine.modes.items() if mode == made.TensorIOMode.INPUT and n not in self._shapes]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            n, _, h, w = self._shapes["labels"]
            return (n, h, w, 2) if name == "ct" else self._shapes[name]

        def update_device_memory_size_for_shapes(self) -> int:
            n, _, h, w = self._shapes["labels"]
            return ACTIVATION * n * h * w

        def set_device_memory(self, memory: int, size: int) -> None:
            assert memory % 256 == 0, "activation memory must be aligned to 256 bytes"
            self._memory, self._size = memory, size

        def set_tensor_address(self, name: str, memory: int) -> bool:
            if said_no("set_tensor_address") or name not in self._engine.modes:
                return False
            self._addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            assert isinstance(stream_handle, int)
            needed = self.update_device_memory_size_for_shapes()
            ready = not self.infer_shapes() and set(self._addresses) == set(self._engine.modes) and self._size >= needed
            capturing = stream_handle in world.captures
            if said_no("execute_async_v3") or not ready or (capturing and self._warm != self._shapes):
                return False
            others = [spans for stream, spans in world.busy.items() if stream != stream_handle]
            assert all(a + n <= self._memory or self._memory + needed <= a for spans in others for a, n in spans), "activations are shared"
            world.busy.setdefault(stream_handle, []).append((self._memory, needed))
            shapes, addresses, memory = {n: self.get_tensor_shape(n) for n in self._engine.modes}, dict(self._addresses), self._memory

            def work() -> None:
                world.at(memory, needed)[...] = 0xEE
                inputs = {}
                for name in shapes:
                    if name != "ct":
                        kind = np.float32 if name == "style" else np.uint8
                        raw = world.at(addresses[name], math.prod(shapes[name]) * np.dtype(kind).itemsize)
                        inputs[name] = raw.view(kind).reshape(shapes[name])
                world.at(addresses["ct"], math.prod(shapes["ct"]))[...] = compute(self._engine.session, inputs).ravel()

            try:
                world.enqueue(stream_handle, work)
            except Refused:
                return False
            self._warm = dict(self._shapes)
            return True

    class Engine:
        def __init__(self, plan: bytes):
            header, _, graph = plan.removeprefix(MAGIC).partition(b"\n")
            facts = json.loads(header)
            self._profile = facts["profile"]
            self.session = session_of(graph)
            self.modes = {i.name: made.TensorIOMode.INPUT for i in self.session.get_inputs()} | {"ct": made.TensorIOMode.OUTPUT}

        @property
        def num_io_tensors(self) -> int:
            return len(self.modes)

        def get_tensor_name(self, index: int) -> str:
            return list(self.modes)[index]

        def get_tensor_mode(self, name: str) -> int:
            return self.modes[name]

        def get_tensor_dtype(self, name: str) -> int:
            return made.DataType.FLOAT if name == "style" else made.DataType.UINT8

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
            return [tuple(shape) for shape in self._profile[name]]

        def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
            n, _, h, w = self._profile["labels"][2]
            return ACTIVATION * n * h * w

        def create_execution_context(self, strategy: int) -> Context | None:
            assert strategy == made.ExecutionContextAllocationStrategy.USER_MANAGED
            world.need_context()
            return None if said_no("create_execution_context") else Context(self)

    class Runtime:
        def __init__(self, logger: Any):
            assert isinstance(logger, ILogger) and logger.initialised
            world.need_context()
            self._logger = logger
            self.engine_host_code_allowed = False

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
            if said_no("deserialize_cuda_engine") or not serialized_engine.startswith(MAGIC):
                self._logger.log(ILogger.Severity.ERROR, "magicTag does not match")
                return None
            return Engine(serialized_engine)

    made.ILogger, made.Runtime = ILogger, Runtime
    return made


def onnxruntime_module(world: World) -> Any:
    """onnxruntime as onnxruntime-gpu is: the real one, with a CUDA provider on the fake device."""
    known = {"device_id", "gpu_mem_limit", "arena_extend_strategy", "cudnn_conv_algo_search", "use_tf32"}

    class Binding:
        def __init__(self) -> None:
            self.tensors: dict[str, tuple[tuple[int, ...], Any, int]] = {}

        def bind_input(self, name: str, device_type: str, device_id: int, element_type: Any, shape: Any, buffer_ptr: int) -> None:
            assert device_type == "cuda"
            self.tensors[name] = (tuple(shape), element_type, buffer_ptr)

        def bind_output(self, name: str, device_type: str, device_id: int, element_type: Any, shape: Any, buffer_ptr: int) -> None:
            self.bind_input(name, device_type, device_id, element_type, shape, buffer_ptr)

    class InferenceSession:
        def __init__(self, path_or_bytes: str, sess_options: Any = None, providers: Any = None):
            ((name, options),) = providers
            assert name == "CUDAExecutionProvider" and set(options) <= known and all(isinstance(v, str) for v in options.values())
            assert sess_options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
            self._limit = int(options["gpu_mem_limit"])
            self._session = session_of(Path(path_or_bytes).read_bytes())

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider"]

        def get_inputs(self) -> Any:
            return self._session.get_inputs()

        def get_modelmeta(self) -> Any:
            return self._session.get_modelmeta()

        def io_binding(self) -> Binding:
            return Binding()

        def run_with_iobinding(self, iobinding: Binding) -> None:
            tensors = dict(iobinding.tensors)
            shape, _, out = tensors.pop("ct")
            needed = ACTIVATION * math.prod(shape[:3])
            if needed > self._limit:
                raise RuntimeError(f"BFCArena: Available memory of {self._limit} is smaller than requested bytes of {needed}")
            try:
                world.count("run_with_iobinding")
            except Refused as exc:
                raise RuntimeError(f"CUDNN failure: {exc}") from exc
            inputs = {n: world.at(p, math.prod(s) * np.dtype(t).itemsize).view(t).reshape(s) for n, (s, t, p) in tensors.items()}
            result = compute(self._session, inputs)
            with world.lock:
                world.at(out, math.prod(shape))[...] = result.ravel()

    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def session(path: str, settings: Any, providers: Any) -> Any:
        return (real.InferenceSession if providers == ["CPUExecutionProvider"] else InferenceSession)(path, settings, providers=providers)

    return SimpleNamespace(InferenceSession=session, SessionOptions=real.SessionOptions, __version__=real.__version__,
                           get_available_providers=lambda: providers, __spec__=ModuleSpec("onnxruntime", None))  # fmt: skip


def session_of(graph: bytes) -> Any:
    return real.InferenceSession(graph, providers=["CPUExecutionProvider"])


def compute(session: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The graph on each slice alone, as the CPU engine runs it."""
    return np.concatenate(
        [session.run(["ct"], {name: array[n : n + 1] for name, array in inputs.items()})[0] for n in range(len(inputs["labels"]))]
    )


def plan_of(graph: bytes, manifest: Manifest, batch: int = 4) -> bytes:
    """An engine file of the fake: its profile takes 1 to `batch` slices on the canvas, to twice its height and width."""
    h, w = manifest.grid.canvas
    sizes = [(1, h, w), (batch, h, w), (2 * batch, 2 * h, 2 * w)]
    profile = {t.name: [[{"N": n, "H": y, "W": x}.get(str(d), d) for d in t.shape] for n, y, x in sizes] for t in manifest.inputs}
    return MAGIC + json.dumps({"profile": profile}).encode() + b"\n" + graph


def install(monkeypatch: pytest.MonkeyPatch, provider: str = "cuda-core", memory: int = 1 << 30) -> World:
    """Put a fake GPU under the runtime: the driver's gate answers yes, `provider` is what is installed."""
    world = World(memory)
    driver, core, trt, ort = driver_module(world), core_module(world), tensorrt_module(world), onnxruntime_module(world)
    bindings, cuda = _module("cuda.bindings"), _module("cuda")
    bindings.__path__ = cuda.__path__ = []  # packages
    bindings.driver, cuda.bindings, cuda.core = driver, bindings, core
    modules: dict[str, Any] = {"cuda": cuda, "cuda.bindings": bindings, "cuda.bindings.driver": driver, "cuda.core": core,
                               "tensorrt_lean": trt, "onnxruntime": ort, "pycuda": None}  # fmt: skip
    if provider == "pycuda":
        pycuda = _module("pycuda")
        pycuda.driver, pycuda.tools = pycuda_modules(world)
        modules.update({"pycuda": pycuda, "pycuda.driver": pycuda.driver, "pycuda.tools": pycuda.tools})
        del cuda.core
        modules["cuda.core"] = None
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    found = Device(0, "Fake GPU", (9, 0), memory, (13, 0))
    monkeypatch.setattr("runtime.cuda.device", lambda ordinal: found)
    for module in ("tensorrt", "onnx_cuda"):
        monkeypatch.setattr(f"runtime.engines.{module}.why_no_gpu", lambda: None)
    return world


def _module(name: str) -> Any:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    return made


def _copy(to: int, source: int, nbytes: int) -> None:
    ctypes.memmove(to, source, nbytes)
