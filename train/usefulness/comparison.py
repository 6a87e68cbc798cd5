"""The command's work: read patients, train generators, plan the steps, compare, report."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from runtime.core.atomic_files import sha256_of, write_json, write_text
from runtime.core.console import duration
from runtime.core.version import VERSION

from .. import checkpoint
from .. import config as configs
from ..loop import choose_device
from .arms import ALL_REAL, ARMS, Arm, Generate, Tissues
from .experiment import PLAN, Experiment, Results, require_plan, run
from .generator import open_generator, train_generator
from .prepared import FEW, Prepared, prepare
from .report import draw, summarise, text_table
from .segmenter import Schedule, seconds_per_step

GENERATORS = "generators"
LEAST_STEPS, MOST_STEPS = 200, 4000
TRAINING_SHARE = 0.85  # of what is left of the budget; the rest is for making images and measuring


def compare(args: argparse.Namespace, names: Sequence[str]) -> str:
    """Run the comparison of a command line and write its reports.

    Args:
        args: what `train.usefulness.__main__.parser` parsed.
        names: arms to compare.

    Returns:
        The table and the verdict, for a person.
    """
    started = time.monotonic()
    prepared = prepare(args)
    arms = {name: ARMS[name] for name in names}
    if all(set(prepared.split.pool) == set(few) for few in prepared.few.values()):
        arms.pop(ALL_REAL, None)  # there are no more real patients
    experiment = _experiment(prepared, args.variants)
    plan = require_plan(args.output, {**_plan(args, prepared), "steps": args.steps})
    generators = _Generators(args, prepared)
    if any(arm.needs_generator for arm in arms.values()):
        generators.train()
    if plan["steps"] is None:
        left = args.budget - (time.monotonic() - started)
        segmenters = len(arms) * args.seeds
        plan["steps"] = _affordable_steps(left, experiment, segmenters, quiet=args.quiet)
        write_json(args.output / PLAN, plan)
    experiment = replace(experiment, schedule=replace(experiment.schedule, steps=plan["steps"]))
    results = Results(args.output)
    run(experiment, arms, results, generators, quiet=args.quiet)
    return _report(args, prepared, experiment, arms, results)


def _experiment(prepared: Prepared, variants: int) -> Experiment:
    config = prepared.config
    return Experiment(
        {number: patient.cases for number, patient in enumerate(prepared.patients)},
        prepared.split.test,
        prepared.split.pool,
        prepared.few,
        len(configs.label_table(config.data)),
        configs.intensity(config),
        Schedule(),
        variants,
        choose_device(config)[0],
    )


def _plan(args: argparse.Namespace, prepared: Prepared) -> dict[str, Any]:
    """What all results depend on. Patients are numbers, in the order of their names."""
    plan: dict[str, Any] = {
        "data": prepared.digest,
        "test_patients": list(prepared.split.test),
        "patients": len(next(iter(prepared.few.values()))),
        "variants": args.variants,
    }
    if args.run is not None:
        return {**plan, "generator": sha256_of(checkpoint.load_run(args.run).weights)}
    data = replace(prepared.config.data, path=None)
    settings = configs.to_json(replace(prepared.config, data=data))
    content = json.dumps(settings, sort_keys=True).encode()
    return {**plan, "generator": hashlib.sha256(content).hexdigest()}


class _Generators:
    """Every seed's generator: trained on the seed's patients, or the one of --run."""

    def __init__(self, args: argparse.Namespace, prepared: Prepared):
        self._args, self._prepared = args, prepared
        self._opened: tuple[Path, tuple[Generate, Tissues | None]] | None = None

    def folder(self, seed: int) -> Path:
        """The run folder of a seed's generator."""
        run_folder: Path | None = self._args.run
        return run_folder or self._args.output / GENERATORS / f"seed-{seed}"

    def train(self) -> None:
        """Train what is not trained yet."""
        if self._args.run is not None:
            return
        for seed, numbers in self._prepared.few.items():
            if not self._args.quiet:
                print(f"generator of seed {seed}, on {len(numbers)} patients", file=sys.stderr)
            patients = [self._prepared.patients[n] for n in numbers]
            config, folder = self._prepared.config, self.folder(seed)
            train_generator(config, patients, folder, quiet=self._args.quiet)

    def __call__(self, seed: int) -> tuple[Generate, Tissues | None]:
        folder = self.folder(seed)
        if self._opened is None or self._opened[0] != folder:
            self._opened = folder, open_generator(folder)
        return self._opened[1]


def _affordable_steps(
    seconds: float,
    experiment: Experiment,
    segmenters: int,
    *,
    quiet: bool,
) -> int:
    """Steps of each of the `segmenters` that `seconds` suffice for here, within bounds."""
    cases = [case for n in experiment.pool[:FEW] for case in experiment.cases[n]]
    e = experiment
    each = seconds_per_step(cases, e.classes, e.intensity, e.schedule, e.device)
    affordable = int(max(seconds, 0) * TRAINING_SHARE / (each * segmenters))
    steps = min(max(affordable, LEAST_STEPS), MOST_STEPS)
    if not quiet:
        needed = steps * each * segmenters / TRAINING_SHARE
        note = "; that is more than the budget" if affordable < LEAST_STEPS else ""
        work = f"{segmenters} segmenters of {steps} steps"
        print(f"{work}: about {duration(needed)}{note}", file=sys.stderr)
    return steps


def _report(
    args: argparse.Namespace,
    prepared: Prepared,
    experiment: Experiment,
    arms: dict[str, Arm],
    results: Results,
) -> str:
    """Write usefulness.json, .md and .png; returns the table and the verdict."""
    names = [label.name for label in configs.label_table(prepared.config.data).labels[1:]]
    summary = summarise(results, arms, [*prepared.few], prepared.split.test, names)
    facts = {
        "data": prepared.digest,
        "training_patients": len(next(iter(prepared.few.values()))),
        "all_real_patients": len(prepared.split.pool),
        "test_patients": len(prepared.split.test),
        "seeds": len(prepared.few),
        "variants": experiment.variants,
        "steps": experiment.schedule.steps,
        "surface_tolerance_mm": experiment.tolerance,
    }
    versions = {"mask2ct": VERSION, "python": platform.python_version(), "torch": torch.__version__}
    head = {"schema_version": 1, "settings": facts, "versions": versions}
    write_json(args.output / "usefulness.json", {**head, **summary})
    title = (
        f"{facts['training_patients']} training patients (all real: {facts['all_real_patients']}), "
        f"{facts['test_patients']} test patients, {facts['seeds']} seeds, {facts['steps']} steps; "
        f"surfaces within {facts['surface_tolerance_mm']:.3g} mm; 95 % intervals"
    )
    text = f"{title}\n\n{text_table(summary, names)}\n\n{summary['verdict']}"
    write_text(args.output / "usefulness.md", text + "\n")
    draw(args.output / "usefulness.png", summary, f"{title}\n{summary['verdict']}")
    return text
