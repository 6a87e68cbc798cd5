"""`mask2ct describe`: print what a model folder contains, and check its files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..core.console import EXIT_CODES
from ..core.manifest import Manifest
from ..engines.description import describe


def add(commands: Any) -> None:
    """Add `describe` to the command line.

    Args:
        commands: What argparse's `add_subparsers` returned.
    """
    parser = commands.add_parser(
        "describe",
        help="describe a model folder and check the SHA-256 of its files",
        epilog=EXIT_CODES,
    )
    parser.set_defaults(command=_describe)
    parser.add_argument("model", type=Path, metavar="FOLDER", help="a model folder")


def _describe(options: argparse.Namespace) -> int:
    print(describe(Manifest.load(options.model), options.model))
    return 0
