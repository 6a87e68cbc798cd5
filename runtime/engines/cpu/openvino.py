"""The graph in OpenVINO on the CPU."""

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

# one slice a run, as in ONNX Runtime: a batch of 8 was slower for light networks, and pads the last
BATCH = 1


def openvino() -> Any:
    """The openvino module, imported so that it sends nothing: by itself it reports every import to
    its makers over the network.

    Raises `MissingComponent`.
    """
    with hidden(OPENVINO), importing("OpenVINO", "openvino", 'pip install "mask2ct[openvino]"'):
        import openvino
    return openvino


class _Call(NamedTuple):
    """A slice in work, and what it reads and writes."""

    request: Any
    inputs: Inputs
    out: NDArray[np.uint8]


class RequestStream:
    """Slices that OpenVINO's own threads compute: between two of them no thread has to wait for the
    interpreter.

    The request of the last slice is kept: given the same arrays again, as by a slot, there is
    nothing to check and nothing to set.
    """

    def __init__(self, engine: OpenVinoEngine):
        self._engine = engine
        self._call: _Call | None = None  # in work
        self._last: _Call | None = None  # done
        self._failure: EngineError | None = None  # the first since `synchronize`

    def knows(self, inputs: Inputs, out: NDArray[np.uint8]) -> bool:
        """Whether the last slice was computed with these very arrays."""
        last = self._call or self._last
        return (
            last is not None
            and last.out is out
            and inputs.keys() == last.inputs.keys()
            and all(inputs[name] is array for name, array in last.inputs.items())
        )

    def begin(self, inputs: Inputs, out: NDArray[np.uint8]) -> None:
        known = self.knows(inputs, out)
        self._wait()
        last, self._last = self._last, None
        try:
            if last is not None and known:
                self._call = self._engine.again(last)
            else:
                if last is not None:
                    self._engine.give_back(last)
                self._call = self._engine.begin(inputs, out)
        except EngineError as exc:
            self._failure = self._failure or exc

    def synchronize(self) -> None:
        self._wait()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        if self._call is not None:
            self._call.request.cancel()  # what is not begun never is
        self._wait()
        last, self._last = self._last, None
        if last is not None:
            self._engine.give_back(last)

    def _wait(self) -> None:
        if self._call is not None:  # kept until it is done: an interrupt leaves it to `close`
            done = None
            try:
                done = self._call if self._engine.end(self._call) else None
            except EngineError as exc:
                self._failure = self._failure or exc
            self._last, self._call = done, None


class OpenVinoEngine(HostEngine):
    """`path` run by OpenVINO's CPU plugin, each slice on one core.

    Three threads round otherwise than two, by a HU here and there; one is the same on every
    machine, and several slices at once keep the other cores busy. For the canvas the network was
    trained on the graph is compiled with its sizes fixed, which saves a quarter of the time and
    more; for all others, when the first comes, with sizes that are open. What is not quantised is
    computed in FP32. Left to itself OpenVINO takes bfloat16 where the CPU has it, which is slower
    without AMX and changes the image.
    """

    def __init__(self, path: Path, manifest: Manifest, options: EngineOptions | None = None):
        super().__init__(options)
        self._ov = ov = openvino()
        self._settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.workers,
            "NUM_STREAMS": self.workers,  # as many slices at once, each on a thread of its own
            # several processes on one machine would pin to the same cores
            "ENABLE_CPU_PINNING": False,
        }
        self.spec = EngineSpec(manifest.inputs, manifest.output, BATCH, streams=self.streams)
        self.name = f"openvino {ov.get_version().split('-')[0]} on CPU, {path.name}"
        self._canvas, self._compiling = manifest.grid.canvas, threading.Lock()
        self._idle: dict[
            tuple[int, int] | None, list[Any]
        ] = {}  # by canvas (None: any other) the requests that serve no call
        self._compiled: dict[tuple[int, int] | None, Any] = {}
        self._working: dict[int, _Call] = {}
        with _loading(path):
            self._core = ov.Core()
            self._graph = self._core.read_model(path)
        place = ["framework", METADATA]  # where OpenVINO keeps the metadata of an ONNX file
        signature = (
            str(self._graph.get_rt_info(place).astype(str))
            if self._graph.has_rt_info(place)
            else None
        )
        known = {
            tensor.name for tensor in manifest.inputs
        }  # OpenVINO may give a port the names of tensors made of it too
        self._ports = {
            next(iter(port.names & known), port.any_name): port.element_type.to_dtype().name
            for port in self._graph.inputs
        }
        check_graph(manifest, self._ports, signature, path)
        with _loading(path):
            self._compile(self._canvas)

    def open_stream(self) -> Stream:
        with self._lock:
            if self._closed:
                raise closed(self.name)
            return RequestStream(self)

    def _compile(self, canvas: tuple[int, int] | None) -> Any:
        with self._compiling:
            if canvas not in self._compiled:
                graph = self._graph
                if canvas is not None:
                    graph = graph.clone()
                    sizes = {"N": BATCH, "H": canvas[0], "W": canvas[1]}
                    named = {
                        tensor.name: [sizes.get(str(d), d) for d in tensor.shape]
                        for tensor in self.spec.inputs
                    }
                    graph.reshape(
                        {
                            port: named[name]
                            for port, name in zip(graph.inputs, self._ports, strict=True)
                        }
                    )
                self._idle[canvas] = []
                self._compiled[canvas] = self._core.compile_model(graph, "CPU", self._settings)
            return self._compiled[canvas]

    def run(self, inputs: Inputs, out: NDArray[np.uint8], *, stream: Stream) -> None:
        if isinstance(stream, RequestStream) and not self._closed and stream.knows(inputs, out):
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
            self.give_back(call)

    def begin(self, inputs: Inputs, out: NDArray[np.uint8]) -> _Call:
        """Set OpenVINO to work on a slice; `end` waits for it. Raises `EngineError`."""
        with self.failing(out):
            compiled, idle = self._compile(canvas := self._canvas_of(out)), self._idle[canvas]
            try:
                request = idle.pop()
            except IndexError:
                request = compiled.create_infer_request()
            for name, array in inputs.items():
                request.set_tensor(name, self._ov.Tensor(array, shared_memory=True))
            request.set_tensor(self.spec.output.name, self._ov.Tensor(out, shared_memory=True))
            return self._started(_Call(request, dict(inputs), out))

    def again(self, last: _Call) -> _Call:
        """`begin` with the request and the arrays of a slice that is done. Raises `EngineError`."""
        with self.failing(last.out):
            return self._started(last)

    def _started(self, call: _Call) -> _Call:
        with self._lock:
            if self._closed:
                raise closed(self.name)
            call.request.start_async()
            self._working[id(call)] = call
        return call

    def end(self, call: _Call) -> bool:
        """Wait for a slice, and say whether its request may be used again. Raises `EngineError`."""
        with self.failing(call.out):
            try:
                call.request.wait()
            finally:
                first = (
                    self._working.pop(id(call), None) is not None
                )  # and not again after an interrupt
                if self._closed:  # it may have been cancelled, and only the first to wait is told
                    raise closed(self.name)
        return first  # one that failed is not used again

    def give_back(self, call: _Call) -> None:
        """Let the request of a slice that is done serve other arrays."""
        self._idle[self._canvas_of(call.out)].append(call.request)

    def _canvas_of(self, out: NDArray[np.uint8]) -> tuple[int, int] | None:
        size = (out.shape[1], out.shape[2])
        return size if size == self._canvas else None

    def close(self) -> None:
        with self._lock:
            self._closed, working = True, list(self._working.values())
        for call in working:
            call.request.cancel()
        for call in working:
            with suppress(Exception):  # whoever gave the work is told
                call.request.wait()
        super().close()
        self._idle = {canvas: [] for canvas in self._idle}
        self._compiled.clear()
        self._graph = None


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as exc:  # OpenVINO raises RuntimeError and classes of its bindings
        raise ModelError(
            f"{path.name} is not a graph OpenVINO loads: {str(exc).strip().splitlines()[-1][:200]}",
            expected="an ONNX graph as export writes it",
            remedy="export the run again",
            file=path,
        ) from exc
