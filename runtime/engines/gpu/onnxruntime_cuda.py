"""The GPU engine of ONNX Runtime, whose tensors stay on the device as in the TensorRT engine."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import MemoryCapExceeded, MissingComponent, ModelError
from ...core.manifest import METADATA, Manifest
from ..base import EngineError, EngineOptions, EngineSpec, Inputs, check_graph
from ..cpu.base import WorkerStream
from ..cpu.onnxruntime import DTYPES, onnxruntime
from ..memory import HOST_STREAM
from .base import STREAMS, GpuEngine, GpuSlot, Shapes, batches, nbytes_of, shapes_of

PROVIDER = "CUDAExecutionProvider"
INSTALL = (
    'pip uninstall onnxruntime, then pip install "mask2ct[gpu]" "onnxruntime-gpu[cuda,cudnn]"'
    " (never beside onnxruntime)"
)
# bytes; a graph does not state its need, and nothing else bounds cuDNN's memory for a convolution
DEFAULT_CAP = 2 << 30
BATCH, MAX_BATCH = 8, 64
# words in ONNX Runtime's errors about the file, not the GPU
_FILE_ERRORS = ("INVALID_PROTOBUF", "INVALID_GRAPH", "NO_SUCHFILE", "INVALID_ARGUMENT")


def why_absent() -> tuple[str, str] | None:
    """Return why ONNX Runtime cannot use a GPU and the remedy; None where it can.

    The caller has seen that there is a GPU. The check imports onnxruntime, which alone knows its
    providers.
    """
    if find_spec("onnxruntime") is None:
        return "onnxruntime-gpu is not installed", INSTALL
    if PROVIDER not in onnxruntime().get_available_providers():
        return "the installed onnxruntime was built without CUDA", INSTALL
    return None


class OnnxCudaEngine(GpuEngine):
    """Runs the graph on ONNX Runtime's CUDA provider, and on no other.

    The tensors take their share of `max_memory` (2 GiB by default), and ONNX Runtime's arena takes
    the rest. cuDNN chooses its convolutions by heuristics, not by timing, and without TF32, so that
    all runs give the same bytes.

    Attributes:
        worker: the one thread that runs the session.
        session: the session of ONNX Runtime.
    """

    def __init__(self, path: Path, manifest: Manifest, options: EngineOptions | None = None):
        """Load a graph.

        Args:
            path: the ONNX file.
            manifest: the manifest of the model.
            options: the options of the engine.

        Raises:
            MissingComponent: the CUDA provider cannot work; ONNX Runtime by itself would go on with
                the CPU.
            ModelError: the file is not such a graph, or contradicts the manifest.
            MemoryCapExceeded: the tensors do not fit into `max_memory`.
        """
        options = options or EngineOptions()
        self._ort: Any = onnxruntime()
        if PROVIDER not in self._ort.get_available_providers():
            raise _missing(
                f"the installed onnxruntime {self._ort.__version__} was built without CUDA"
            )
        self.worker: ThreadPoolExecutor | None = None
        self.session: Any = None
        super().__init__(manifest, options)
        try:
            cap = options.max_memory or DEFAULT_CAP
            batch_bytes = nbytes_of(self.tensors, shapes_of(self.tensors, BATCH, self._canvas))
            io = (STREAMS + 1) * batch_bytes * 4  # a canvas may double each side
            self._open_pools(cap, cap)
            if io >= cap:
                raise self.device_pool.exceeded(io)
            self._reserved.append(self.device_pool.reserve(cap - io, "arena"))
            self.worker = ThreadPoolExecutor(1, thread_name_prefix="mask2ct GPU")
            self.session = self._load(path, manifest, options.device, cap - io)
            self.spec = EngineSpec(manifest.inputs, manifest.output, BATCH, STREAMS)
            if options.auto_batch:
                self._choose_batch(manifest, io)
        except BaseException:
            self.close()
            raise

    def _load(self, path: Path, manifest: Manifest, ordinal: int, arena: int) -> Any:
        """Open the session with an arena of so many bytes."""
        ort = self._ort
        with redirect_stdout(sys.stderr):  # it prints the libraries that it does not find
            if hasattr(ort, "preload_dlls"):
                ort.preload_dlls()
        settings = ort.SessionOptions()
        settings.log_severity_level = 4  # errors that matter are raised
        settings.use_deterministic_compute = True
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        cuda_options = {
            "device_id": str(ordinal),
            "gpu_mem_limit": str(arena),
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",
            "use_tf32": "0",
        }
        try:
            providers = [(PROVIDER, cuda_options)]
            session = ort.InferenceSession(str(path), settings, providers=providers)
        # ONNX Runtime's classes share no base but Exception
        except Exception as exc:
            text = str(exc).splitlines()[0][:300]
            if any(word in text for word in _FILE_ERRORS):
                raise ModelError(
                    f"{path.name} is not a graph ONNX Runtime loads: {text}",
                    expected="an ONNX graph as export writes it",
                    remedy="export the run again",
                    file=path,
                ) from exc
            raise _missing(f"ONNX Runtime cannot run this graph on the GPU: {text}") from exc
        if session.get_providers()[:1] != [PROVIDER]:
            raise _missing(f"ONNX Runtime chose {session.get_providers()} instead of the GPU")
        inputs = {tensor.name: DTYPES.get(tensor.type) for tensor in session.get_inputs()}
        signature = session.get_modelmeta().custom_metadata_map.get(METADATA)
        check_graph(manifest, inputs, signature, path)
        return session

    def _choose_batch(self, manifest: Manifest, budget: int) -> None:
        """Choose the largest batch whose slots fit in `budget` bytes and that runs in a trial.

        ONNX Runtime does not state beforehand how much memory a batch takes.
        """
        for batch in batches(1, MAX_BATCH):
            shapes = shapes_of(self.tensors, batch, self._canvas)
            if batch > 1 and (STREAMS + 1) * nbytes_of(self.tensors, shapes) > budget:
                continue
            self.spec = EngineSpec(manifest.inputs, manifest.output, batch, STREAMS)
            arrays = {t.name: np.zeros(shapes[t.name], t.dtype) for t in self.tensors}
            out = arrays.pop(manifest.output.name)
            try:
                self.run(arrays, out, stream=HOST_STREAM)
                return
            except MemoryCapExceeded:
                if batch == 1:
                    raise

    def _what(self) -> str:
        return f"onnxruntime {self._ort.__version__} on CUDA"

    def _slot(self) -> GpuSlot:
        return OnnxCudaSlot(self)

    def _release(self) -> None:
        if self.worker is not None:
            self.worker.shutdown()
        self.session = None


class OnnxCudaSlot(GpuSlot):
    """A slot with an IO binding to its tensors.

    A run of ONNX Runtime blocks until it is complete. The engine's one thread therefore makes all
    runs, while other slots upload and download.
    """

    owner: OnnxCudaEngine

    def __init__(self, owner: OnnxCudaEngine):
        """Make a slot of `owner`."""
        self._binding: Any = None
        assert owner.worker is not None
        self._queue = WorkerStream(owner.worker, owner.name)
        super().__init__(owner)

    def _bind(self, shapes: Shapes) -> None:
        binding, ordinal = self.owner.session.io_binding(), self.cuda.device.ordinal
        for tensor in self.owner.tensors[:-1]:
            binding.bind_input(
                tensor.name,
                "cuda",
                ordinal,
                np.dtype(tensor.dtype).type,
                shapes[tensor.name],
                self.buffers[tensor.name].ptr,
            )
        output = self.owner.tensors[-1]
        binding.bind_output(
            output.name,
            "cuda",
            ordinal,
            np.uint8,
            shapes[output.name],
            self.buffers[output.name].ptr,
        )
        self._binding = binding

    def _unbind(self) -> None:
        self._binding = None
        super()._unbind()

    def _work(self, inputs: Inputs, out: NDArray[np.uint8]) -> None:
        self._upload(inputs)
        self.cuda.record(self._event, self._handle)
        self._queue.submit(self._run_and_download(out))

    def _run_and_download(self, out: NDArray[np.uint8]) -> Callable[[], None]:
        """The work of the engine's thread for one batch, after its upload."""

        def run_and_download() -> None:
            with self.cuda.current():
                self.cuda.wait(self._event)
                try:
                    self.owner.session.run_with_iobinding(self._binding)
                except Exception as exc:
                    raise self._error_of(exc) from exc
                self._download(out)
                self.cuda.record(self._event, self._handle)

        return run_and_download

    def _error_of(self, exc: Exception) -> Exception:
        """Our error for one of ONNX Runtime's."""
        text = str(exc)
        if match := re.search(r"requested bytes of (\d+)", text):
            return self.owner.device_pool.exceeded(int(match[1]))
        return EngineError(
            f"ONNX Runtime failed on the GPU: {text.splitlines()[0][:300]}",
            expected="a synthesized batch",
            remedy="run again, or with --backend onnx on the CPU",
        )

    def _finish(self) -> None:
        self._queue.synchronize()
        super()._finish()

    def _drain(self) -> None:
        self._queue.close()
        super()._drain()


def _missing(fact: str) -> MissingComponent:
    return MissingComponent(
        fact, expected=f"onnxruntime-gpu with {PROVIDER}, CUDA 13 and cuDNN 9", remedy=INSTALL
    )
