"""`python -m runtime` and `mask2ct`: the commands of `runtime.cli`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str]) -> int:
    """Parse the command line and run its command.

    Args:
        argv: The words after the program's name.

    Returns:
        The exit code (`runtime.core.console.EXIT_CODES`).

    Raises:
        Mask2CTError: As the command raises it; `runtime.core.console.run` prints it.
        SystemExit: After `--help` and `--version`, and for an option that does not exist.
    """
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
    """Run the console script.

    It imports its modules only after it has set the signal, so that Ctrl-C during the imports ends
    it without a traceback.

    Returns:
        The exit code.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .core.console import run

    return run(main)


if __name__ == "__main__":
    sys.exit(entry())
