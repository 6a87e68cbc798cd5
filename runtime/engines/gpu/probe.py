"""Ask the driver for its NVIDIA GPUs, through ctypes, before TensorRT is imported.

Without a driver or a device, TensorRT's `Runtime` raises nothing. It returns an object that ends
the process with a segmentation fault when it is used or freed (lean 10.16 and 11.4). No exception
handler can catch that, so this check comes first.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass

from ...core.errors import MissingComponent

# the library of the driver, not of the toolkit
LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
DRIVER_REMEDY = (
    "run on a machine with an NVIDIA GPU and its driver (`nvidia-smi` lists it; in Docker: --gpus"
    " all)"
)
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR (cuda.h)


@dataclass(frozen=True)
class Device:
    """One GPU as the driver describes it.

    Attributes:
        ordinal: its number in the driver's order.
        name: its name.
        compute_capability: (major, minor).
        memory: its total memory in bytes.
        driver: the newest CUDA version of the driver, (major, minor).
    """

    ordinal: int
    name: str
    compute_capability: tuple[int, int]
    memory: int
    driver: tuple[int, int]

    def __str__(self) -> str:
        major, minor = self.compute_capability
        return f"{self.name} (compute capability {major}.{minor}, {self.memory / 2**30:.1f} GiB)"


def why_no_gpu(library: str = LIBRARY) -> str | None:
    """Check for a usable NVIDIA GPU without making a CUDA context.

    Args:
        library: the file name of the driver's library.

    Returns:
        None where a GPU can be used, else a phrase with the reason.
    """
    driver = _open(library)
    return driver if isinstance(driver, str) else None


def device(ordinal: int = 0, library: str = LIBRARY) -> Device:
    """Describe a GPU.

    Args:
        ordinal: its number in the driver's order, among those of CUDA_VISIBLE_DEVICES.
        library: the file name of the driver's library.

    Returns:
        The GPU.

    Raises:
        MissingComponent: there is no such GPU, or no driver.
    """
    cuda = _open(library)
    if isinstance(cuda, str):
        raise _absent(cuda)
    count, handle, major, minor, version = (ctypes.c_int() for _ in range(5))
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    _check(cuda, cuda.cuDeviceGetCount(ctypes.byref(count)))
    if not 0 <= ordinal < count.value:
        raise _absent(f"there is no GPU number {ordinal}, the driver lists {count.value}")
    _check(cuda, cuda.cuDeviceGet(ctypes.byref(handle), ordinal))
    _check(cuda, cuda.cuDeviceGetName(name, len(name), handle))
    _check(cuda, cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, handle))
    _check(cuda, cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, handle))
    _check(cuda, cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), handle))
    _check(cuda, cuda.cuDriverGetVersion(ctypes.byref(version)))
    cuda_version = (version.value // 1000, version.value % 1000 // 10)
    return Device(
        ordinal,
        name.value.decode("utf-8", "replace"),
        (major.value, minor.value),
        memory.value,
        cuda_version,
    )


def _open(library: str) -> ctypes.CDLL | str:
    """The initialized driver, or the reason why it cannot be used."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return f"the NVIDIA driver is not installed ({library} cannot be loaded)"
    if code := cuda.cuInit(0):
        return f"the NVIDIA driver answers {_name(cuda, code)}{_visible()}"
    count = ctypes.c_int()
    if code := cuda.cuDeviceGetCount(ctypes.byref(count)):
        return f"the NVIDIA driver answers {_name(cuda, code)}"
    if count.value < 1:
        return f"the NVIDIA driver lists no GPU{_visible()}"
    return cuda


def _visible() -> str:
    """The value of CUDA_VISIBLE_DEVICES for a message, where it is set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"


def _name(cuda: ctypes.CDLL, code: int) -> str:
    """A CUresult as cuda.h names it: `CUDA_ERROR_NO_DEVICE (100)`."""
    text = ctypes.c_char_p()
    cuda.cuGetErrorName(code, ctypes.byref(text))
    return f"{(text.value or b'CUresult').decode()} ({code})"


def _check(cuda: ctypes.CDLL, code: int) -> None:
    """Raise `MissingComponent` unless a CUresult is CUDA_SUCCESS."""
    if code:
        raise _absent(f"the NVIDIA driver answers {_name(cuda, code)}")


def _absent(reason: str) -> MissingComponent:
    return MissingComponent(
        f"no NVIDIA GPU can be used: {reason}",
        expected="an NVIDIA GPU and its driver",
        remedy=DRIVER_REMEDY,
    )
