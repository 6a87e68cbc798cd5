"""The training loop: batches in, a run folder out.

A training resumes exactly, and an interruption never damages its run folder.
"""

from __future__ import annotations

import difflib
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.core.append_log import AppendLog, line_of
from runtime.core.atomic_files import write_text
from runtime.core.console import Progress
from runtime.core.context import Context
from runtime.core.errors import ModelError, UsageError
from runtime.core.manifest import grid_to_json, labels_to_json
from runtime.engines.base import cores

from . import checkpoint, figures, verdict
from . import config as configs
from .config import RunConfig
from .data import augmentation, dataset
from .data.class_dropout import drop_classes
from .data.class_statistics import ClassStatistics, measure_classes
from .data.layouts import find
from .data.slice_cache import SliceCache
from .distributed import SINGLE_PROCESS, DistributedContext
from .metrics import scores
from .networks.contrast import ContrastStyles, move_contrast
from .networks.generator import Generator
from .networks.style import Styles, shift_intensity, warp_outline
from .reporting import run_report
from .reporting.loggers import Loggers
from .step import Batch, Step
from .training_monitor import TrainingMonitor, note
from .validation import MASKS_KEPT, Validation, label_maps

# The most held-out slices that a finished training is assessed on, if it validates on fewer.
ASSESSED_SLICES = 256
# In the run folder: the worst slice of a broken training.
WORST = "figures/worst.png"


def choose_device(config: RunConfig) -> tuple[torch.device, str]:
    """Choose the device to train on.

    Args:
        config: The config of the run.

    Returns:
        The device, and the reason for the choice.

    Raises:
        UsageError: The config asks for CUDA, and this machine has no CUDA device.
    """
    requested, has_cuda = config.training.device, torch.cuda.is_available()
    if requested == "cuda" and not has_cuda:
        raise UsageError(
            "training.device is cuda, and this machine has none",
            expected="a CUDA device",
            remedy="set training.device to auto or cpu",
        )
    if requested == "cpu" or not has_cuda:
        return torch.device("cpu"), "as configured" if requested == "cpu" else "no CUDA device"
    return torch.device(
        "cuda"
    ), "as configured" if requested == "cuda" else "a CUDA device is there"


def set_threads(config: RunConfig, sharers: int = 1) -> int:
    """Set the number of CPU threads of this process.

    It is `training.threads`, or else this process' share of the cores.

    Args:
        config: The config of the run.
        sharers: How many processes share the cores.

    Returns:
        The number of threads.
    """
    threads = config.training.threads or max(1, cores() // sharers)
    torch.set_num_threads(threads)
    return threads


def open_cohort(
    config: RunConfig, folder: Path, *, cache: Path | None = None, quiet: bool = False
) -> dataset.Cohort:
    """Open the patients of `data.path`, or simulate the phantom's into RUN/data.

    Args:
        config: The config of the run.
        folder: The run folder.
        cache: The folder of decoded slices; None: they stay in memory.
        quiet: Whether to print nothing.

    Returns:
        The cohort.

    Raises:
        UsageError: There is no data.
        InputError: A file cannot be used for training.
    """
    pairs = find(dataset_path(config, folder, quiet=quiet), config.data).pairs
    slices = None if cache is None else SliceCache(cache)
    table, intensity = configs.label_table(config.data), configs.intensity(config)
    cohort = dataset.load_cohort(
        pairs,
        config.data,
        table,
        configs.grid_policy(config),
        intensity,
        slices,
        None if slices is None else slices.tissues,
    )
    if not quiet:
        print(cohort.table(table, intensity), file=sys.stderr)
    return cohort


def dataset_path(config: RunConfig, folder: Path, *, quiet: bool = True) -> Path:
    """The path of the data: `data.path`, or the phantom's in RUN/data, which may be simulated.

    Args:
        config: The config of the run.
        folder: The run folder.
        quiet: Whether to print nothing.

    Raises:
        UsageError: There is no data.
    """
    if config.data.path is not None:
        return Path(config.data.path)
    if config.data.phantom is None:
        raise UsageError(
            "there is no data to train on",
            expected="a folder of patients, or a config with data.phantom",
            remedy="give --dataset-path DIR",
        )
    return _phantom(config.data.phantom, folder / "data", quiet)


def _phantom(phantom: configs.PhantomConfig, folder: Path, quiet: bool) -> Path:
    """Simulate the phantom's patients into `folder`, unless they are complete."""
    # This marker is written last: without it, an interrupted cohort is simulated again.
    marker = folder / ".complete"
    if not marker.exists():
        from .phantom.cohort import generate_cohort

        line = Progress("phantom patients", phantom.patients, quiet=quiet)
        generate_cohort(
            folder,
            phantom.patients,
            seed=phantom.seed,
            size=phantom.size,
            progress=lambda count, _: line.update(count),
        )
        line.close()
        write_text(marker, "")
    return folder


class Training:
    """One training from step `done` on.

    `Step` and the number of steps hold everything that it needs to continue. Each of several ranks
    has a `Training` with the same arguments; only rank 0 validates and writes.

    Args:
        config: The config of the run.
        folder: The run folder.
        cohort: The patients.
        resume_from: The checkpoint to continue from; None: start at step 0.
        quiet: Whether to print nothing.
        ranks: This process among its peers.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        cohort: dataset.Cohort,
        resume_from: Path | None = None,
        *,
        quiet: bool = False,
        ranks: DistributedContext = SINGLE_PROCESS,
    ):
        self.config, self.folder, self.cohort, self.ranks = config, folder, cohort, ranks
        self._quiet = quiet
        self.device, reason = choose_device(config)
        threads = set_threads(config, ranks.neighbours)
        if not quiet:
            count = f"{ranks.world} ranks, each " if ranks.world > 1 else ""
            print(
                f"training on {count}{self.device} ({reason}), {threads} CPU threads",
                file=sys.stderr,
            )
        table, intensity = configs.label_table(config.data), configs.intensity(config)
        self._labels = len(table)
        self.statistics: ClassStatistics | None = None
        if cohort.context is not None:
            self.statistics = measure_classes(cohort.train, len(table), cohort.context, intensity)
        self.step, self.done = Step(config, self.device, ranks, self.statistics), 0
        if resume_from is not None:
            self.done, tensors = checkpoint.load(resume_from)
            try:
                self.step.load_state(tensors)
            except (KeyError, RuntimeError) as exc:
                raise ModelError(
                    f"checkpoint {resume_from.name} does not fit the networks of this version",
                    expected="tensors of the same networks",
                    remedy=(
                        "go on with the version that wrote it, or start anew in another --output"
                    ),
                    file=resume_from,
                ) from exc
        t = config.training
        self.batches = dataset.Batches(
            cohort.train, t.batch_size, t.seed, intensity, ranks.rank, ranks.world
        )
        g = config.generator
        self.styles: Styles | None = None
        self.contrast: ContrastStyles | None = None
        if g.style and cohort.context is not None and self.statistics is not None:
            self.contrast = ContrastStyles(
                cohort.train,
                self.statistics,
                cohort.context,
                len(table),
                g.style,
                g.style_spread,
                t.seed,
            )
        elif g.style:
            self.styles = Styles(
                cohort.train, self.step.classes, g.style, t.seed, intensity, g.style_spread
            )
        self.validation = Validation(
            cohort.valid,
            t.valid_slices,
            table,
            intensity,
            t.seed,
            classes=self.step.classes,
            contrast=None if self.contrast is None else self.contrast.contrast,
        )
        self.metrics: dict[str, Any] | None = None
        self._generated: list[NDArray[np.int16]] = []
        # Of a finished run: train/verdict.py.
        self.verdict: dict[str, Any] | None = None
        self.monitor = TrainingMonitor(folder, t.collapse_steps if config.loss.adversarial else 0)
        self._log: _Log | None = None
        self._progress = Progress("training", t.steps, unit="steps", quiet=quiet)
        self._sums: dict[str, Tensor] = {}
        self._since = self.done

    def run(self) -> dict[str, Any]:
        """Train to `training.steps` and write the run folder.

        Returns:
            The last validation metrics; empty on other ranks than 0.

        Raises:
            Diverged: A loss is not a number. The last good checkpoint stays.
            Collapsed: The networks teach each other nothing. The last good checkpoint stays.
            KeyboardInterrupt: After the checkpoint that Ctrl-C asks for.
        """
        t = self.config.training
        moments = {round(share * t.steps) for share in figures.MOMENTS}
        with _graceful() as interrupted, ExitStack() as stack:
            if self.ranks.first:
                self._log = stack.enter_context(
                    closing(_Log(self.config, self.folder, self.done, quiet=self._quiet))
                )
                if self.done == 0:
                    self._snapshot()
            while self.done < t.steps:
                self._advance()
                end = self.done == t.steps
                log, validate, save = (
                    self.done % every == 0
                    for every in (t.log_every, t.valid_every, t.checkpoint_every)
                )
                # Several ranks do not exchange signals at every step, which would cost time.
                due = log or validate or save or end or self.ranks.world == 1
                stop = due and not end and self.ranks.any(bool(interrupted))
                if log or validate or save or end or stop:
                    self._report(validate=validate or end)
                if self.ranks.first:
                    if self.done in moments:
                        self._snapshot()
                    self._save(validated=validate or end, anyway=save or end or stop)
                if stop:
                    if self.ranks.first:
                        how = f"python train/run.py --resume --output {self.folder}"
                        print(f"\nstopped after step {self.done}; to go on: {how}", file=sys.stderr)
                    raise KeyboardInterrupt
        self._progress.close()
        return self._finish()

    def batch(self, n: int) -> Batch:
        """Prepare the n-th batch, a function of (seed, n).

        Args:
            n: The number of the step.

        Returns:
            This rank's part of the batch, augmented, on the device.
        """
        condition, pixels, noise_bytes = self.batches[n]
        labels = augmentation.on_device(condition, self.device)
        image = augmentation.on_device(pixels, self.device)
        noise = augmentation.on_device(noise_bytes, self.device)
        settings, part, style = self.config.augment, self.batches.part, None
        if self.contrast is not None:
            style, change = (
                augmentation.on_device(array[part], self.device)
                for array in self.contrast(self.batches.slices(n), n)
            )
            image = move_contrast(image, labels, change)
        if self.statistics is not None:
            rng = dataset.stream(self.config.training.seed, "drop", n)
            labels = augmentation.on_device(
                drop_classes(
                    condition,
                    self.batches.tissues(n),
                    self._labels,
                    self.step.classes,
                    settings,
                    rng,
                    self.batches.batch_size,
                    part,
                ),
                self.device,
            )
        if self.styles is not None:
            # Before the augmentation, which may move labels and image apart.
            drawn, edits = self.styles(self.batches.slices(n), n)
            style, shifts, factors, centres = (
                augmentation.on_device(array[part], self.device) for array in (drawn, *edits)
            )
            image = warp_outline(shift_intensity(image, labels, shifts), labels, factors, centres)
        if settings.active:
            rng = dataset.stream(self.config.training.seed, "augment", n)
            labels, image = augmentation.augment(
                settings, labels, image, rng, self.batches.batch_size, part
            )
        return Batch(labels, image, noise, style)

    def context(self) -> Context | None:
        """The context of the run with its statistics; None without `data.context`."""
        if self.cohort.context is None or self.statistics is None:
            return None
        nothing = np.zeros((0, self.step.classes), np.float32)
        contrast = nothing if self.contrast is None else self.contrast.contrast
        return self.statistics.stated(self.cohort.context, contrast)

    def _advance(self) -> None:
        """Train one step and add its losses to the sums."""
        losses = self.step(self.done, self.batch(self.done))
        self._sums = {
            name: value + self._sums[name] if self._sums else value
            for name, value in losses.items()
        }
        self.done += 1

    def _report(self, *, validate: bool) -> None:
        """Append the mean losses since the last report, and metrics if due, to metrics.jsonl."""
        sums = torch.stack([*self._sums.values()])
        self.ranks.average(sums)
        values = sums.tolist()
        losses = {
            name: value / (self.done - self._since)
            for name, value in zip(self._sums, values, strict=True)
        }
        self.monitor.losses(self._since, self.done, losses)
        self._sums, self._since = {}, self.done
        if self._log is None:
            return
        row: dict[str, Any] = {"losses": {name: round(value, 6) for name, value in losses.items()}}
        if validate:
            net, n = self.network(), self.config.training.batch_size
            self.metrics, generated = self.validation.measure(net, self.device, n)
            self._generated = generated
            if net.style and (
                diversity := self.validation.diversity(net, self.device, n, self.cohort.train)
            ):
                self.metrics["diversity"] = diversity
            self.monitor.check_images(self.done, generated, self.validation.images)
            self.validation.draw(
                self.folder / "figures" / f"step-{self.done:08d}.png",
                generated,
                f"step {self.done}",
            )
            row["metrics"] = self.metrics
        self._log.write(self.done, row)
        self._progress.update(self.done, note(losses))

    def _save(self, *, validated: bool, anyway: bool) -> None:
        """Write a checkpoint if one is due, or if the validation gave the best score so far."""
        score = self._score() if validated else None
        metric = self.config.training.best_metric
        best = None if score is None else checkpoint.best(self.folder, self.done, metric)
        if anyway or (score is not None and (best is None or score < best[1])):
            state = self.step.state()
            self.monitor.state(self.done, state)
            keep = None if self.monitor.suspicious else self.config.training.keep_checkpoints
            checkpoint.save(self.folder, self.done, state, keep, score, metric)

    def _score(self) -> float | None:
        """The last `training.best_metric`, lower is better; None where it is not measured."""
        t, numbers = self.config.training, dict(scores.flat(self.metrics or {}))
        if t.best_metric is None:
            return None
        if t.best_metric not in numbers:
            near = difflib.get_close_matches(t.best_metric, numbers, 4, 0.3)
            print(
                f"warning: no best checkpoint is kept: {t.best_metric} is not measured; there are"
                f" {', '.join(near)} ...",
                file=sys.stderr,
            )
            return None
        return numbers[t.best_metric] * (1 if t.best_is == "lowest" else -1)

    def _snapshot(self) -> None:
        """Write three fixed held-out slices as synthesized now, for train/figures.py."""
        figures.write_snapshot(
            self.folder, self.done, *self.validation.sample(self.network(), self.device)
        )

    def network(self) -> Generator:
        """Copy the EMA generator, with batch statistics measured anew on training batches.

        Returns:
            The generator in eval mode.
        """
        count = self.config.training.recalibrate
        return self.step.recalibrated(self.batch(n) for n in range(count))

    def _finish(self) -> dict[str, Any]:
        """Write the finished run folder."""
        if not self.ranks.first:
            return {}
        net = self.network()
        metrics, generated = self.metrics, self._generated
        if not metrics:
            n = self.config.training.batch_size
            metrics, generated = self.validation.measure(net, self.device, n)
        metrics["ceiling"] = self.validation.real_baseline(self.cohort.train)
        masks = {
            "validation": label_maps(self.cohort.valid, MASKS_KEPT),
            "calibration": label_maps(self.cohort.train, MASKS_KEPT),
        }
        checkpoint.write_run(
            self.folder,
            net,
            masks,
            {
                **facts(self.config, self.cohort, self.done, metrics, self.context()),
                **self._assess(net),
            },
        )
        run_report.write(self.folder, self.validation.viewer(generated))
        return metrics

    def _assess(self, net: Generator) -> dict[str, Any]:
        """Measure up to `ASSESSED_SLICES` held-out slices, and compare them with the limits."""
        if self.done < verdict.LEAST_STEPS:
            self.verdict = verdict.assess(None, self.done)
            return {"verdict": self.verdict}
        t, intensity = self.config.training, configs.intensity(self.config)
        most = max(ASSESSED_SLICES, t.valid_slices)
        table = configs.label_table(self.config.data)
        sample = Validation(
            self.cohort.valid,
            most,
            table,
            intensity,
            t.seed,
            classes=self.step.classes,
            contrast=None if self.contrast is None else self.contrast.contrast,
        )
        synthetic = sample.measure(net, self.device, t.batch_size)[1]
        quality = sample.quality(synthetic, self.cohort.train)
        self.verdict = verdict.assess(quality, self.done)
        if self.verdict["verdict"] == verdict.BROKEN:
            worst = self.verdict["findings"][0]
            sample.draw_worst(self.folder / WORST, synthetic, worst["label"], worst["text"])
        return {"quality": quality, "verdict": self.verdict}


def facts(
    config: RunConfig,
    cohort: dataset.Cohort,
    step: int,
    metrics: dict[str, Any],
    context: Context | None = None,
) -> dict[str, Any]:
    """Collect what run.json states besides the weights.

    The dataset's path stays out: run folders travel, patients' names do not.

    Args:
        config: The config of the run.
        cohort: The patients.
        step: The number of steps trained.
        metrics: The last validation metrics.
        context: The context classes.

    Returns:
        JSON data.
    """
    data = configs.to_json(config)
    data["data"]["path"] = None
    return {
        "name": config.name,
        "license": config.license,
        "config": data,
        "labels": labels_to_json(configs.label_table(config.data)),
        "grid": grid_to_json(configs.grid_policy(config)),
        "intensity": vars(configs.intensity(config)),
        "style": style_length(config),
        **({} if context is None else {"context": context.to_json()}),
        "noise": config.generator.textures > 0,
        "step": step,
        "data": cohort.summary(),
        "metrics": metrics,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
        "commit": _commit(),
    }


def style_length(config: RunConfig) -> int:
    """The length of the graph's style vector: that of the config, or one number a class.

    Args:
        config: The config of the run.
    """
    is_contrast = config.data.context == "auto" and config.generator.style
    return configs.class_count(config.data) if is_contrast else config.generator.style


def _commit() -> str | None:
    """The commit of this checkout, None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() if process.returncode == 0 else None


class _Log:
    """metrics.jsonl, one JSON object a line, and the loggers of `config.logging`.

    Lines after `step` are cut off: a resumed run writes them again.
    """

    def __init__(self, config: RunConfig, folder: Path, step: int, *, quiet: bool):
        self._loggers = Loggers(config, folder, quiet=quiet)
        self._log = AppendLog(folder / checkpoint.METRICS, checksums=False)
        rows = [row for row in self._log.read() if row["step"] <= step]
        self._start = time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)
        lines = [line_of(row, checksum=False).decode() for row in rows]
        write_text(self._log.path, "".join(lines))

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Append one line for `step`, and pass its numbers to the loggers."""
        seconds = round(time.monotonic() - self._start, 2)
        self._log.add({"step": step, "seconds": seconds, **row})
        self._loggers.write(step, dict(scores.flat(row)))

    def close(self) -> None:
        """Write pending numbers."""
        self._loggers.close()


@contextmanager
def _graceful() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list that the loop looks at between steps.

    A second signal ends the process at once.
    """
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("\nfinishing this step, then saving ...", file=sys.stderr)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        # This is not the main thread: the host program owns the signals.
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
