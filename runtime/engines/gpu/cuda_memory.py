"""A GPU's memory and page-locked host memory, by PyCUDA's pools or by cuda-core.

See `Source` in `runtime.engines.memory`.

Whichever is used, buffers are page-aligned addresses in the primary context. A buffer is only ever
closed when the stream that used it has passed (`runtime.engines.gpu.base`), which PyCUDA's pools
need: they hand a block on at once.
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
    """The device's memory, page-locked host memory, and who provides them and why.

    PyCUDA where it is installed, since nobody has it by accident: it is an extra of its own and
    compiles for minutes. Else cuda-core, which the GPU extra brings. Raises `MissingComponent` when
    neither can be imported.
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
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(ptr))


class _CudaCore(ABC):
    """What both kinds of cuda-core's memory share.

    Raises MemoryError when the driver has no more.
    """

    kind = ""

    def __init__(self, core: Any, cuda: Cuda):
        self._core, self._cuda = core, cuda
        self.held = self.blocks = 0

    @property
    def free(self) -> int | None:
        return None

    def growth(self, nbytes: int) -> int:
        return nbytes

    def trim(self) -> None:  # noqa: B027  (nothing to do, by default)
        """What came back went back: the driver keeps what it keeps, and gives it to others
        before it refuses them.
        """

    def allocate(self, nbytes: int, *, stream: Stream) -> Buffer:
        with self._cuda.current():
            try:
                block = self._allocate(nbytes)
            except Exception as exc:  # cuda-core raises a class of its own, which is not public
                if "OUT_OF_MEMORY" in str(exc):
                    raise MemoryError(str(exc)) from exc
                raise
            ptr = int(block.handle)
        self.held += nbytes
        self.blocks += 1

        def release() -> None:
            self.held -= nbytes
            with (
                self._cuda.current(),
                suppress(Exception),
            ):  # refused by a device that was lost, whose memory is gone with it
                self._release(block)

        return Buffer(ptr, nbytes, release, self._block(ptr, nbytes))

    @abstractmethod
    def _allocate(self, nbytes: int) -> Any:
        """The library's block of `nbytes` bytes."""

    def _release(self, block: Any) -> None:
        block.close()

    def _block(self, ptr: int, nbytes: int) -> NDArray[np.uint8] | None:
        return None


class CudaCoreDevice(_CudaCore):
    """A pool of the driver's own (cuMemPool), apart from the one that others in this process share.

    Allocation and release are ordered on a stream of this object's; the first is waited for, so
    that every stream may use it.
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
        with self._cuda.current():
            return self._cuda.free()

    def _allocate(self, nbytes: int) -> Any:
        block = self._pool.allocate(nbytes, stream=self._stream)
        self._stream.sync()
        return block

    def _release(self, block: Any) -> None:
        block.close(self._stream)

    def close(self) -> None:
        with self._cuda.current():
            with suppress(Exception):  # as above
                self._stream.sync()
            self._pool.close()
            self._cuda.destroy(stream=self._handle)


class CudaCorePageLocked(_CudaCore):
    """Page-locked host memory by cuMemAllocHost, which every driver has; pools of it came with
    CUDA 12.6 and not for every card.
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
        """Nothing is kept."""


class PyCudaPools:
    """PyCUDA's pools, which know no locks and serve only the thread that made their context: one
    thread makes every call.

    `device` and `page_locked` are the two sources; the thread ends when both are closed.
    """

    def __init__(self, driver: Any, tools: Any, cuda: Cuda):
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
        """What `call` returns, called in the thread.

        Raises MemoryError when the driver has no more.
        """
        try:
            return self._thread.submit(call).result()
        except self._driver.MemoryError as exc:
            raise MemoryError(str(exc)) from exc

    def close(self) -> None:
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
        # its destructor would end the context as if it were not the primary one
        self._context.detach()


class _PyCuda(ABC):
    """What both pools share: the sizes they really take (16 to an octave), and the blocks they
    keep.
    """

    kind = ""

    def __init__(self, pools: PyCudaPools, pool: Any):
        self._pools, self._pool = pools, pool
        self.blocks = 0

    @property
    def held(self) -> int:
        return 0 if self._pool is None else int(self._pools.do(lambda: self._pool.managed_bytes))

    @property
    def free(self) -> int | None:
        return None

    def growth(self, nbytes: int) -> int:
        return int(self._pools.do(lambda: self._pool.alloc_size(self._pool.bin_number(nbytes))))

    def trim(self) -> None:
        if self._pool is not None:
            self._pools.do(self._pool.free_held)

    def allocate(self, nbytes: int, *, stream: Stream) -> Buffer:
        before = self.held
        ptr, release, block = self._pools.do(lambda: self._allocate(nbytes))
        self.blocks += self.held > before
        return Buffer(ptr, nbytes, lambda: self._pools.do(release), block)

    @abstractmethod
    def _allocate(self, nbytes: int) -> tuple[int, Callable[[], None], NDArray[np.uint8] | None]:
        """(address, what gives it back, its bytes where the host can reach them)."""

    def close(self) -> None:
        if self._pool is not None:
            self._pools.do(self._pool.stop_holding)
            self._pool = None
            self._pools.close()


class PyCudaDevice(_PyCuda):
    def __init__(self, pools: PyCudaPools, pool: Any):
        super().__init__(pools, pool)
        self.kind = f"memory of GPU {pools.cuda.device.ordinal}"

    @property
    def free(self) -> int | None:
        with self._pools.cuda.current():
            return self._pools.cuda.free()

    def _allocate(self, nbytes: int) -> tuple[int, Callable[[], None], NDArray[np.uint8] | None]:
        block = self._pool.allocate(nbytes)
        return int(block), block.free, None


class PyCudaPageLocked(_PyCuda):
    kind = "page-locked host memory"

    def _allocate(self, nbytes: int) -> tuple[int, Callable[[], None], NDArray[np.uint8] | None]:
        array = self._pool.allocate((nbytes,), np.uint8)
        return int(array.ctypes.data), array.base.free, array
