"""Hooks of the documentation's build: `--help` of each command, as it is now, in place of a mark.

`{{ help: -m runtime synth }}` in a page becomes what `python -m runtime synth --help` prints.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"\{\{ help: (.+?) \}\}")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the marks of a page.

    Raises:
        subprocess.CalledProcessError: a command that a page shows has no `--help`.
    """
    return MARK.sub(lambda mark: f"```text\n{help_of(mark[1])}\n```", markdown)


def help_of(arguments: str) -> str:
    """What `python ARGUMENTS --help` prints, 100 columns wide."""
    return subprocess.run(
        [sys.executable, *shlex.split(arguments), "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.rstrip()
