"""Widths and steps that fit a budget of time, from a few steps measured on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from runtime.core.console import duration

from ..config import RunConfig
from ..loop import choose_device, set_threads
from ..reporting.estimate import duration_of_step, time_steps
from ..step import Step
from .data_plan import Choices

# Channels of the generator's first layer, the widest first.
WIDTHS = {"cpu": (32, 24, 16, 12, 8), "cuda": (64, 48, 32, 24, 16)}
# Steps that a network should have; fewer than FEWEST teach little.
WANTED, FEWEST, MOST = 1500, 400, 20_000
# The share of the budget for steps; reading, validation and reports take the rest.
SHARE = 0.8
# Seconds in which one width is timed.
TRIAL_SECONDS = 2.5
# A step of a network of twice the width takes about 2 ** COST times as long.
COST = 1.5
# A learning rate ends at exp(-DECAY) of its beginning; validations of a run; averaging of weights.
DECAY, VALIDATIONS = 2.0, 4
LONG_RUN, EMA_SHORT, EMA_LONG = 5000, 0.995, 0.999


def discriminator_filters(width: int) -> int:
    """The discriminator's width beside a generator's.

    Args:
        width: Channels of the generator's first layer.
    """
    return max(8, 8 * (width // 10))


def plan_budget(
    resolve: Callable[[Choices], RunConfig], seconds: float, stated: set[str]
) -> Choices:
    """Choose the widest network that makes `WANTED` steps in the budget, and its steps.

    Args:
        resolve: Makes the config with more choices.
        seconds: The budget.
        stated: Keys that the command line gives.

    Returns:
        The choices.
    """
    config = resolve({})
    device = choose_device(config)[0].type
    own_steps = config.training.steps if "training.steps" in stated else None
    own_width = config.generator.filters if "generator.filters" in stated else None
    if own_steps is not None and own_width is not None:
        return {**_discriminator(own_width), **plan_steps(own_steps, "--set")}
    widths = list(WIDTHS[device]) if own_width is None else [own_width]
    target = WANTED if own_steps is None else own_steps
    width = widths[0]
    while True:
        per_step = _seconds_per_step(resolve(_widths(width)))
        steps = int(SHARE * seconds / per_step)
        narrower = [w for w in widths if w < width]
        if steps >= target or not narrower:
            break
        fitting = [w for w in narrower if steps * (width / w) ** COST >= target]
        width = fitting[0] if fitting else narrower[-1]
    steps = max(1, min(MOST, steps)) if own_steps is None else own_steps
    return {
        **_widths(width, f"{duration_of_step(per_step)} a step here, on {device}"),
        **plan_steps(steps, _why_steps(steps, seconds)),
    }


def plan_steps(steps: int, why: str) -> Choices:
    """Choose what follows from the number of steps.

    Args:
        steps: The number of steps.
        why: The reason for it.

    Returns:
        The choices.
    """
    every = max(1, steps // VALIDATIONS)
    rate: tuple[Any, str] = (round(DECAY / steps, 7), "the learning rate ends at 14 %")
    ema = EMA_LONG if steps > LONG_RUN else EMA_SHORT
    return {
        "training.steps": (steps, why),
        "training.valid_every": (every, f"{VALIDATIONS} validations"),
        "training.checkpoint_every": (every, "after each validation"),
        "training.log_every": (max(1, min(20, steps // 50)), "50 lines or more"),
        "training.ema_decay": (ema, f"for {steps} steps"),
        "optimizer.decay_g": rate,
        "optimizer.decay_d": rate,
    }


def _why_steps(steps: int, seconds: float) -> str:
    why = f"{SHARE:.0%} of {duration(seconds)}"
    if steps < FEWEST:
        why += f"; FEWER THAN {FEWEST} TEACH LITTLE: raise --budget"
    return why


def _widths(width: int, why: str = "") -> Choices:
    return {"generator.filters": (width, why), **_discriminator(width)}


def _discriminator(width: int) -> Choices:
    return {"discriminator.filters": (discriminator_filters(width), "follows the generator's")}


def _seconds_per_step(config: RunConfig) -> float:
    set_threads(config)
    # Steps as they are in training, but for logs and validation.
    one = replace(config, training=replace(config.training, compile=False))
    return time_steps(one, Step(one, choose_device(one)[0]), TRIAL_SECONDS)[0]
