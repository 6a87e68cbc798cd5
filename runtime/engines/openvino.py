"""The graph in OpenVINO on the CPU."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contract import METADATA, Manifest
from ..errors import ModelError, importing
from .base import EngineOptions, EngineSpec, Inputs, check_graph
from .host import HostEngine

BATCH = 1  # one slice a run, as in ONNX Runtime: a batch of 8 was slower for light networks, and pads the last
_TELEMETRY = "openvino_telemetry"


def openvino() -> Any:
    """The openvino module, imported so that it sends nothing: by itself it reports every import to its makers over the network.

    Raises `MissingComponent`.
    """
    hidden = {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == _TELEMETRY}
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # cannot be imported: openvino takes its own stub
    try:
        with importing("OpenVINO", "openvino", 'pip install "mask2ct[openvino]"'):
            import openvino
    finally:
        del sys.modules[_TELEMETRY]
        sys.modules.update(hidden)
    return openvino


class OpenVinoEngine(HostEngine):
    """`path` run by OpenVINO's CPU plugin, each slice on one core.

    Three threads round otherwise than two, by a HU here and there; one is the same on every machine, and several slices at once keep
    the other cores busy. For the canvas the network was trained on the graph is compiled with its sizes fixed, which saves a quarter of
    the time and more; for all others, when the first comes, with sizes that are open.
    What is not quantised is computed in FP32. Left to itself OpenVINO takes bfloat16 where the CPU has it, which is slower
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
            "ENABLE_CPU_PINNING": False,  # several processes on one machine would pin to the same cores
        }
        self.spec = EngineSpec(manifest.inputs, manifest.output, BATCH, streams=self.streams)
        self.name = f"openvino {ov.get_version().split('-')[0]} on CPU, {path.name}"
        self._canvas, self._compiling = manifest.grid.canvas, threading.Lock()
        self._requests: dict[tuple[int, int] | None, SimpleQueue[Any]] = {}  # canvas (None: any other) → the idle ones
        with _loading(path):
            self._core = ov.Core()
            self._graph = self._core.read_model(path)
        place = ["framework", METADATA]  # where OpenVINO keeps the metadata of an ONNX file
        statement = str(self._graph.get_rt_info(place).astype(str)) if self._graph.has_rt_info(place) else None
        known = {tensor.name for tensor in manifest.inputs}  # OpenVINO may give a port the names of tensors made of it too
        self._ports = {next(iter(port.names & known), port.any_name): port.element_type.to_dtype().name for port in self._graph.inputs}
        check_graph(manifest, self._ports, statement, path)
        with _loading(path):
            self._idle(self._canvas)

    def _idle(self, size: tuple[int, int]) -> SimpleQueue[Any]:
        """The idle requests for canvases of that size: one serves one call at a time. Compiles the graph for the first of them."""
        canvas = size if size == self._canvas else None
        with self._compiling:
            if canvas not in self._requests:
                graph = self._graph
                if canvas is not None:
                    graph = graph.clone()
                    sizes = {"N": BATCH, "H": canvas[0], "W": canvas[1]}
                    named = {tensor.name: [sizes.get(str(d), d) for d in tensor.shape] for tensor in self.spec.inputs}
                    graph.reshape({port: named[name] for port, name in zip(graph.inputs, self._ports, strict=True)})
                compiled = self._core.compile_model(graph, "CPU", self._settings)
                self._requests[canvas] = SimpleQueue()
                for _ in range(self.workers):
                    self._requests[canvas].put(compiled.create_infer_request())
            return self._requests[canvas]

    def _infer(self, inputs: Inputs, out: NDArray[np.uint8]) -> None:
        idle = self._idle((out.shape[1], out.shape[2]))
        request = idle.get()
        try:
            for name, array in inputs.items():
                request.set_tensor(name, self._ov.Tensor(array, shared_memory=True))
            request.set_tensor(self.spec.output.name, self._ov.Tensor(out, shared_memory=True))
            request.infer()
        finally:
            idle.put(request)

    def close(self) -> None:
        super().close()
        self._requests.clear()
        self._graph = None


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as exc:  # OpenVINO raises RuntimeError and classes of its bindings
        raise ModelError(f"{path.name} is not a graph OpenVINO loads: {str(exc).strip().splitlines()[-1][:200]}",
                         expected="an ONNX graph as export writes it", remedy="export the run again", file=path) from exc  # fmt: skip
