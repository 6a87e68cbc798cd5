"""The few calls of the CUDA driver that engines need, by cuda-bindings, on the context that
everybody shares.

The device's *primary* context is retained and made current for each stretch of work: PyTorch, ONNX
Runtime and the CUDA runtime inside TensorRT use the same one, so that addresses and streams are
valid in all of them and none ends another's context.
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

    After an illegal access every later call in the process is refused too.
    """


class Cuda:
    """GPU number `ordinal`.

    Everything but `current` and `close` asks for the context to be current: `with cuda.current():
    …`.

    Streams, events and graphs are the driver's handles, opaque to the caller. Raises
    `MissingComponent` when there is no such GPU, before any library of CUDA is touched, and when
    cuda-bindings is missing; `GpuError` when a call fails.
    """

    def __init__(self, ordinal: int = 0):
        self.device = device(ordinal)
        self._driver = _bindings()
        self._context: Any = None
        self._done("the driver", self._driver.cuInit(0))
        self._handle = self._done("the device", self._driver.cuDeviceGet(ordinal))
        self._context = self._done(
            "the primary context", self._driver.cuDevicePrimaryCtxRetain(self._handle)
        )

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current in this thread, and what was current before again afterwards."""
        self._done("the context", self._driver.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent()

    def free(self) -> int:
        """Bytes the device has left, whoever uses the rest."""
        return int(self._done("its memory", self._driver.cuMemGetInfo())[0])

    def stream(self) -> Any:
        """A stream that does not wait for the default one, on which other libraries of this
        process may work.
        """
        return self._done(
            "a stream",
            self._driver.cuStreamCreate(int(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING)),
        )

    def event(self) -> Any:
        """An event whose waiter sleeps instead of burning a core."""
        flags = self._driver.CUevent_flags
        return self._done(
            "an event",
            self._driver.cuEventCreate(
                int(flags.CU_EVENT_BLOCKING_SYNC) | int(flags.CU_EVENT_DISABLE_TIMING)
            ),
        )

    def record(self, event: Any, stream: Any) -> None:
        self._done("an event", self._driver.cuEventRecord(event, stream))

    def follow(self, stream: Any, event: Any) -> None:
        """What is put on `stream` from now on waits, on the device, for what was before `event`
        when it was recorded.
        """
        self._done("an order of streams", self._driver.cuStreamWaitEvent(stream, event, 0))

    def wait(self, event: Any) -> None:
        """Return when what was on the stream at `record` is done. Raises what went wrong in it."""
        self._done("the work", self._driver.cuEventSynchronize(event))

    def drain(self, stream: Any) -> None:
        """Wait for everything on the stream, whatever became of it."""
        self._driver.cuStreamSynchronize(stream)

    def upload(self, ptr: int, array: NDArray[Any], stream: Any) -> None:
        self._done(
            "an upload",
            self._driver.cuMemcpyHtoDAsync(ptr, array.ctypes.data, array.nbytes, stream),
        )

    def download(self, array: NDArray[np.uint8], ptr: int, stream: Any) -> None:
        self._done(
            "a download",
            self._driver.cuMemcpyDtoHAsync(array.ctypes.data, ptr, array.nbytes, stream),
        )

    def capture(self, work: Callable[[], None], stream: Any) -> Any:
        """A graph of what `work` puts on `stream`, which is not done now.

        Other threads may use CUDA meanwhile: capture is thread-local.
        """
        driver = self._driver
        self._done(
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
        graph = self._done("a capture", driver.cuStreamEndCapture(stream))
        try:
            return self._done("a graph", driver.cuGraphInstantiate(graph, 0))
        finally:
            driver.cuGraphDestroy(graph)

    def launch(self, graph: Any, stream: Any) -> None:
        self._done("a graph", self._driver.cuGraphLaunch(graph, stream))

    def destroy(self, *, graph: Any = None, event: Any = None, stream: Any = None) -> None:
        """Give back what is named.

        Raises nothing: it is called where something went wrong already.
        """
        if graph is not None:
            self._driver.cuGraphExecDestroy(graph)
        if event is not None:
            self._driver.cuEventDestroy(event)
        if stream is not None:
            self._driver.cuStreamDestroy(stream)

    def close(self) -> None:
        """Release the primary context, which ends with its last user; twice is harmless."""
        if self._context is not None:
            self._context = None
            self._driver.cuDevicePrimaryCtxRelease(self._handle)

    def _done(self, what: str, result: tuple[Any, ...]) -> Any:
        """What a call returned besides its status: nothing, one value, or several."""
        status, *values = result
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise GpuError(
                f"{self.device}: the driver refused {what} with {status.name}",
                expected="CUDA_SUCCESS",
                remedy=(
                    "run again; if it stays, `nvidia-smi` shows the GPU's state, and another"
                    " --backend does without it"
                ),
            )
        return values[0] if len(values) == 1 else values


def _bindings() -> Any:
    with importing("cuda-bindings", "cuda-bindings >= 13, < 14", INSTALL):
        from cuda.bindings import driver
    return driver
