"""A stand-in for TensorRT's builder: the real names and signatures, refusals on demand, and no GPU.

It is strict where the real one crashes, logs or silently does the wrong thing: types are checked as
pybind11 checks them, order and lifetimes as NVIDIA's documentation asks.
tests/test_tensorrt_contract.py holds its names and signatures against the real ones.
"""

from __future__ import annotations

import enum
import json
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import onnx

OPERATIONS = {"Conv": "CONVOLUTION", "ConvTranspose": "DECONVOLUTION", "Cast": "CAST"}
TYPES = {
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "HALF",
    onnx.TensorProto.UINT8: "UINT8",
}


@dataclass
class Script:
    """What the stand-in does, and `log`, what was asked of it, in order."""

    version: str = "11.4.0.106"
    refuses_profile: bool = False
    cache_of: str = "this GPU"  # a cache that says another is a mismatch
    builds: bool = True
    errors: tuple[str, ...] = ()  # what the logger is told while building
    forgets_half: str = ""  # "network" or "engine": which of them turns out FP32
    loads: bool = True
    log: list[str] = field(default_factory=list)


def tensorrt(script: Script) -> Any:
    """A module that behaves as `script` says."""

    class Enum(enum.Enum):
        def __int__(self) -> int:  # pybind11's enums are no integers, and become one
            return int(self.value)

    def members(name: str, text: str, start: int = 0) -> Any:
        return Enum(
            name, {member: start + n for n, member in enumerate(text.split())}, module=__name__
        )

    def require(thing: Any, kind: Any, what: str) -> None:
        if not isinstance(thing, kind):  # as pybind11 says it
            raise TypeError(f"{what}: incompatible function arguments, got {type(thing).__name__}")

    NetworkDefinitionCreationFlag = members(
        "NetworkDefinitionCreationFlag",
        "STRONGLY_TYPED",
        1 if script.version.startswith("10.") else 0,
    )
    BuilderFlag = members("BuilderFlag", "TF32 VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME", 6)
    HardwareCompatibilityLevel = members(
        "HardwareCompatibilityLevel", "NONE AMPERE_PLUS SAME_COMPUTE_CAPABILITY"
    )
    MemoryPoolType = members("MemoryPoolType", "WORKSPACE")
    ProfilingVerbosity = members("ProfilingVerbosity", "LAYER_NAMES_ONLY NONE DETAILED")
    LayerInformationFormat = members("LayerInformationFormat", "ONELINE JSON")
    LayerType = members("LayerType", "CONVOLUTION DECONVOLUTION CAST ELEMENTWISE")
    DataType = members("DataType", "FLOAT HALF UINT8")

    class ILogger:
        Severity = members("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")

        def __init__(self) -> None:
            self.ready = True

        def log(self, severity: Any, msg: str) -> None:
            raise NotImplementedError

    class IProgressMonitor:
        def __init__(self) -> None:
            self.ready = True

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None: ...
        def phase_finish(self, phase_name: str) -> None: ...
        def step_complete(self, phase_name: str, step: int) -> bool: ...

    class IHostMemory(bytes):
        @property
        def nbytes(self) -> int:
            return len(self)

    class ITensor:
        def __init__(self, name: str, dtype: str, shape: tuple[int, ...] = ()) -> None:
            self.name, self.dtype, self.shape = name, DataType[dtype], shape

    class ILayer:
        def __init__(self, name: str, operation: str, dtype: str) -> None:
            self.name, self.type, self.num_outputs, self._dtype = (
                name,
                LayerType[operation],
                1,
                dtype,
            )

        def get_output(self, index: int) -> Any:
            return ITensor(f"{self.name}_output", self._dtype)

    class INetworkDefinition:
        def __init__(self) -> None:
            self.inputs: list[Any] = []
            self.layers: list[Any] = []

        @property
        def num_inputs(self) -> int:
            return len(self.inputs)

        @property
        def num_layers(self) -> int:
            return len(self.layers)

        def get_input(self, index: int) -> Any:
            return self.inputs[index]

        def get_layer(self, index: int) -> Any:
            return self.layers[index]

    class OnnxParser:
        def __init__(self, network: Any, logger: Any) -> None:
            require(network, INetworkDefinition, "OnnxParser")
            require(logger, ILogger, "OnnxParser")
            self._network = network

        @property
        def num_errors(self) -> int:
            return 0

        def parse_from_file(self, model: str) -> bool:
            require(model, str, "parse_from_file")
            script.log.append("parse")
            graph = onnx.load(model).graph
            weights = {
                tensor.name: TYPES[tensor.data_type]
                for tensor in graph.initializer
                if tensor.data_type in TYPES
            }
            for tensor in graph.input:
                sizes = [
                    d.dim_value if d.HasField("dim_value") else -1
                    for d in tensor.type.tensor_type.shape.dim
                ]
                self._network.inputs.append(
                    ITensor(tensor.name, TYPES[tensor.type.tensor_type.elem_type], tuple(sizes))
                )
            for node in graph.node:
                dtype = next((weights[name] for name in node.input if name in weights), "FLOAT")
                dtype = "FLOAT" if script.forgets_half == "network" else dtype
                self._network.layers.append(
                    ILayer(node.name, OPERATIONS.get(node.op_type, "ELEMENTWISE"), dtype)
                )
            return True

    class IOptimizationProfile:
        def __init__(self) -> None:
            self.shapes: dict[str, Any] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            if not len(min) == len(opt) == len(max) or any(
                not a <= b <= c for a, b, c in zip(min, opt, max, strict=True)
            ):
                raise ValueError("Shape provided for min is inconsistent with other shapes.")
            self.shapes[input] = (tuple(min), tuple(opt), tuple(max))
            script.log.append(f"shape {input} {tuple(min)} {tuple(opt)} {tuple(max)}")

    class ITimingCache:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def serialize(self) -> Any:
            return IHostMemory(b"timings of this GPU")

    class IBuilderConfig:
        def __init__(self) -> None:
            self.flags = {BuilderFlag.TF32}
            self.profiles: list[Any] = []
            self.cache: Any = None
            self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
            self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE
            self._monitor: Any = None

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            require(pool, MemoryPoolType, "set_memory_pool_limit")
            require(pool_size, int, "set_memory_pool_limit")
            script.log.append(f"{pool.name} {pool_size}")

        def set_flag(self, flag: Any) -> None:
            require(flag, BuilderFlag, "set_flag")
            self.flags.add(flag)

        def clear_flag(self, flag: Any) -> None:
            require(flag, BuilderFlag, "clear_flag")
            self.flags.discard(flag)

        def add_optimization_profile(self, profile: Any) -> int:
            require(profile, IOptimizationProfile, "add_optimization_profile")
            if script.refuses_profile:
                return -1
            self.profiles.append(profile)
            return len(self.profiles) - 1

        def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
            content = bytes(memoryview(serialized_timing_cache))
            return (
                None
                if content and not content.startswith(b"timings of ")
                else ITimingCache(content)
            )

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            require(cache, ITimingCache, "set_timing_cache")
            if cache.content and cache.content != f"timings of {script.cache_of}".encode():
                return False
            self.cache = weakref.ref(
                cache
            )  # "The cache must not be destroyed until after the engine is built."
            script.log.append(f"timing cache of {len(cache.content)} bytes")
            return True

        @property
        def progress_monitor(self) -> Any:
            return self._monitor() if self._monitor else None

        @progress_monitor.setter
        def progress_monitor(self, monitor: Any) -> None:
            require(monitor, IProgressMonitor, "progress_monitor")
            self._monitor = weakref.ref(monitor)

    class Builder:
        def __init__(self, logger: Any) -> None:
            require(logger, ILogger, "Builder")
            assert logger.ready, "a subclass that skips ILogger.__init__ is refused by pybind11"
            self._logger = logger

        def create_network(self, flags: int = 0) -> Any:
            require(flags, int, "create_network")
            assert flags == 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED), (
                "not strongly typed: TensorRT chooses the types"
            )
            return INetworkDefinition()

        def create_builder_config(self) -> Any:
            return IBuilderConfig()

        def create_optimization_profile(self) -> Any:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            require(network, INetworkDefinition, "build_serialized_network")
            require(config, IBuilderConfig, "build_serialized_network")
            assert network.layers, "built before it was parsed"
            assert {t.name for t in network.inputs} <= set(config.profiles[0].shapes), (
                "a dynamic input without a profile"
            )
            lean = {BuilderFlag.VERSION_COMPATIBLE, BuilderFlag.EXCLUDE_LEAN_RUNTIME} & config.flags
            assert len(lean) != 1, (
                "one of the two: host code inside the plan, or a flag without effect"
            )
            assert config.cache is None or config.cache() is not None, (
                "the timing cache was destroyed before the build"
            )
            level = config.hardware_compatibility_level
            script.log.append(
                "build "
                + " ".join(
                    [
                        *sorted(flag.name for flag in config.flags),
                        level.name,
                        config.profiling_verbosity.name,
                    ]
                )
            )
            for text in script.errors:
                self._logger.log(ILogger.Severity.ERROR, text)
            self._logger.log(ILogger.Severity.WARNING, "a warning that is no error")
            if not _steps(config.progress_monitor) or not script.builds:
                return None
            layers = [
                {"name": x.name, "type": x.type.name, "dtype": x.get_output(0).dtype.name}
                for x in network.layers
            ]
            return IHostMemory(
                json.dumps(
                    {"lean": bool(lean), "layers": layers, "shapes": config.profiles[0].shapes}
                ).encode()
            )

    def _steps(monitor: Any) -> bool:
        """Two phases, one within the other; the outer one leaves its last step out.

        False: the build was stopped.
        """
        if monitor is None:
            return True
        monitor.phase_start("Building Engine", None, 3)
        monitor.phase_start("Tactics", "Building Engine", 2)
        going = monitor.step_complete("Tactics", 0) and monitor.step_complete("Tactics", 1)
        monitor.phase_finish("Tactics")
        going = (
            going
            and monitor.step_complete("Building Engine", 0)
            and monitor.step_complete("Building Engine", 1)
        )
        monitor.phase_finish("Building Engine")
        return going

    class Runtime:
        def __init__(self, logger: Any) -> None:
            require(logger, ILogger, "Runtime")
            self._lean = False

        def load_runtime(self, path: str) -> Any:
            require(path, str, "load_runtime")
            loaded = Runtime(ILogger())
            loaded._lean = True
            return loaded

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            data = json.loads(bytes(memoryview(serialized_engine)))
            assert data["lean"] == self._lean, (
                "a version-compatible plan loads through the lean runtime, a native one through the"
                " full"
            )
            return ICudaEngine(data) if script.loads else None

    class ICudaEngine:
        def __init__(self, data: Any) -> None:
            self.data, self.num_optimization_profiles = data, 1

        def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
            return 4096 + profile_index

        def create_engine_inspector(self) -> Any:
            return EngineInspector(self.data)

        def create_execution_context(self) -> Any:
            return IExecutionContext(self.data)

    class IExecutionContext:
        def __init__(self, data: Any) -> None:
            self.data, self.set = data, set()

        def set_input_shape(self, name: str, shape: Any) -> bool:
            smallest, _, largest = self.data["shapes"][name]
            fits = all(a <= n <= b for a, n, b in zip(smallest, shape, largest, strict=True))
            self.set.add(name if fits else "")
            return fits

    class EngineInspector:
        def __init__(self, data: Any) -> None:
            self._data, self.execution_context = data, None

        def get_engine_information(self, format: Any) -> str:
            require(format, LayerInformationFormat, "get_engine_information")
            known = self.execution_context is not None and self.execution_context.set == set(
                self._data["shapes"]
            )
            words = {
                "HALF": "Half" if script.forgets_half != "engine" else "Float",
                "FLOAT": "Float",
            }
            rows = [
                {
                    "Name": row["name"],
                    "LayerType": row["type"],
                    "Outputs": [
                        {"Format/Datatype": words.get(row["dtype"], "UInt8") if known else "N/A"}
                    ],
                }
                for row in self._data["layers"]
            ]
            return json.dumps({"Layers": rows, "Bindings": sorted(self._data["shapes"])})

    public = {
        name: thing
        for name, thing in locals().items()
        if isinstance(thing, type) and name != "Enum"
    }
    return SimpleNamespace(__version__=script.version, **public)
