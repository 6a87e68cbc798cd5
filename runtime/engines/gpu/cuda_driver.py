"""The calls of the CUDA driver that engines need, through cuda-bindings.

All of them use the device's *primary* context, which is retained once and made current for each
piece of work. PyTorch, ONNX Runtime and the CUDA runtime inside TensorRT use the same context, so
that addresses and streams are valid in all of them and none destroys another's context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import importing
from ..base import EngineError
from .probe import device

INSTALL = 'pip install "mask2ct[gpu]"'


class GpuError(EngineError):
    """The CUDA driver refused a call.

    After an illegal memory access the driver refuses every later call of the process.
    """


class Cuda:
    """The CUDA driver on one GPU.

    All methods but `current` and `close` need the context to be current: `with cuda.current(): …`.
    They raise `GpuError` when the driver refuses a call. Streams, events and graphs are handles of
    the driver, opaque to the caller.
    """

    def __init__(self, ordinal: int = 0):
        """Retain the primary context of a GPU.

        Args:
            ordinal: the number of the GPU in the driver's order.

        Raises:
            MissingComponent: there is no such GPU (found before any CUDA library is loaded), or
                cuda-bindings is not installed.
            GpuError: the driver refused a call.
        """
        self.device = device(ordinal)
        self._driver = _bindings()
        self._context: Any = None
        self._checked("the driver", self._driver.cuInit(0))
        self._handle = self._checked("the device", self._driver.cuDeviceGet(ordinal))
        self._context = self._checked(
            "the primary context", self._driver.cuDevicePrimaryCtxRetain(self._handle)
        )

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current in this thread, and restore the previous one afterwards."""
        self._checked("the context", self._driver.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent()

    def free(self) -> int:
        """Return the free memory of the device in bytes."""
        return int(self._checked("its memory", self._driver.cuMemGetInfo())[0])

    def stream(self) -> Any:
        """Make a stream that does not wait for the default stream, which other libraries use."""
        flags = self._driver.CUstream_flags
        return self._checked(
            "a stream", self._driver.cuStreamCreate(int(flags.CU_STREAM_NON_BLOCKING))
        )

    def event(self) -> Any:
        """Make an event; a thread that waits for it sleeps instead of spinning."""
        kinds = self._driver.CUevent_flags
        flags = int(kinds.CU_EVENT_BLOCKING_SYNC) | int(kinds.CU_EVENT_DISABLE_TIMING)
        return self._checked("an event", self._driver.cuEventCreate(flags))

    def record(self, event: Any, stream: Any) -> None:
        """Record `event` behind the work that is on `stream` now."""
        self._checked("an event", self._driver.cuEventRecord(event, stream))

    def follow(self, stream: Any, event: Any) -> None:
        """Make later work on `stream` wait, on the device, for the work before `event`."""
        self._checked("an order of streams", self._driver.cuStreamWaitEvent(stream, event, 0))

    def wait(self, event: Any) -> None:
        """Wait for the work before `event`.

        Raises:
            GpuError: the work failed.
        """
        self._checked("the work", self._driver.cuEventSynchronize(event))

    def drain(self, stream: Any) -> None:
        """Wait for all work on the stream, without raising its errors."""
        self._driver.cuStreamSynchronize(stream)

    def upload(self, ptr: int, array: NDArray[Any], stream: Any) -> None:
        """Put a copy of `array` to the device address `ptr` on the stream."""
        self._checked(
            "an upload",
            self._driver.cuMemcpyHtoDAsync(ptr, array.ctypes.data, array.nbytes, stream),
        )

    def download(self, array: NDArray[np.uint8], ptr: int, stream: Any) -> None:
        """Put a copy from the device address `ptr` to `array` on the stream."""
        self._checked(
            "a download",
            self._driver.cuMemcpyDtoHAsync(array.ctypes.data, ptr, array.nbytes, stream),
        )

    def capture(self, work: Callable[[], None], stream: Any) -> Any:
        """Capture the work that `work` puts on a stream, without executing it.

        Other threads may use CUDA meanwhile, because the capture is thread-local.

        Args:
            work: puts the work on the stream.
            stream: the stream.

        Returns:
            The graph, for `launch`.

        Raises:
            GpuError: the driver cannot capture the work.
        """
        driver = self._driver
        self._checked(
            "a capture",
            driver.cuStreamBeginCapture(
                stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            ),
        )
        try:
            work()
        except BaseException:
            driver.cuStreamEndCapture(stream)
            raise
        graph = self._checked("a capture", driver.cuStreamEndCapture(stream))
        try:
            return self._checked("a graph", driver.cuGraphInstantiate(graph, 0))
        finally:
            driver.cuGraphDestroy(graph)

    def launch(self, graph: Any, stream: Any) -> None:
        """Put a captured graph on the stream."""
        self._checked("a graph", self._driver.cuGraphLaunch(graph, stream))

    def destroy(self, *, graph: Any = None, event: Any = None, stream: Any = None) -> None:
        """Destroy handles without raising errors, because it runs after errors too."""
        if graph is not None:
            self._driver.cuGraphExecDestroy(graph)
        if event is not None:
            self._driver.cuEventDestroy(event)
        if stream is not None:
            self._driver.cuStreamDestroy(stream)

    def close(self) -> None:
        """Release the primary context; a second call does nothing."""
        if self._context is not None:
            self._context = None
            self._driver.cuDevicePrimaryCtxRelease(self._handle)

    def _checked(self, what: str, result: tuple[Any, ...]) -> Any:
        """Check the status of a call and return its values: none, one or several."""
        status, *values = result
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise GpuError(
                f"{self.device}: the driver refused {what} with {status.name}",
                expected="CUDA_SUCCESS",
                remedy=(
                    "run again; if the error stays, look at the GPU's state with `nvidia-smi`, or"
                    " choose another --backend"
                ),
            )
        return values[0] if len(values) == 1 else values


def _bindings() -> Any:
    with importing("cuda-bindings", "cuda-bindings >= 13, < 14", INSTALL):
        from cuda.bindings import driver
    return driver
