"""`mask2ct demo`: a first picture from the model and the masks that come with the package."""

from __future__ import annotations

import argparse
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..core.console import Parser, epilog
from . import synth, view

FOLDER = Path("mask2ct-demo")
VARIANTS = 2


def add(commands: Any) -> None:
    """Add `demo` to the command line.

    Args:
        commands: What argparse's `add_subparsers` returned.
    """
    parser = commands.add_parser(
        "demo",
        epilog=epilog("mask2ct demo", "mask2ct demo --output OUT --no-open"),
    )
    parser.set_defaults(command=_demo)
    parser.add_argument(
        "--output",
        type=Path,
        default=FOLDER,
        metavar="OUT",
        help="the folder for the CTs and the page (default: %(default)s)",
    )
    view.add_no_open(parser)


def demo_folder() -> Path:
    """The folder of the package with `model` and `masks`: simulated patients, no real one."""
    return Path(str(files(__package__.partition(".")[0]) / "demo"))


def _demo(options: argparse.Namespace) -> int:
    """Run `synth` and `view` as a person would, and print both."""
    source, out = demo_folder(), str(options.output)
    model = ["--model", str(source / "model")]
    masks = [str(source / "masks"), *model, "--output", out]
    steps: tuple[tuple[Any, list[str], list[str]], ...] = (
        (synth, ["synth", *masks, "--variants", str(VARIANTS), "--resume"], []),
        (view, ["view", out, *model], ["--no-open"] if options.no_open else []),
    )
    for module, words, more in steps:
        print(f"$ mask2ct {shlex.join(words)}", flush=True)
        commands = Parser("mask2ct").add_subparsers(prog="mask2ct")
        module.add(commands)
        parsed = commands.choices[words[0]].parse_args([*words[1:], *more])
        if code := int(parsed.command(parsed)):
            return code
    return 0
