"""Train a generator from label maps and images.

    python train/run.py --dataset-path DATA --budget 10min
    python train/run.py --config train/configs/phantom.json --output runs/demo/train

The first plans everything from the data and the speed of this machine; --dry-run shows the plan,
and --init-config FILE writes it to change it.

When training ends, RUN holds generator.safetensors and run.json. While it runs, metrics.jsonl,
figures/ and checkpoints/ grow.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
ROOT = Path(__file__).resolve().parent.parent
# The root replaces train/, whose file names would hide other packages.
sys.path[0] = str(ROOT)

import argparse
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from runtime.core import console
from runtime.core.errors import UsageError
from train import checkpoint, config

# Neither of these imports torch: --help answers without it.
from train.distributed import DistributedContext, check, init_distributed
from train.planning.duration import duration
from train.verdict import summary

if TYPE_CHECKING:
    from train.planning.plan import Plan

# Of a training without --config and --budget.
BUDGET_SECONDS = 600.0


PROGRAM = "python train/run.py"


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """Describe the command line.

    Args:
        program: What the user typed in front of the options.
    """
    p = console.Parser(
        prog=program,
        description="Train a generator that synthesizes CT from label masks.",
        epilog=console.epilog(
            f"{program} --dataset-path DATA --budget 10min",
            f"{program} --config train/configs/phantom.json --dataset-path DATA --output RUN",
            f"{program} --dataset-path DATA --init-config FILE",
        ),
    )
    p.add_argument(
        "--config",
        type=Path,
        help=(
            "a JSON file, such as train/configs/phantom.json (without it: planned from the data;"
            " with --resume: the run's own)"
        ),
    )
    p.add_argument(
        "--budget",
        type=duration,
        metavar="TIME",
        help="time that a training without --config may take (default: 10min)",
    )
    p.add_argument(
        "--init-config",
        type=Path,
        metavar="FILE",
        help="write the planned config with a comment on every key, and start nothing",
    )
    p.add_argument(
        "--dataset-path",
        "--dataset_path",
        metavar="DIR",
        help=(
            "folder (nnU-Net, MSD, MM-WHS, TotalSegmentator, images + labels as PNG or TIFF,"
            " training/PATIENT/*.dcm) or CSV table of pairs"
        ),
    )
    p.add_argument(
        "--output", type=Path, metavar="RUN", help="the run folder to write (default: runs/NAME)"
    )
    p.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder for decoded slices, which the next run reuses (default: .slices beside RUN)",
    )
    p.add_argument("--no-cache", action="store_true", help="keep decoded slices in memory")
    p.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in RUN"
    )
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="print config or plan, data, network sizes and a time estimate; start nothing",
    )
    console.add_json(p)
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        nargs="+",
        help="override, e.g. training.steps=40 or MAX_ITER=40",
    )
    p.add_argument(
        "--train-ratio",
        "--train_ratio",
        type=float,
        metavar="R",
        help="share of the patients for training; 1: test on testing/",
    )
    p.add_argument(
        "--valid-ratio",
        "--valid_ratio",
        type=float,
        metavar="R",
        help="share of the patients for validation",
    )
    p.add_argument(
        "--ckpt-load",
        "--ckpt_load",
        type=Path,
        metavar="CHECKPOINT",
        help="start from the weights of this checkpoint (with --test: test it)",
    )
    p.add_argument(
        "--test",
        action="store_true",
        help="measure RUN (or CHECKPOINT) on the test split and write RUN/test.json; do not train",
    )
    p.add_argument("--tensorboard", action="store_true", help="log to RUN/tensorboard")
    p.add_argument(
        "--use-wandb",
        "--use_wandb",
        action="store_true",
        help="log to Weights & Biases (WANDB_MODE=offline: to RUN/wandb)",
    )
    p.add_argument(
        "--wandb-resume-id",
        "--wandb_resume_id",
        metavar="ID",
        help="continue this Weights & Biases run",
    )
    p.add_argument("--quiet", action="store_true", help="print no progress")
    return p


def overrides_of(args: argparse.Namespace) -> list[str]:
    """Collect --set and the options that stand for a config key.

    Args:
        args: The parsed command line.

    Returns:
        Overrides as `key=value`, the values as JSON.
    """
    options = {
        "data.train_ratio": args.train_ratio,
        "data.valid_ratio": args.valid_ratio,
        "logging.tensorboard": args.tensorboard or None,
        "logging.wandb": args.use_wandb or args.wandb_resume_id is not None or None,
        "logging.wandb_id": args.wandb_resume_id,
    }
    option_overrides = [
        f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None
    ]
    return [*(item for items in args.set for item in items), *option_overrides]


def resolve(args: argparse.Namespace) -> tuple[config.RunConfig, Path]:
    """Resolve the config and the run folder of a command line with a config or a run.

    Args:
        args: The parsed command line.

    Returns:
        The checked config and the run folder.

    Raises:
        UsageError: There is no config to use.
        ConfigError: The config is wrong.
    """
    if args.budget is not None or args.init_config is not None:
        raise UsageError(
            "--budget and --init-config are for a training that is planned from the data",
            expected="--dataset-path DATA without --config and --resume",
            remedy="drop them, or drop --config",
        )
    if args.config is None:
        if not (args.resume and args.output):
            raise UsageError(
                "neither a config nor a dataset is given",
                expected="--config CONFIG, --dataset-path DATA, or --resume --output RUN",
                remedy=(
                    "give --dataset-path DATA, or start with --config train/configs/phantom.json"
                ),
            )
        data = config.to_json(checkpoint.stored_config(args.output))
    else:
        data = config.load(args.config)
    resolved = config.resolve(data, overrides_of(args), dataset_path=args.dataset_path)
    return resolved, args.output or Path("runs") / resolved.name


def planned(args: argparse.Namespace, ranks: DistributedContext) -> Plan | None:
    """Plan a config where the command line has data and neither a config nor a run.

    Args:
        args: The parsed command line.
        ranks: This process among its peers.

    Returns:
        The plan; None where there is a config.

    Raises:
        UsageError: Several processes train: each would plan steps of its own.
    """
    has_run = (
        args.resume and args.output is not None and (args.output / checkpoint.CONFIG).is_file()
    )
    if args.config is not None or args.dataset_path is None or has_run:
        return None
    if ranks.world > 1:
        raise UsageError(
            "several processes train, and no config is given",
            expected="one config for all of them",
            remedy=(
                f"write one with: python train/run.py --dataset-path {args.dataset_path}"
                " --init-config FILE, then give --config FILE"
            ),
        )
    from train.planning.plan import plan

    return plan(args.dataset_path, overrides_of(args), args.budget or BUDGET_SECONDS)


def init_config(plan: Plan, file: Path) -> int:
    """Write a planned config with a comment on every key.

    Args:
        plan: The plan.
        file: The new file.

    Returns:
        The exit code, 0.

    Raises:
        UsageError: The file exists.
        OutputError: It cannot be written.
    """
    from runtime.core.atomic_files import write_text
    from train.planning.document import commented_config

    if file.exists():
        raise UsageError(
            f"{file} exists",
            expected="a new file for the config",
            remedy="choose another name, or remove the file",
            file=file,
        )
    write_text(file, commented_config(plan))
    print(f"{file} is written; train with: python train/run.py --config {file}")
    return 0


def cache_of(args: argparse.Namespace, folder: Path) -> Path | None:
    """Choose the slice cache for a command that writes `folder`.

    Args:
        args: The parsed command line.
        folder: The run folder.

    Returns:
        The cache folder, or None with --no-cache.
    """
    from train.data.slice_cache import FOLDER

    return None if args.no_cache else args.cache or folder.parent / FOLDER


def main(argv: Sequence[str], program: str = PROGRAM) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the program's name.
        program: What the user typed in front of them.

    Returns:
        The exit code.
    """
    with enough_memory(), init_distributed() as ranks:
        # Rank 0 checks first: the ranks report an error once.
        with ranks.rank_zero_first():
            args = parser(program).parse_args(argv)
            if args.json and not args.dry_run:
                raise UsageError(
                    "--json is for a plan",
                    expected="--dry-run with it, or mask2ct plan --json",
                    remedy="add --dry-run, or leave it out",
                )
            if args.test:
                return test(args) if ranks.first else 0
            plan = planned(args, ranks)
            if plan is not None and args.init_config is not None:
                return init_config(plan, args.init_config)
            if plan is None:
                resolved, folder = resolve(args)
            else:
                resolved, folder = plan.config, args.output or Path("runs") / plan.config.name
            from train.data.inference import infer_from_data
            from train.reporting.loggers import require

            require(resolved.logging)
            resolved, data_note = infer_from_data(resolved)
            if args.dry_run:
                return dry_run(resolved, plan, as_json=args.json) if ranks.first else 0
            if args.ckpt_load and args.resume:
                raise UsageError(
                    "--ckpt-load and --resume are given together",
                    expected="one of them: --resume goes on, --ckpt-load begins anew",
                    remedy="drop one",
                )
            check(resolved, ranks)
        return train(args, resolved, data_note, folder, ranks, plan)


@contextmanager
def enough_memory() -> Iterator[None]:
    """Raise `UsageError` where torch runs out of memory, on a GPU or on the CPU."""
    try:
        yield
    except (MemoryError, RuntimeError) as exc:
        if isinstance(exc, RuntimeError) and not re.search(
            "out of memory|allocate memory|not enough memory", str(exc)
        ):
            raise
        first_line = (str(exc).strip().splitlines() or ["none is left"])[0]
        raise UsageError(
            f"the memory does not suffice: {first_line[:200]}",
            expected="room for both networks, their optimisers and a batch",
            remedy=(
                "lower training.batch_size, generator.filters or data.canvas; on a GPU,"
                " training.precision=bf16 helps"
            ),
        ) from exc


def dry_run(resolved: config.RunConfig, plan: Plan | None = None, *, as_json: bool = False) -> int:
    """Print the config or the plan, the data, the network sizes and a time estimate.

    Args:
        resolved: The config with nothing left to infer.
        plan: The plan that it is from; None for a config of the user.
        as_json: Whether a program reads it.

    Returns:
        The exit code, 0.
    """
    from train.planning.document import plan_table
    from train.reporting.estimate import describe, describe_json

    if as_json:
        console.print_json(describe_json(resolved, {} if plan is None else plan.reasons))
        return 0

    print(describe(resolved, "" if plan is None else plan_table(plan)))
    return 0


def train(
    args: argparse.Namespace,
    resolved: config.RunConfig,
    data_note: str,
    folder: Path,
    ranks: DistributedContext,
    plan: Plan | None = None,
) -> int:
    """Train in this process, one of several ranks.

    Rank 0 prepares the run folder first; then all ranks train in it.

    Args:
        args: The parsed command line.
        resolved: The config with nothing left to infer.
        data_note: A line about the data for the person who starts the run; may be empty.
        folder: The run folder.
        ranks: This process among its peers.
        plan: The plan that the config is from; None for a config of the user.

    Returns:
        The exit code, 0.
    """
    from train.loop import Training, open_cohort
    from train.restore import begin_from, checkpoint_of

    quiet = args.quiet or not ranks.first
    if not quiet:
        if plan is not None:
            from train.planning.document import plan_table

            print(plan_table(plan))
        print(f"the whole config: {folder / checkpoint.CONFIG}")
        if data_note:
            print(data_note, file=sys.stderr)
    with ranks.rank_zero_first():
        source = checkpoint_of(args.ckpt_load) if args.ckpt_load and ranks.first else None
        resume_from = checkpoint.starting_point(
            folder, resolved, args.resume or not ranks.first, quiet=not ranks.first
        )
        cohort = open_cohort(resolved, folder, cache=cache_of(args, folder), quiet=quiet)
        if source is not None:
            # The other ranks find this checkpoint as their starting point.
            resume_from = begin_from(source, resolved, folder)
        training = Training(resolved, folder, cohort, resume_from, quiet=quiet, ranks=ranks)
        if ranks.first:
            # From here on, --resume finds a run.
            checkpoint.claim(folder, resolved)
    metrics = training.run()
    if not quiet:
        from train.metrics.scores import table

        print(table(metrics, resolved.intensity.unit))
    if ranks.first:
        print(f"{folder}: {checkpoint.WEIGHTS} and {checkpoint.RUN} are written")
        assert training.verdict is not None
        if resolved.data.context == "auto":
            from train.layouts import add_layouts

            if add_layouts(resolved, folder) and not quiet:
                print(f"{folder}: {checkpoint.LAYOUTS} is written", file=sys.stderr)
        refuse_broken(training.verdict, folder)
        if not quiet:
            print(summary(training.verdict), file=sys.stderr)
    return 0


def refuse_broken(verdict: Mapping[str, Any], folder: Path) -> None:
    """End with exit code 1 where a training is broken; all its files stay.

    Args:
        verdict: The verdict on the training.
        folder: The run folder.

    Raises:
        BrokenModel: The training is broken.
    """
    from train.loop import WORST
    from train.verdict import BROKEN, BrokenModel

    if verdict["verdict"] == BROKEN:
        raise BrokenModel(
            "the training is broken: " + "; ".join(f["text"] for f in verdict["findings"]),
            expected="images within the limits of docs/reference/quality.md",
            remedy=f"look at {WORST} and report.html there; train longer, on more patients, or"
            " with lower optimizer.lr_g",
            file=folder,
        )


def test(args: argparse.Namespace) -> int:
    """Measure the test split with a finished run or with a checkpoint.

    Args:
        args: The parsed command line, with --test.

    Returns:
        The exit code, 0.

    Raises:
        UsageError: The command line names neither a run nor a checkpoint.
    """
    from train import restore
    from train.loop import open_cohort
    from train.metrics.scores import table

    source = args.ckpt_load or (resolve(args)[1] if args.config else args.output)
    if source is None:
        raise UsageError(
            "--test does not say what to test",
            expected="--output RUN or --ckpt-load CHECKPOINT",
            remedy="add one of the two",
        )
    run = restore.run_of(source)
    data = (
        config.load(args.config) if args.config else config.to_json(checkpoint.stored_config(run))
    )
    tested = restore.stored(run, config.resolve(data, overrides_of(args)), args.dataset_path)
    output = args.output or run
    cohort = open_cohort(tested, run, cache=cache_of(args, output), quiet=args.quiet)
    metrics = restore.measure_test(tested, source, output, cohort, quiet=args.quiet)
    if not args.quiet:
        print(table(metrics, tested.intensity.unit))
    print(f"{output / restore.TEST} is written")
    return 0


if __name__ == "__main__":
    code = console.run(main)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # All work is done. gloo's threads may abort an interpreter that shuts down
        # ("terminate called without …"), so the process ends at once.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
