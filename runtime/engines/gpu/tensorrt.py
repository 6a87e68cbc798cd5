"""A TensorRT engine, by the lean runtime or the full one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import MemoryCapExceeded, MissingComponent, ModelError
from ...core.manifest import Manifest
from ..base import EngineError, EngineOptions, EngineSpec, Inputs
from ..memory import ALIGNMENT
from .base import STREAMS, GpuEngine, GpuSlot, Shapes, batches, nbytes_of, shapes_of
from .probe import DRIVER_REMEDY, why_no_gpu
from .workspace import Workspace, WorkspacePool

# The lean runtime loads what export writes by default, and is 44 MB; an engine built with --native
# needs the full one. Each is
# found as its front package and as the wheel of its bindings, which works alone.
MODULES = ("tensorrt_lean", "tensorrt_lean_bindings", "tensorrt", "tensorrt_bindings")
VERSIONS = ((10, 13), (12, 0))  # from, below: the names used here exist in all of them
INSTALL = 'pip install "mask2ct[gpu]"'


def why_absent() -> tuple[str, str] | None:
    """Why no TensorRT engine can run here and the remedy, or None when one can.

    Imports nothing of TensorRT's.
    """
    if not any(find_spec(name) for name in MODULES):
        return "neither tensorrt_lean nor tensorrt is installed", INSTALL
    why = why_no_gpu()
    return (why, DRIVER_REMEDY) if why else None


class TensorRTEngine(GpuEngine):
    """`path`, an engine file whose SHA-256 was checked by the caller, on GPU number
    `options.device`.

    Its batch is the one its profile was tuned for; with `auto_batch`, the largest of the profile's
    that fits `max_memory`. Raises `MissingComponent` without a GPU or a runtime, before a runtime
    object is made, for one made without a device ends the process.
    """

    def __init__(self, path: Path, manifest: Manifest, options: EngineOptions | None = None):
        options = options or EngineOptions()
        self._no_graphs = ""
        super().__init__(manifest, options)
        try:
            with self.cuda.current():
                self._trt, self._runtime, self.engine = _deserialize(path)
                self._check(path)
                self._plan(path, manifest, options)
        except BaseException:
            self.close()
            raise

    def _check(self, path: Path) -> None:
        """Hold the engine's tensors against the manifest's."""
        trt, engine = self._trt, self.engine
        kinds = {"uint8": trt.DataType.UINT8, "float32": trt.DataType.FLOAT}
        modes = {
            t.name: trt.TensorIOMode.OUTPUT if t is self.tensors[-1] else trt.TensorIOMode.INPUT
            for t in self.tensors
        }
        names = [engine.get_tensor_name(n) for n in range(engine.num_io_tensors)]
        found = {
            name: (engine.get_tensor_mode(name), engine.get_tensor_dtype(name)) for name in names
        }
        stated = {t.name: (modes[t.name], kinds[t.dtype]) for t in self.tensors}
        if found != stated:
            raise ModelError(
                f"{path.name} has the tensors {found}",
                expected=f"the manifest's, {stated}",
                remedy="build the engine again",
                file=path,
            )

    def _plan(self, path: Path, manifest: Manifest, options: EngineOptions) -> None:
        """Choose the batch and how many slots there may be, and cap the pools at what that
        takes.
        """
        smallest, best, largest = (
            tuple(dims) for dims in self.engine.get_tensor_profile_shape("labels", 0)
        )
        canvas = largest[-2], largest[-1]
        weights = (
            path.stat().st_size
        )  # what TensorRT takes for itself on the device is about the file
        batch, streams = best[0], STREAMS
        if options.auto_batch or options.max_memory is not None:
            room = (
                self.cuda.free() if options.max_memory is None else options.max_memory
            ) - weights
            wanted = batches(smallest[0], largest[0]) if options.auto_batch else [batch]
            needs = dict(zip(wanted, self._needs(wanted), strict=True))
            batch = next((n for n in wanted if needs[n] <= room), wanted[-1])
            if needs[batch] > room:
                kind = f"memory of GPU {options.device}"
                raise MemoryCapExceeded.of(
                    kind,
                    needs[batch] + weights,
                    cap=room + weights,
                    in_use=0,
                    free=self.cuda.free(),
                )
            streams = min(STREAMS, room // needs[batch])
        # a slot each on the largest canvas, and one for volumes of another canvas at the same time
        io = nbytes_of(self.tensors, shapes_of(self.tensors, batch, canvas))
        most = (STREAMS + 1) * (
            self.engine.get_device_memory_size_for_profile_v2(0) + io + ALIGNMENT
        )
        self._open_pools(
            options.max_memory or weights + most, max(options.max_memory or 0, (STREAMS + 1) * io)
        )
        self._reserved.append(self.device_pool.reserve(weights, "weights"))
        self.activations = WorkspacePool(self.cuda, self.device_pool.tag("activations"), streams)
        self.spec = EngineSpec(manifest.inputs, manifest.output, batch, streams, canvas)

    def _needs(self, wanted: list[int]) -> list[int]:
        """Bytes that a slot of each batch takes on the device, on the canvas the network was
        trained on.
        """
        needs, context = [], self.context()
        for batch in wanted:
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
        """A context without activation memory."""
        trt = self._trt
        context = self.engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        accepted(context is not None, "an execution context")
        return context

    def without_graphs(self, reason: str) -> None:
        """Go on without CUDA graphs, and say so."""
        self._no_graphs = reason

    @property
    def graphs(self) -> bool:
        return not self._no_graphs

    def _what(self) -> str:
        graphs = f"no CUDA graphs ({self._no_graphs})" if self._no_graphs else "CUDA graphs"
        return f"{self._trt.__name__.removesuffix('_bindings')} {self._trt.__version__}, {graphs}"

    def _slot(self) -> GpuSlot:
        return TensorRTSlot(self)

    def _release(self) -> None:
        self.engine = self._runtime = None  # in this order


class TensorRTSlot(GpuSlot):
    """An execution context, the activation memory it works in, and a CUDA graph of its shape.

    The first batch of a shape goes call by call, which lets TensorRT set itself up. The second is
    captured, with its copies, and the graph launched from then on, until a shape or an address
    changes. Tensors that are not page-locked are never captured.
    """

    owner: TensorRTEngine

    def __init__(self, owner: TensorRTEngine):
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
        found = tuple(context.get_tensor_shape(names[-1]))
        accepted(found == shapes[names[-1]], f"an output of {shapes[names[-1]]}, it is {found}")
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

    def _turn(self) -> AbstractContextManager[None]:
        assert self._activations is not None
        return self._activations.exclusive(self._handle, self._event)

    def _work(self, inputs: Inputs, out: NDArray[np.uint8]) -> None:
        addresses = tuple(array.ctypes.data for array in (*inputs.values(), out))
        if addresses != self._addresses:
            if self._graph is not None:
                self._drain()
            self._forget_graph()
            self._addresses = addresses
        if (
            self._graph is None
            and self._uncaptured
            and self.owner.graphs
            and all(map(self.owner.pool.owns, addresses))
        ):
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


def accepted(yes: bool, what: str) -> None:
    """Raise `EngineError` unless TensorRT took it: it says no by returning False."""
    if not yes:
        raise EngineError(
            f"TensorRT refused {what}",
            expected="what the engine was built for",
            remedy="build the engine again on this machine",
        )


def _deserialize(path: Path) -> tuple[Any, Any, Any]:
    """The module, the runtime and the engine.

    The lean runtime is asked first; what each says goes into the error.
    """
    reasons: list[str] = []
    plan = path.read_bytes()
    found = False
    for name in MODULES:
        try:
            trt = import_module(name)
        except ImportError as exc:
            reasons.append(f"{name}: {exc}")
            continue
        if (
            not VERSIONS[0]
            <= tuple(int(n) for n in str(trt.__version__).split(".")[:2])
            < VERSIONS[1]
        ):
            reasons.append(f"{name} is {trt.__version__}")
            continue
        found = True
        said: list[str] = []
        runtime = trt.Runtime(collecting_logger(trt, said))
        assert not runtime.engine_host_code_allowed, "an engine must not bring code of its own"
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is not None:
            return trt, runtime, engine
        reasons.append(f"{name} {trt.__version__}: {'; '.join(said[-3:]) or 'it says no more'}")
    if not found:
        raise MissingComponent(
            f"no TensorRT runtime can be used: {'; '.join(reasons)}",
            expected="tensorrt_lean or tensorrt >= 10.13, < 12",
            remedy=INSTALL,
        )
    raise ModelError(
        f"no TensorRT runtime here loads {path.name} ({'; '.join(reasons)})",
        expected="an engine of this TensorRT and this GPU",
        remedy="build it on this machine; one built with --native needs the same full TensorRT",
        file=path,
    )


def collecting_logger(trt: Any, said: list[str]) -> Any:
    """A TensorRT logger that keeps what it calls errors in `said`."""
    errors = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in errors:
                said.append(msg)

    return Logger()
