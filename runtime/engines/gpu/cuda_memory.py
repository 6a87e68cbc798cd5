"""GPU memory and page-locked host memory, from PyCUDA's pools or from cuda-core.

The classes are sources (`runtime.engines.memory.Source`). With either library buffers are
page-aligned addresses in the primary context. The caller closes a buffer only after the stream that
used it has completed its work (`runtime.engines.gpu.base`). PyCUDA's pools require that, because
they reuse a block at once.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...core.errors import MissingComponent
from ..memory import Buffer, Source, Stream
from .cuda_driver import INSTALL, Cuda

T = TypeVar("T")


def open_memory(cuda: Cuda) -> tuple[Source, Source, str]:
    """Open the memory of a GPU and page-locked host memory.

    PyCUDA is used where it is installed, because nobody has it by accident: it is an extra of its
    own and compiles for minutes. Otherwise cuda-core is used, which the GPU extra installs.

    Args:
        cuda: the CUDA driver on the GPU.

    Returns:
        The device memory, the page-locked memory, and a phrase with the library and the reason.

    Raises:
        MissingComponent: neither library can be imported.
    """
    refused = ""
    if find_spec("pycuda") is not None:
        try:
            from pycuda import driver, tools
        except ImportError as exc:
            refused = f"PyCUDA cannot be imported: {exc}"
        else:
            pools = PyCudaPools(driver, tools, cuda)
            return pools.device, pools.page_locked, "memory by PyCUDA, which is installed"
    try:
        from cuda import core
    except ImportError as exc:
        raise MissingComponent(
            f"no provider of GPU memory can be imported: {refused or 'PyCUDA is not installed'};"
            f" cuda-core: {exc}",
            expected="cuda-core or PyCUDA",
            remedy=INSTALL,
        ) from exc
    reason = refused or "PyCUDA is not installed"
    return (
        CudaCoreDevice(core, cuda),
        CudaCorePageLocked(core, cuda),
        f"memory by cuda-core {core.__version__} ({reason})",
    )


def _view(ptr: int, nbytes: int) -> NDArray[np.uint8]:
    """The bytes at a host address as an array."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(ptr))


class _CudaCore(ABC):
    """Base of both kinds of cuda-core memory; `allocate` raises MemoryError when it is full."""

    kind = ""

    def __init__(self, core: Any, cuda: Cuda):
        self._core, self._cuda = core, cuda
        self.held = self.blocks = 0

    @property
    def free(self) -> int | None:
        """Bytes that the system has left; None by default."""
        return None

    def growth(self, nbytes: int) -> int:
        """Return `nbytes`: this source keeps no blocks."""
        return nbytes

    def trim(self) -> None:  # noqa: B027  (nothing to do, by default)
        """Do nothing: the driver itself frees cached blocks before it refuses a request."""

    def allocate(self, nbytes: int, *, stream: Stream) -> Buffer:
        """Allocate a block of `nbytes` bytes, which any stream may use."""
        with self._cuda.current():
            try:
                block = self._allocate(nbytes)
            except Exception as exc:  # the class that cuda-core raises is not public
                if "OUT_OF_MEMORY" in str(exc):
                    raise MemoryError(str(exc)) from exc
                raise
            ptr = int(block.handle)
        self.held += nbytes
        self.blocks += 1

        def release() -> None:
            self.held -= nbytes
            # a lost device refuses the call, but its memory is gone anyway
            with self._cuda.current(), suppress(Exception):
                self._release(block)

        return Buffer(ptr, nbytes, release, self._block(ptr, nbytes))

    @abstractmethod
    def _allocate(self, nbytes: int) -> Any:
        """Allocate a block of the library."""

    def _release(self, block: Any) -> None:
        block.close()

    def _block(self, ptr: int, nbytes: int) -> NDArray[np.uint8] | None:
        """The bytes of a block where the host can reach them."""
        return None


class CudaCoreDevice(_CudaCore):
    """Device memory from a driver pool (cuMemPool) of its own, apart from the process's default.

    Allocation and release are ordered on a stream of this source. `allocate` waits for that stream,
    so that every other stream may use the block.
    """

    def __init__(self, core: Any, cuda: Cuda):
        super().__init__(core, cuda)
        self.kind = f"memory of GPU {cuda.device.ordinal}"
        with cuda.current():
            core.Device(cuda.device.ordinal).set_current()
            self._handle = cuda.stream()
            self._stream = core.Stream.from_handle(int(self._handle))
            self._pool = core.DeviceMemoryResource(
                cuda.device.ordinal, options=core.DeviceMemoryResourceOptions()
            )

    @property
    def free(self) -> int | None:
        """The free memory of the device in bytes."""
        with self._cuda.current():
            return self._cuda.free()

    def _allocate(self, nbytes: int) -> Any:
        block = self._pool.allocate(nbytes, stream=self._stream)
        self._stream.sync()
        return block

    def _release(self, block: Any) -> None:
        block.close(self._stream)

    def close(self) -> None:
        """Destroy the pool and the stream."""
        with self._cuda.current():
            with suppress(Exception):  # a lost device refuses the call
                self._stream.sync()
            self._pool.close()
            self._cuda.destroy(stream=self._handle)


class CudaCorePageLocked(_CudaCore):
    """Page-locked host memory by cuMemAllocHost, which every driver has.

    Pools of page-locked memory came with CUDA 12.6, and not for every card.
    """

    kind = "page-locked host memory"

    def __init__(self, core: Any, cuda: Cuda):
        super().__init__(core, cuda)
        self._resource = core.LegacyPinnedMemoryResource()

    def _allocate(self, nbytes: int) -> Any:
        return self._resource.allocate(nbytes)

    def _block(self, ptr: int, nbytes: int) -> NDArray[np.uint8] | None:
        return _view(ptr, nbytes)

    def close(self) -> None:
        """Do nothing: this source keeps no blocks."""


class PyCudaPools:
    """PyCUDA's pools behind one thread, which makes all calls.

    The pools have no locks and serve only the thread that made their context. The thread ends when
    both sources are closed.

    Attributes:
        device: the memory of the GPU.
        page_locked: the page-locked host memory.
    """

    def __init__(self, driver: Any, tools: Any, cuda: Cuda):
        """Start the thread and make both pools.

        Args:
            driver: the module pycuda.driver.
            tools: the module pycuda.tools.
            cuda: the CUDA driver on the GPU.
        """
        self._driver, self.cuda = driver, cuda
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mask2ct PyCUDA")
        self._open = 2
        try:
            self.do(self._start)
            self.device = PyCudaDevice(self, self.do(tools.DeviceMemoryPool))
            self.page_locked = PyCudaPageLocked(
                self, self.do(lambda: tools.PageLockedMemoryPool(tools.PageLockedAllocator()))
            )
        except BaseException:
            self._thread.shutdown()
            raise

    def do(self, call: Callable[[], T]) -> T:
        """Run `call` in the thread and return its result.

        Raises:
            MemoryError: the driver has no more memory.
        """
        try:
            return self._thread.submit(call).result()
        except self._driver.MemoryError as exc:
            raise MemoryError(str(exc)) from exc

    def close(self) -> None:
        """Count one source as closed, and end the thread with the last one."""
        self._open -= 1
        if not self._open:
            self.do(self._stop)
            self._thread.shutdown()

    def _start(self) -> None:
        self._driver.init()
        self._context = self._driver.Device(self.cuda.device.ordinal).retain_primary_context()
        self._context.push()

    def _stop(self) -> None:
        self._driver.Context.pop()
        # without this the destructor would destroy the context, although it is the primary one
        self._context.detach()


class _PyCuda(ABC):
    """Base of both kinds of PyCUDA memory; its pools round sizes up, in 16 steps per octave."""

    kind = ""

    def __init__(self, pools: PyCudaPools, pool: Any):
        self._pools, self._pool = pools, pool
        self.blocks = 0

    @property
    def held(self) -> int:
        """Bytes allocated from the system, free blocks included."""
        return 0 if self._pool is None else int(self._pools.do(lambda: self._pool.managed_bytes))

    @property
    def free(self) -> int | None:
        """Bytes that the system has left; None by default."""
        return None

    def growth(self, nbytes: int) -> int:
        """Return the size of the block that the pool would allocate, in bytes."""
        return int(self._pools.do(lambda: self._pool.alloc_size(self._pool.bin_number(nbytes))))

    def trim(self) -> None:
        """Return the free blocks to the system."""
        if self._pool is not None:
            self._pools.do(self._pool.free_held)

    def allocate(self, nbytes: int, *, stream: Stream) -> Buffer:
        """Allocate a block of `nbytes` bytes, or reuse a free one."""
        before = self.held
        ptr, release, block = self._pools.do(lambda: self._allocate(nbytes))
        self.blocks += self.held > before
        return Buffer(ptr, nbytes, lambda: self._pools.do(release), block)

    @abstractmethod
    def _allocate(self, nbytes: int) -> tuple[int, Callable[[], None], NDArray[np.uint8] | None]:
        """The address, the function that frees it, and the bytes where the host can reach them."""

    def close(self) -> None:
        """Return all memory; a second call does nothing."""
        if self._pool is not None:
            self._pools.do(self._pool.stop_holding)
            self._pool = None
            self._pools.close()


class PyCudaDevice(_PyCuda):
    """The memory of a GPU from a PyCUDA pool."""

    def __init__(self, pools: PyCudaPools, pool: Any):
        super().__init__(pools, pool)
        self.kind = f"memory of GPU {pools.cuda.device.ordinal}"

    @property
    def free(self) -> int | None:
        """The free memory of the device in bytes."""
        with self._pools.cuda.current():
            return self._pools.cuda.free()

    def _allocate(self, nbytes: int) -> tuple[int, Callable[[], None], NDArray[np.uint8] | None]:
        block = self._pool.allocate(nbytes)
        return int(block), block.free, None


class PyCudaPageLocked(_PyCuda):
    """Page-locked host memory from a PyCUDA pool."""

    kind = "page-locked host memory"

    def _allocate(self, nbytes: int) -> tuple[int, Callable[[], None], NDArray[np.uint8] | None]:
        array = self._pool.allocate((nbytes,), np.uint8)
        return int(array.ctypes.data), array.base.free, array
