"""What could run the same network without us: each library in a tight loop on prepared tensors.

As many threads call OpenVINO and ONNX Runtime at once as our engines have workers, each on its
share of the cores, and write straight into the result. This is our arrangement with nothing around
it. PyTorch has one caller on all cores, as people run it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.core.errors import MissingComponent
from runtime.core.manifest import Manifest
from runtime.core.resampling import SliceGrid
from runtime.core.rng import CaseRandom
from runtime.core.volume import Geometry, LabelVolume
from runtime.engines.base import cores
from runtime.engines.cpu.base import MOST_WORKERS
from runtime.engines.cpu.onnxruntime import onnxruntime
from runtime.engines.cpu.openvino import core, openvino

from .paired import Ready
from .volumes import mask

Call = Callable[[int, int], None]


def tensors(manifest: Manifest, slices: int) -> tuple[LabelVolume, dict[str, NDArray[Any]]]:
    """A mask on the model's own grid, and the tensors that the synthesizer makes of it.

    Args:
        manifest: The model's manifest.
        slices: The number of slices.

    Returns:
        The mask, and the inputs by name (N = `slices`).
    """
    (h, w), spacing = manifest.grid.canvas, manifest.grid.pixel_spacing or (1.0, 1.0)
    labels = mask((slices, h, w), len(manifest.labels)).labels
    volume = LabelVolume(
        labels, Geometry(np.diag([spacing[1], spacing[0], manifest.grid.slice_spacing or 3.0, 1.0]))
    )
    grid = SliceGrid(manifest.grid, volume.geometry, (slices, h, w), labels)
    random = CaseRandom(0, volume.digest, 0)
    inputs: dict[str, NDArray[Any]] = {
        "labels": np.stack([grid.labels(labels, k) for k in range(slices)])
    }
    if manifest.style:
        inputs["style"] = np.repeat(random.style(manifest.style)[None], slices, 0)
    if manifest.noise:
        inputs["noise"] = np.stack([random.noise(k, (h, w)) for k in range(slices)])
    return volume, inputs


def loop(call: Call, out: NDArray[np.uint8], batch: int, callers: int, **facts: Any) -> Ready:
    """A contender that calls a library batch by batch.

    Args:
        call: `call(caller, n)` synthesizes the slices n to n + `batch` into `out`.
        out: uint8 (slices, H, W, 2).
        batch: Slices in a call.
        callers: The number of threads that share the batches.
        **facts: Facts to report. How long single calls take is added.

    Returns:
        The contender; its unit is slices.
    """
    starts = range(0, len(out), batch)
    threads = ThreadPoolExecutor(callers)
    calls = Calls(facts)

    def work(caller: int, remaining: Any) -> None:
        # all threads share one iterator, so that a free one takes the next batch
        for n in remaining:
            calls.time(lambda n=n: call(caller, n))  # type: ignore[misc]

    def run() -> float:
        remaining = iter(starts)
        for future in [threads.submit(work, caller, remaining) for caller in range(callers)]:
            future.result()
        calls.next_round()
        return float(len(out))

    def output() -> NDArray[Any]:
        run()
        return out.view("<i2")[..., 0]

    return Ready(run, output, facts)


class Calls:
    """Measures single calls, as `facts["call_ms"]` in milliseconds.

    The first two rounds are left out, because they set up the contender and warm it up.
    """

    SKIPPED = 2

    def __init__(self, facts: dict[str, Any]):
        self._facts = facts
        self._rounds = 0
        self._taken: list[float] = []

    def time(self, call: Callable[[], object]) -> None:
        """Make a call and add its duration.

        Args:
            call: The call.
        """
        before = time.perf_counter()
        call()
        self.took(time.perf_counter() - before)

    def took(self, seconds: float) -> None:
        """Add the duration of a call.

        Args:
            seconds: The duration.
        """
        if self._rounds >= self.SKIPPED:
            self._taken.append(1e3 * seconds)

    def next_round(self) -> None:
        """End a round: update the facts."""
        self._rounds += 1
        if self._taken:
            self._facts["call_ms"] = {
                f"p{p}": round(float(np.percentile(self._taken, p)), 3) for p in (50, 90, 99)
            }


def opened(
    model: str, precision: str, slices: int, batch: int
) -> tuple[Path, dict[str, NDArray[Any]], NDArray[np.uint8]]:
    """Open a model's graph for a library.

    Args:
        model: The model folder.
        precision: "fp32", "fp16" or "int8".
        slices: The number of slices, a multiple of `batch`.
        batch: Slices in a call.

    Returns:
        The graph's file, its inputs by name, and an array for the result, uint8 (slices, H, W, 2).

    Raises:
        MissingComponent: The model holds no such graph.
    """
    if slices % batch:
        raise ValueError(f"{slices} slices do not fill batches of {batch}")
    manifest = Manifest.load(Path(model))
    name = manifest.file_of("onnx", precision)
    if name is None:
        raise MissingComponent(
            f"the model holds no {precision} graph",
            expected="such a graph",
            remedy="export the run again",
        )
    return (
        Path(model) / name,
        tensors(manifest, slices)[1],
        np.empty((slices, *manifest.grid.canvas, 2), np.uint8),
    )


def by_openvino(model: str, precision: str, slices: int, batch: int) -> Ready:
    """The graph in OpenVINO.

    Args:
        model: The model folder.
        precision: "fp32" or "int8".
        slices: Slices in a round.
        batch: Slices in a call.

    Returns:
        The contender.
    """
    ov = openvino()
    path, inputs, out = opened(model, precision, slices, batch)
    callers = min(cores(), MOST_WORKERS)
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": cores(),
        "NUM_STREAMS": callers,
        "ENABLE_CPU_PINNING": False,
    }
    graph = core().read_model(path)
    # fixed sizes are faster
    graph.reshape({name: [batch, *array.shape[1:]] for name, array in inputs.items()})
    compiled = core().compile_model(graph, "CPU", settings)
    requests = [compiled.create_infer_request() for _ in range(callers)]

    def call(caller: int, n: int) -> None:
        for name, array in inputs.items():
            requests[caller].set_tensor(name, ov.Tensor(array[n : n + batch], shared_memory=True))
        requests[caller].set_output_tensor(ov.Tensor(out[n : n + batch], shared_memory=True))
        requests[caller].infer()

    return loop(call, out, batch, callers)


def by_onnxruntime(model: str, precision: str, slices: int, batch: int) -> Ready:
    """The graph in ONNX Runtime's CPU provider.

    Args:
        model: The model folder.
        precision: "fp32" or "int8".
        slices: Slices in a round.
        batch: Slices in a call.

    Returns:
        The contender.
    """
    ort = onnxruntime()
    path, inputs, out = opened(model, precision, slices, batch)
    callers = min(cores(), MOST_WORKERS)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = max(1, cores() // callers)
    settings.log_severity_level = 3
    session: Any = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    result = session.get_outputs()[0].name

    def call(caller: int, n: int) -> None:
        binding = session.io_binding()
        for name, array in inputs.items():
            part = array[n : n + batch]
            binding.bind_input(name, "cpu", 0, part.dtype.type, part.shape, part.ctypes.data)
        part = out[n : n + batch]
        binding.bind_output(result, "cpu", 0, np.uint8, part.shape, part.ctypes.data)
        session.run_with_iobinding(binding)

    return loop(call, out, batch, callers)


def by_pytorch(model: str, trained: str, way: str, slices: int, batch: int) -> Ready:
    """The network in PyTorch on the CPU.

    Args:
        model: The model folder.
        trained: The run folder.
        way: "eager", "channels_last" or "compile".
        slices: Slices in a round.
        batch: Slices in a call.

    Returns:
        The contender.
    """
    import torch

    graph = network(trained)
    if way == "channels_last":
        graph = graph.to(memory_format=torch.channels_last)
    infer: Any = torch.compile(graph) if way == "compile" else graph
    _, inputs, out = opened(model, "fp32", slices, batch)
    torch_inputs = {name: torch.from_numpy(array) for name, array in inputs.items()}
    result = torch.from_numpy(out)

    def call(caller: int, n: int) -> None:
        with torch.inference_mode():
            part = {name: array[n : n + batch] for name, array in torch_inputs.items()}
            result[n : n + batch] = infer(**part)

    return loop(call, out, batch, 1)


def network(trained: str) -> Any:
    """A run's network in PyTorch, as the exported graph computes it.

    Args:
        trained: The run folder.

    Returns:
        A `LabelsToIntensity`.
    """
    from export.graph import LabelsToIntensity
    from train.checkpoint import load_generator, load_run

    facts = load_run(Path(trained))
    return LabelsToIntensity(load_generator(Path(trained)), facts.classes, facts.intensity)
