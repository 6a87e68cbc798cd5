"""Throughput of a model on this machine, against what a user would otherwise run:  python benchmarks/run.py engine --model MODEL

Suite `engine`: slices/s of the synthesizer (mask in, HU on the mask's grid out) beside the bare backend called in a tight loop
on prepared tensors, which is its ceiling, and the same network in eager PyTorch, which is what people run today (with --run).
Suite `train`: see benchmarks/train.py.
Contenders take turns within every round, so that a machine whose speed drifts slows all of them; ratios are taken round by
round. A table for people, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np

from benchmarks.record import machine
from runtime import Synthesizer
from runtime.console import EXIT_CODES, Progress, run
from runtime.contract import Manifest
from runtime.engines.registry import open_engine
from runtime.files import write_json
from runtime.memory import HOST_STREAM
from runtime.volume import Geometry, LabelVolume

Contender = Callable[[], int]  # does some slices (or steps), returns how many
OURS, BARE, TORCH = "mask2ct synthesizer", "bare backend, tight loop", "PyTorch eager"


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["train"]:  # options of its own
        from benchmarks import train

        return train.main(argv[1:])
    parser = argparse.ArgumentParser("run.py", description="Throughput on this machine.", epilog=EXIT_CODES)
    parser.add_argument("suite", choices=["engine", "train"], help="`train --help` shows the options of that suite")
    parser.add_argument(
        "--model", type=Path, default=ROOT / "runs" / "demo" / "model", help="a model folder (default: that of `make demo`)"
    )
    parser.add_argument("--run", type=Path, help="the run folder it came from: adds eager PyTorch (default: `train` beside the model)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--quick", action="store_true", help="fewer slices a round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args(argv)

    slices, rounds = (8, 7) if options.quick else (32, 11)
    beside = options.model.parent / "train"
    contenders, backend = engine_suite(
        options.model, options.run or (beside if (beside / "run.json").is_file() else None), options.backend, slices
    )
    rates = measure(contenders, rounds, options.quiet)
    result = summarise(rates)
    print(f"{'':<28}{'slices/s':>10}{'range':>18}{'ours / this':>14}{'range':>16}")
    for name, row in result.items():
        rate, ratio = (f"{row[key + '_least']:.4g} … {row[key + '_most']:.4g}" for key in ("rate", "ratio"))
        print(f"{name:<28}{row['rate']:>10.1f}{rate:>18}{row['ratio']:>14.2f}{ratio:>16}")
    print(f"backend: {backend}; median of {rounds} rounds of {slices} slices, in turn")
    record = {"suite": "engine", "backend": backend, "rounds": rounds, "slices": slices, "machine": machine(ROOT), "result": result}
    if options.json:
        write_json(options.json, record)
    print(json.dumps(record))
    return 0


def engine_suite(model: Path, trained: Path | None, backend: str, slices: int) -> tuple[dict[str, Contender], str]:
    """The contenders by name, and which backend they run. They were checked to paint the same before any is timed."""
    manifest = Manifest.load(model)
    engine, reason, _ = open_engine(backend, manifest, model)  # one for both: a second session's threads would spin beside the first's
    synth = Synthesizer(manifest, engine, reason=reason)
    h, w = manifest.grid.canvas
    spacing = manifest.grid.pixel_spacing or (1.0, 1.0)
    labels = np.random.default_rng(0).integers(0, len(manifest.labels), (slices, h // 8, w // 8), np.uint8).repeat(8, 1).repeat(8, 2)
    volume = LabelVolume(labels, Geometry(np.diag([spacing[1], spacing[0], manifest.grid.slice_spacing or 3.0, 1.0])))

    batch = engine.spec.batch
    inputs: dict[str, Any] = {"labels": np.ascontiguousarray(np.repeat(labels[:batch, None], manifest.grid.slices, 1))}
    if manifest.noise:
        inputs["noise"] = np.random.default_rng(1).integers(0, 256, (batch, h, w), np.uint8)
    out = np.empty((batch, h, w, 2), np.uint8)

    def ours() -> int:
        return len(synth.paint(volume))

    def bare() -> int:
        for _ in range(0, slices, batch):
            engine.run(inputs, out, stream=HOST_STREAM)
        return slices

    contenders: dict[str, Contender] = {OURS: ours, BARE: bare}
    if trained is not None:
        contenders[TORCH] = _torch(trained, inputs, slices)
    return contenders, synth.backend


def _torch(trained: Path, inputs: dict[str, Any], slices: int) -> Contender:
    import torch

    from export.graph import LabelsToIntensity
    from train.checkpoint import load_generator, load_run

    facts = load_run(trained)
    graph = LabelsToIntensity(load_generator(trained), len(facts.labels), facts.intensity)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}

    def eager() -> int:
        with torch.inference_mode():
            for _ in range(0, slices, len(tensors["labels"])):
                graph(**tensors)
        return slices

    return eager


def measure(contenders: Mapping[str, Contender], rounds: int, quiet: bool) -> dict[str, list[float]]:
    """Rate of each contender in each round, in what it counts per second, after one round of warm-up that is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    progress = Progress("rounds", rounds + 1, quiet=quiet)
    for n in range(rounds + 1):
        names = list(contenders)
        for name in names[n % len(names) :] + names[: n % len(names)]:  # nobody always follows the same one
            contender = contenders[name]
            started = time.perf_counter()
            done = contender()
            if n:
                rates[name].append(done / (time.perf_counter() - started))
        progress.update(n + 1)
    progress.close()
    return rates


def summarise(rates: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and range of each contender, and of ours (the first) / it, taken round by round."""
    rows = {}
    first = next(iter(rates.values()))
    for name, values in rates.items():
        ratios = [ours / other for ours, other in zip(first, values, strict=True)]
        rows[name] = {
            "rate": statistics.median(values), "rate_least": min(values), "rate_most": max(values),
            "ratio": statistics.median(ratios), "ratio_least": min(ratios), "ratio_most": max(ratios),
        }  # fmt: skip
    return rows


if __name__ == "__main__":
    sys.exit(run(main))
