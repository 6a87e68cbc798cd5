"""The graph in OpenVINO on the CPU."""

from __future__ import annotations

import sys
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
    the other cores busy.
    What is not quantised is computed in FP32. Left to itself OpenVINO takes bfloat16 where the CPU has it, which is slower
    without AMX and changes the image.
    """

    def __init__(self, path: Path, manifest: Manifest, options: EngineOptions | None = None):
        super().__init__(options)
        ov = openvino()
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.workers,
            "NUM_STREAMS": self.workers,  # as many slices at once, each on a thread of its own
            "ENABLE_CPU_PINNING": False,  # several processes on one machine would pin to the same cores
        }
        try:
            model = ov.Core().read_model(path)
            compiled = ov.Core().compile_model(model, "CPU", settings)
        except Exception as exc:  # OpenVINO raises RuntimeError and classes of its bindings
            raise ModelError(f"{path.name} is not a graph OpenVINO loads: {str(exc).strip().splitlines()[-1][:200]}",
                             expected="an ONNX graph as export writes it", remedy="export the run again", file=path) from exc  # fmt: skip
        place = ["framework", METADATA]  # where OpenVINO keeps the metadata of an ONNX file
        statement = str(model.get_rt_info(place).astype(str)) if model.has_rt_info(place) else None
        known = {tensor.name for tensor in manifest.inputs}  # OpenVINO may give a port the names of tensors made of it too
        names = [next(iter(port.names & known), port.any_name) for port in compiled.inputs]
        dtypes = [port.element_type.to_dtype().name for port in compiled.inputs]
        check_graph(manifest, dict(zip(names, dtypes, strict=True)), statement, path)
        self._ov, self._requests = ov, SimpleQueue[Any]()  # the idle ones: a request serves one call at a time
        for _ in range(self.workers):
            self._requests.put(compiled.create_infer_request())
        self.spec = EngineSpec(manifest.inputs, manifest.output, BATCH, streams=self.workers + 1)
        self.name = f"openvino {ov.get_version().split('-')[0]} on CPU, {path.name}"

    def _infer(self, inputs: Inputs, out: NDArray[np.uint8]) -> None:
        request = self._requests.get()
        try:
            for name, array in inputs.items():
                request.set_tensor(name, self._ov.Tensor(array, shared_memory=True))
            request.set_tensor(self.spec.output.name, self._ov.Tensor(out, shared_memory=True))
            request.infer()
        finally:
            self._requests.put(request)

    def close(self) -> None:
        super().close()
        self._requests = SimpleQueue()
