"""A GPU made of host memory, behind the real signatures of cuda-bindings, cuda-core, PyCUDA,
TensorRT and ONNX Runtime as used.

Work is done when somebody waits for it and not before, so that a missing wait shows as wrong bytes.
Freed memory, foreign threads, calls without a context, captures that allocate and graphs over freed
blocks are refused as the real ones refuse them, or harder. Networks are computed by ONNX Runtime on
the CPU, slice by slice, so that results can be compared bit for bit.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from enum import IntEnum
from types import ModuleType
from typing import Any

import pytest
from fake_engines import onnxruntime_module, tensorrt_module
from fake_memory import core_module, pycuda_modules
from fake_world import CUresult, Refused, World, new_module

from runtime.engines.gpu.probe import Device


def driver_module(world: World) -> ModuleType:
    """cuda.bindings.driver: every function returns a tuple that begins with its CUresult."""
    made = new_module("cuda.bindings.driver")
    made.CUresult = CUresult
    made.CUstream_flags = IntEnum(
        "CUstream_flags", {"CU_STREAM_DEFAULT": 0, "CU_STREAM_NON_BLOCKING": 1}
    )
    made.CUevent_flags = IntEnum(
        "CUevent_flags",
        {"CU_EVENT_DEFAULT": 0, "CU_EVENT_BLOCKING_SYNC": 1, "CU_EVENT_DISABLE_TIMING": 2},
    )
    made.CUstreamCaptureMode = IntEnum(
        "CUstreamCaptureMode",
        {
            "CU_STREAM_CAPTURE_MODE_GLOBAL": 0,
            "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL": 1,
            "CU_STREAM_CAPTURE_MODE_RELAXED": 2,
        },
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
                (CUresult.CUDA_SUCCESS,)
                if value is None
                else (CUresult.CUDA_SUCCESS, *(value if isinstance(value, tuple) else (value,)))
            )

        wrapped.__wrapped__ = function  # its signature
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
        assert not world.streams.pop(hStream) or world.broken, (
            "a stream was destroyed with work on it"
        )

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
        world.record(hEvent, hStream)

    @call
    def cuStreamWaitEvent(hStream: int, hEvent: int, Flags: int) -> None:
        world.need_context()
        assert Flags == 0 and hStream not in world.captures, "a graph would keep the order for ever"
        if hStream not in world.streams or hEvent not in world.events:
            raise Refused(CUresult.CUDA_ERROR_INVALID_HANDLE)
        world.follow(hStream, hEvent)

    @call
    def cuEventSynchronize(hEvent: int) -> None:
        world.need_context()
        stream, until = world.events[hEvent]
        if stream:
            world.drain(stream, until)

    @call
    def cuMemcpyHtoDAsync(dstDevice: int, srcHost: int, ByteCount: int, hStream: int) -> None:
        world.need_context()
        world.enqueue(
            hStream,
            lambda: _copy(int(world.at(dstDevice, ByteCount).ctypes.data), srcHost, ByteCount),
        )

    @call
    def cuMemcpyDtoHAsync(dstHost: int, srcDevice: int, ByteCount: int, hStream: int) -> None:
        world.need_context()
        world.enqueue(
            hStream,
            lambda: _copy(dstHost, int(world.at(srcDevice, ByteCount).ctypes.data), ByteCount),
        )

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
        activations = [block for _, blocks in world.graphs[hGraphExec] for block in blocks]
        world.enqueue(
            hStream, lambda: [work() for work, _ in world.graphs[hGraphExec]] and None, activations
        )

    @call
    def cuGraphDestroy(hGraph: int) -> None:
        del world.graphs[hGraph]

    @call
    def cuGraphExecDestroy(hGraphExec: int) -> None:
        del world.graphs[hGraphExec]

    return made


def install(
    monkeypatch: pytest.MonkeyPatch,
    provider: str = "cuda-core",
    memory: int = 1 << 30,
    capability: tuple[int, int] = (9, 0),
) -> World:
    """Put a fake GPU under the runtime: the driver's gate answers yes, `provider` is what is
    installed.
    """
    world = World(memory)
    driver, core, trt, ort = (
        driver_module(world),
        core_module(world),
        tensorrt_module(world),
        onnxruntime_module(world),
    )
    bindings, cuda = new_module("cuda.bindings"), new_module("cuda")
    bindings.__path__ = cuda.__path__ = []  # packages
    bindings.driver, cuda.bindings, cuda.core = driver, bindings, core
    modules: dict[str, Any] = {
        "cuda": cuda,
        "cuda.bindings": bindings,
        "cuda.bindings.driver": driver,
        "cuda.core": core,
        "tensorrt_lean": trt,
        "tensorrt_rtx": None,
        "tensorrt_rtx_bindings": tensorrt_module(world, "tensorrt_rtx_bindings", "1.7.1.116"),
        "onnxruntime": ort,
        "pycuda": None,
    }
    if provider == "pycuda":
        pycuda = new_module("pycuda")
        pycuda.driver, pycuda.tools = pycuda_modules(world)
        modules.update(
            {"pycuda": pycuda, "pycuda.driver": pycuda.driver, "pycuda.tools": pycuda.tools}
        )
        del cuda.core
        modules["cuda.core"] = None
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    gpu = Device(0, "Fake GPU", capability, memory, (13, 0))
    for module in ("cuda_driver", "tensorrt_rtx"):
        monkeypatch.setattr(f"runtime.engines.gpu.{module}.device", lambda ordinal=0: gpu)
    monkeypatch.setattr("runtime.engines.registry.why_no_gpu", lambda: None)
    return world


def _copy(to: int, source: int, nbytes: int) -> None:
    ctypes.memmove(to, source, nbytes)
