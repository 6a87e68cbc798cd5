"""The GPU engine of TensorRT, for its lean runtime and its full one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ...core.errors import MemoryCapExceeded, MissingComponent, ModelError
from ...core.manifest import Manifest
from ..base import EngineError, EngineOptions, EngineSpec, Inputs
from ..memory import ALIGNMENT
from .base import STREAMS, GpuEngine, GpuSlot, Shapes, batches, nbytes_of, shapes_of
from .workspace import Workspace, WorkspacePool


@dataclass(frozen=True)
class Library:
    """One of NVIDIA's runtimes.

    Attributes:
        title: what people call it.
        modules: the Python modules that hold it; the first that loads an engine file is used.
        versions: the oldest (major, minor) with the names that this module uses, and the first one
            that is too new.
        install: the command that installs it.
    """

    title: str
    modules: tuple[str, ...]
    versions: tuple[tuple[int, int], tuple[int, int]]
    install: str

    @property
    def range(self) -> str:
        """The versions as people write them: ">= 10.13, < 12.0"."""
        (oldest, minor), (newest, next_minor) = self.versions
        return f">= {oldest}.{minor}, < {newest}.{next_minor}"

    def serves(self, version: str) -> bool:
        """Return whether this module works with that version of the library."""
        return self.versions[0] <= tuple(map(int, version.split(".")[:2])) < self.versions[1]

    def why_absent(self) -> tuple[str, str] | None:
        """Return why the library is absent and the remedy; None where it is installed.

        The check does not import it.
        """
        if any(find_spec(name) for name in self.modules):
            return None
        return f"{self.title} is not installed ({' or '.join(self.modules[::2])})", self.install


# The lean runtime (44 MB) loads the engines that export writes by default; an engine built with
# --native needs the full one. For each stand its front package and the wheel of its bindings, which
# works alone.
TENSORRT = Library(
    "TensorRT",
    ("tensorrt_lean", "tensorrt_lean_bindings", "tensorrt", "tensorrt_bindings"),
    ((10, 13), (12, 0)),
    'pip install "mask2ct[gpu]"',
)


class TensorRTEngine(GpuEngine):
    """Runs an engine file of TensorRT.

    The batch size is the one that the engine's profile was tuned for. With `auto_batch` it is the
    largest of the profile that fits `max_memory`.

    Attributes:
        library: the runtime of NVIDIA's that loads the file.
        engine: the deserialized engine (ICudaEngine).
        activations: the activation memory that its execution contexts share.
    """

    library: ClassVar[Library] = TENSORRT

    def __init__(self, path: Path, manifest: Manifest, options: EngineOptions | None = None):
        """Load an engine file.

        Args:
            path: the engine file, whose SHA-256 the caller has checked.
            manifest: the manifest of the model.
            options: the options of the engine.

        Raises:
            MissingComponent: there is no GPU or no runtime. That is checked before a runtime object
                is made, which would end the process where there is no device.
            ModelError: no runtime here loads the file, or it contradicts the manifest.
            MemoryCapExceeded: the engine does not fit into `max_memory`.
        """
        options = options or EngineOptions()
        self._no_graphs = ""
        super().__init__(manifest, options)
        try:
            with self.cuda.current():
                self._trt, self._runtime, self.engine = _deserialize(path, self.library)
                self._check(path)
                self._plan(path, manifest, options)
        except BaseException:
            self.close()
            raise

    def _check(self, path: Path) -> None:
        """Compare the engine's tensors with those of the manifest."""
        trt, engine = self._trt, self.engine
        dtypes = {"uint8": trt.DataType.UINT8, "float32": trt.DataType.FLOAT}
        modes = {
            t.name: trt.TensorIOMode.OUTPUT if t is self.tensors[-1] else trt.TensorIOMode.INPUT
            for t in self.tensors
        }
        names = [engine.get_tensor_name(n) for n in range(engine.num_io_tensors)]
        tensors = {
            name: (engine.get_tensor_mode(name), engine.get_tensor_dtype(name)) for name in names
        }
        stated = {t.name: (modes[t.name], dtypes[t.dtype]) for t in self.tensors}
        if tensors != stated:
            raise ModelError(
                f"{path.name} has the tensors {tensors}",
                expected=f"the manifest's, {stated}",
                remedy="build the engine again",
                file=path,
            )

    def _plan(self, path: Path, manifest: Manifest, options: EngineOptions) -> None:
        """Choose the batch size and the number of slots, and open the pools with fitting caps."""
        smallest, best, largest = (
            tuple(dims) for dims in self.engine.get_tensor_profile_shape("labels", 0)
        )
        canvas = largest[-2], largest[-1]
        weights = path.stat().st_size  # TensorRT's own device memory is about the size of the file
        batch, streams = best[0], STREAMS
        if options.auto_batch or options.max_memory is not None:
            cap = self.cuda.free() if options.max_memory is None else options.max_memory
            budget = cap - weights
            choices = batches(smallest[0], largest[0]) if options.auto_batch else [batch]
            needs = dict(zip(choices, self._slot_bytes(choices), strict=True))
            batch = next((n for n in choices if needs[n] <= budget), choices[-1])
            if needs[batch] > budget:
                raise MemoryCapExceeded.of(
                    f"memory of GPU {options.device}",
                    needs[batch] + weights,
                    cap=cap,
                    in_use=0,
                    free=self.cuda.free(),
                )
            streams = min(STREAMS, budget // needs[batch])
        # one slot per stream on the largest canvas, and one for a volume on another canvas
        slots = STREAMS + 1
        io = nbytes_of(self.tensors, shapes_of(self.tensors, batch, canvas))
        activations = self.engine.get_device_memory_size_for_profile_v2(0)
        most = slots * (activations + io + ALIGNMENT)
        self._open_pools(
            options.max_memory or weights + most, max(options.max_memory or 0, slots * io)
        )
        self._reserved.append(self.device_pool.reserve(weights, "weights"))
        self.activations = WorkspacePool(self.cuda, self.device_pool.tag("activations"), streams)
        self.spec = EngineSpec(manifest.inputs, manifest.output, batch, streams, canvas)

    def _slot_bytes(self, choices: list[int]) -> list[int]:
        """The device memory in bytes of a slot of each batch size, on the training canvas."""
        needs, context = [], self.context()
        for batch in choices:
            shapes = shapes_of(self.tensors, batch, self._canvas)
            for tensor in self.tensors[:-1]:
                accepted(
                    context.set_input_shape(tensor.name, shapes[tensor.name]),
                    f"the shape {shapes[tensor.name]} of {tensor.name}",
                )
            needs.append(
                int(context.update_device_memory_size_for_shapes())
                + nbytes_of(self.tensors, shapes)
                + ALIGNMENT
            )
        return needs

    def context(self) -> Any:
        """Make an execution context without activation memory.

        Raises:
            EngineError: TensorRT refuses it.
        """
        trt = self._trt
        context = self.engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        accepted(context is not None, "an execution context")
        return context

    def without_graphs(self, reason: str) -> None:
        """Use no CUDA graphs from now on, and state `reason` in the name of the engine."""
        self._no_graphs = reason

    @property
    def graphs(self) -> bool:
        """Whether slots may capture CUDA graphs."""
        return not self._no_graphs

    def _what(self) -> str:
        graphs = f"no CUDA graphs ({self._no_graphs})" if self._no_graphs else "CUDA graphs"
        return f"{self._trt.__name__.removesuffix('_bindings')} {self._trt.__version__}, {graphs}"

    def _slot(self) -> GpuSlot:
        return TensorRTSlot(self)

    def _release(self) -> None:
        self.engine = self._runtime = None  # in this order


class TensorRTSlot(GpuSlot):
    """A slot with an execution context, activation memory, and a CUDA graph of its shape.

    The first batch of a shape is enqueued call by call, which lets TensorRT initialize itself. The
    second is captured together with its copies. Later batches launch the graph, until a shape or an
    address changes. Batches in arrays that are not page-locked are never captured.
    """

    owner: TensorRTEngine

    def __init__(self, owner: TensorRTEngine):
        """Make a slot of `owner`.

        Args:
            owner: the engine.

        Raises:
            EngineError: TensorRT refuses an execution context, or CUDA a stream.
        """
        self._context: Any = None
        self._activations: Workspace | None = None
        self._graph: Any = None
        self._addresses: tuple[int, ...] = ()
        self._uncaptured = 0
        super().__init__(owner)
        try:
            with self.cuda.current():
                self._context = owner.context()
        except BaseException:
            self.close()
            raise

    def _bind(self, shapes: Shapes) -> None:
        context, names = self._context, [t.name for t in self.owner.tensors]
        for name in names[:-1]:
            accepted(
                context.set_input_shape(name, shapes[name]), f"the shape {shapes[name]} of {name}"
            )
        missing = context.infer_shapes()
        accepted(not missing, f"the shapes, without {missing}")
        output, expected = tuple(context.get_tensor_shape(names[-1])), shapes[names[-1]]
        accepted(output == expected, f"an output of {expected}, it is {output}")
        needed = max(1, int(context.update_device_memory_size_for_shapes()))
        self._activations = self.owner.activations.acquire(needed, stream=self)
        assert self._activations.ptr % ALIGNMENT == 0
        context.set_device_memory(self._activations.ptr, self._activations.nbytes)
        for name in names:
            accepted(
                context.set_tensor_address(name, self.buffers[name].ptr), f"the address of {name}"
            )

    def _unbind(self) -> None:
        self._forget_graph()
        if self._activations is not None:
            self.owner.activations.release(self._activations, self._event)
            self._activations = None
        super()._unbind()

    def _forget_graph(self) -> None:
        self.cuda.destroy(graph=self._graph)
        self._graph, self._addresses, self._uncaptured = None, (), 0

    def _exclusive_workspace(self) -> AbstractContextManager[None]:
        assert self._activations is not None
        return self._activations.exclusive(self._handle, self._event)

    def _work(self, inputs: Inputs, out: NDArray[np.uint8]) -> None:
        addresses = tuple(array.ctypes.data for array in (*inputs.values(), out))
        if addresses != self._addresses:
            if self._graph is not None:
                self._drain()
            self._forget_graph()
            self._addresses = addresses
        may_capture = self._graph is None and self._uncaptured and self.owner.graphs
        if may_capture and all(map(self.owner.pool.owns, addresses)):
            self._drain()
            try:
                self._graph = self.cuda.capture(lambda: self._enqueue(inputs, out), self._handle)
            except EngineError as exc:
                self.owner.without_graphs(exc.fact)
        if self._graph is not None:
            self.cuda.launch(self._graph, self._handle)
            return
        self._enqueue(inputs, out)
        self._uncaptured += 1

    def _enqueue(self, inputs: Inputs, out: NDArray[np.uint8]) -> None:
        self._upload(inputs)
        accepted(self._context.execute_async_v3(int(self._handle)), "the batch")
        self._download(out)

    def _close(self) -> None:
        self._context = None


def accepted(success: bool, what: str) -> None:
    """Check the result of a call to TensorRT, which reports errors by returning False.

    Args:
        success: the result.
        what: the thing that TensorRT was to accept, for the message.

    Raises:
        EngineError: TensorRT refused it.
    """
    if not success:
        raise EngineError(
            f"TensorRT refused {what}",
            expected="a call that the engine was built for",
            remedy="build the engine again on this machine",
        )


def _deserialize(path: Path, library: Library) -> tuple[Any, Any, Any]:
    """Load an engine file with the first runtime that can, the lean one first.

    Returns:
        The module, the runtime and the engine.
    """
    reasons: list[str] = []
    plan = path.read_bytes()
    usable = False
    for name in library.modules:
        try:
            trt = import_module(name)
        except ImportError as exc:
            reasons.append(f"{name}: {exc}")
            continue
        if not library.serves(str(trt.__version__)):
            reasons.append(f"{name} is {trt.__version__}")
            continue
        usable = True
        messages: list[str] = []
        runtime = trt.Runtime(collecting_logger(trt, messages))
        assert not runtime.engine_host_code_allowed, "an engine must not bring code of its own"
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is not None:
            return trt, runtime, engine
        details = "; ".join(messages[-3:]) or "it gives no reason"
        reasons.append(f"{name} {trt.__version__}: {details}")
    if not usable:
        raise MissingComponent(
            f"no runtime of {library.title} can be used: {'; '.join(reasons)}",
            expected=f"{' or '.join(library.modules[::2])} {library.range}",
            remedy=library.install,
        )
    raise ModelError(
        f"no runtime of {library.title} here loads {path.name} ({'; '.join(reasons)})",
        expected=f"an engine of this {library.title} and this GPU",
        remedy="build it on this machine; one built with --native needs the same full TensorRT",
        file=path,
    )


def collecting_logger(trt: Any, messages: list[str]) -> Any:
    """Make a TensorRT logger that collects errors.

    Args:
        trt: a module of TensorRT.
        messages: the list that receives the texts.

    Returns:
        The logger (ILogger).
    """
    errors = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in errors:
                messages.append(msg)

    return Logger()
