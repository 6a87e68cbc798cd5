"""Suite `engine`: slices/s of the networks, by backend, precision, batch and size.

There is one group for each network and canvas. Ours is in it twice: the synthesizer (a mask in, HU
on the mask's grid out), and its engine alone, with prepared tensors through all of its streams.
Beside them is whatever else could run the same network (benchmarks/harness/libraries.py, on a GPU
benchmarks/gpu/contenders.py). All synthesize the same slices with the same noise. How far each is
from the FP32 picture is compared before the timing, and printed with it.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import Synthesizer
from runtime.core.manifest import Manifest
from runtime.engines.registry import open_engine

from ..harness.libraries import Calls, tensors
from ..harness.macs import count
from ..harness.models import Prepared, at_size, prepared
from ..harness.paired import Contender, Ready

# The mean difference from the FP32 picture that is allowed. The parity checks are stricter.
HU = {"fp32": 0.05, "fp16": 2.0, "int8": 20.0}
SIZES, QUICK_SIZES = (256, 128, 512), (256,)
BATCHES, QUICK_BATCHES = (1, 8), (1,)
# Slices in a round at 256 x 256, about a second; other sizes scale with their pixels.
SLICES = {"reference": 8, "unet": 16, "edge": 32}
LIBRARIES = {"OpenVINO": "by_openvino", "ONNX Runtime": "by_onnxruntime"}
GPU = {
    "PyTorch FP16, CUDA graph": "by_pytorch",
    "ONNX Runtime CUDA FP16": "by_onnxruntime",
    "TensorRT FP16": "by_tensorrt",
}


def groups(chosen: Prepared | None, backend: str, quick: bool) -> dict[str, list[Contender]]:
    """The contenders.

    Args:
        chosen: Measure this model alone, at its own size. None: a network of each kind, and `edge`
            at other sizes too.
        backend: The backend of our engine.
        quick: Fewer contenders and sizes.

    Returns:
        A group for each network and canvas.
    """
    if chosen is not None:
        return {"engine": contenders(chosen.model, chosen.trained, backend, 32, quick)}
    named_groups = {}
    for kind, slices in SLICES.items():
        network = prepared(kind)
        for side in SIZES if kind == "edge" and not quick else QUICK_SIZES:
            count = max(8, slices * 256**2 // side**2 // 8 * 8)
            named_groups[f"engine {kind} {side}x{side}"] = contenders(
                at_size(network.model, side), network.trained, backend, count, quick
            )
    return named_groups


def contenders(
    model: Path, trained: Path | None, backend: str, slices: int, quick: bool
) -> list[Contender]:
    """What can run a model.

    Args:
        model: The model folder.
        trained: The run folder, for PyTorch; None: without PyTorch.
        backend: The backend of our engine.
        slices: Slices in a round.
        quick: Fewer contenders.

    Returns:
        The contenders; ours is the first.
    """
    manifest, options = Manifest.load(model), {"model": str(model), "slices": slices}
    if backend == "auto" and not manifest.parity:
        backend = "openvino"  # "auto" chooses only among backends that are validated
    cost = macs(model)
    batches = QUICK_BATCHES if quick else BATCHES
    result = [
        Contender(
            f"mask2ct {what}",
            f"benchmarks.suites.engine:{make}",
            {**options, "backend": backend},
            HU["fp32"],
            {"fp32": cost},
        )
        for what, make in (("synthesizer", "synthesizer"), ("engine", "ours"))
    ]
    if "openvino-int8" in manifest.parity.get(str(manifest.file_of("onnx", "int8")), {}):
        int8_options = {**options, "backend": "openvino-int8"}
        result.append(
            Contender(
                "mask2ct synthesizer, INT8",
                "benchmarks.suites.engine:synthesizer",
                int8_options,
                HU["int8"],
                {"int8": cost},
            )
        )
    result += [
        Contender(
            f"{name} {precision.upper()}, batch {batch}",
            f"benchmarks.harness.libraries:{make}",
            {**options, "precision": precision, "batch": batch},
            HU[precision],
            {"int8" if precision == "int8" else "fp32": cost},
        )
        for precision in ("fp32", "int8")
        if manifest.file_of("onnx", precision)
        for name, make in LIBRARIES.items()
        for batch in batches
    ]
    if trained is not None:
        ways = [
            ("eager", 8),
            ("channels_last", 8),
            *([] if quick else [("eager", 1), ("compile", 8)]),
        ]
        result += [
            Contender(
                f"PyTorch {way}, batch {batch}",
                "benchmarks.harness.libraries:by_pytorch",
                {**options, "trained": str(trained), "way": way, "batch": batch},
                HU["fp32"],
                {"fp32": cost},
            )
            for way, batch in ways
        ]
    result += [
        Contender(
            f"{name}, batch 8",
            f"benchmarks.gpu.contenders:{make}",
            {**options, "trained": str(trained), "batch": 8},
            HU["fp16"],
        )
        for name, make in GPU.items()
    ]
    return result


def macs(model: Path) -> int:
    """Count a slice's multiply-accumulates in the model's FP32 graph.

    Args:
        model: The model folder.

    Returns:
        The count for a slice on the canvas.
    """
    manifest = Manifest.load(model)
    h, w = manifest.grid.canvas
    return count(model / str(manifest.file_of("onnx", "fp32")), {"N": 1, "H": h, "W": w})


def synthesizer(model: str, slices: int, backend: str, planted: float = 0.0) -> Ready:
    """Our synthesizer: a mask in, HU on the mask's grid out.

    Args:
        model: The model folder.
        slices: Slices in a round.
        backend: The backend.
        planted: Slow every round by this share of itself (benchmarks/harness/selfcheck.py).

    Returns:
        The contender; its unit is slices.
    """
    synth = Synthesizer.open(model, backend=backend)
    volume, _ = tensors(synth.manifest, slices)

    def run() -> float:
        started = time.perf_counter()
        synth.synthesize(volume)
        until = time.perf_counter() + planted * (time.perf_counter() - started)
        while time.perf_counter() < until:
            pass
        return float(slices)

    return Ready(run, lambda: synth.synthesize(volume), {"backend": synth.backend})


def ours(model: str, slices: int, backend: str) -> Ready:
    """Our engine by its own protocol, used as the synthesizer uses it.

    Each of its streams has a call in flight, with tensors of its own that are filled and emptied.
    Half of the calls in flight are waited for at once.

    Args:
        model: The model folder.
        slices: Slices in a round.
        backend: The backend.

    Returns:
        The contender; its unit is slices.
    """
    manifest = Manifest.load(Path(model))
    engine = open_engine(backend, manifest, Path(model))[0]
    batch, inputs = engine.spec.batch, tensors(manifest, slices)[1]
    out = np.empty((slices, *manifest.grid.canvas, 2), np.uint8)
    slots = [
        (
            {name: array[:batch].copy() for name, array in inputs.items()},
            out[:batch].copy(),
            engine.open_stream(),
        )
        for _ in range(engine.spec.streams)
    ]
    facts: dict[str, Any] = {"backend": engine.name, "batch": batch}
    calls = Calls(facts)

    def run() -> float:
        free, busy = deque(slots), deque[tuple[Any, int, float]]()

        def wait() -> None:
            half = [busy.popleft() for _ in range((len(busy) + 1) // 2)]
            for (_, slot_output, stream), n, since in reversed(half):
                stream.synchronize()
                calls.took(time.perf_counter() - since)
                out[n : n + batch] = slot_output
            free.extend(slot for slot, *_ in half)

        for n in range(0, slices - slices % batch, batch):
            if not free:
                wait()
            slot_inputs, slot_output, stream = slot = free.popleft()
            for name, array in inputs.items():
                slot_inputs[name][...] = array[n : n + batch]
            busy.append((slot, n, time.perf_counter()))
            engine.run(slot_inputs, slot_output, stream=stream)
        while busy:
            wait()
        calls.next_round()
        return float(slices - slices % batch)

    def output() -> NDArray[Any]:
        run()
        return out.view("<i2")[..., 0]

    return Ready(run, output, facts)
