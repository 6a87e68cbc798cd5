"""Our TensorRT code against the real bindings of three versions, and against the real lean
runtime, without a GPU.
"""

from __future__ import annotations

import enum
import inspect
from pathlib import Path

import pytest
from bindings import VERSIONS, Api, folder, libraries, problems, python, read_api, touched
from fake_tensorrt import Script, tensorrt

from export.to_tensorrt import HARDWARE
from runtime.engines.gpu.probe import why_no_gpu
from runtime.engines.gpu.tensorrt_rtx import COMPUTE_CAPABILITIES

BUILDER_FILES = ("export/to_tensorrt.py", "export/precision_audit.py", "benchmarks/gpu/parts.py")
RUNTIME_FILES = ("runtime/engines/gpu/tensorrt.py", "benchmarks/gpu/bare.py")
RTX_FILES = (
    "export/to_tensorrt.py",
    "export/rtx_target.py",
    "runtime/engines/gpu/tensorrt.py",
    "runtime/engines/gpu/tensorrt_rtx.py",
)


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory):
    """The API of a version, read once."""
    where, known = tmp_path_factory.mktemp("libraries"), {}

    def api(version: str) -> Api:
        path = folder(version)
        if version not in known:
            alone = {"lean": "tensorrt_lean_bindings", "rtx": "tensorrt_rtx_bindings"}
            known[version] = (
                read_api(alone[version], path)
                if version in alone
                else read_api("tensorrt_bindings", path, libraries(version.split(".")[0], where))
            )
        return known[version]

    return api


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", BUILDER_FILES)
def test_tensorrt_names_of_builder_exist(version: str, file: str, root: Path, read) -> None:
    api = read(version)
    assert api.version == version
    assert problems((root / file).read_text(), api) == []
    assert all(f"HardwareCompatibilityLevel.{level}" in api.names for level in HARDWARE.values())


@pytest.mark.parametrize("version", [*VERSIONS, "lean"])
@pytest.mark.parametrize("file", RUNTIME_FILES)
def test_tensorrt_names_of_runtime_exist(version: str, file: str, root: Path, read) -> None:
    """The same file runs on the lean runtime and on the full one."""
    if not (root / file).is_file():
        pytest.skip(f"{file} is not written yet")
    beside = root / "runtime/engines/gpu/base.py"
    assert (
        problems(
            (root / file).read_text(), read(version), beside.read_text() if beside.is_file() else ""
        )
        == []
    )


@pytest.mark.parametrize("file", RTX_FILES)
def test_names_exist_in_tensorrt_for_rtx(file: str, root: Path, read) -> None:
    """TensorRT for RTX has every name that builds an engine and runs one."""
    beside = [root / f"runtime/engines/gpu/{name}.py" for name in ("base", "tensorrt")]
    text = "\n".join(path.read_text() for path in beside)
    api = read("rtx")
    assert problems((root / file).read_text(), api, text) == []
    for major, minor in COMPUTE_CAPABILITIES:
        assert f"ComputeCapability.SM{major}{minor}" in api.names


def test_tensorrt_walk_lists_known_traps(root: Path) -> None:
    """Blindness would pass every test above: what FACTS name as traps has to be among what is
    found.
    """
    paths = {
        touch.path
        for file in (*BUILDER_FILES, *RUNTIME_FILES, *RTX_FILES)
        for touch in touched((root / file).read_text())
    }
    assert paths >= {
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "Builder.create_network",
        "OnnxParser.parse_from_file",
        "OnnxParser.num_errors",
        "ParserError.node_operator",
        "IBuilderConfig.set_memory_pool_limit",
        "IBuilderConfig.hardware_compatibility_level",
        "BuilderFlag.VERSION_COMPATIBLE",
        "BuilderFlag.EXCLUDE_LEAN_RUNTIME",
        "BuilderFlag.TF32",
        "IOptimizationProfile.set_shape",
        "IBuilderConfig.add_optimization_profile",
        "IBuilderConfig.set_timing_cache",
        "Builder.build_serialized_network",
        "IProgressMonitor.step_complete",
        "ILogger.log",
        "ILogger.Severity.ERROR",
        "ITensor.dtype",
        "ILayer.type",
        "ICudaEngine.get_device_memory_size_for_profile_v2",
        "EngineInspector.execution_context",
        "Runtime.load_runtime",
        "IBuilderConfig.set_compute_capability",
        "IRuntimeConfig.create_runtime_cache",
        "IRuntimeConfig.set_execution_context_allocation_strategy",
        "IRuntimeCache.deserialize",
    }


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("config.set_flag(trt.BuilderFlag.FP16)", "BuilderFlag.FP16 is not in"),
        ("builder.platform_has_fast_fp16", "Builder.platform_has_fast_fp16 is not in"),
        ("engine.device_memory_size", "ICudaEngine.device_memory_size is not in"),
        (
            "config.set_timing_cache(cache, ignore_missmatch=True)",
            "IBuilderConfig.set_timing_cache takes",
        ),
        (
            "trt.OnnxParser(network)(1, 2, 3, 4)\ntrt.OnnxParser(network, logger, 3)",
            "OnnxParser takes",
        ),
        ("engine.num_layers = 3", "ICudaEngine.num_layers cannot be set"),
        ("something.set_input_shape('labels', (1, 2))", "not in ROLES"),
        (
            "class Monitor(trt.IProgressMonitor):\n    def step_complete(self, name, step): ...",
            "overrides",
        ),
    ],
)
def test_tensorrt_misspelt_name_is_detected(line: str, fault: str, read) -> None:
    (found,) = problems(line, read(VERSIONS[-1]))
    assert fault in found


@pytest.mark.parametrize("version", VERSIONS)
def test_tensorrt_builder_without_libraries_is_refused(version: str, read, tmp_path: Path) -> None:
    """The bindings alone raise where the lean runtime would crash: no gate is needed before
    `Builder`.
    """
    code = "import tensorrt_bindings as trt\ntrt.Builder(trt.Logger())"
    done = python(code, path=folder(version), libraries=libraries(version.split(".")[0], tmp_path))
    assert (
        done.returncode == 1
        and "TypeError: pybind11::init(): factory function returned nullptr" in done.stderr
    )


LEAN = """
import sys, tensorrt_lean_bindings as trt
print(list(trt.Dims((1, 3, 128, 128))), trt.volume((2, 3)), trt.DataType.HALF.itemsize, trt.ExecutionContextAllocationStrategy.USER_MANAGED.name)
print(hasattr(trt, "Builder"), hasattr(trt, "EngineInspector"), hasattr(trt.ICudaEngine, "device_memory_size_v2"), "numpy" in sys.modules)
"""


def test_tensorrt_lean_runtime_cannot_build() -> None:
    done = python(LEAN, path=folder("lean"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "[1, 3, 128, 128] 6 2 USER_MANAGED",
        "False False True False",
    ]


def test_tensorrt_full_lean_bindings_share_process(tmp_path: Path) -> None:
    """An engine is built with the one and validated with the other."""
    version = VERSIONS[-1]
    code = (
        f"import sys; sys.path.append({str(folder('lean'))!r}); import tensorrt_bindings as a,"
        " tensorrt_lean_bindings as b; print(a.ILogger is b.ILogger)"
    )
    done = python(code, path=folder(version), libraries=libraries(version.split(".")[0], tmp_path))
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_tensorrt_runtime_without_device_ends_process() -> None:
    """Pinned, so that an upgrade that mends it is seen: until then `runtime.engines.gpu.probe`
    comes before every `Runtime`.
    """
    if why_no_gpu() is None:
        pytest.skip("there is a GPU: a Runtime is safe here")
    code = (
        "import tensorrt_lean_bindings as trt\nruntime ="
        " trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))\nprint('made', flush=True)\ndel"
        " runtime"
    )
    done = python(code, path=folder("lean"))
    assert (done.returncode, done.stdout.strip()) == (-11, "made"), done.stderr


@pytest.mark.parametrize("version", VERSIONS)
def test_fake_tensorrt_builder_matches_real_one(version: str, read) -> None:
    """tests/test_to_tensorrt.py is worth what the stand-in is worth: its names and parameters
    are the real ones.
    """
    api, module = read(version), tensorrt(Script(version=version))
    checked = 0
    for name, thing in vars(module).items():
        assert name in api.names, name
        if name == "__version__":
            continue
        if issubclass(thing, enum.Enum):
            assert {f"{name}.{member}" for member in thing.__members__} <= api.names
            continue
        for member, value in vars(thing).items():
            full = f"{name}.{member}"
            if member.startswith("_") or isinstance(value, type):
                continue
            assert full in api.names, full
            if isinstance(value, property):
                assert value.fset is None or full in api.settable, full
            else:
                wanted = list(inspect.signature(value).parameters)[1:]
                assert api.takes(full, 0, wanted), (full, api.calls[full])
            checked += 1
    assert checked > 30
