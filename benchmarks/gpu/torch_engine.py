"""Our slots, streams and pools around a network in torch.

They can be checked with it where neither TensorRT nor ONNX Runtime has a GPU build.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from benchmarks.gpu.bare import require
from benchmarks.gpu.case import BATCH, Absent, Case, need_gpu
from benchmarks.gpu.model import NAME, random_graph
from runtime.core.errors import MissingComponent
from runtime.engines.base import EngineOptions, EngineSpec
from runtime.engines.gpu import base
from runtime.engines.gpu.cuda_driver import Cuda
from runtime.engines.gpu.cuda_memory import open_memory
from runtime.engines.memory import HOST_STREAM, Pool

CAP = 256 << 20  # bytes, device and page-locked each
TYPES = {"uint8": "|u1", "float32": "<f4"}


class Array:
    """A block of device memory that torch takes without a copy (CUDA array interface 3).

    Args:
        ptr: The block's address.
        shape: The array's shape.
        dtype: A key of `TYPES`.
    """

    def __init__(self, ptr: int, shape: tuple[int, ...], dtype: str):
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": TYPES[dtype],
            "data": (ptr, False),
            "strides": None,
            "version": 3,
        }


def torch_engine(case: Case) -> Any:
    """An engine of our protocol that computes the random model's FP16 network in torch.

    It uses our streams and memory.

    Args:
        case: The model.

    Returns:
        The engine.

    Raises:
        Absent: The model has other weights.
    """
    torch = import_module("torch")
    if case.manifest.name != NAME:
        raise Absent("torch has the weights of the random model only")
    from export.graph import to_fp16

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    graph = to_fp16(random_graph()[1]).cuda()

    class TorchEngine(base.GpuEngine):
        def __init__(self) -> None:
            super().__init__(case.manifest, EngineOptions())
            self._open_pools(CAP, CAP)
            self.spec = EngineSpec(case.manifest.inputs, case.manifest.output, BATCH, base.STREAMS)

        def _what(self) -> str:
            return f"torch {torch.__version__}"

        def _slot(self) -> Any:
            return TorchSlot(self)

    class TorchSlot(base.GpuSlot):
        def _bind(self, shapes: dict[str, tuple[int, ...]]) -> None:
            dtypes = {t.name: t.dtype for t in self.owner.tensors}
            self._bound = {
                name: torch.as_tensor(
                    Array(self.buffers[name].ptr, shape, dtypes[name]), device="cuda"
                )
                for name, shape in shapes.items()
            }

        def _unbind(self) -> None:
            self._bound = {}
            super()._unbind()

        def _work(self, inputs: Any, out: Any) -> None:
            self._upload(inputs)
            result = self.owner.spec.output.name
            tensors = {name: tensor for name, tensor in self._bound.items() if name != result}
            with (
                torch.inference_mode(),
                torch.cuda.stream(torch.cuda.ExternalStream(int(self._handle))),
            ):
                self._bound[result].copy_(graph(**tensors))
            self._download(out)

    return TorchEngine()


def loopback(case: Case) -> str:
    """Copies up and down, as one CUDA graph on our stream: the bytes that go in come out.

    Args:
        case: The model and the folder to work in.

    Returns:
        A line about what was seen.

    Raises:
        Absent: A package, a file or the GPU is missing.
        RuntimeError: The check fails.
    """
    need_gpu()
    try:
        cuda = Cuda(0)
        device, host, why = open_memory(cuda)
    except MissingComponent as exc:
        raise Absent(exc.fact) from exc
    rng, size = np.random.default_rng(0), 1 << 20
    with cuda.current():
        stream, pools = cuda.stream(), (Pool(device, CAP), Pool(host, CAP))
        block = pools[0].allocate(size, stream=HOST_STREAM)
        buffers = [pools[1].allocate(size, stream=HOST_STREAM) for _ in range(2)]
        source, target = (buffer.array((size,), "uint8") for buffer in buffers)

        def copies() -> None:
            cuda.upload(block.ptr, source, stream)
            cuda.download(target, block.ptr, stream)

        copies()
        cuda.drain(stream)
        graph = cuda.capture(copies, stream)
        for _ in range(10):
            source[...] = rng.integers(0, 256, size, np.uint8)
            target[...] = 0
            cuda.launch(graph, stream)
            cuda.drain(stream)
            require(np.array_equal(source, target), "other bytes came back")
        cuda.destroy(graph=graph, stream=stream)
        for buffer in (block, *buffers):
            buffer.close()
    still_in_use = [pool.stats.in_use for pool in pools]
    require(still_in_use == [0, 0], f"{still_in_use} bytes are still in use")
    return f"10 launches, {why}"
