"""The training loop: batches in, a run folder out. Exact to resume, safe to interrupt."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.console import Progress
from runtime.contract import grid_to_json, labels_to_json
from runtime.errors import Mask2CTError, UsageError, writing
from runtime.files import write_text

from . import augment, checkpoint, dataset, evaluate, figures
from . import config as configs
from .config import RunConfig
from .generator import Generator
from .layouts import find
from .loggers import Loggers
from .step import Batch, Step
from .validation import Validation


class Diverged(Mask2CTError):
    """A loss is no longer a number."""


def choose_device(config: RunConfig) -> tuple[torch.device, str]:
    """(device, why). Raises `UsageError` when CUDA is asked for and absent."""
    wanted, there = config.training.device, torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UsageError(
            "training.device is cuda, and this machine has none", expected="a CUDA device", remedy="set training.device to auto or cpu"
        )
    if wanted == "cpu" or not there:
        return torch.device("cpu"), "as configured" if wanted == "cpu" else "no CUDA device"
    return torch.device("cuda"), "as configured" if wanted == "cuda" else "a CUDA device is there"


def set_threads(config: RunConfig) -> int:
    """Use `training.threads` CPU threads, or as many as the process may run on. Returns how many."""
    threads = config.training.threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    torch.set_num_threads(threads)
    return threads


def open_cohort(config: RunConfig, folder: Path, *, quiet: bool = False) -> dataset.Cohort:
    """The patients of `data.path`, or of the phantom, which is made in RUN/data first."""
    path = config.data.path
    if path is None:
        if config.data.phantom is None:
            raise UsageError(
                "there is no data to train on",
                expected="a folder of patients, or a config with data.phantom",
                remedy="give --dataset-path DIR",
            )
        path = str(_phantom(config.data.phantom, folder / "data", quiet))
    pairs = find(Path(path), config.data).pairs
    table, intensity = configs.label_table(config.data), configs.intensity(config)
    cohort = dataset.load_cohort(pairs, config.data, table, configs.grid_policy(config), intensity)
    if not quiet:
        print(cohort.table(table, intensity), file=sys.stderr)
    return cohort


def _phantom(phantom: configs.PhantomConfig, folder: Path, quiet: bool) -> Path:
    marker = folder / ".complete"  # written last; without it an interrupted cohort is made again
    if not marker.exists():
        from .phantom import generate_cohort

        if not quiet:
            print(f"making {phantom.patients} phantom patients in {folder}", file=sys.stderr)
        generate_cohort(folder, phantom.patients, seed=phantom.seed, size=phantom.size)
        write_text(marker, "")
    return folder


class Training:
    """One training from step `done` on. What it needs to go on lies in `Step` and in the number of steps done; nothing else."""

    def __init__(self, config: RunConfig, folder: Path, cohort: dataset.Cohort, resume_from: Path | None = None, *, quiet: bool = False):
        self.config, self.folder, self.cohort = config, folder, cohort
        self._quiet = quiet
        self.device, reason = choose_device(config)
        threads = set_threads(config)
        if not quiet:
            print(f"training on {self.device} ({reason}), {threads} CPU threads", file=sys.stderr)
        self.step, self.done = Step(config, self.device), 0
        if resume_from is not None:
            self.done, tensors = checkpoint.load(resume_from)
            self.step.load_state(tensors)
        t, intensity = config.training, configs.intensity(config)
        self.batches = dataset.Batches(cohort.train, t.batch_size, t.seed, intensity)
        self.validation = Validation(cohort.valid, t.valid_slices, configs.label_table(config.data), intensity, t.seed)
        self.metrics: dict[str, Any] | None = None
        self._progress = Progress("training", t.steps, unit="steps", quiet=quiet)
        self._sums: dict[str, Tensor] = {}
        self._since = self.done

    def run(self) -> dict[str, Any]:
        """Train to `training.steps`, write the run folder and return the last validation metrics.

        Raises `Diverged` on a loss that is no number, KeyboardInterrupt after the checkpoint that Ctrl-C asks for.
        """
        t = self.config.training
        self._log = _Log(self.folder / checkpoint.METRICS, self.done)
        moments = {round(share * t.steps) for share in figures.MOMENTS}
        with _graceful() as interrupted, closing(Loggers(self.config, self.folder, quiet=self._quiet)) as self._loggers:
            if self.done == 0:
                self._snapshot()
            while self.done < t.steps:
                self._advance()
                end = self.done == t.steps
                stop = bool(interrupted) and not end
                log, validate, save = (self.done % every == 0 for every in (t.log_every, t.valid_every, t.checkpoint_every))
                if log or validate or save or end or stop:
                    self._report(validate=validate or end)
                if self.done in moments:
                    self._snapshot()
                if save or end or stop:
                    checkpoint.save(self.folder, self.done, self.step.state(), t.keep_checkpoints)
                if stop:
                    print(
                        f"\nstopped after step {self.done}; to go on: python train/run.py --resume --output {self.folder}", file=sys.stderr
                    )
                    raise KeyboardInterrupt
        self._progress.close()
        return self._finish()

    def batch(self, n: int) -> Batch:
        """The n-th batch on the device, augmented: a function of (seed, n)."""
        labels, image, noise = (torch.from_numpy(array).to(self.device, non_blocking=True) for array in self.batches[n])
        settings = self.config.augment
        if settings.active:
            labels, image = augment.augment(settings, labels, image, dataset.stream(self.config.training.seed, "augment", n))
        return Batch(labels, image, noise)

    def _advance(self) -> None:
        losses = self.step(self.done, self.batch(self.done))
        self._sums = {name: value + self._sums[name] if self._sums else value for name, value in losses.items()}
        self.done += 1

    def _report(self, *, validate: bool) -> None:
        """The mean losses since the last report, and the held-out patients if due, as one line of metrics.jsonl."""
        values = torch.stack([*self._sums.values()]).tolist()
        losses = {name: value / (self.done - self._since) for name, value in zip(self._sums, values, strict=True)}
        if not all(map(math.isfinite, values)):
            raise Diverged(f"the training diverged before step {self.done}: {_note(losses)}", expected="finite losses",
                           remedy="lower optimizer.lr_g and optimizer.lr_d, or resume from an earlier checkpoint", file=self.folder)  # fmt: skip
        self._sums, self._since = {}, self.done
        row: dict[str, Any] = {"losses": {name: round(value, 6) for name, value in losses.items()}}
        if validate:
            self.metrics, painted = self.validation.measure(self.network(), self.device, self.config.training.batch_size)
            self.validation.draw(self.folder / "figures" / f"step-{self.done:08d}.png", painted, f"step {self.done}")
            row["metrics"] = self.metrics
        self._log.write(self.done, row)
        self._loggers.write(self.done, dict(evaluate.flat(row)))
        self._progress.update(self.done, _note(losses))

    def _snapshot(self) -> None:
        """Three fixed held-out slices as they are painted now, for train/figures.py."""
        figures.write_snapshot(self.folder, self.done, *self.validation.sample(self.network(), self.device))

    def network(self) -> Generator:
        """The averaged generator, in eval mode, its batch statistics measured anew on training batches."""
        count = self.config.training.recalibrate
        return self.step.recalibrated(self.batch(n) for n in range(count))

    def _finish(self) -> dict[str, Any]:
        net = self.network()
        metrics = self.metrics or self.validation.measure(net, self.device, self.config.training.batch_size)[0]
        checkpoint.write_run(self.folder, net, self.validation.labels, facts(self.config, self.cohort, self.done, metrics))
        return metrics


def facts(config: RunConfig, cohort: dataset.Cohort, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """What run.json says beside the weights. The dataset's path stays out: run folders travel, patients' names do not."""
    data = configs.to_json(config)
    data["data"]["path"] = None
    return {
        "name": config.name,
        "config": data,
        "labels": labels_to_json(configs.label_table(config.data)),
        "grid": grid_to_json(configs.grid_policy(config)),
        "intensity": vars(configs.intensity(config)),
        "style": 0,
        "noise": config.generator.textures > 0,
        "step": step,
        "data": cohort.summary(),
        "metrics": metrics,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of this checkout, None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _note(losses: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in losses.items())


class _Log:
    """metrics.jsonl: one JSON object a line. Lines past `step` are cut off: a resumed run writes them again."""

    def __init__(self, path: Path, step: int):
        self._path, self._before, self._start = path, 0.0, time.monotonic()
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                break  # the line that was being written when the process died
            if row["step"] > step:
                break
            kept.append(line)
            self._before = row["seconds"]
        write_text(path, "".join(line + "\n" for line in kept))

    def write(self, step: int, row: dict[str, Any]) -> None:
        seconds = round(self._before + time.monotonic() - self._start, 2)
        with writing(self._path), open(self._path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, "seconds": seconds, **row}, allow_nan=False) + "\n")


@contextmanager
def _graceful() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list that the loop looks at between steps; a second one ends the process at once."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("\nfinishing this step, then saving ...", file=sys.stderr)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the host program owns the signals
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
