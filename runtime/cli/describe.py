"""`mask2ct describe`: print what a model folder contains, and check its files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..core.console import add_json, epilog, print_json
from ..core.manifest import Manifest
from ..engines.description import describe, describe_json


def add(commands: Any) -> None:
    """Add `describe` to the command line.

    Args:
        commands: What argparse's `add_subparsers` returned.
    """
    parser = commands.add_parser(
        "describe",
        epilog=epilog("mask2ct describe MODEL", "mask2ct describe MODEL --json"),
    )
    parser.set_defaults(command=_describe)
    parser.add_argument("model", type=Path, metavar="FOLDER", help="a model folder")
    add_json(parser)


def _describe(options: argparse.Namespace) -> int:
    manifest = Manifest.load(options.model)
    if options.json:
        print_json(describe_json(manifest, options.model))
    else:
        print(describe(manifest, options.model))
    return 0
