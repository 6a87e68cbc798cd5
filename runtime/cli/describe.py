"""`mask2ct describe`: what a model folder holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..core.console import EXIT_CODES
from ..core.manifest import Manifest
from .description import describe


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "describe", help="what a model folder holds; checks every file", epilog=EXIT_CODES
    )
    parser.set_defaults(command=_describe)
    parser.add_argument("model", type=Path)


def _describe(options: argparse.Namespace) -> int:
    print(describe(Manifest.load(options.model), options.model))
    return 0
