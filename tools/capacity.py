"""Predict the throughput of other machines from stage costs measured on this one.

    python tools/capacity.py --model MODEL -o docs/reference/capacity.md

The costs of a slice are measured: CPU seconds of each stage, bytes over disk and link,
multiply-accumulates and tensor traffic of the graph. The capacity of a device comes from its data
sheet. A stage's rate is capacity over cost, and the slowest stage sets the throughput. All of the
page but the costs is a prediction, and is marked as one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)


from benchmarks.harness.macs import count, traffic
from benchmarks.harness.record import machine
from benchmarks.harness.volumes import SIZES, mask, values
from benchmarks.report import si
from benchmarks.suites.io import slabs_of, some_ct
from runtime.core.atomic_files import write_text
from runtime.core.console import EXIT_CODES, run
from runtime.core.manifest import Manifest
from runtime.core.resampling import SliceGrid
from runtime.core.rng import CaseRandom
from runtime.io.case_finding import find_cases
from runtime.io.cases import read_case
from runtime.io.writers.registry import DEFAULT_OPTIONS, FORMATS, OutputRecord

REPEATS = 3
# Of the data sheet's dense rate that small convolutions reach. The lower end is the only measured
# rate that was found for such a device: YOLOv8n in INT8 on an Orin Nano, 1.25 of 16.75 T
# multiply-accumulates a second. The upper end is a guess.
PEAK_SHARES = (0.07, 0.30)
BANDWIDTH_SHARE = 0.60  # of the data sheet's memory bandwidth


@dataclass(frozen=True)
class Device:
    """A machine to predict for.

    Attributes:
        name: Its name in the page.
        fp16: Dense tensor-core FLOP/s.
        memory: GPU memory bandwidth, bytes/s.
        link: Bandwidth between host and GPU, bytes/s.
        cores: The number of CPU cores.
        core: The speed of one core relative to the measured one.
        disk: Bytes/s.
    """

    name: str
    fp16: float
    memory: float
    link: float
    cores: int
    core: float
    disk: float


# Rates are from NVIDIA's data sheets (Jetson Orin Nano Super and AGX Orin series technical briefs,
# L4, H200 SXM), with sparse figures halved. Links: a Jetson's CPU and GPU share the memory; PCIe
# 4.0 x16 and 5.0 x16 one way. Hosts, disks and core speeds are assumed.
DEVICES = (
    Device("Jetson Orin Nano 8 GB (Super)", 17e12, 102e9, 50e9, 6, 0.35, 1e9),
    Device("Jetson AGX Orin 64 GB", 42.5e12, 204.8e9, 100e9, 12, 0.40, 2e9),
    Device("L4, 8-core host", 121e12, 300e9, 25e9, 8, 0.8, 3e9),
    Device("H200, 32-core host", 989e12, 4800e9, 50e9, 32, 0.8, 6e9),
    Device(
        "Ray cluster of 8 x L4, 8-core hosts, own disks",
        8 * 121e12,
        8 * 300e9,
        8 * 25e9,
        64,
        0.8,
        8 * 3e9,
    ),
)


@dataclass(frozen=True)
class Costs:
    """What one slice costs.

    Attributes:
        cpu: CPU seconds by stage.
        disk: Bytes read and written on disk.
        link: Bytes between host and GPU.
        macs: Multiply-accumulates.
        tensors: Bytes that convolutions read and write.
    """

    cpu: dict[str, float]
    disk: float
    link: float
    macs: int
    tensors: int


def measure(model: Path, size: str, format: str) -> Costs:
    """Run every stage alone on this machine.

    CPU seconds are those of the whole process, so that the threads of a stage count.

    Args:
        model: A model folder with an FP32 graph.
        size: A key of `SIZES`, the mask's size.
        format: A key of `FORMATS`, the result's format.

    Returns:
        The costs of one slice.
    """
    manifest = Manifest.load(model)
    volume = mask(SIZES[size], len(manifest.labels))
    depth, height, width = volume.labels.shape
    grid, random = (
        SliceGrid(manifest.grid, volume.geometry, (depth, height, width), volume.labels),
        CaseRandom(0, volume.digest, 0),
    )
    ct, writer = some_ct(volume), FORMATS[format](DEFAULT_OPTIONS)
    generated, plane = some_ct(mask((1, *grid.size), len(manifest.labels)))[0], ct[0].copy()

    def back() -> None:
        for _ in range(depth):
            grid.back(generated, plane, manifest.intensity.low)

    with tempfile.TemporaryDirectory() as folder:
        import SimpleITK as sitk

        source, out = Path(folder) / "mask.nii.gz", Path(folder) / "out"
        out.mkdir()
        sitk.WriteImage(sitk.GetImageFromArray(values(volume, manifest.labels)), str(source))
        record = OutputRecord("case", None, volume, manifest, "none", "", 0)
        cpu = {
            "read .nii.gz": (
                _seconds(lambda: read_case(find_cases([source])[0], manifest.labels)) / depth
            ),
            "to the model's grid": (
                _seconds(lambda: [grid.labels(volume.labels, k) for k in range(depth)]) / depth
            ),
            "noise": (
                _seconds(lambda: [random.noise(k, grid.size) for k in range(depth)]) / depth
                if manifest.noise
                else 0.0
            ),
            "back to the mask's grid": _seconds(back) / depth,
            f"write {format}": _seconds(lambda: writer.write(out, record, slabs_of(ct))) / depth,
        }
        written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        disk = (source.stat().st_size + written) / depth
    h, w = grid.size
    name = manifest.file_of("onnx", "fp32")
    if name is None:
        raise SystemExit("the model holds no model.onnx to count")
    sizes = {"N": 1, "H": h, "W": w}
    link = h * w * (manifest.grid.slices + manifest.noise + 2)
    return Costs(
        cpu, disk, link, count(model / name, sizes), traffic(model / name, sizes, bytes_per_value=2)
    )


def _seconds(stage: Callable[[], object]) -> float:
    """The least CPU seconds of a few runs, after one run that warms up."""
    seconds = []
    for n in range(REPEATS + 1):
        before = time.process_time()
        stage()
        if n:
            seconds.append(time.process_time() - before)
    return min(seconds)


def predict(costs: Costs, device: Device, peak_share: float) -> dict[str, float]:
    """Predict the rates of a device.

    Args:
        costs: What one slice costs.
        device: The machine.
        peak_share: The share of the data sheet's dense FP16 rate that the GPU reaches.

    Returns:
        Slices/s that each of its resources allows.
    """
    gpu = max(
        2 * costs.macs / (peak_share * device.fp16),
        costs.tensors / (BANDWIDTH_SHARE * device.memory),
    )
    return {
        "GPU": 1 / gpu,
        "link": device.link / costs.link,
        "CPU": device.cores * device.core / sum(costs.cpu.values()),
        "disk": device.disk / costs.disk,
    }


def page(model: Path, size: str, costs: dict[str, Costs]) -> str:
    """Write the page.

    Args:
        model: The model folder.
        size: A key of `SIZES`.
        costs: The costs of a slice by output format.

    Returns:
        The page as Markdown.
    """
    this_machine, first_costs = machine(ROOT), next(iter(costs.values()))
    on_disk = ", ".join(f"{cost.disk / 1e3:.0f} kB ({name})" for name, cost in costs.items())
    return "\n".join(
        [
            "# Capacity: what to expect of other machines",
            "",
            (
                f"Written by `python tools/capacity.py`; costs measured on {this_machine['cpu']},"
                f" commit {this_machine['commit']}, one core's seconds."
            ),
            (
                f"Model `{Manifest.load(model).name}`: {first_costs.macs / 1e9:.3g}"
                f" G multiply-accumulates and {first_costs.tensors / 1e6:.0f} MB"
                " of FP16 tensors a slice."
            ),
            f"Masks of {size}.",
            "",
            "## Measured: what one slice costs",
            "",
            "| stage | CPU ms |",
            "| :-- | --: |",
            *(
                f"| {stage} | {1e3 * seconds:.2f} |"
                for stage, seconds in {
                    s: t for c in costs.values() for s, t in c.cpu.items()
                }.items()
            ),
            "",
            f"Over the link {first_costs.link / 1e3:.0f} kB; on disk {on_disk}.",
            *(line for name, cost in costs.items() for line in _predicted(name, cost)),
            "",
            "## Assumptions",
            "",
            (
                f"- The GPU reaches {PEAK_SHARES[0]:.0%} to {PEAK_SHARES[1]:.0%} of its data"
                f" sheet's dense FP16 rate or {BANDWIDTH_SHARE:.0%} of its memory bandwidth,"
            ),
            "  whichever is slower. No mask2ct has run on a GPU yet: the lower end is what others",
            "  measured for a small network in INT8 on an Orin Nano, the rest are guesses.",
            "- Stages overlap fully; CPU stages share the cores evenly and scale with them.",
            (
                "- A cluster's nodes share nothing: its rate is the sum of theirs. Shared storage"
                " must carry the disk bytes of all."
            ),
            "",
            (
                "| device | FP16 dense TFLOP/s | memory GB/s | link GB/s | cores | a core against"
                " the measured one | disk GB/s |"
            ),
            "| :-- | --: | --: | --: | --: | --: | --: |",
            *(
                f"| {d.name} | {d.fp16 / 1e12:g} | {d.memory / 1e9:g} | {d.link / 1e9:g} |"
                f" {d.cores} | {d.core:g} | {d.disk / 1e9:g} |"
                for d in DEVICES
            ),
            "",
        ]
    )


def _predicted(name: str, cost: Costs) -> list[str]:
    """A table of every device's rates, in slices/s, for results of one format."""
    lines = [
        "",
        f"## Predicted, writing {name}",
        "",
        "| device | GPU | link | CPU | disk | slices/s | starves first | to keep the GPU busy |",
        "| :-- | --: | --: | --: | --: | --: | :-- | :-- |",
    ]
    for device in DEVICES:
        low, high = (predict(cost, device, share) for share in PEAK_SHARES)
        rates = [_range(low[key], high[key]) for key in low]
        slowest = _range(min(low.values()), min(high.values()))
        first = dict.fromkeys(min(rate, key=rate.__getitem__) for rate in (low, high))
        cores = [rate["GPU"] * sum(cost.cpu.values()) / device.core for rate in (low, high)]
        disk = [rate["GPU"] * cost.disk / 1e6 for rate in (low, high)]
        need = f"{_range(*map(round, cores))} such cores, {_range(*map(round, disk))} MB/s of disk"
        row = [device.name, *rates, f"**{slowest}**", " or ".join(first), need]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _range(low: float, high: float) -> str:
    """Two ends as text, or one number where they are the same."""
    ends = list(dict.fromkeys((si(low), si(high))))
    return " to ".join(ends)


def main(argv: Sequence[str]) -> int:
    """Measure and write the page; returns the exit code.

    Args:
        argv: The command line without the program's name.
    """
    parser = argparse.ArgumentParser(
        "capacity.py",
        description="Predict throughput on other machines from costs measured here.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "demo" / "model")
    parser.add_argument("--size", choices=list(SIZES), default="300x512x512")
    parser.add_argument(
        "-o", "--output", type=Path, default=ROOT / "docs" / "reference" / "capacity.md"
    )
    options = parser.parse_args(argv)
    text = page(
        options.model,
        options.size,
        {
            name: measure(options.model, options.size, name)
            for name in ("nifti", "nii")
            if name in FORMATS
        },
    )
    write_text(options.output, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
