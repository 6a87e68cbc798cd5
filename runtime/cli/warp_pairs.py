"""`mask2ct warp`: deform real CTs with their masks; it is `synth --warp` without the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.console import epilog
from .options import MASK_HELP, add_reading, add_results
from .synth import add_run, run_synth
from .warp import MODEL_OPTIONS, VARIANTS, add_jitter

# Options of `synth` that only a model needs, at their defaults.
_OTHERS = {**MODEL_OPTIONS, "context": None, "intensity": (), "layout": "auto"}


def add(commands: Any) -> None:
    """Add `warp` to the command line.

    Args:
        commands: What argparse's `add_subparsers` returned.
    """
    parser = commands.add_parser(
        "warp",
        epilog=epilog(
            "mask2ct warp IMAGES MASKS --output OUT --variants 5",
            "mask2ct warp CT.nii.gz MASK.nii.gz --output OUT --intensity-jitter off",
        ),
    )
    parser.set_defaults(command=run_synth, **_OTHERS)
    parser.add_argument(
        "warp",
        type=Path,
        metavar="CT",
        help="a volume, a DICOM series, or a folder of these whose names match the masks'"
        f" ({VARIANTS} variants of each without --variants)",
    )
    parser.add_argument("masks", nargs="+", type=Path, metavar="MASK", help=MASK_HELP)
    add_jitter(parser)
    add_results(parser)
    add_reading(parser)
    add_run(parser)
