"""From ONNX to a TensorRT engine, with one code path for TensorRT 10.13 to 11 and TensorRT for RTX.

TensorRT builds on the GPU for that GPU. TensorRT for RTX builds on any machine, for many GPUs.

Until TensorRT 10 a flag asked for FP16. TensorRT 11 has no such flag, and code that looks for it
builds FP32 without a word. So no flag is set here: the FP16 graph has FP16 weights, the network is
strongly typed, and the result is counted (`export.precision_audit`). Only names that 10.13, 10.16
and 11 share are used; tests compare them with the real bindings, and build with the real builder of
TensorRT for RTX.
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
from runtime.engines.gpu.tensorrt import TENSORRT, Library, collecting_logger
from runtime.engines.gpu.tensorrt_rtx import RTX
from runtime.engines.onnx_file import check_weights

from .precision_audit import LayerTypes, read_network
from .rtx_target import set_compute_capabilities


@dataclass(frozen=True)
class Target:
    """One of NVIDIA's builders, and the engine file that it makes.

    Attributes:
        name: The name for `--target`.
        library: The runtime that loads the file.
        modules: The Python modules that hold the builder; the first one that imports is used.
        install: The command that installs the builder.
        backend: The runtime's name of the engine (`runtime.engines.registry`).
        kind: The role of the file in the manifest.
        file: The engine's file.
        needs_gpu: Whether it builds only where there is a GPU.
    """

    name: str
    library: Library
    modules: tuple[str, ...]
    install: str
    backend: str
    kind: str
    file: str
    needs_gpu: bool

    @property
    def layers(self) -> str:
        """The file with the types of the engine's layers."""
        return f"{self.file}.json"

    def load(self) -> Any:
        """Import the builder.

        Raises:
            ImportError: None of the modules can be imported.
        """
        reasons = []
        for name in self.modules:
            try:
                return import_module(name)
            except ImportError as exc:
                reasons.append(str(exc))
        raise ImportError("; ".join(reasons))


CLASSIC = Target(
    "tensorrt",
    TENSORRT,
    ("tensorrt",),
    'pip install -e ".[tensorrt]"',
    "tensorrt",
    "engine",
    "model.engine",
    needs_gpu=True,
)
FOR_RTX = Target(
    "rtx",
    RTX,
    RTX.modules,
    'pip install -e ".[rtx]"',
    "tensorrt-rtx",
    "rtx-engine",
    "model.rtx.engine",
    needs_gpu=False,
)
TARGETS = {target.name: target for target in (CLASSIC, FOR_RTX)}
# How many times the canvas' height and width an engine takes: a canvas grows only where labels
# reach beyond it.
GROWTH = 2
HARDWARE = {"same": "SAME_COMPUTE_CAPABILITY", "ampere+": "AMPERE_PLUS", "this": "NONE"}

Shape = tuple[int, ...]
# Input → its smallest, its best and its largest shape.
Profile = Mapping[str, tuple[Shape, Shape, Shape]]
OnProgress = Callable[[str, int, int], None]  # phase, steps done, steps


@dataclass(frozen=True)
class BuildOptions:
    """How to build an engine.

    TensorRT for RTX has no use for `native`, `hardware` and `timing_cache`.

    Attributes:
        precision: "fp16", "fp32" or "int8".
        native: Only the same TensorRT loads the engine, and it is the fastest. Otherwise the lean
            runtime of this version or a later one loads it.
        hardware: Which GPUs run it: of the "same" compute capability, "ampere+" (any from Ampere
            on, slower), or "this" model alone.
        max_batch: The most slices in one call.
        workspace: The most scratch memory of a layer, in bytes.
        timing_cache: A file that is kept from build to build on one GPU.
    """

    precision: str = "fp16"
    native: bool = False
    hardware: str = "same"
    max_batch: int = 8
    workspace: int = 2 << 30
    timing_cache: Path | None = None


@dataclass(frozen=True)
class Built:
    """A built engine.

    Attributes:
        plan: The engine's bytes.
        version: The version of TensorRT.
        profile: The shapes that it takes.
        layers: The types of the network that it was built from.
        notes: Remarks for a person.
    """

    plan: bytes
    version: str
    profile: Profile
    layers: LayerTypes
    notes: tuple[str, ...]


def why_not(target: Target = CLASSIC) -> MissingComponent | None:
    """Tell why no engine can be built for a target on this machine.

    Args:
        target: The target.

    Returns:
        An error that names all that is missing and how to get it, first what this machine lacks
        and no package mends; None where an engine can be built.
    """
    missing, remedies = [], []
    if target.needs_gpu and (reason := why_no_gpu()):
        missing.append(reason)
        remedies.append(DRIVER_REMEDY)
    try:
        version = str(target.load().__version__)
        if not target.library.serves(version):
            missing.append(f"{target.modules[0]} {version} is installed")
            remedies.append(target.install)
    except ImportError as exc:
        missing.append(f"{target.library.title} cannot be imported ({exc})")
        remedies.append(target.install)
    if not missing:
        return None
    needed = f"{target.library.title} {target.library.range}"
    return MissingComponent(
        f"no engine of {target.library.title} can be built here: {'; '.join(missing)}",
        expected=f"{needed}, an NVIDIA GPU and its driver" if target.needs_gpu else needed,
        remedy="; ".join(remedies),
    )


def shapes_of(manifest: Manifest, max_batch: int) -> Profile:
    """The shapes that an engine takes.

    They go from 1 to `max_batch` slices, and from the canvas to GROWTH times its sides; the best is
    a full batch on the canvas. A model without a pixel spacing fits every slice to its canvas and
    needs no larger one.

    Args:
        manifest: The model's manifest.
        max_batch: The most slices in one call.

    Returns:
        The smallest, the best and the largest shape of each input.
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
    target: Target = CLASSIC,
    trt: Any = None,
    on_progress: OnProgress | None = None,
) -> Built:
    """Build an engine from an ONNX graph.

    The timing cache is read before, and written atomically after.

    Args:
        onnx: The graph's file.
        profile: The shapes that the engine takes.
        options: How to build it.
        target: What to build for.
        trt: The builder's module (default: import it).
        on_progress: Called with the phase, the steps done and the steps in all.

    Returns:
        The engine.

    Raises:
        BuildError: TensorRT refuses the graph, the shapes or the build; it quotes TensorRT.
        OutputError: The cache cannot be written.
        KeyboardInterrupt: A person interrupted the build.
    """
    check_weights(onnx)
    trt = trt or target.load()
    messages: list[str] = []
    logger = collecting_logger(trt, messages)
    builder = trt.Builder(logger)
    network = parse(trt, builder, logger, onnx)
    _require_inputs(network, profile, onnx)
    config = builder.create_builder_config()
    _configure(trt, config, options)
    if target is FOR_RTX:
        set_compute_capabilities(trt, config)
    else:
        _target_this_gpu(trt, config, options)
    _add_profile(builder, config, profile, onnx)
    # the cache has to live until the engine is built
    timing_cache = options.timing_cache if target.needs_gpu else None
    notes, cache = _load_cache(config, timing_cache)
    monitor = _monitor(trt, on_progress)
    config.progress_monitor = monitor
    layers = read_network(trt, network)
    plan = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise BuildError(
            f"TensorRT {trt.__version__} builds no engine from {onnx.name}: {_last(messages)}",
            expected="an engine",
            remedy=(
                "a smaller --max-batch, a larger --workspace, or a GPU with more free memory; else"
                " report this"
            ),
            file=onnx,
        )
    if timing_cache is not None and cache is not None:
        with atomic_file(timing_cache) as handle:
            handle.write(memoryview(cache.serialize()))
    return Built(bytes(memoryview(plan)), str(trt.__version__), profile, layers, notes)


def parse(trt: Any, builder: Any, logger: Any, onnx: Path) -> Any:
    """Parse a graph into a strongly typed network.

    Args:
        trt: The tensorrt module.
        builder: A TensorRT builder.
        logger: A TensorRT logger.
        onnx: The graph's file.

    Returns:
        TensorRT's `INetworkDefinition`.

    Raises:
        BuildError: The parser refuses the graph; it lists every error.
    """
    # the flag's number differs between TensorRT 10 and 11
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
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
    names = {network.get_input(n).name for n in range(network.num_inputs)}
    if names != set(profile):
        raise BuildError(
            f"{onnx.name} takes {sorted(names)}",
            expected=f"the manifest's inputs {sorted(profile)}",
            remedy="export the run again",
            file=onnx,
        )


def _configure(trt: Any, config: Any, options: BuildOptions) -> None:
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    # the inspector tells types only with this verbosity
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # on by default: 10 bits of mantissa where the graph says FP32
    config.clear_flag(trt.BuilderFlag.TF32)


def _target_this_gpu(trt: Any, config: Any, options: BuildOptions) -> None:
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
            expected="shapes that the graph takes",
            remedy="export the run again",
            file=onnx,
        )


def _load_cache(config: Any, file: Path | None) -> tuple[tuple[str, ...], Any]:
    """What to say of the timing cache, and the cache in use (None: no file was named)."""
    if file is None:
        return (), None
    old = file.read_bytes() if file.is_file() else b""
    cache = config.create_timing_cache(old)
    if cache is not None and config.set_timing_cache(cache, False):
        return (
            f"timing cache {file}: {len(old)} bytes" if old else f"timing cache {file}: new",
        ), cache
    # the file is of another GPU or another TensorRT, or no timing cache at all
    cache = config.create_timing_cache(b"")
    if cache is None or not config.set_timing_cache(cache, False):
        return (f"timing cache {file}: TensorRT takes none",), None
    return (f"timing cache {file}: not of this GPU and TensorRT, started empty",), cache


def _last(messages: list[str]) -> str:
    """The last messages of TensorRT."""
    return "; ".join(messages[-3:]) or "it says no more"


def _monitor(trt: Any, on_progress: OnProgress | None) -> Any:
    """A TensorRT progress monitor: it passes on the outermost phases; Ctrl-C stops the build."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._phases: dict[str, tuple[int, int]] = {}  # outermost phase → steps done, steps

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._phases[phase_name] = (0, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            step, steps = self._phases.get(phase_name, (0, 0))
            if step < steps:  # TensorRT may leave steps out
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
