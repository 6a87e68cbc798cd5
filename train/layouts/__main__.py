"""Fit layouts to the training patients of a finished run; export puts them into the model folder.

python -m train.layouts RUN [--dataset-path DATA]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from runtime.core.errors import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line in the module's docstring.

    Args:
        argv: The arguments; None: those of the process.

    Returns:
        The exit code, 0.

    Raises:
        UsageError: The run has no context, or its data allow no layouts.
    """
    parser = argparse.ArgumentParser(
        prog="python -m train.layouts", description="fit layouts to a run's training patients"
    )
    parser.add_argument("run", type=Path, help="a finished run with data.context=auto")
    parser.add_argument(
        "--dataset-path", "--dataset_path", metavar="DIR", help="where the run's data lie now"
    )
    args = parser.parse_args(argv)
    from .. import checkpoint
    from . import add_layouts

    config = checkpoint.stored_config(args.run)
    if args.dataset_path is not None:
        config = replace(config, data=replace(config.data, path=args.dataset_path, phantom=None))
    if not add_layouts(config, args.run):
        raise UsageError(
            "no layouts can be fitted to this run",
            expected="data.context=auto, data.pixel_spacing, four training volumes with labels",
            remedy="train such a run",
            file=args.run,
        )
    print(f"{args.run}: {checkpoint.LAYOUTS} is written")
    return 0


if __name__ == "__main__":
    from runtime.core import console

    sys.exit(console.run(main))
