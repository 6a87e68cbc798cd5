"""The GPU engine of TensorRT for RTX: one file for many GPUs, compiled on the GPU when opened.

It builds without a GPU (`export.to_tensorrt`) and has the interface of TensorRT, so this module
holds only what differs: which GPUs it runs on, and the kernels that it compiles when it is opened.
Nothing of it has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ...core.atomic_files import key_of
from ...core.errors import ModelError
from ...core.manifest import Manifest
from ..base import EngineOptions
from .jit_cache import JitCache
from .probe import device
from .tensorrt import Library, TensorRTEngine, accepted

RTX = Library(
    "TensorRT for RTX",
    ("tensorrt_rtx", "tensorrt_rtx_bindings"),
    ((1, 7), (2, 0)),
    'pip install "mask2ct[rtx]"',
)
# Ampere, Ada, Blackwell. Its builder knows Turing (7.5) too, but multiplies no FP32 matrices there,
# which a style needs. Data centre GPUs (9.0, 10.0, 10.3) and Jetson (8.7, 11.0) are TensorRT's own.
COMPUTE_CAPABILITIES = ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1))


def written(capability: tuple[int, int]) -> str:
    """A compute capability as NVIDIA writes it: "8.9".

    Args:
        capability: (major, minor).
    """
    return f"{capability[0]}.{capability[1]}"


def why_absent() -> tuple[str, str] | None:
    """Return why TensorRT for RTX cannot run on this machine's GPU and the remedy; None if it can.

    The caller has seen that there is a GPU.
    """
    if absent := RTX.why_absent():
        return absent
    gpu = device()
    if gpu.compute_capability in COMPUTE_CAPABILITIES:
        return None
    return f"TensorRT for RTX does not run on {gpu}", 'pip install "mask2ct[gpu]"'


def why_unfit(facts: Mapping[str, Any], ordinal: int = 0) -> str | None:
    """Return why a GPU of this machine does not run an engine file; None where it does.

    Args:
        facts: what the manifest says of the file.
        ordinal: the GPU's number in the driver's order.
    """
    capability = written(device(ordinal).compute_capability)
    stated = facts.get("compute_capabilities")
    if isinstance(stated, list) and capability in stated:
        return None
    return f"the engine was built for other GPUs than compute capability {capability}"


class TensorRTRtxEngine(TensorRTEngine):
    """Runs an engine file of TensorRT for RTX.

    Kernels are compiled for each shape when it is first seen, and before its first batch runs:
    with kernels that take over later, one volume would get the values of two kernels.
    """

    library: ClassVar[Library] = RTX

    def __init__(self, path: Path, manifest: Manifest, options: EngineOptions | None = None):
        """Load an engine file.

        Args:
            path: the engine file, whose SHA-256 the caller has checked.
            manifest: the manifest of the model.
            options: the options of the engine.

        Raises:
            MissingComponent: there is no GPU or no runtime.
            ModelError: the file is not for this GPU, or contradicts the manifest.
            MemoryCapExceeded: the engine does not fit into `max_memory`.
        """
        self._file = manifest.files[path.name]
        self._config: Any = None
        self._kernels: Any = None
        if why := why_unfit(self._file.facts, (options or EngineOptions()).device):
            raise ModelError(
                f"{path.name} does not run on this GPU: {why}",
                expected="an engine for this GPU",
                remedy="build the engine again, or name --backend onnx-cuda",
                file=path,
            )
        super().__init__(path, manifest, options)

    def _check(self, path: Path) -> None:
        super()._check(path)
        trt = self._trt
        gpu = str(self.cuda.device)
        self._jit = JitCache(
            key_of({"engine": self._file.sha256, "library": trt.__version__, "gpu": gpu})
        )
        runtime_config = self.engine.create_runtime_config()
        runtime_config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        runtime_config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        # a cache of another driver is refused by the library, and then grows anew
        runtime_cache = runtime_config.create_runtime_cache()
        content = self._jit.read()
        if content and not runtime_cache.deserialize(content):
            self._jit.note = "JIT cache new (the kept one is of another driver)"
        accepted(runtime_config.set_runtime_cache(runtime_cache), "a cache of kernels")
        self._config, self._kernels = runtime_config, runtime_cache

    def context(self) -> Any:
        """Make an execution context without activation memory.

        Raises:
            EngineError: TensorRT for RTX refuses it.
        """
        context = self.engine.create_execution_context(self._config)
        accepted(context is not None, "an execution context")
        return context

    def _what(self) -> str:
        return f"{super()._what()}, {self._jit.note}"

    def _release(self) -> None:
        if self._kernels is not None:
            content = self._kernels.serialize()
            self._jit.write(b"" if content is None else bytes(memoryview(content)))
        self._config = self._kernels = None
        super()._release()
