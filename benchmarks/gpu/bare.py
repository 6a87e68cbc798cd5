"""A TensorRT engine with nothing around it.

The runtime's engine is measured against it, and it checks each of TensorRT's means by itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.core.manifest import Manifest


def ok(result: tuple[Any, ...]) -> Any:
    """The value of a CUDA call.

    Args:
        result: What cuda-bindings returned: an error code and values.

    Returns:
        The first value, or None.

    Raises:
        RuntimeError: CUDA reports an error; the message names it.
    """
    from cuda.bindings import runtime as cuda

    code, *values = result
    if int(code):
        raise RuntimeError(f"CUDA says {ok(cuda.cudaGetErrorName(code)).decode()}")
    return values[0] if values else None


class Bare:
    """One context, one stream, fixed pinned and device buffers for `batch` slices on the canvas.

    Nothing is freed: a bare engine lives in a process of its own.

    Args:
        module: "tensorrt_lean" or "tensorrt".
        plan: The engine's bytes.
        manifest: The model's manifest.
        batch: Slices in a call.
        managed: Activations lie in memory that we allocate (USER_MANAGED).
        captured: Copies and kernels are one CUDA graph.
    """

    def __init__(
        self,
        module: str,
        plan: bytes,
        manifest: Manifest,
        batch: int,
        *,
        managed: bool = False,
        captured: bool = False,
    ):
        from cuda.bindings import runtime as cuda

        trt = import_module(module)
        self._cuda = cuda
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        engine = self._engine = self._runtime.deserialize_cuda_engine(plan)
        require(engine is not None, f"{module} {trt.__version__} does not load the engine")
        strategies = trt.ExecutionContextAllocationStrategy
        strategy = strategies.USER_MANAGED if managed else strategies.STATIC
        context = self._context = engine.create_execution_context(strategy)
        require(context is not None, "no execution context")
        self._stream = ok(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))
        # device, host, bytes, whether to the device
        self._copies: list[tuple[int, int, int, bool]] = []
        self.inputs: dict[str, NDArray[Any]] = {}
        self.output: NDArray[Any] = np.empty(0, np.uint8)
        sizes = {"N": batch, "H": manifest.grid.canvas[0], "W": manifest.grid.canvas[1]}
        for tensor in (*manifest.inputs, manifest.output):
            shape = tuple(sizes[d] if isinstance(d, str) else d for d in tensor.shape)
            into = tensor.name != manifest.output.name
            if into:
                require(
                    context.set_input_shape(tensor.name, shape),
                    f"the engine refuses {shape} for {tensor.name}",
                )
            host, device, view = self._buffers(shape, np.dtype(tensor.dtype))
            require(
                context.set_tensor_address(tensor.name, device),
                f"the engine has no tensor {tensor.name}",
            )
            self._copies.append((device, host, view.nbytes, into))
            if into:
                self.inputs[tensor.name] = view
            else:
                self.output = view
        require(not context.infer_shapes(), "some input has no shape")
        if managed:
            size = context.update_device_memory_size_for_shapes()
            context.set_device_memory(ok(cuda.cudaMalloc(max(size, 256))), size)
        self._graph: Any = None
        self.launch()  # once without capture: TensorRT allocates lazily
        self.wait()
        if captured:
            ok(
                cuda.cudaStreamBeginCapture(
                    self._stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
                )
            )
            self.launch()
            self._graph = ok(
                cuda.cudaGraphInstantiate(ok(cuda.cudaStreamEndCapture(self._stream)), 0)
            )

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
        """Synthesize one batch.

        Args:
            inputs: Arrays of `batch` slices by name.

        Returns:
            uint8 (N, H, W, 2), a copy.
        """
        for name, array in inputs.items():
            self.inputs[name][...] = array
        self.output[...] = 0xAA  # bytes that nothing wrote must not look like a result
        self.launch()
        self.wait()
        return self.output.copy()

    def launch(self) -> None:
        """Queue the copies in, the kernels and the copy out."""
        if self._graph is not None:
            ok(self._cuda.cudaGraphLaunch(self._graph, self._stream))
            return
        kinds = self._cuda.cudaMemcpyKind
        for device, host, size, into in self._copies:
            if into:
                ok(
                    self._cuda.cudaMemcpyAsync(
                        device, host, size, kinds.cudaMemcpyHostToDevice, self._stream
                    )
                )
        require(self._context.execute_async_v3(int(self._stream)), "TensorRT refuses to run")
        for device, host, size, into in self._copies:
            if not into:
                ok(
                    self._cuda.cudaMemcpyAsync(
                        host, device, size, kinds.cudaMemcpyDeviceToHost, self._stream
                    )
                )

    def wait(self) -> None:
        """Wait for all that was queued."""
        ok(self._cuda.cudaStreamSynchronize(self._stream))

    def _buffers(
        self, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> tuple[int, int, NDArray[Any]]:
        """A pinned and a device block, and the pinned one as an array."""
        size = int(np.prod(shape)) * dtype.itemsize
        host, device = (
            int(ok(self._cuda.cudaMallocHost(size))),
            int(ok(self._cuda.cudaMalloc(size))),
        )
        view: NDArray[Any] = (
            np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(host))
            .view(dtype)
            .reshape(shape)
        )
        return host, device, view


def require(condition: Any, fault: str) -> None:
    """Fail unless a condition holds.

    Args:
        condition: Any value.
        fault: The message.

    Raises:
        RuntimeError: The condition is false.
    """
    if not condition:
        raise RuntimeError(fault)
