"""`python -m runtime` and `mask2ct`: the commands in `runtime.commands`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str]) -> int:
    from .cli import audit, describe, labels, serve, synth, watch
    from .core.console import EXIT_CODES, Parser
    from .core.version import VERSION

    parser = Parser(
        "mask2ct", description="Synthesize a synthetic CT for any label mask.", epilog=EXIT_CODES
    )
    parser.add_argument("--version", action="version", version=f"mask2ct {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (synth, watch, serve, labels, describe, audit):
        command.add(commands)
    options = parser.parse_args(argv)
    chosen: Any = options.command
    return int(chosen(options))


def entry() -> int:
    """The console script. What it needs is imported within, so that Ctrl-C meanwhile ends it
    without a traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .core.console import run

    return run(main)


if __name__ == "__main__":
    sys.exit(entry())
