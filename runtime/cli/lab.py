"""Start a command of the lab: `mask2ct train`, `export` and others, which lie in a clone.

The wheel holds the runtime alone. The lab is looked for beside the runtime's own folder and
nowhere else: a package that is called `train` on the module path may be anybody's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..core.errors import MissingComponent
from ..core.stopping import is_command_line
from .commands import Command

STARTER = Path("tools", "lab.py")


def clone_of(package: Path) -> Path | None:
    """The clone that a package folder lies in.

    Args:
        package: The folder of this package.

    Returns:
        The clone's root; None where the package was installed without the lab.
    """
    root = package.resolve().parent
    try:
        project = (root / "pyproject.toml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    is_ours = re.search(r'^name = "mask2ct"$', project, re.MULTILINE) is not None
    return root if is_ours and (root / STARTER).is_file() else None


def start(command: Command, argv: Sequence[str]) -> int:
    """Run a command of the lab in a process of its own.

    The lab imports the runtime as `runtime`, and this process may have it as `mask2ct`. A process
    that is this command becomes the lab's, so that signals reach it; else it is waited for.

    Args:
        command: The command.
        argv: The words after its name.

    Returns:
        The exit code.

    Raises:
        MissingComponent: The lab is not there.
    """
    root = clone_of(Path(__file__).parent.parent)
    if root is None:
        raise MissingComponent(
            f"mask2ct {command.name} is not installed: the package holds the runtime alone",
            remedy=f'in a clone of mask2ct: pip install -e ".[{command.extra}]"',
        )
    words = [sys.executable, str(root / STARTER), command.name, *argv]
    sys.stdout.flush()
    sys.stderr.flush()
    if is_command_line() and os.name == "posix":
        os.execv(sys.executable, words)
    with subprocess.Popen(words) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the process received it as well, and ends in its own way
                continue
