"""The parity check: does an exported file synthesize what the network synthesizes?

The difference is measured in HU, through each engine that may run the file.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.core.context import Context
from runtime.core.errors import ModelError, ParityError
from runtime.core.manifest import Manifest, TensorSpec
from runtime.engines.base import Engine
from runtime.engines.memory import HOST_STREAM
from runtime.engines.registry import Backend
from train.metrics.scores import body_mask
from train.metrics.volume_metrics import medians

from .graph import LabelsToIntensity
from .similarity import similarity

# The least number of slices in a parity check: of held-out masks, and of random labels.
SLICES, RANDOM_SLICES = 64, 8
# The least number of pixels where noise or a style makes other images of the same masks: the median
# of a few pixels is chance.
PIXELS = 1 << 20
ON_MASKS, ON_RANDOM = "validation masks", "random labels"
REMEDY = "nothing was written; report this with the run's run.json"
AT_ONCE = 8  # slices in one call of the network

# The most that each precision may differ, in HU. FP32 on random labels too: two correct
# computations may fall on either side of a half.
LIMITS: Mapping[str, Mapping[str, float]] = {
    "fp32": {"max": 1},
    "fp16": {"mean": 1, "p99_9": 10, "organs": 1},
    "int8": {"body_mean": 8, "organs": 3},
    "int8-gpu": {"body_mean": 8, "organs": 3},
}


@dataclass(frozen=True)
class Reference:
    """What the network synthesizes.

    Attributes:
        inputs: The inputs by name, n slices.
        values: int16 HU (n, H, W).
        body: The body in `values`.
        masks: The number of different masks among the slices.
    """

    inputs: Mapping[str, NDArray[Any]]
    values: NDArray[np.int16]
    body: NDArray[np.bool_]
    masks: int

    @property
    def labels(self) -> NDArray[np.uint8]:
        """Model indices of the synthetic slices, (n, H, W)."""
        labels: NDArray[np.uint8] = self.inputs["labels"]
        return labels[:, labels.shape[1] // 2]


def random_labels(
    slices: int, z: int, size: tuple[int, int], classes: int, seed: int = 0
) -> NDArray[np.uint8]:
    """Labels that no anatomy has, so that every channel is active everywhere.

    Args:
        slices: The number of slices.
        z: Labels per slice: itself and its neighbours.
        size: (H, W) in pixels.
        classes: The number of labels.
        seed: Of the random generator.

    Returns:
        uint8 (slices, Z, H, W).
    """
    return np.random.default_rng(seed).integers(0, classes, (slices, z, *size), np.uint8)


def repeated(
    masks: NDArray[np.uint8], slices: int, specs: tuple[TensorSpec, ...]
) -> NDArray[np.uint8]:
    """Repeat masks until there are enough for a parity check.

    Args:
        masks: uint8 (n, Z, H, W).
        slices: The least number of slices.
        specs: The graph's inputs; one that takes more than labels needs `PIXELS` too.

    Returns:
        uint8 (at least `slices`, Z, H, W).
    """
    most = max(slices, len(masks), -(-PIXELS // masks[0, 0].size) if len(specs) > 1 else 0)
    return masks[np.arange(most) % len(masks)]


def draw_inputs(
    specs: tuple[TensorSpec, ...],
    labels: NDArray[np.uint8],
    seed: int = 0,
    context: Context | None = None,
) -> dict[str, NDArray[Any]]:
    """Inputs of the graph: labels, and noise and a style for each slice as the runtime draws them.

    Args:
        specs: The graph's inputs.
        labels: uint8 (n, Z, H, W).
        seed: Of the random generator.
        context: The model's context, whose contrast the style is.

    Returns:
        Arrays of n slices by name.
    """
    rng = np.random.default_rng(seed)
    inputs: dict[str, NDArray[Any]] = {"labels": np.ascontiguousarray(labels)}
    for tensor in specs:
        if tensor.name == "style" and context is not None:
            directions = np.array(context.contrast, np.float32)
            drawn = rng.standard_normal((len(labels), len(directions)), np.float32)
            inputs["style"] = drawn @ directions
        elif tensor.name == "style":
            inputs["style"] = rng.standard_normal((len(labels), int(tensor.shape[1])), np.float32)
        elif tensor.name == "noise":
            inputs["noise"] = rng.integers(0, 256, (len(labels), *labels.shape[2:]), np.uint8)
    return inputs


def reference(
    graph: LabelsToIntensity, inputs: Mapping[str, NDArray[Any]], masks: int | None = None
) -> Reference:
    """Synthesize `inputs` with the FP32 network itself.

    Args:
        graph: The network.
        inputs: Arrays of n slices by name.
        masks: The number of different masks among them (default: n).

    Returns:
        Inputs and outputs.
    """
    parts = []
    for start in range(0, len(inputs["labels"]), AT_ONCE):
        batch = {
            name: torch.from_numpy(array[start : start + AT_ONCE]) for name, array in inputs.items()
        }
        with torch.inference_mode():
            parts.append(graph(**batch).numpy())
    values = _hu(np.concatenate(parts))
    return Reference(inputs, values, body_mask(values), len(values) if masks is None else masks)


def references(
    graph: LabelsToIntensity, manifest: Manifest, masks: NDArray[np.uint8]
) -> dict[str, Reference]:
    """The reference outputs that a file is measured against.

    Args:
        graph: The network.
        manifest: The model's manifest.
        masks: uint8 (n, Z, H, W) of held-out slices.

    Returns:
        The outputs on `masks` and on random labels, by name.
    """
    chosen = repeated(masks, SLICES, manifest.inputs)
    random = random_labels(
        RANDOM_SLICES, manifest.grid.slices, manifest.grid.canvas, manifest.classes
    )
    return {
        name: reference(
            graph, draw_inputs(manifest.inputs, labels, context=manifest.context), count
        )
        for name, labels, count in ((ON_MASKS, chosen, len(masks)), (ON_RANDOM, random, None))
    }


def run_engine(
    engine: Engine, inputs: Mapping[str, NDArray[Any]]
) -> tuple[NDArray[np.int16], float]:
    """Synthesize `inputs` with an engine.

    Args:
        engine: An open engine.
        inputs: Arrays of n slices by name; H and W are multiples of the grid's divisor.

    Returns:
        int16 HU (n, H, W), and slices/s: the median call's.
    """
    count, batch = len(inputs["labels"]), engine.spec.batch
    generated, seconds = [], []
    for start in range(0, count, batch):
        # the last batch is padded with its last slice
        picked = [min(n, count - 1) for n in range(start, start + batch)]
        batch_inputs = {name: np.ascontiguousarray(array[picked]) for name, array in inputs.items()}
        out = np.empty((batch, *inputs["labels"].shape[2:], 2), np.uint8)
        began = time.perf_counter()
        engine.run(batch_inputs, out, stream=HOST_STREAM)
        seconds.append(time.perf_counter() - began)
        generated.append(out[: count - start])
    return _hu(np.concatenate(generated)), batch / statistics.median(seconds)


def compare(truth: Reference, generated: NDArray[np.int16], manifest: Manifest) -> dict[str, Any]:
    """Measure synthetic slices against the reference output.

    Args:
        truth: The reference output.
        generated: int16 HU (n, H, W).
        manifest: The model's manifest.

    Returns:
        `error_metrics`, and 1 - SSIM of the slices ("dssim"). JSON data.
    """
    return {
        **error_metrics(truth, generated, manifest),
        "dssim": _dssim(generated, truth.values, manifest),
    }


def error_metrics(
    truth: Reference, generated: NDArray[np.int16], manifest: Manifest
) -> dict[str, Any]:
    """Absolute differences in HU, and each organ's shift of the median.

    Args:
        truth: The reference output.
        generated: int16 HU (n, H, W).
        manifest: The model's manifest.

    Returns:
        JSON data. "differing" is the share of pixels that differ at all. The body's figures are
        null where there is no body, an organ's where it is absent.
    """
    delta = np.abs(generated.astype(np.int32) - truth.values)
    classes = len(manifest.labels)
    shifts = medians(generated, truth.labels, classes) - medians(
        truth.values, truth.labels, classes
    )
    names = [label.name for label in manifest.labels.labels[1:]]
    return {
        "slices": len(generated),
        "masks": truth.masks,
        **_figures(delta),
        "differing": round(float(np.count_nonzero(delta) / delta.size), 6),
        **{f"body_{key}": value for key, value in _figures(delta[truth.body]).items()},
        "organs": {
            name: None if np.isnan(shift) else float(shift)
            for name, shift in zip(names, shifts, strict=True)
        },
    }


def limit_violations(precision: str, numbers: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Set each limit of a precision beside what was measured.

    Args:
        precision: One of `LIMITS`.
        numbers: What `error_metrics` returned. Without a body, the whole slice stands for it.

    Returns:
        (measured, allowed) by limit, in HU.
    """
    measured = {}
    for key, limit in LIMITS[precision].items():
        if key == "organs":
            value = max(
                (abs(shift) for shift in numbers["organs"].values() if shift is not None),
                default=0.0,
            )
        else:
            value = numbers[key] if numbers[key] is not None else numbers[key.removeprefix("body_")]
        measured[key] = (float(value), limit)
    return measured


def check_parity(
    path: Path,
    precision: str,
    backend: Backend,
    manifest: Manifest,
    references_by_name: Mapping[str, Reference],
) -> dict[str, Any]:
    """Measure a file in a backend against the reference outputs.

    Args:
        path: The file.
        precision: One of `LIMITS`.
        backend: What runs the file.
        manifest: The model's manifest.
        references_by_name: The reference outputs.

    Returns:
        What the manifest says of this file in this backend. JSON data.

    Raises:
        ParityError: The backend cannot open or run the file, or it differs by more than `LIMITS`.
    """
    try:
        engine = backend.open(path, manifest)
        try:
            name, parity_report = engine.name.split(",")[0], {}
            for what, truth in references_by_name.items():
                generated, rate = run_engine(engine, truth.inputs)
                parity_report[what] = compare(truth, generated, manifest)
                if what == ON_MASKS:
                    speed = rate
        finally:
            engine.close()
    except ModelError as exc:
        raise ParityError(
            f"{path.name} does not run in {backend.name}: {exc.fact}",
            expected=exc.expected,
            remedy=REMEDY,
        ) from exc
    for what, numbers in parity_report.items():
        wrong = {k: v for k, v in limit_violations(precision, numbers).items() if v[0] > v[1]}
        if wrong and (what == ON_MASKS or precision == "fp32"):
            raise Exceeded(path, backend.name, what, wrong, numbers, manifest.intensity.unit)
    return {"engine": name, "slices_per_second": round(speed, 1), **parity_report}


class Exceeded(ParityError):
    """A file synthesizes other values than the network.

    It is raised before the stage with the error is known (export/error_localization.py).
    """

    def __init__(
        self,
        path: Path,
        backend: str,
        what: str,
        wrong: Mapping[str, tuple[float, float]],
        numbers: Mapping[str, Any],
        unit: str = "HU",
    ):
        measured = ", ".join(f"{LIMIT_NAMES[key]} {value:.3g}" for key, (value, _) in wrong.items())
        super().__init__(
            f"{path.name} in {backend} synthesizes other values than the network on {what}:"
            f" {measured} {unit}; {100 * numbers['differing']:.2f} % of the pixels differ, by up to"
            f" {numbers['max']} {unit}",
            expected="at most "
            + ", ".join(f"{LIMIT_NAMES[key]} {limit:g}" for key, (_, limit) in wrong.items())
            + f" {unit}",
            remedy=REMEDY,
        )


LIMIT_NAMES = {
    "max": "the largest difference",
    "mean": "the mean difference",
    "p99_9": "the 99.9th percentile",
    "body_mean": "the mean difference in the body",
    "organs": "the shift of an organ's median",
}


def _figures(delta: NDArray[np.int32]) -> dict[str, Any]:
    """Mean, 99.9th percentile and maximum of differences, or None without any."""
    if not delta.size:
        return {"mean": None, "p99_9": None, "max": None}
    p99_9 = float(np.percentile(delta, 99.9))
    return {
        "mean": round(float(delta.mean()), 6),
        "p99_9": round(p99_9, 3),
        "max": int(delta.max()),
    }


def _dssim(a: NDArray[np.int16], b: NDArray[np.int16], manifest: Manifest) -> float:
    """1 - SSIM of two stacks of slices in HU."""
    span = float(manifest.intensity.high - manifest.intensity.low)
    total = 0.0
    for start in range(0, len(a), AT_ONCE):
        x, y = (
            torch.from_numpy(v[start : start + AT_ONCE, None].astype(np.float32)) for v in (a, b)
        )
        total += len(x) * (1 - similarity(x, y, span))
    return round(max(0.0, total / len(a)), 8)


def _hu(pairs: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Little-endian pairs of bytes (…, 2) as int16 HU."""
    return np.ascontiguousarray(pairs).view("<i2")[..., 0]
