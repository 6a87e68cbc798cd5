"""The data set of a comparison: read, and its patients divided, before anything is trained."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from runtime.core.atomic_files import check_writable, write_json
from runtime.core.errors import ConfigError, UsageError

from .. import checkpoint
from .. import config as configs
from ..config import RunConfig
from ..data.checks import check_leakage
from ..data.dataset import assign
from ..data.inference import infer_from_data
from ..data.layouts import Pair, find
from ..loop import set_threads
from ..planning.data_plan import MOST_DIRECTIONS
from ..planning.plan import plan
from .cohort import MOST_TESTED, Case, Patient, Split, read_patients, split_patients
from .segmenter import DIVISOR

CACHE = ".slices"
PLANNED = "config.json"
FEW = 4
# Of the budget, for the generators, and the most seconds for one of them.
GENERATORS_SHARE, MOST_SECONDS = 0.4, 600.0


@dataclass(frozen=True)
class Prepared:
    """The data set as the comparison uses it; `few`: each seed's training patients."""

    config: RunConfig
    patients: list[Patient]
    split: Split
    few: dict[int, tuple[int, ...]]
    digest: str


def prepare(args: argparse.Namespace) -> Prepared:
    """Read the data set and divide its patients. Raises `UsageError` or `InputError`."""
    if args.run is not None and args.patients is not None:
        raise UsageError(
            "--patients and --run are given together",
            expected="one of them: a run has its own patients",
            remedy="drop --patients",
        )
    config = _config(args)
    if any(side % DIVISOR for side in config.data.canvas):
        raise ConfigError(
            f"data.canvas is {list(config.data.canvas)}",
            expected=f"multiples of {DIVISOR}, which the segmenter halves four times",
            remedy="change data.canvas",
        )
    set_threads(config)
    pairs = [pair for pair in find(Path(args.data), config.data).pairs if not pair.synthetic]
    check_writable(args.output)
    patients, digest = read_patients(config, pairs, args.output / CACHE)
    seeds = range(args.seeds)
    if args.run is None:
        count = FEW if args.patients is None else args.patients
        split = split_patients(len(patients), count, args.test_patients, config.data.split_seed)
        few = {seed: split.few(count, seed) for seed in seeds}
    else:
        split, own = _split_of_run(args, config, pairs, patients, digest)
        few = dict.fromkeys(seeds, own)
    images = {
        name: {pair.name: _digest(case) for n in numbers for pair, case in patients[n].items()}
        for name, numbers in (("train", split.pool), ("test", split.test))
    }
    check_leakage(images)
    return Prepared(config, patients, split, few, digest)


def _digest(case: Case) -> str:
    return hashlib.sha256(case.image.tobytes()).hexdigest()


def _config(args: argparse.Namespace) -> RunConfig:
    overrides = [item for items in args.set for item in items]
    if args.run is not None:
        if overrides:
            raise UsageError(
                "--set and --run are given together",
                expected="one of them: a run has its own config",
                remedy="drop --set",
            )
        config = checkpoint.load_run(args.run).config
        return replace(config, data=replace(config.data, path=args.data, phantom=None))
    if args.config is None:
        return _planned(args, overrides)
    config, note = infer_from_data(
        configs.resolve(configs.load(args.config), overrides, dataset_path=args.data),
    )
    if note and not args.quiet:
        print(note, file=sys.stderr)
    return config


def _planned(args: argparse.Namespace, overrides: Sequence[str]) -> RunConfig:
    """Plan a generator with a context from the data; the layouts come from the training patients.

    The plan depends on the machine's speed, so that it is written into --output and read again
    when the command goes on.
    """
    file = args.output / PLANNED
    if not file.is_file():
        patients = FEW if args.patients is None else args.patients
        # One patient chooses the checkpoint, and n patients differ in n - 1 directions.
        directions = max(0, min(MOST_DIRECTIONS, patients - 2))
        ours = ["data.context=auto", f"generator.style={directions}"]
        seconds = min(MOST_SECONDS, GENERATORS_SHARE * args.budget / args.seeds)
        planned = plan(args.data, [*ours, *overrides], seconds)
        if not args.quiet:
            print(planned.says, file=sys.stderr)
        write_json(file, configs.to_json(planned.config))
    return configs.resolve(configs.load(file), overrides, dataset_path=args.data)


def _split_of_run(
    args: argparse.Namespace,
    config: RunConfig,
    pairs: Sequence[Pair],
    patients: Sequence[Patient],
    digest: str,
) -> tuple[Split, tuple[int, ...]]:
    """(test patients and pool, the run's own patients), by the split the run was trained with."""
    stated = checkpoint.load_run(args.run).data.get("data", {}).get("digest")
    if stated != digest:
        raise UsageError(
            "the run was trained on other data: its digest differs",
            expected="the data set that the run was trained on",
            remedy="give that data set, or --config to train a generator on this one",
            file=args.run,
        )
    splits = assign(pairs, config.data)
    seen = {pairs[n].who for name in ("train", "valid") for n in splits[name]}
    own = tuple(n for n, patient in enumerate(patients) if patient.pairs[0].who in seen)
    others = [n for n in range(len(patients)) if n not in own]
    if not others or config.data.split_by == "slices":
        raise UsageError(
            "the run was trained on every patient: nobody is left to test on",
            expected="patients that the generator has not seen",
            remedy="train it with a lower data.train_ratio, or give --config",
            file=args.run,
        )
    tested = args.test_patients or max(1, min(MOST_TESTED, len(others) // 2))
    if tested > len(others):
        raise UsageError(
            f"{tested} patients to test on were asked for",
            expected=f"at most {len(others)}, which the run has not seen",
            remedy="lower --test-patients",
        )
    order = np.random.default_rng([config.data.split_seed, 1]).permutation(others).tolist()
    return Split(tuple(sorted(order[:tested])), tuple(sorted([*order[tested:], *own]))), own
