"""`python -m runtime` and `mask2ct`: the commands in `runtime.commands`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from .commands import describe, labels, serve, synth, watch
from .console import EXIT_CODES, run
from .version import VERSION

COMMANDS = (synth, watch, serve, labels, describe)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("mask2ct", description="Paint a synthetic CT for any label mask.", epilog=EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"mask2ct {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    options = parser.parse_args(argv)
    chosen: Any = options.command
    return int(chosen(options))


def entry() -> int:
    """The console script."""
    return run(main)


if __name__ == "__main__":
    sys.exit(entry())
