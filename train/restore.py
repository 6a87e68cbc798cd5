"""Use an existing training: test it on the test split, or start another one from its weights."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from runtime.core.atomic_files import write_json
from runtime.core.errors import ConfigError, ModelError, UsageError

from . import checkpoint
from . import config as configs
from .config import RunConfig
from .data.dataset import Cohort, Slices
from .data.slice_cache import FOLDER
from .loop import Training, choose_device, open_cohort, set_threads
from .networks.generator import Generator
from .step import Step
from .validation import Validation

TEST = "test.json"


def checkpoint_of(path: Path) -> Path:
    """Find the checkpoint that a path stands for.

    Args:
        path: A checkpoint folder, or a run folder, which stands for its newest checkpoint.

    Returns:
        The checkpoint folder.

    Raises:
        ModelError: There is no checkpoint.
    """
    if checkpoint.is_checkpoint(path):
        return path
    newest = checkpoint.newest(path) if path.is_dir() else None
    if newest is None:
        raise ModelError(
            f"{path} is not a checkpoint",
            expected="a folder such as RUN/checkpoints/step-00001000, or a run folder",
            remedy="correct --ckpt-load",
            file=path,
        )
    return newest


def run_of(path: Path) -> Path:
    """Find the run folder that a path belongs to.

    Args:
        path: A checkpoint folder or a run folder.

    Returns:
        The run folder.
    """
    return path.parent.parent if checkpoint.is_checkpoint(path) else path


def begin_from(source: Path, config: RunConfig, folder: Path) -> Path:
    """Write the state of a checkpoint as step 0 of a new run.

    Args:
        source: The checkpoint folder.
        config: The config of the new run.
        folder: The run folder of the new run.

    Returns:
        The new checkpoint folder.

    Raises:
        ModelError: The checkpoint belongs to other networks.
    """
    _, tensors = checkpoint.load(source)
    try:
        Step(config).load_state(tensors)
    except (KeyError, RuntimeError) as exc:
        raise ModelError(
            f"checkpoint {source.name} does not fit the networks of this config",
            expected="the same labels, generator and discriminator",
            remedy="use the config that it was trained with",
            file=source,
        ) from exc
    checkpoint.claim(folder, config)
    return checkpoint.save(folder, 0, tensors, config.training.keep_checkpoints)


def stored(run: Path, requested: RunConfig, dataset_path: str | None) -> RunConfig:
    """Load the config that a run was trained with, and compare it with the command line's.

    Args:
        run: The run folder.
        requested: The config of the command line.
        dataset_path: Where the dataset lies now; None: where it was.

    Returns:
        The config of the run, with that path.

    Raises:
        ConfigError: The two configs differ in what decides the result.
    """
    config = checkpoint.stored_config(run)
    free = [
        *checkpoint.FREE,
        "data.path",
        *(["data.phantom"] if config.data.path is not None else []),
    ]
    # The data decide these two where the config leaves them open.
    free += ["data.labels"] if requested.data.labels is None else []
    free += ["intensity."] if requested.intensity.unit == "auto" else []
    changed = checkpoint.differences(configs.to_json(config), configs.to_json(requested))
    if changed := [key for key in changed if not key.startswith(tuple(free))]:
        raise ConfigError(
            f"the run was trained with other values of {', '.join(changed)}",
            expected="the config it was trained with",
            remedy="drop --config and --set: the run folder knows",
            file=run / checkpoint.CONFIG,
        )
    return (
        config
        if dataset_path is None
        else replace(config, data=replace(config.data, path=dataset_path, phantom=None))
    )


def measure_test(
    config: RunConfig, source: Path, output: Path, cohort: Cohort, *, quiet: bool = False
) -> dict[str, Any]:
    """Measure every slice of the test split; write OUTPUT/test.json and OUTPUT/figures/test.png.

    Args:
        config: The config of the run.
        source: A finished run (its exported generator), an unfinished one (its newest checkpoint)
            or a checkpoint.
        output: The folder of the results.
        cohort: The patients.
        quiet: Whether to print nothing.

    Returns:
        The metrics.

    Raises:
        UsageError: The test split is empty.
        ModelError: The source cannot be loaded.
    """
    if not cohort.test:
        raise _empty_split("test")
    step, device, net = network_of(config, source, output, cohort, quiet=quiet)
    patients = _all_slices(config, cohort.test)
    metrics, generated = patients.measure(net, device, config.training.batch_size)
    patients.draw(output / "figures" / "test.png", generated, f"test patients, step {step}")
    counts = cohort.summary()
    write_json(
        output / TEST,
        {
            "split": "test",
            "patients": counts["patients"]["test"],
            "slices": counts["slices"]["test"],
            "step": step,
            "data": counts["digest"],
            "metrics": metrics,
        },
    )
    if not quiet:
        print(f"tested on {len(cohort.test)} patient(s) at step {step}", file=sys.stderr)
    return metrics


def held_out(
    source: Path, split: Literal["valid", "test"], dataset_path: str | None = None
) -> tuple[dict[str, Any], str]:
    """Measure every slice of a run's split; write nothing but decoded slices.

    Args:
        source: As in `measure_test`.
        split: The patients to measure.
        dataset_path: Where the dataset lies now; None: where it was.

    Returns:
        The metrics and their unit.

    Raises:
        UsageError: The split is empty.
        ModelError: The source cannot be loaded.
    """
    run = run_of(source)
    config = checkpoint.stored_config(run)
    if dataset_path is not None:
        config = replace(config, data=replace(config.data, path=dataset_path, phantom=None))
    cohort = open_cohort(config, run, cache=run.parent / FOLDER, quiet=True)
    patients: tuple[Slices, ...] = getattr(cohort, split)
    if not patients:
        raise _empty_split(split)
    _, device, net = network_of(config, source, run, cohort, quiet=True)
    measured = _all_slices(config, patients)
    metrics, synthetic = measured.measure(net, device, config.training.batch_size)
    metrics["quality"] = measured.quality(synthetic, cohort.train)
    metrics["ceiling"] = measured.real_baseline(cohort.train)
    return metrics, config.intensity.unit


def network_of(
    config: RunConfig, source: Path, output: Path, cohort: Cohort, *, quiet: bool
) -> tuple[int, torch.device, Generator]:
    """Load a network: that of a finished run as exported, else that of a checkpoint.

    Args:
        config: The config of the run.
        source: As in `measure_test`.
        output: The folder of the results.
        cohort: The patients.
        quiet: Whether to print nothing.

    Returns:
        The number of steps trained, the device, and the generator on it in eval mode.
    """
    if (source / checkpoint.RUN).is_file():
        device, _ = choose_device(config)
        set_threads(config)
        return (
            checkpoint.load_run(source).step,
            device,
            checkpoint.load_generator(source).to(device),
        )
    training = Training(config, output, cohort, checkpoint_of(source), quiet=quiet)
    return training.done, training.device, training.network()


def _all_slices(config: RunConfig, patients: tuple[Slices, ...]) -> Validation:
    """Every slice of the patients, ready to be measured."""
    return Validation(
        patients,
        sum(map(len, patients)),
        configs.label_table(config.data),
        configs.intensity(config),
        config.training.seed,
        classes=configs.class_count(config.data),
    )


def _empty_split(split: str) -> UsageError:
    """The error for a split without patients."""
    return UsageError(
        f"the {split} split is empty",
        expected="patients that are neither trained on nor validated with",
        remedy=(
            "lower data.train_ratio or add patients; in the original's layout train_ratio 1 tests"
            " on testing/"
        ),
    )
