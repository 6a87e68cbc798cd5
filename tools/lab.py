"""Run a command of the lab, as `mask2ct train` and its like start it (`runtime.cli.lab`).

python tools/lab.py COMMAND [OPTIONS]
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # The root replaces tools/, whose file names would hide other packages.
    sys.path[0] = str(ROOT)

from collections.abc import Sequence
from importlib import import_module

from runtime.cli.commands import COMMANDS
from runtime.core import console
from runtime.core.errors import importing


def main(argv: Sequence[str]) -> int:
    """Run one command.

    Args:
        argv: The command's name and its words.

    Returns:
        The exit code.

    Raises:
        MissingComponent: A package that the command needs is not installed.
    """
    command = COMMANDS[argv[0]]
    with importing(
        f"a package of mask2ct {command.name}",
        f"the packages of the {command.extra} extra",
        f'pip install -e "{ROOT}[{command.extra}]"',
    ):
        module = import_module(command.module)
        return int(module.main([*command.words, *argv[1:]], f"mask2ct {command.name}"))


if __name__ == "__main__":
    sys.exit(console.run(main))
