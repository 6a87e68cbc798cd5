"""TensorRT and onnxruntime-gpu on the fake device.

Networks are computed on the CPU, slice by slice, as the CPU engine does.
"""

from __future__ import annotations

import json
import math
from enum import IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as real
from fake_world import Refused, World, new_module

from runtime.core.manifest import Manifest

MAGIC = b"fake plan\n"
ACTIVATION = 40  # bytes of activations for a pixel of a slice


def tensorrt_module(
    world: World, name: str = "tensorrt_lean", version: str = "11.4.0.106"
) -> ModuleType:
    made = new_module(name)
    made.__version__ = version
    made.DataType = IntEnum("DataType", ["FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8"])
    made.TensorIOMode = IntEnum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
    made.ExecutionContextAllocationStrategy = IntEnum(
        "ExecutionContextAllocationStrategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"]
    )

    made.DynamicShapesKernelSpecializationStrategy = IntEnum(
        "DynamicShapesKernelSpecializationStrategy", ["LAZY", "EAGER", "NONE"]
    )

    class IRuntimeCache:
        """The kernels of TensorRT for RTX."""

        def deserialize(self, blob: bytes) -> bool:
            world.need_context()
            return bytes(blob) == world.kernels

        def serialize(self) -> bytes:
            world.need_context()
            return world.kernels

    class IRuntimeConfig:
        def __init__(self) -> None:
            self.strategy = made.ExecutionContextAllocationStrategy.STATIC
            self.dynamic_shapes_kernel_specialization_strategy = (
                made.DynamicShapesKernelSpecializationStrategy.LAZY
            )
            self.cache: IRuntimeCache | None = None

        def set_execution_context_allocation_strategy(self, strategy: int) -> None:
            self.strategy = strategy

        def create_runtime_cache(self) -> IRuntimeCache:
            return IRuntimeCache()

        def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
            self.cache = cache
            return not said_no("set_runtime_cache")

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
            if said_no("set_input_shape") or not all(
                a <= n <= b for a, n, b in zip(low, shape, high, strict=True)
            ):
                return False
            self._shapes[name] = tuple(shape)
            return True

        def infer_shapes(self) -> list[str]:
            return [
                n
                for n, mode in self._engine.modes.items()
                if mode == made.TensorIOMode.INPUT and n not in self._shapes
            ]

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
            ready = (
                not self.infer_shapes()
                and set(self._addresses) == set(self._engine.modes)
                and self._size >= needed
            )
            capturing = stream_handle in world.captures
            if (
                said_no("execute_async_v3")
                or not ready
                or (capturing and self._warm != self._shapes)
            ):
                return False
            shapes, addresses, memory = (
                {n: self.get_tensor_shape(n) for n in self._engine.modes},
                dict(self._addresses),
                self._memory,
            )

            def work() -> None:
                world.at(memory, needed)[...] = 0xEE
                inputs = {}
                for name in shapes:
                    if name != "ct":
                        kind = np.float32 if name == "style" else np.uint8
                        raw = world.at(
                            addresses[name], math.prod(shapes[name]) * np.dtype(kind).itemsize
                        )
                        inputs[name] = raw.view(kind).reshape(shapes[name])
                world.at(addresses["ct"], math.prod(shapes["ct"]))[...] = compute(
                    self._engine.session, inputs
                ).ravel()

            try:
                world.enqueue(stream_handle, work, [(memory, needed)])
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
            self.modes = {i.name: made.TensorIOMode.INPUT for i in self.session.get_inputs()} | {
                "ct": made.TensorIOMode.OUTPUT
            }

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

        def create_runtime_config(self) -> IRuntimeConfig:
            return IRuntimeConfig()

        def create_execution_context(self, strategy: Any) -> Context | None:
            if isinstance(strategy, IRuntimeConfig):
                eager = made.DynamicShapesKernelSpecializationStrategy.EAGER
                assert strategy.dynamic_shapes_kernel_specialization_strategy == eager, (
                    "kernels that take over later give one volume the values of two"
                )
                assert strategy.cache is not None
                strategy = strategy.strategy
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
    known = {
        "device_id",
        "gpu_mem_limit",
        "arena_extend_strategy",
        "cudnn_conv_algo_search",
        "use_tf32",
    }

    class Binding:
        def __init__(self) -> None:
            self.tensors: dict[str, tuple[tuple[int, ...], Any, int]] = {}

        def bind_input(
            self,
            name: str,
            device_type: str,
            device_id: int,
            element_type: Any,
            shape: Any,
            buffer_ptr: int,
        ) -> None:
            assert device_type == "cuda"
            self.tensors[name] = (tuple(shape), element_type, buffer_ptr)

        def bind_output(
            self,
            name: str,
            device_type: str,
            device_id: int,
            element_type: Any,
            shape: Any,
            buffer_ptr: int,
        ) -> None:
            self.bind_input(name, device_type, device_id, element_type, shape, buffer_ptr)

    class InferenceSession:
        def __init__(self, path_or_bytes: str, sess_options: Any = None, providers: Any = None):
            ((name, options),) = providers
            assert (
                name == "CUDAExecutionProvider"
                and set(options) <= known
                and all(isinstance(v, str) for v in options.values())
            )
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
                raise RuntimeError(
                    f"BFCArena: Available memory of {self._limit} is smaller than requested bytes"
                    f" of {needed}"
                )
            try:
                world.count("run_with_iobinding")
            except Refused as exc:
                raise RuntimeError(f"CUDNN failure: {exc}") from exc
            inputs = {
                n: world.at(p, math.prod(s) * np.dtype(t).itemsize).view(t).reshape(s)
                for n, (s, t, p) in tensors.items()
            }
            result = compute(self._session, inputs)
            with world.lock:
                world.at(out, math.prod(shape))[...] = result.ravel()

    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def session(path_or_bytes: Any, sess_options: Any = None, providers: Any = None) -> Any:
        made = real.InferenceSession if providers == ["CPUExecutionProvider"] else InferenceSession
        return made(path_or_bytes, sess_options, providers=providers)

    return SimpleNamespace(
        InferenceSession=session,
        SessionOptions=real.SessionOptions,
        __version__=real.__version__,
        get_available_providers=lambda: providers,
        __spec__=ModuleSpec("onnxruntime", None),
    )


def session_of(graph: bytes) -> Any:
    return real.InferenceSession(graph, providers=["CPUExecutionProvider"])


def compute(session: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The graph on each slice alone, as the CPU engine runs it."""
    return np.concatenate(
        [
            session.run(["ct"], {name: array[n : n + 1] for name, array in inputs.items()})[0]
            for n in range(len(inputs["labels"]))
        ]
    )


def plan_of(graph: bytes, manifest: Manifest, batch: int = 4) -> bytes:
    """An engine file of the fake: its profile takes 1 to `batch` slices on the canvas, to twice
    its height and width.
    """
    h, w = manifest.grid.canvas
    sizes = [(1, h, w), (batch, h, w), (2 * batch, 2 * h, 2 * w)]
    profile = {
        t.name: [[{"N": n, "H": y, "W": x}.get(str(d), d) for d in t.shape] for n, y, x in sizes]
        for t in manifest.inputs
    }
    return MAGIC + json.dumps({"profile": profile}).encode() + b"\n" + graph
