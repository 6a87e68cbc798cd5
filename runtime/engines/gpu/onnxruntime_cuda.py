"""The graph in ONNX Runtime on an NVIDIA GPU: its tensors stay on the device, in slots like
TensorRT's.
"""

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
from .probe import DRIVER_REMEDY, why_no_gpu

PROVIDER = "CUDAExecutionProvider"
INSTALL = (
    'pip uninstall onnxruntime, then pip install "mask2ct[gpu]" "onnxruntime-gpu[cuda,cudnn]"'
    " (never beside onnxruntime)"
)
DEFAULT_CAP = (
    2 << 30
    # bytes; the graph states no need, and what cuDNN takes for a convolution is bounded by nothing
    # else
)
BATCH, MOST = 8, 64


def why_absent() -> tuple[str, str] | None:
    """Why ONNX Runtime runs nothing on a GPU here and the remedy, or None when it may.

    Imports onnxruntime, which says what it is.
    """
    if find_spec("onnxruntime") is None:
        return "onnxruntime-gpu is not installed", INSTALL
    if PROVIDER not in onnxruntime().get_available_providers():
        return "the installed onnxruntime was built without CUDA", INSTALL
    why = why_no_gpu()
    return (why, DRIVER_REMEDY) if why else None


class OnnxCudaEngine(GpuEngine):
    """`path` by ONNX Runtime's CUDA provider and no other on GPU number `options.device`.

    Of `max_memory` (2 GiB unless told otherwise) the tensors take their part and ONNX Runtime's
    arena the rest. Convolutions are chosen by rule rather than by timing, without TF32, so that
    every run gives the same bytes. Raises `MissingComponent` where the provider cannot work: ONNX
    Runtime itself would go on with the CPU.
    """

    def __init__(self, path: Path, manifest: Manifest, options: EngineOptions | None = None):
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
            io = (
                (STREAMS + 1)
                * nbytes_of(self.tensors, shapes_of(self.tensors, BATCH, self._canvas))
                * 4
            )  # a canvas may double each side
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
        ort = self._ort
        with redirect_stdout(sys.stderr):  # it prints what it does not find
            if hasattr(ort, "preload_dlls"):
                ort.preload_dlls()
        settings = ort.SessionOptions()
        settings.log_severity_level = 4  # what matters is raised
        settings.use_deterministic_compute = True
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        wanted = {
            "device_id": str(ordinal),
            "gpu_mem_limit": str(arena),
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",
            "use_tf32": "0",
        }
        try:
            session = ort.InferenceSession(str(path), settings, providers=[(PROVIDER, wanted)])
        except (
            Exception
        ) as exc:  # ONNX Runtime raises classes of its own that share no base but Exception
            text = str(exc).splitlines()[0][:300]
            if any(
                word in text
                for word in ("INVALID_PROTOBUF", "INVALID_GRAPH", "NO_SUCHFILE", "INVALID_ARGUMENT")
            ):
                raise ModelError(
                    f"{path.name} is not a graph ONNX Runtime loads: {text}",
                    expected="an ONNX graph as export writes it",
                    remedy="export the run again",
                    file=path,
                ) from exc
            raise _missing(f"ONNX Runtime cannot run this graph on the GPU: {text}") from exc
        if session.get_providers()[:1] != [PROVIDER]:
            raise _missing(f"ONNX Runtime chose {session.get_providers()} instead of the GPU")
        inputs = {i.name: DTYPES.get(i.type) for i in session.get_inputs()}
        check_graph(
            manifest, inputs, session.get_modelmeta().custom_metadata_map.get(METADATA), path
        )
        return session

    def _choose_batch(self, manifest: Manifest, room: int) -> None:
        """The largest batch whose slots fit in `room` bytes and that a trial on the canvas gets
        through with: nothing tells before.
        """
        for batch in batches(1, MOST):
            shapes = shapes_of(self.tensors, batch, self._canvas)
            if batch > 1 and (STREAMS + 1) * nbytes_of(self.tensors, shapes) > room:
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
    """An IO binding to the slot's tensors.

    Computation is started by the engine's one thread, since a run of ONNX Runtime returns when it
    is done; uploads and downloads of other slots go on beside it.
    """

    owner: OnnxCudaEngine

    def __init__(self, owner: OnnxCudaEngine):
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
        self._queue.submit(self._rest(out))

    def _rest(self, out: NDArray[np.uint8]) -> Callable[[], None]:
        def rest() -> None:
            with self.cuda.current():
                self.cuda.wait(self._event)
                try:
                    self.owner.session.run_with_iobinding(self._binding)
                except Exception as exc:
                    raise self._failed(exc) from exc
                self._download(out)
                self.cuda.record(self._event, self._handle)

        return rest

    def _failed(self, exc: Exception) -> Exception:
        text = str(exc)
        if short := re.search(r"requested bytes of (\d+)", text):
            return self.owner.device_pool.exceeded(int(short[1]))
        return EngineError(
            f"ONNX Runtime failed on the GPU: {text.splitlines()[0][:300]}",
            expected="a batch synthesized",
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
