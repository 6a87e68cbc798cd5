"""`mask2ct synth --warp CT`: deform real CTs with their masks, without a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..batch.plan import Plan
from ..batch.warp_source import WarpSource, label_table
from ..core.errors import UsageError
from ..core.warp import IntensityJitter
from ..io.cases import Case
from ..io.readers.image import with_images
from ..synthesizer import DEFAULT_BATCH
from .models import plan_of

VARIANTS = 3  # of each pair, without --variants
# Options that only a model needs, with their defaults.
MODEL_OPTIONS = {
    "model": None,
    "use": None,
    "rules": None,
    "backend": "auto",
    "batch": DEFAULT_BATCH,
    "max_memory": None,
    "device": 0,
    "workers": None,
    "ray": None,
    "ray_workers": None,
    "ray_gpus": None,
}


def add_warp(parser: argparse.ArgumentParser) -> None:
    """Add the options of `--warp`.

    Args:
        parser: Receives the options.
    """
    group = parser.add_argument_group("real CTs instead of a model")
    group.add_argument(
        "--warp",
        type=Path,
        metavar="CT",
        help=(
            "deform this CT with its mask instead of using a model: a volume, a DICOM series, or a"
            f" folder of these whose names match the masks' ({VARIANTS} variants without"
            " --variants)"
        ),
    )
    add_jitter(group)


def add_jitter(group: argparse._ActionsContainer) -> None:
    """Add the option of the intensities.

    Args:
        group: Receives the option.
    """
    group.add_argument(
        "--intensity-jitter",
        choices=("on", "off"),
        help=(
            "of a deformed real CT: also shift the intensities of each label and tissue at random"
            " (default: on)"
        ),
    )


def check_warp(options: argparse.Namespace) -> None:
    """Check that no option lacks its effect, with `--warp` or without it.

    Args:
        options: Parsed options of `synth`.

    Raises:
        UsageError: For an option without effect, and without both `--model` and `--warp`.
    """
    if options.warp is None:
        if options.intensity_jitter is not None:
            raise UsageError(
                "--intensity-jitter is for --warp",
                expected="--warp CT with it",
                remedy="add --warp, or leave it out",
            )
        if options.model is None and not options.list:
            raise UsageError(
                "neither --model nor --warp was given",
                expected=(
                    "--model FOLDER, which synthesizes CTs from masks, or --warp CT, which deforms"
                    " real CTs with their masks"
                ),
                remedy="add one of them",
            )
        return
    for name, default in MODEL_OPTIONS.items():
        if getattr(options, name) != default:
            raise UsageError(
                f"--{name.replace('_', '-')} has no effect beside --warp, which takes no model",
                expected="one of them",
                remedy="leave one out",
            )


def warp_source(
    cases: Sequence[Case], options: argparse.Namespace
) -> tuple[WarpSource, list[Case], Plan]:
    """Pair masks with CTs, and plan their deformation.

    Args:
        cases: The masks.
        options: Parsed options of `synth`; `variants` receives its default.

    Returns:
        The source that deforms the CTs, the cases with their CTs, and the plan.

    Raises:
        UsageError: When no mask has a CT, or the label map cannot be used.
    """
    options.variants = VARIANTS if options.variants is None else options.variants
    pairs = with_images(cases, options.warp)
    table, label_map = label_table(pairs, options.labels)
    source = WarpSource(table, None if options.intensity_jitter == "off" else IntensityJitter())
    # The table already holds the targets of --labels: `plan_of` must not load the map against it.
    labels_option, options.labels = options.labels, None
    plan = plan_of(options, options.output, table, resume=options.resume)
    options.labels = labels_option
    return source, pairs, replace(plan, labels=label_map)
