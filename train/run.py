"""Train a generator: `python train/run.py --config train/configs/phantom.json --output runs/demo/train`.

RUN ends with generator.safetensors and run.json; metrics.jsonl, figures/ and checkpoints/ grow on the way.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # in place of train/, whose file names would hide other packages

import argparse
import json
from collections.abc import Sequence

from runtime import console
from runtime.errors import UsageError
from train import checkpoint, config

if TYPE_CHECKING:  # --help is answered without torch
    from train.ranks import Ranks


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python train/run.py", description="Train a generator that paints CT from label masks.", epilog=console.EXIT_CODES
    )
    p.add_argument("--config", type=Path, help="a JSON file, such as train/configs/phantom.json (with --resume: the run's own)")
    p.add_argument("--dataset-path", "--dataset_path", metavar="DIR", help="folder of CASE_image.nii.gz + CASE_label.nii.gz")
    p.add_argument("--output", type=Path, metavar="RUN", help="the run folder to write (default: runs/NAME)")
    p.add_argument("--cache", type=Path, metavar="DIR", help="where decoded slices are kept for the next run (default: .slices beside RUN)")
    p.add_argument("--no-cache", action="store_true", help="keep them in memory instead")
    p.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in RUN")
    p.add_argument("--dry-run", action="store_true", help="print config, data, network sizes and a time estimate; start nothing")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", nargs="+", help="override, e.g. training.steps=40 or MAX_ITER=40"
    )
    p.add_argument("--quiet", action="store_true", help="no progress")
    return p


def resolve(args: argparse.Namespace) -> tuple[config.RunConfig, Path]:
    """(config, run folder) of a command line. Raises `UsageError`."""
    overrides = [item for items in args.set for item in items]
    if args.config is None:
        if not (args.resume and args.output):
            raise UsageError("no config is given", expected="--config CONFIG (only --resume --output RUN may do without)",
                             remedy="start with --config train/configs/phantom.json")  # fmt: skip
        data = config.to_json(checkpoint.stored_config(args.output))
    else:
        data = config.load(args.config)
    resolved = config.resolve(data, overrides, dataset_path=args.dataset_path)
    return resolved, args.output or Path("runs") / resolved.name


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    resolved, folder = resolve(args)
    if args.dry_run:
        from train.estimate import describe

        print(describe(resolved))
        return 0
    from train.ranks import check, joined

    with joined() as ranks:
        check(resolved, ranks)
        return train(args, resolved, folder, ranks)


def train(args: argparse.Namespace, resolved: config.RunConfig, folder: Path, ranks: Ranks) -> int:
    """What one rank does: the first makes the run folder ready, then all train in it. Returns the exit code."""
    from train.cache import FOLDER
    from train.loop import Training, open_cohort

    quiet = args.quiet or not ranks.first
    if not quiet:
        print(json.dumps(config.to_json(resolved)))
    cache = None if args.no_cache else args.cache or folder.parent / FOLDER
    with ranks.first_then_others():
        resume_from = checkpoint.starting_point(folder, resolved, args.resume or not ranks.first)
        cohort = open_cohort(resolved, folder, cache=cache, quiet=quiet)
        if ranks.first:
            checkpoint.claim(folder, resolved)
    metrics = Training(resolved, folder, cohort, resume_from, quiet=quiet, ranks=ranks).run()
    if not quiet:
        from train.evaluate import table

        print(table(metrics))
    if ranks.first:
        print(f"{folder}: {checkpoint.WEIGHTS} and {checkpoint.RUN} are written")
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
