"""Do synthetic images make a segmenter better? Measured on patients that nothing was trained on.

    python -m train.usefulness DATA [--config CONFIG] [--patients 4] [--seeds 3] [--budget 30min]
    python -m train.usefulness DATA --run RUN [--seeds 3] [--budget 30min]

The first draws the training patients anew for every seed and trains a generator on them alone, by
CONFIG or by a plan from the data. The second takes a trained run and its own patients. --output
gets usefulness.json, .md and .png. A command that was killed goes on when it is called again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from runtime.core import console
from runtime.core.errors import UsageError

from ..planning.duration import duration
from .arms import ARMS

RUN_FOLDER = Path("runs/usefulness")
OF_CONFIG = "override a key of the config"
OF_CONFIG_FILE = "train a generator by it, for every seed anew (default: planned from the data)"
OF_VARIANTS = "images made of every training image (default: %(default)s)"
OF_BUDGET = "time for generators and segmenters together (default: %(default)s)"
OF_OUTPUT = "folder of the comparison (default: %(default)s)"


PROGRAM = "python -m train.usefulness"


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """The command line.

    Args:
        program: What the user typed in front of the options.
    """
    p = console.Parser(
        prog=program,
        description="Measure whether synthetic images make a segmenter better.",
        epilog=console.epilog(
            f"{program} DATA --config CONFIG --patients 4 --seeds 3 --budget 30min --output OUT",
            f"{program} DATA --run RUN --seeds 3 --budget 30min --output OUT",
        ),
    )
    add = p.add_argument
    add("data", metavar="DATA", help="folder or CSV table of labelled images, as for train/run.py")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--config", type=Path, help=OF_CONFIG_FILE)
    source.add_argument("--run", type=Path, help="a finished run folder: measure its generator")
    add("--set", action="append", default=[], nargs="+", metavar="KEY=VALUE", help=OF_CONFIG)
    add("--patients", type=int, metavar="N", help="training patients of a seed (default: 4)")
    add("--seeds", type=int, default=3, metavar="N", help="repetitions (default: %(default)s)")
    add("--test-patients", type=int, metavar="N", help="patients to test on (default: a third)")
    add("--variants", type=int, default=3, metavar="K", help=OF_VARIANTS)
    add("--arms", metavar="A,B", help=f"only these arms, of {', '.join(ARMS)}")
    add("--budget", type=duration, default="30min", metavar="TIME", help=OF_BUDGET)
    add("--steps", type=int, metavar="N", help="steps of a segmenter, in place of --budget")
    add("--output", type=Path, default=RUN_FOLDER, metavar="OUT", help=OF_OUTPUT)
    add("--quiet", action="store_true", help="no progress")
    return p


def chosen_arms(text: str | None) -> list[str]:
    """The names of --arms, in the order of the table. Raises `UsageError`."""
    names = [*ARMS] if text is None else [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise UsageError(
            f"there is no arm {unknown[0]!r}",
            expected=", ".join(ARMS),
            remedy="correct --arms",
        )
    return [name for name in ARMS if name in names]


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """The command line in the module's docstring."""
    args = parser(program).parse_args(argv)
    for name, value in (
        ("--seeds", args.seeds),
        ("--variants", args.variants),
        ("--steps", args.steps),
    ):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}", expected="1 or more", remedy=f"correct {name}")
    arms = chosen_arms(args.arms)
    from .comparison import compare

    started = time.monotonic()
    text = compare(args, arms)
    print(text)
    if not args.quiet:
        took = console.duration(time.monotonic() - started)
        print(
            f"{args.output}: usefulness.json, .md and .png are written, after {took}",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
