"""The CPU engine of OpenVINO."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ModelError, importing
from ...core.manifest import METADATA, Manifest
from ...core.telemetry import OPENVINO, hidden
from ..base import EngineError, EngineOptions, EngineSpec, Inputs, check_graph, closed
from ..memory import Stream
from .base import HostEngine

# One slice per run, as in ONNX Runtime: a batch of 8 was slower for light networks, and its last
# batch needs padding.
BATCH = 1


def openvino() -> Any:
    """Import openvino without its telemetry, which reports every import over the network.

    Returns:
        The module.

    Raises:
        MissingComponent: OpenVINO is not installed.
    """
    with hidden(OPENVINO), importing("OpenVINO", "openvino", 'pip install "mask2ct[openvino]"'):
        import openvino
    return openvino


_cores: list[Any] = []  # the one core of this process, once there is one
_making_core = threading.Lock()


def core() -> Any:
    """Return the one `openvino.Core` of this process, which stays until the process ends.

    The first model that a core loads makes its CPU plugin, which gives the calling thread a signal
    stack. A plugin that ends unmaps that stack, also where it ends in another thread or before an
    older plugin's. The next signal of a thread that has lost its stack ends the process with a
    segmentation fault: SIGTERM, or SIGCHLD where a data loader handles it.

    Raises:
        MissingComponent: OpenVINO is not installed.
    """
    ov = openvino()
    with _making_core:
        if not _cores:
            _cores.append(ov.Core())
        return _cores[0]


class _Call(NamedTuple):
    """An inference request with the arrays that it reads and writes."""

    request: Any
    inputs: Inputs
    out: NDArray[np.uint8]


class RequestStream:
    """A stream whose slices run on OpenVINO's own threads, which never wait for the interpreter.

    The stream keeps the request of its last slice. A call with the same arrays, as a slot makes it,
    uses that request again without checking or binding the arrays.
    """

    def __init__(self, engine: OpenVinoEngine):
        """Open a stream of `engine`."""
        self._engine = engine
        self._call: _Call | None = None  # in work
        self._last: _Call | None = None  # complete
        self._failure: EngineError | None = None  # the first since `synchronize`

    def is_bound_to(self, inputs: Inputs, out: NDArray[np.uint8]) -> bool:
        """Return whether the last slice was computed with these very arrays."""
        last = self._call or self._last
        return (
            last is not None
            and last.out is out
            and inputs.keys() == last.inputs.keys()
            and all(inputs[name] is array for name, array in last.inputs.items())
        )

    def begin(self, inputs: Inputs, out: NDArray[np.uint8]) -> None:
        """Wait for the last slice and start another; `synchronize` raises the errors of both."""
        bound = self.is_bound_to(inputs, out)
        self._wait()
        last, self._last = self._last, None
        try:
            if last is not None and bound:
                self._call = self._engine.restart(last)
            else:
                if last is not None:
                    self._engine.release(last)
                self._call = self._engine.begin(inputs, out)
        except EngineError as exc:
            self._failure = self._failure or exc

    def synchronize(self) -> None:
        """Wait for the slice and raise the first error since the last call."""
        self._wait()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Cancel the slice where it has not begun, else wait for it, and release its request."""
        if self._call is not None:
            self._call.request.cancel()
        self._wait()
        last, self._last = self._last, None
        if last is not None:
            self._engine.release(last)

    def _wait(self) -> None:
        # `_call` stays until the end: after an interrupt `close` must still wait for it
        if self._call is not None:
            reusable = None
            try:
                reusable = self._call if self._engine.end(self._call) else None
            except EngineError as exc:
                self._failure = self._failure or exc
            self._last, self._call = reusable, None


class OpenVinoEngine(HostEngine):
    """Runs the graph on OpenVINO's CPU plugin, each slice on one core.

    Three threads round differently from two, by 1 HU in some voxels. One thread gives the same
    result on every machine, and several slices at once keep the other cores busy.

    For the network's training canvas the graph is compiled with fixed sizes, which saves a quarter
    of the time or more. The first slice on another canvas compiles it once more with open sizes.
    Layers that are not quantized run in FP32: by default OpenVINO would use bfloat16 where the CPU
    has it, which is slower without AMX and changes the image.
    """

    def __init__(self, path: Path, manifest: Manifest, options: EngineOptions | None = None):
        """Load a graph and compile it for the training canvas.

        Args:
            path: the ONNX file.
            manifest: the manifest of the model.
            options: the options of the engine.

        Raises:
            MissingComponent: OpenVINO is not installed.
            ModelError: the file is not such a graph, or contradicts the manifest.
        """
        super().__init__(options)
        self._ov = ov = openvino()
        self._settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.workers,
            "NUM_STREAMS": self.workers,  # slices at once, each on its own thread
            # several processes on one machine would pin their threads to the same cores
            "ENABLE_CPU_PINNING": False,
        }
        self.spec = EngineSpec(manifest.inputs, manifest.output, BATCH, streams=self.streams)
        self.name = f"openvino {ov.get_version().split('-')[0]} on CPU, {path.name}"
        self._canvas, self._compiling = manifest.grid.canvas, threading.Lock()
        # both by canvas, None for every canvas but the training canvas
        self._idle_requests: dict[tuple[int, int] | None, list[Any]] = {}
        self._compiled: dict[tuple[int, int] | None, Any] = {}
        self._working: dict[int, _Call] = {}
        with _loading(path):
            self._graph = core().read_model(path)
        key = ["framework", METADATA]  # where OpenVINO keeps the metadata of an ONNX file
        signature = (
            str(self._graph.get_rt_info(key).astype(str)) if self._graph.has_rt_info(key) else None
        )
        # a port may also bear the names of tensors that OpenVINO derives from its input
        input_names = {tensor.name for tensor in manifest.inputs}
        self._ports = {
            next(iter(port.names & input_names), port.any_name): port.element_type.to_dtype().name
            for port in self._graph.inputs
        }
        check_graph(manifest, self._ports, signature, path)
        with _loading(path):
            self._compile(self._canvas)

    def open_stream(self) -> Stream:
        """Open a stream.

        Raises:
            EngineError: the engine is closed.
        """
        with self._lock:
            if self._closed:
                raise closed(self.name)
            return RequestStream(self)

    def _compile(self, canvas: tuple[int, int] | None) -> Any:
        """The graph compiled for a canvas, once; None for open sizes."""
        with self._compiling:
            if canvas not in self._compiled:
                graph = self._graph
                if canvas is not None:
                    graph = graph.clone()
                    sizes = {"N": BATCH, "H": canvas[0], "W": canvas[1]}
                    shapes = {
                        tensor.name: [sizes.get(str(d), d) for d in tensor.shape]
                        for tensor in self.spec.inputs
                    }
                    ports = zip(graph.inputs, self._ports, strict=True)
                    graph.reshape({port: shapes[name] for port, name in ports})
                self._idle_requests[canvas] = []
                self._compiled[canvas] = core().compile_model(graph, "CPU", self._settings)
            return self._compiled[canvas]

    def run(self, inputs: Inputs, out: NDArray[np.uint8], *, stream: Stream) -> None:
        """Check the arrays, unless the stream has them already, and start; see `Engine.run`."""
        if (
            isinstance(stream, RequestStream)
            and not self._closed
            and stream.is_bound_to(inputs, out)
        ):
            stream.begin(inputs, out)
        else:
            super().run(inputs, out, stream=stream)

    def _submit(self, inputs: Inputs, out: NDArray[np.uint8], stream: Stream) -> None:
        if isinstance(stream, RequestStream):
            stream.begin(inputs, out)
        else:
            super()._submit(inputs, out, stream)

    def _infer(self, inputs: Inputs, out: NDArray[np.uint8]) -> None:
        call = self.begin(inputs, out)
        if self.end(call):
            self.release(call)

    def begin(self, inputs: Inputs, out: NDArray[np.uint8]) -> _Call:
        """Start a slice, which `end` waits for.

        Args:
            inputs: the input arrays by name, checked.
            out: the output array, uint8 (N, H, W, 2).

        Returns:
            The call, which holds the arrays.

        Raises:
            EngineError: the engine is closed or OpenVINO fails.
        """
        with self.map_errors(out):
            canvas = self._canvas_of(out)
            compiled = self._compile(canvas)
            try:
                request = self._idle_requests[canvas].pop()
            except IndexError:
                request = compiled.create_infer_request()
            for name, array in inputs.items():
                request.set_tensor(name, self._ov.Tensor(array, shared_memory=True))
            request.set_tensor(self.spec.output.name, self._ov.Tensor(out, shared_memory=True))
            return self._start(_Call(request, dict(inputs), out))

    def restart(self, last: _Call) -> _Call:
        """Start a slice with the request and the arrays of a complete one; see `begin`."""
        with self.map_errors(last.out):
            return self._start(last)

    def _start(self, call: _Call) -> _Call:
        with self._lock:
            if self._closed:
                raise closed(self.name)
            call.request.start_async()
            self._working[id(call)] = call
        return call

    def end(self, call: _Call) -> bool:
        """Wait for a slice.

        Args:
            call: the call, from `begin` or `restart`.

        Returns:
            Whether its request may be used again: once, and not after an error.

        Raises:
            EngineError: OpenVINO failed, or the engine was closed meanwhile.
        """
        with self.map_errors(call.out):
            try:
                call.request.wait()
            finally:
                # False for a second wait after an interrupt
                first = self._working.pop(id(call), None) is not None
                # `close` may have cancelled the request, which only the first wait reports
                if self._closed:
                    raise closed(self.name)
        return first

    def release(self, call: _Call) -> None:
        """Let the request of a complete slice serve other arrays."""
        self._idle_requests[self._canvas_of(call.out)].append(call.request)

    def _canvas_of(self, out: NDArray[np.uint8]) -> tuple[int, int] | None:
        size = (out.shape[1], out.shape[2])
        return size if size == self._canvas else None

    def close(self) -> None:
        """Cancel or wait for the slices in work, then release the compiled graphs."""
        with self._lock:
            self._closed, working = True, list(self._working.values())
        for call in working:
            call.request.cancel()
        for call in working:
            with suppress(Exception):  # the stream of the call raises it
                call.request.wait()
        super().close()
        self._idle_requests = {canvas: [] for canvas in self._idle_requests}
        self._compiled.clear()
        self._graph = None


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    """Raise the errors of OpenVINO as `ModelError`."""
    try:
        yield
    except Exception as exc:  # OpenVINO raises RuntimeError and classes of its bindings
        raise ModelError(
            f"{path.name} is not a graph OpenVINO loads: {str(exc).strip().splitlines()[-1][:200]}",
            expected="an ONNX graph as export writes it",
            remedy="export the run again",
            file=path,
        ) from exc
