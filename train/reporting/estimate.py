"""Describe what a run would be: config, data, network sizes and time.

It reads headers and makes a few real steps; it writes nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from runtime.core.console import duration

from .. import config as configs
from ..config import RunConfig
from ..data import dataset
from ..data.layouts import find
from ..loop import choose_device, set_threads
from ..step import Batch, Step

# The time for trial steps.
BUDGET_SECONDS = 8.0
# The slices of the first trial step.
FEW = 2
# If a step takes at most so long, the other precision is tried too.
OTHER_SECONDS = 0.5
TRIAL_STEPS = 6


@dataclass(frozen=True)
class Estimate:
    """What a run would be.

    Attributes:
        source: Where the data come from, for a person; empty without data.
        splits: (patients, axial slices) by the split's name.
        networks: (parameters, multiply-accumulates per slice of one canvas) by network.
        device: The device of the training.
        device_reason: Why it was chosen.
        threads: CPU threads.
        step_seconds: The median seconds of a step, by precision; a precision that was not tried is
            absent.
        measured: The number of steps that were timed.
    """

    source: str
    splits: Mapping[str, tuple[int, int]]
    networks: Mapping[str, tuple[int, int]]
    device: str
    device_reason: str
    threads: int
    step_seconds: Mapping[str, float]
    measured: int


def estimate(config: RunConfig) -> Estimate:
    """Count data and networks, and time some steps.

    Args:
        config: The config with nothing left to infer.

    Returns:
        What the run would be.

    Raises:
        Mask2CTError: The run itself would fail on this config or these data.
    """
    device, reason = choose_device(config)
    threads = set_threads(config)
    step = Step(config, device)
    per_step, measured = time_steps(config, step)
    step_seconds: dict[str, float] = {config.training.precision: per_step}
    if per_step <= OTHER_SECONDS:
        other = other_precision(config)
        changed = replace(config, training=replace(config.training, precision=other))
        step_seconds[other], _ = time_steps(changed, Step(changed, device))
    source, splits = count_data(config)
    return Estimate(
        source,
        splits,
        count_networks(config, step),
        str(device),
        reason,
        threads,
        step_seconds,
        measured,
    )


def other_precision(config: RunConfig) -> Literal["fp32", "bf16"]:
    """The precision that the config does not have."""
    return "bf16" if config.training.precision == "fp32" else "fp32"


def describe(config: RunConfig, plan: str = "") -> str:
    """Write the text that --dry-run prints.

    Args:
        config: The config with nothing left to infer.
        plan: The table of a planned config, in place of the whole config.

    Returns:
        Lines of text.

    Raises:
        Mask2CTError: The run itself would fail on this config or these data.
    """
    run = estimate(config)
    precision, other = config.training.precision, other_precision(config)
    per_step = run.step_seconds[precision]
    comparison = f"; {other} was not tried, it may take long"
    if other in run.step_seconds:
        comparison = f"; {duration_of_step(run.step_seconds[other])} in {other}"
    total = (
        f"{duration_of_step(per_step)} a step, {duration(per_step * config.training.steps)} for"
        f" {config.training.steps} steps, validation not counted"
    )
    return "\n".join(
        [
            plan or json.dumps(configs.to_json(config), indent=1),
            "",
            data_table(run.source, run.splits),
            "",
            network_table(run.networks),
            "",
            f"device         {run.device} ({run.device_reason}), {run.threads} CPU threads",
            f"time           {total} (median of {run.measured} steps here)",
            f"precision      {duration_of_step(per_step)} a step in {precision}{comparison}",
        ]
    )


def describe_json(config: RunConfig, reasons: Mapping[str, str]) -> dict[str, Any]:
    """Describe a run for a program (docs/reference/json.md).

    Args:
        config: The config with nothing left to infer.
        reasons: Why a key has its value, by key; empty for a config of the user.

    Returns:
        Values that JSON can write; times are in seconds.

    Raises:
        Mask2CTError: As `describe`.
    """
    run = estimate(config)
    return {
        "config": configs.to_json(config),
        "reasons": dict(reasons),
        "data": {
            "source": run.source,
            "splits": {
                name: {"patients": patients, "slices": slices}
                for name, (patients, slices) in run.splits.items()
            },
        },
        "networks": {
            name: {"parameters": parameters, "macs_per_slice": macs}
            for name, (parameters, macs) in run.networks.items()
        },
        "device": run.device,
        "threads": run.threads,
        "step_seconds": dict(run.step_seconds),
        "training_seconds": run.step_seconds[config.training.precision] * config.training.steps,
    }


def duration_of_step(seconds: float) -> str:
    """Write the duration of one step for a person.

    Args:
        seconds: The duration.

    Returns:
        Such as "120 ms".
    """
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else duration(seconds)


def count_data(config: RunConfig) -> tuple[str, dict[str, tuple[int, int]]]:
    """Count patients and axial slices per split, from headers, or from the phantom's config.

    Args:
        config: The config.

    Returns:
        Where the data come from, empty without data, and (patients, slices) by split.
    """
    policy = configs.grid_policy(config)
    if config.data.path is not None:
        layout = find(Path(config.data.path), config.data)
        pairs = layout.pairs
        if config.data.split_by == "slices":
            pairs = [pair for pair in pairs if not pair.synthetic]
        counts = dataset.slice_counts(pairs, policy)
        parts = dataset.assign(pairs, config.data)
        source = f"{config.data.path}: {layout.says}"
    elif config.data.phantom is not None:
        counts = [config.data.phantom.size[0]] * config.data.phantom.patients
        parts = dataset.split(len(counts), config.data)
        source = f"phantom, seed {config.data.phantom.seed}"
    else:
        return "", {}
    splits = {}
    for name, numbers in parts.items():
        patients, slices = len(numbers), sum(counts[n] for n in numbers)
        if config.data.split_by == "slices":
            patients = len(counts)
            slices = sum(len(dataset.split(count, config.data)[name]) for count in counts)
        splits[name] = (patients, slices)
    return source, splits


def data_table(source: str, splits: Mapping[str, tuple[int, int]]) -> str:
    """The patients and axial slices of each split, for a person.

    Args:
        source: As `count_data` returns it.
        splits: As `count_data` returns them.

    Returns:
        Lines of text.
    """
    if not source:
        return "data           none: give --dataset-path DIR"
    rows = [f"data           {source}", f"{'split':<14} patients  slices"]
    for name, (patients, slices) in splits.items():
        rows.append(f"{name:<14} {patients:8d} {slices:7d}")
    return "\n".join(rows)


def count_networks(config: RunConfig, step: Step) -> dict[str, tuple[int, int]]:
    """Count parameters and multiply-accumulates of both networks, for one canvas.

    Args:
        config: The config.
        step: The networks.

    Returns:
        (parameters, multiply-accumulates per slice) by network.
    """
    channels, (h, w) = step.generator.channels, config.data.canvas
    condition = torch.zeros(1, channels, h, w, device=step.device)
    plane = torch.zeros(1, 1, h, w, device=step.device)
    noise = plane if step.generator.noisy else None
    style = (
        torch.zeros(1, step.generator.style, device=step.device) if step.generator.style else None
    )
    calls: list[tuple[str, torch.nn.Module, Callable[[], object]]] = [
        ("generator", step.generator, lambda: step.ema_generator(condition, noise, style)),
        ("discriminator", step.discriminator, lambda: step.discriminator(condition, plane)),
    ]
    counts = {}
    for name, net, call in calls:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        parameters = sum(p.numel() for p in net.parameters())
        counts[name] = (parameters, counter.get_total_flops() // 2)
    return counts


def network_table(networks: Mapping[str, tuple[int, int]]) -> str:
    """The sizes of the networks, for a person.

    Args:
        networks: As `count_networks` returns them.

    Returns:
        Lines of text.
    """
    rows = [f"{'network':<14} {'parameters':>12} {'MACs per slice':>15}"]
    for name, (parameters, macs) in networks.items():
        rows.append(f"{name:<14} {parameters:>12,} {macs:>15,}")
    return "\n".join(rows)


def time_steps(config: RunConfig, step: Step, budget: float = BUDGET_SECONDS) -> tuple[float, int]:
    """Time steps on random slices.

    The first step, of `FEW` slices, warms up. Where it shows that a whole batch takes long, steps
    of as few slices are timed and scaled up.

    Args:
        config: The config.
        step: The networks, which are changed.
        budget: The seconds to spend.

    Returns:
        The median seconds of a whole step, and the number of steps that were timed.
    """
    rng, (h, w), n = np.random.default_rng(0), config.data.canvas, config.training.batch_size
    few = min(n, FEW)

    def seconds(count: int) -> float:
        labels = torch.from_numpy(
            rng.integers(0, step.classes, (count, config.data.slices, h, w), np.uint8)
        )
        image = torch.from_numpy(rng.random((count, 1, h, w), np.float32))
        style = (
            torch.from_numpy(rng.standard_normal((count, step.generator.style), np.float32))
            if step.generator.style
            else None
        )
        batch = Batch(
            labels, image, torch.from_numpy(rng.integers(0, 256, (count, 1, h, w), np.uint8)), style
        )
        before = time.perf_counter()
        # .item() waits for the device.
        step(0, batch)["adversarial"].item()
        return time.perf_counter() - before

    start = time.perf_counter()
    count = few if seconds(few) * n / few > budget / 2 else n
    times: list[float] = []
    while not times or (
        len(times) < TRIAL_STEPS and time.perf_counter() - start + times[-1] < budget
    ):
        times.append(seconds(count))
    return float(np.median(times)) * n / count, len(times)
