"""The graph in ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ModelError, importing
from ...core.manifest import METADATA, Manifest
from ..base import EngineOptions, EngineSpec, Inputs, check_graph, closed, cores
from .base import HostEngine

# One slice a run: on two cores a batch of 8 gained 9 to 13 % for the widest network and lost for a
# light one, and one
# slice at a time needs the least memory and pads nothing.
BATCH = 1


def onnxruntime() -> Any:
    """The onnxruntime module. Raises `MissingComponent` with the two packages that provide it."""
    which = "onnxruntime (or onnxruntime-gpu; never both, they overwrite each other)"
    with importing("ONNX Runtime", which, 'pip install "mask2ct[onnx]"'):
        import onnxruntime
    return onnxruntime


class OnnxEngine(HostEngine):
    """`path` run by ONNX Runtime's CPU provider, whose workers share the cores: its threads
    change no byte.
    """

    def __init__(self, path: Path, manifest: Manifest, options: EngineOptions | None = None):
        super().__init__(options)
        ort = onnxruntime()
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = max(1, cores() // self.workers)
        settings.add_session_config_entry(
            "session.intra_op.allow_spinning", "0"
        )  # who waits leaves the core to the other stages
        settings.log_severity_level = 3
        try:
            self._session: Any = ort.InferenceSession(
                str(path), settings, providers=["CPUExecutionProvider"]
            )
        except (
            Exception
        ) as exc:  # ONNX Runtime raises classes of its own that share no base but Exception
            raise ModelError(
                f"{path.name} is not a graph ONNX Runtime loads: {str(exc).splitlines()[0][:200]}",
                expected="an ONNX graph as export writes it",
                remedy="export the run again",
                file=path,
            ) from exc
        inputs = {i.name: DTYPES.get(i.type) for i in self._session.get_inputs()}
        check_graph(
            manifest, inputs, self._session.get_modelmeta().custom_metadata_map.get(METADATA), path
        )
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
        super().close()
        self._session = None


DTYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}
