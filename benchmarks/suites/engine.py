"""Suite `engine`: slices/s of the networks, by backend, precision, batch and size, on prepared
tensors and from a mask.

One group for each network and canvas. Ours twice: the synthesizer (a mask in, HU on the mask's grid
out), and its engine alone, with prepared tensors through all of its streams. Beside them whatever
else could run the same network (benchmarks/harness/libraries.py, on a GPU
benchmarks/gpu/contenders.py). All synthesize the same slices with the same noise; how far each is
from the FP32 picture is compared before anything is timed and printed with it.
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

HU = {
    "fp32": 0.05,
    "fp16": 2.0,
    "int8": 20.0,
}  # mean difference from the FP32 picture; the proofs in the manifests are stricter
SIZES, QUICK_SIZES = (256, 128, 512), (256,)
BATCHES, QUICK_BATCHES = (1, 8), (1,)
SLICES = {
    "reference": 8,
    "unet": 16,
    "edge": 32,
}  # a round at 256 x 256, about a second; others scale with their pixels
LIBRARIES = {"OpenVINO": "by_openvino", "ONNX Runtime": "by_onnxruntime"}
GPU = {
    "PyTorch FP16, CUDA graph": "by_pytorch",
    "ONNX Runtime CUDA FP16": "by_onnxruntime",
    "TensorRT FP16": "by_tensorrt",
}


def groups(given: Prepared | None, backend: str, quick: bool) -> dict[str, list[Contender]]:
    """`given`: this model alone, at its own size; else one of each kind, and `edge` at other
    sizes.
    """
    if given is not None:
        return {"engine": contenders(given.model, given.trained, backend, 32, quick)}
    found = {}
    for kind, slices in SLICES.items():
        made = prepared(kind)
        for side in SIZES if kind == "edge" and not quick else QUICK_SIZES:
            some = max(8, slices * 256**2 // side**2 // 8 * 8)
            found[f"engine {kind} {side}x{side}"] = contenders(
                at_size(made.model, side), made.trained, backend, some, quick
            )
    return found


def contenders(
    model: Path, trained: Path | None, backend: str, slices: int, quick: bool
) -> list[Contender]:
    manifest, given = Manifest.load(model), {"model": str(model), "slices": slices}
    if backend == "auto" and not manifest.parity:
        backend = "openvino"  # nothing is validated, so that it has to be asked for by name
    cost = macs(model)
    batches = QUICK_BATCHES if quick else BATCHES
    found = [
        Contender(
            f"mask2ct {what}",
            f"benchmarks.suites.engine:{make}",
            {**given, "backend": backend},
            HU["fp32"],
            {"fp32": cost},
        )
        for what, make in (("synthesizer", "synthesizer"), ("engine", "ours"))
    ]
    if "openvino-int8" in manifest.parity.get(str(manifest.file_of("onnx", "int8")), {}):
        options = {**given, "backend": "openvino-int8"}
        found.append(
            Contender(
                "mask2ct synthesizer, INT8",
                "benchmarks.suites.engine:synthesizer",
                options,
                HU["int8"],
                {"int8": cost},
            )
        )
    found += [
        Contender(
            f"{name} {precision.upper()}, batch {batch}",
            f"benchmarks.harness.libraries:{make}",
            {**given, "precision": precision, "batch": batch},
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
        found += [
            Contender(
                f"PyTorch {way}, batch {batch}",
                "benchmarks.harness.libraries:by_pytorch",
                {**given, "trained": str(trained), "way": way, "batch": batch},
                HU["fp32"],
                {"fp32": cost},
            )
            for way, batch in ways
        ]
    found += [
        Contender(
            f"{name}, batch 8",
            f"benchmarks.gpu.contenders:{make}",
            {**given, "trained": str(trained), "batch": 8},
            HU["fp16"],
        )
        for name, make in GPU.items()
    ]
    return found


def macs(model: Path) -> int:
    """Multiply-accumulates of a slice on the model's canvas, counted in its graph."""
    manifest = Manifest.load(model)
    h, w = manifest.grid.canvas
    return count(model / str(manifest.file_of("onnx", "fp32")), {"N": 1, "H": h, "W": w})


def synthesizer(model: str, slices: int, backend: str, planted: float = 0.0) -> Ready:
    """`planted`: makes every round slower by that share of itself; for
    benchmarks/harness/selfcheck.py.
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
    """The engine by its own protocol: a call for each of its streams in flight, half of them waited
    for at once, each in tensors of its own that are filled and emptied, as the synthesizer has it.
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
            for (_, made, stream), n, since in reversed(half):
                stream.synchronize()
                calls.took(time.perf_counter() - since)
                out[n : n + batch] = made
            free.extend(slot for slot, *_ in half)

        for n in range(0, slices - slices % batch, batch):
            if not free:
                wait()
            given, made, stream = slot = free.popleft()
            for name, array in inputs.items():
                given[name][...] = array[n : n + batch]
            busy.append((slot, n, time.perf_counter()))
            engine.run(given, made, stream=stream)
        while busy:
            wait()
        calls.next_round()
        return float(slices - slices % batch)

    def output() -> NDArray[Any]:
        run()
        return out.view("<i2")[..., 0]

    return Ready(run, output, facts)
