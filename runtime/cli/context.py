"""`mask2ct synth --context CT`: the tissues around each mask come from its own CT."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..batch.given_layout import GivenLayout
from ..io.cases import Case
from ..io.readers.image import with_images
from ..synthesizer import VolumeSynthesizer
from .options import refuse_beside


def add_context(parser: argparse.ArgumentParser) -> None:
    """Add the option `--context`.

    Args:
        parser: Receives the option.
    """
    group = parser.add_argument_group("layout")
    group.add_argument(
        "--context",
        type=Path,
        metavar="CT",
        help=(
            "take the tissues around each mask from this CT, for a model with a context: a volume,"
            " a DICOM series, or a folder of these whose names match the masks' (default: what the"
            " model makes of the mask alone)"
        ),
    )


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Add the option `--layout`.

    Args:
        parser: Receives the option.
    """
    parser.add_argument(
        "--layout",
        choices=("auto", "none"),
        default="auto",
        help=(
            "none: synthesize from the mask alone; auto: draw the tissues around each mask, for a"
            " model that has learned layouts (default)"
        ),
    )


def apply_layout(models: Mapping[str, VolumeSynthesizer], options: argparse.Namespace) -> None:
    """Switch learned layouts off where `--layout none` asks for it.

    Args:
        models: Open models by name.
        options: Parsed options of `synth`.
    """
    if options.layout == "none":
        for model in models.values():
            model.omit_layouts()


def check_context(options: argparse.Namespace) -> None:
    """Check that `--context` and `--layout` are not beside options that make them void.

    Args:
        options: Parsed options of `synth`.

    Raises:
        UsageError: It is.
    """
    if options.context is not None:
        refuse_beside("--context", options, ("warp", "ray", "list"))
    if options.layout == "none":
        refuse_beside("--layout none", options, ("warp", "ray", "list", "context"))


def with_context(
    models: Mapping[str, VolumeSynthesizer], cases: Sequence[Case], options: argparse.Namespace
) -> tuple[Mapping[str, GivenLayout | VolumeSynthesizer], list[Case]]:
    """Pair masks with the CTs of `--context`.

    Args:
        models: Open models by name.
        cases: The masks.
        options: Parsed options of `synth`.

    Returns:
        What makes the CTs, by the model's name, and the cases with their CTs; as they were without
        `--context`.

    Raises:
        UsageError: No mask has a CT, or a model has no context.
    """
    if options.context is None:
        return models, [*cases]
    sources = {name: GivenLayout(model) for name, model in models.items()}
    return sources, with_images(cases, options.context, "--context")
