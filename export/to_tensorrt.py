"""ONNX → TensorRT engine.

One code path for TensorRT 10.13 to 11: strongly typed, so that FP16 is what the graph says.

A flag could ask for FP16 until TensorRT 10; 11 has none, and code that looks for it builds FP32
without a word. So no flag is set here: the FP16 graph carries half weights, the network is strongly
typed, and what came out is counted (`export.precision_audit`). Only names that 10.13, 10.16 and 11
share are used; tests hold them against the real bindings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from runtime.core.atomic_files import atomic_file
from runtime.core.errors import BuildError, MissingComponent
from runtime.core.manifest import Manifest
from runtime.engines.gpu.probe import DRIVER_REMEDY, why_no_gpu
from runtime.engines.gpu.tensorrt import collecting_logger
from runtime.engines.onnx_file import check_weights

from .precision_audit import LayerTypes, read_network

VERSIONS = ((10, 13), (12, 0))  # from, below
INSTALL = 'pip install -e ".[tensorrt]"  (tensorrt-cu13 and tensorrt-lean-cu13 >= 10.13, < 12)'
# times the canvas' height and width that an engine takes: a canvas grows only where labels reach
# beyond it
GROWTH = 2
HARDWARE = {"same": "SAME_COMPUTE_CAPABILITY", "ampere+": "AMPERE_PLUS", "this": "NONE"}

Shape = tuple[int, ...]
Profile = Mapping[
    str, tuple[Shape, Shape, Shape]
]  # input → its smallest, its best and its largest shape
OnProgress = Callable[[str, int, int], None]  # phase, steps done, steps


@dataclass(frozen=True)
class BuildOptions:
    """`native`: only the same TensorRT loads it, and it is the fastest; else the lean runtime of
    this version or a later one.

    `hardware`: which GPUs take it: "same" compute capability, "ampere+" (any from Ampere on;
    slower) or "this" model alone. `workspace`: most scratch memory a layer may use, in bytes.
    `timing_cache`: kept from build to build on one GPU.
    """

    precision: str = "fp16"
    native: bool = False
    hardware: str = "same"
    max_batch: int = 8
    workspace: int = 2 << 30
    timing_cache: Path | None = None


@dataclass(frozen=True)
class Built:
    """An engine as bytes, `plan`, and what was seen while it was built.

    `layers`: the types of the network it was built from.
    """

    plan: bytes
    version: str
    profile: Profile
    layers: LayerTypes
    notes: tuple[str, ...]


def why_not() -> MissingComponent | None:
    """Why no engine can be built here, with everything that is missing and how to get it; None
    when one can.
    """
    missing, remedies = [], []
    try:
        found = str(import_module("tensorrt").__version__)
        if not VERSIONS[0] <= tuple(int(n) for n in found.split(".")[:2]) < VERSIONS[1]:
            missing.append(f"tensorrt {found} is installed")
    except ImportError as exc:
        missing.append(f"TensorRT cannot be imported ({exc})")
    if missing:
        remedies.append(INSTALL)
    if reason := why_no_gpu():
        missing.append(reason)
        remedies.append(DRIVER_REMEDY)
    if not missing:
        return None
    return MissingComponent(
        f"no TensorRT engine can be built here: {'; '.join(missing)}",
        expected="TensorRT >= 10.13, < 12, an NVIDIA GPU and its driver",
        remedy="; ".join(remedies),
    )


def shapes_of(manifest: Manifest, max_batch: int) -> Profile:
    """The shapes an engine takes: 1 to `max_batch` slices on the canvas (best: a full batch), each
    side up to GROWTH times it.

    A model that fits every slice to its canvas (no pixel spacing) needs no more than the canvas.
    """
    canvas = manifest.grid.canvas
    growth = 1 if manifest.grid.pixel_spacing is None else GROWTH
    sizes = [
        {"N": 1, "H": canvas[0], "W": canvas[1]},
        {"N": max_batch, "H": canvas[0], "W": canvas[1]},
        {"N": max_batch, "H": canvas[0] * growth, "W": canvas[1] * growth},
    ]
    profile = {}
    for tensor in manifest.inputs:
        smallest, best, largest = (
            tuple(size[d] if isinstance(d, str) else d for d in tensor.shape) for size in sizes
        )
        profile[tensor.name] = (smallest, best, largest)
    return profile


def build(
    onnx: Path,
    profile: Profile,
    options: BuildOptions,
    *,
    trt: Any = None,
    on_progress: OnProgress | None = None,
) -> Built:
    """Build the graph `onnx` for the shapes of `profile`.

    `trt`: the tensorrt module (default: import it).

    The timing cache is read before and written after, atomically. Raises `BuildError` with what
    TensorRT said when it refuses the graph, the shapes or the build; `OutputError` when the cache
    cannot be written; `KeyboardInterrupt` when interrupted.
    """
    check_weights(onnx)
    trt = trt or import_module("tensorrt")
    said: list[str] = []
    logger = collecting_logger(trt, said)
    builder = trt.Builder(logger)
    network = parse(trt, builder, logger, onnx)
    _require_inputs(network, profile, onnx)
    config = builder.create_builder_config()
    _configure(trt, config, options)
    _add_profile(builder, config, profile, onnx)
    notes, cache = _load_cache(
        config, options.timing_cache
    )  # the cache has to live until the engine is built
    monitor = _monitor(trt, on_progress)
    config.progress_monitor = monitor
    layers = read_network(trt, network)
    plan = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise BuildError(
            f"TensorRT {trt.__version__} builds no engine from {onnx.name}: {_last(said)}",
            expected="an engine",
            remedy=(
                "a smaller --max-batch, a larger --workspace, or a GPU with more free memory; else"
                " report this"
            ),
            file=onnx,
        )
    if options.timing_cache is not None and cache is not None:
        with atomic_file(options.timing_cache) as handle:
            handle.write(memoryview(cache.serialize()))
    return Built(bytes(memoryview(plan)), str(trt.__version__), profile, layers, notes)


def parse(trt: Any, builder: Any, logger: Any, onnx: Path) -> Any:
    """The strongly typed network of `onnx`. Raises `BuildError` with every error of the parser."""
    network = builder.create_network(
        1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )  # 1 in 10, 0 in 11
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(onnx)):
        return network
    rows = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = f" at node {error.node()}" if error.node() >= 0 else ""
        rows.append(
            f"{index + 1}. {error.node_operator() or '?'} {error.node_name()!r}{where}:"
            f" {error.desc()}"
        )
    raise BuildError(
        f"TensorRT {trt.__version__} does not take {onnx.name}, {len(rows)} errors:",
        rows=rows,
        expected="a graph of operators that TensorRT's ONNX parser documents",
        remedy="report this with the errors above",
        file=onnx,
    )


def _require_inputs(network: Any, profile: Profile, onnx: Path) -> None:
    found = {network.get_input(n).name for n in range(network.num_inputs)}
    if found != set(profile):
        raise BuildError(
            f"{onnx.name} takes {sorted(found)}",
            expected=f"the manifest's inputs {sorted(profile)}",
            remedy="export the run again",
            file=onnx,
        )


def _configure(trt: Any, config: Any, options: BuildOptions) -> None:
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    config.profiling_verbosity = (
        trt.ProfilingVerbosity.DETAILED
    )  # the inspector tells types only then
    config.clear_flag(
        trt.BuilderFlag.TF32
    )  # on by default: 10 bits of mantissa where the graph says FP32
    config.hardware_compatibility_level = getattr(
        trt.HardwareCompatibilityLevel, HARDWARE[options.hardware]
    )
    if not options.native:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)  # no executable code inside the plan


def _add_profile(builder: Any, config: Any, shapes: Profile, onnx: Path) -> None:
    profile = builder.create_optimization_profile()
    refused = ""
    try:
        for name, (smallest, best, largest) in shapes.items():
            profile.set_shape(name, smallest, best, largest)
    except ValueError as exc:
        refused = str(exc)
    if refused or config.add_optimization_profile(profile) < 0:
        text = "; ".join(
            f"{name} {' … '.join(map(str, triple))}" for name, triple in shapes.items()
        )
        raise BuildError(
            f"TensorRT refuses the shapes {text}{': ' + refused if refused else ''}",
            expected="shapes the graph takes",
            remedy="export the run again",
            file=onnx,
        )


def _load_cache(config: Any, file: Path | None) -> tuple[tuple[str, ...], Any]:
    """What to say of it, and the cache in use (None: no file was named)."""
    if file is None:
        return (), None
    old = file.read_bytes() if file.is_file() else b""
    cache = config.create_timing_cache(old)
    if cache is not None and config.set_timing_cache(cache, False):
        return (
            f"timing cache {file}: {len(old)} bytes" if old else f"timing cache {file}: new",
        ), cache
    cache = config.create_timing_cache(
        b""
    )  # another GPU's, another TensorRT's, or no timing cache at all
    if cache is None or not config.set_timing_cache(cache, False):
        return (f"timing cache {file}: TensorRT takes none",), None
    return (f"timing cache {file}: not of this GPU and TensorRT, started empty",), cache


def _last(said: list[str]) -> str:
    return "; ".join(said[-3:]) or "it says no more"


def _monitor(trt: Any, on_progress: OnProgress | None) -> Any:
    """A TensorRT progress monitor: outermost phases are passed on; Ctrl-C stops the build at the
    next step.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._phases: dict[str, tuple[int, int]] = {}  # outermost phase → steps told, steps

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._phases[phase_name] = (0, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            told, steps = self._phases.get(phase_name, (0, 0))
            if told < steps:  # TensorRT may leave steps out
                self.step_complete(phase_name, steps - 1)
            self._phases.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:  # an exception must not pass through TensorRT
                if phase_name in self._phases and on_progress is not None:
                    self._phases[phase_name] = (step + 1, self._phases[phase_name][1])
                    on_progress(phase_name, *self._phases[phase_name])
            except KeyboardInterrupt:
                self.interrupted = True
            return not self.interrupted

    return Monitor()
