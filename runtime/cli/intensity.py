"""`mask2ct synth --intensity NAME=VALUE±DEVIATION`: ask for the contrast of a class."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from ..core.contrast import REQUEST_HELP, parse_requests
from ..synthesizer import VolumeSynthesizer
from .options import refuse_beside


def add_intensity(parser: argparse.ArgumentParser) -> None:
    """Add the option `--intensity`.

    Args:
        parser: Receives the option.
    """
    parser.add_argument(
        "--intensity",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=(
            f"give a class this median intensity, for a model with a contrast: {REQUEST_HELP}; the"
            " deviation is that over masks and variants; repeatable (default: drawn as the training"
            " patients differ)"
        ),
    )


def check_intensity(options: argparse.Namespace) -> None:
    """Check `--intensity` before any model is opened.

    Args:
        options: Parsed options of `synth`.

    Raises:
        UsageError: A request cannot be read, or stands beside an option that leaves it without
            effect.
    """
    if parse_requests(options.intensity):
        refuse_beside("--intensity", options, ("warp", "ray", "list"))


def apply_intensity(models: Mapping[str, VolumeSynthesizer], options: argparse.Namespace) -> None:
    """Ask every model for the intensities of `--intensity`.

    Args:
        models: Open models by name.
        options: Parsed options of `synth`.

    Raises:
        UsageError: A model takes no intensities, or has no such class.
    """
    requests = parse_requests(options.intensity)
    if requests:
        for model in models.values():
            model.request_intensities(requests)
