"""The CPU engine of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ModelError, importing
from ...core.manifest import METADATA, Manifest
from ..base import EngineOptions, EngineSpec, Inputs, check_graph, closed, cores
from .base import HostEngine

# One slice per run needs the least memory and no padding. On two cores a batch of 8 gained 9 to
# 13 % for the widest network, but lost time for a light one.
BATCH = 1
DTYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}  # ONNX Runtime → numpy


def onnxruntime() -> Any:
    """Import onnxruntime.

    Returns:
        The module.

    Raises:
        MissingComponent: neither of the two packages that provide it is installed.
    """
    which = "onnxruntime (or onnxruntime-gpu; never both, they overwrite each other)"
    with importing("ONNX Runtime", which, 'pip install "mask2ct[onnx]"'):
        import onnxruntime
    return onnxruntime


class OnnxEngine(HostEngine):
    """Runs the graph on ONNX Runtime's CPU provider; the result does not depend on the threads."""

    def __init__(self, path: Path, manifest: Manifest, options: EngineOptions | None = None):
        """Load a graph.

        Args:
            path: the ONNX file.
            manifest: the manifest of the model.
            options: the options of the engine.

        Raises:
            MissingComponent: ONNX Runtime is not installed.
            ModelError: the file is not such a graph, or contradicts the manifest.
        """
        super().__init__(options)
        ort = onnxruntime()
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = max(1, cores() // self.workers)
        # a thread that waits must leave its core to the other stages
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        settings.log_severity_level = 3
        try:
            self._session: Any = ort.InferenceSession(
                str(path), settings, providers=["CPUExecutionProvider"]
            )
        # ONNX Runtime's classes share no base but Exception
        except Exception as exc:
            raise ModelError(
                f"{path.name} is not a graph ONNX Runtime loads: {str(exc).splitlines()[0][:200]}",
                expected="an ONNX graph as export writes it",
                remedy="export the run again",
                file=path,
            ) from exc
        inputs = {tensor.name: DTYPES.get(tensor.type) for tensor in self._session.get_inputs()}
        signature = self._session.get_modelmeta().custom_metadata_map.get(METADATA)
        check_graph(manifest, inputs, signature, path)
        self.spec = EngineSpec(manifest.inputs, manifest.output, BATCH, streams=self.streams)
        self.name = f"onnxruntime {ort.__version__} on CPU, {path.name}"

    def _infer(self, inputs: Inputs, out: NDArray[np.uint8]) -> None:
        session = self._session
        if session is None:
            raise closed(self.name)
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        binding.bind_output(self.spec.output.name, "cpu", 0, np.uint8, out.shape, out.ctypes.data)
        session.run_with_iobinding(binding)

    def close(self) -> None:
        """Wait for the work in progress and release the session."""
        super().close()
        self._session = None
