"""Describe what a run would be: config, data, network sizes and time.

It reads headers and makes a few real steps; it writes nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

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
    device, reason = choose_device(config)
    threads = set_threads(config)
    step = Step(config, device)
    per_step, measured = time_steps(config, step)
    precision: Literal["fp32", "bf16"] = "bf16" if config.training.precision == "fp32" else "fp32"
    comparison = f"; {precision} was not tried, it may take long"
    if per_step <= OTHER_SECONDS:
        changed = replace(config, training=replace(config.training, precision=precision))
        seconds, _ = time_steps(changed, Step(changed, device))
        comparison = f"; {duration_of_step(seconds)} in {precision}"
    estimate = (
        f"{duration_of_step(per_step)} a step, {duration(per_step * config.training.steps)} for"
        f" {config.training.steps} steps, validation not counted"
    )
    return "\n".join(
        [
            plan or json.dumps(configs.to_json(config), indent=1),
            "",
            data_table(config),
            "",
            network_table(config, step),
            "",
            f"device         {device} ({reason}), {threads} CPU threads",
            f"time           {estimate} (median of {measured} steps here)",
            (
                f"precision      {duration_of_step(per_step)} a step in"
                f" {config.training.precision}{comparison}"
            ),
        ]
    )


def duration_of_step(seconds: float) -> str:
    """Write the duration of one step for a person.

    Args:
        seconds: The duration.

    Returns:
        Such as "120 ms".
    """
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else duration(seconds)


def data_table(config: RunConfig) -> str:
    """Count patients and axial slices per split, from headers, or from the phantom's config.

    Args:
        config: The config.

    Returns:
        Lines of text.
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
        return "data           none: give --dataset-path DIR"
    rows = [f"data           {source}", f"{'split':<14} patients  slices"]
    for name, numbers in parts.items():
        slices = sum(counts[n] for n in numbers)
        if config.data.split_by == "slices":
            numbers, slices = (
                list(range(len(counts))),
                sum(len(dataset.split(count, config.data)[name]) for count in counts),
            )
        rows.append(f"{name:<14} {len(numbers):8d} {slices:7d}")
    return "\n".join(rows)


def network_table(config: RunConfig, step: Step) -> str:
    """Count parameters and multiply-accumulates of both networks, for one canvas.

    Args:
        config: The config.
        step: The networks.

    Returns:
        Lines of text.
    """
    channels, (h, w) = step.generator.channels, config.data.canvas
    condition = torch.zeros(1, channels, h, w, device=step.device)
    plane = torch.zeros(1, 1, h, w, device=step.device)
    noise = plane if step.generator.noisy else None
    style = (
        torch.zeros(1, step.generator.style, device=step.device) if step.generator.style else None
    )
    rows = [f"{'network':<14} {'parameters':>12} {'MACs per slice':>15}"]
    calls: list[tuple[str, torch.nn.Module, Callable[[], object]]] = [
        ("generator", step.generator, lambda: step.ema_generator(condition, noise, style)),
        ("discriminator", step.discriminator, lambda: step.discriminator(condition, plane)),
    ]
    for name, net, call in calls:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        rows.append(
            f"{name:<14} {sum(p.numel() for p in net.parameters()):>12,}"
            f" {counter.get_total_flops() // 2:>15,}"
        )
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
