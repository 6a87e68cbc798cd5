"""`python -m runtime` and `mask2ct`: the commands of `runtime.cli`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
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
    from .cli.commands import COMMANDS, overview
    from .core.console import EXIT_CODES, Parser
    from .core.version import VERSION

    parser = Parser(
        "mask2ct",
        usage="mask2ct COMMAND [OPTIONS]",
        description=f"Synthesize a synthetic CT for any label mask.\n\n{overview()}",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"mask2ct {VERSION}")
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    command = COMMANDS.get(argv[0])
    if command is None:
        parser.parse_known_args(argv[:1])  # --help and --version end here
        parser.error(no_command(argv[0], COMMANDS))
    if command.in_lab:
        from .cli.lab import start

        return start(command, argv[1:])
    commands = parser.add_subparsers(prog="mask2ct", required=True, metavar="COMMAND")
    import_module(f".cli{command.module}", __package__).add(commands)
    commands.choices[command.name].description = f"{command.name}: {command.summary}"
    options = parser.parse_args(argv)
    chosen: Any = options.command
    return int(chosen(options))


def no_command(word: str, commands: Iterable[str]) -> str:
    """What to tell somebody whose command does not exist.

    Args:
        word: The word in a command's place.
        commands: The names of all commands.
    """
    from difflib import get_close_matches

    similar = get_close_matches(word, list(commands), 1)
    hint = f"did you mean {similar[0]}?" if similar else "mask2ct --help lists them"
    return f"there is no command {word}: {hint}"


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
