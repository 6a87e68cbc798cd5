"""What could run the same network on a GPU: PyTorch, ONNX Runtime, a bare TensorRT engine.

PyTorch runs FP16 in a CUDA graph, ONNX Runtime its CUDA provider. They are contenders of the suite
`engine`, beside ours of the same backend. Each states why it cannot run where it cannot. They have
not run yet, for want of a machine with a GPU. Fact `vram`: bytes of device memory in use while it
runs, less what was in use before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.bare import Bare
from benchmarks.harness.libraries import loop, network, opened, tensors
from benchmarks.harness.paired import Ready
from runtime.core.errors import MissingComponent
from runtime.core.manifest import Manifest
from runtime.engines.cpu.onnxruntime import onnxruntime
from runtime.engines.gpu.onnxruntime_cuda import INSTALL, PROVIDER
from runtime.engines.gpu.probe import DRIVER_REMEDY, why_no_gpu


def by_pytorch(model: str, trained: str, slices: int, batch: int) -> Ready:
    """The FP16 network of a run, captured once with fixed tensors and replayed.

    Args:
        model: The model folder.
        trained: The run folder.
        slices: Slices in a round.
        batch: Slices in a call.

    Returns:
        The contender; its unit is slices.

    Raises:
        MissingComponent: The GPU, a package or a file is missing.
    """
    _need_gpu()
    import torch

    from export.graph import fuse_batch_norm, to_fp16

    if not torch.cuda.is_available():
        raise _absent(f"torch {torch.__version__} has no CUDA")
    if not (Path(trained) / "run.json").is_file():
        raise _absent("the run folder of this model is missing")
    before = torch.cuda.mem_get_info()[0]
    graph = to_fp16(fuse_batch_norm(network(trained))).cuda()
    _, inputs, out = opened(model, "fp32", slices, batch)
    host = {name: torch.from_numpy(array).pin_memory() for name, array in inputs.items()}
    result = torch.from_numpy(out).pin_memory()
    device_inputs = {name: tensor[:batch].cuda() for name, tensor in host.items()}
    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                graph(**device_inputs)
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            generated = graph(**device_inputs)

    def call(caller: int, n: int) -> None:
        for name, tensor in device_inputs.items():
            tensor.copy_(host[name][n : n + batch], non_blocking=True)
        captured.replay()
        result[n : n + batch].copy_(generated, non_blocking=True)
        torch.cuda.synchronize()

    return loop(call, result.numpy(), batch, 1, vram=before - torch.cuda.mem_get_info()[0])


def by_onnxruntime(model: str, trained: str, slices: int, batch: int) -> Ready:
    """The FP16 graph with the CUDA provider's defaults; never on the CPU.

    ONNX Runtime copies the tensors to and fro.

    Args:
        model: The model folder.
        trained: The run folder.
        slices: Slices in a round.
        batch: Slices in a call.

    Returns:
        The contender; its unit is slices.

    Raises:
        MissingComponent: The GPU, a package or a file is missing.
    """
    _need_gpu()
    ort = onnxruntime()
    if PROVIDER not in ort.get_available_providers():
        raise MissingComponent(
            "the installed onnxruntime was built without CUDA", expected=PROVIDER, remedy=INSTALL
        )
    path, inputs, out = opened(model, "fp16", slices, batch)
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    before = _free()
    session: Any = ort.InferenceSession(str(path), settings, providers=[PROVIDER])

    def call(caller: int, n: int) -> None:
        out[n : n + batch] = session.run(
            None, {name: array[n : n + batch] for name, array in inputs.items()}
        )[0]

    call(0, 0)
    return loop(call, out, batch, 1, vram=before - _free())


def by_tensorrt(model: str, trained: str, slices: int, batch: int) -> Ready:
    """The model's own engine as one CUDA graph with its copies (benchmarks/gpu/bare.py).

    Args:
        model: The model folder.
        trained: The run folder.
        slices: Slices in a round.
        batch: Slices in a call.

    Returns:
        The contender; its unit is slices.

    Raises:
        MissingComponent: The GPU, a package or a file is missing.
    """
    manifest = Manifest.load(Path(model))
    name = manifest.file_of("engine", "fp16")
    if name is None:
        raise MissingComponent(
            "the model holds no fp16 engine file",
            expected="an engine that was built for this GPU",
            remedy="export the run on a machine with this GPU",
        )
    _need_gpu()
    lean = bool(manifest.files[name].facts.get("version_compatible"))
    before, inputs = _free(), tensors(manifest, slices)[1]
    bare = Bare(
        "tensorrt_lean" if lean else "tensorrt",
        (Path(model) / name).read_bytes(),
        manifest,
        batch,
        captured=True,
    )
    out = np.empty((slices, *manifest.grid.canvas, 2), np.uint8)

    def call(caller: int, n: int) -> None:
        for key, array in inputs.items():
            bare.inputs[key][...] = array[n : n + batch]
        bare.launch()
        bare.wait()
        out[n : n + batch] = bare.output

    return loop(call, out, batch, 1, vram=before - _free())


def _need_gpu() -> None:
    if why := why_no_gpu():
        raise _absent(why)


def _absent(why: str) -> MissingComponent:
    return MissingComponent(why, expected="an NVIDIA GPU", remedy=DRIVER_REMEDY)


def _free() -> int:
    """Bytes of free device memory."""
    from cuda.bindings import runtime as cuda

    code, free, _ = cuda.cudaMemGetInfo()
    if int(code):
        raise _absent(f"CUDA error {int(code)} when asked for its memory")
    return int(free)
