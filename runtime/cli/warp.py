"""`mask2ct synth --warp CT`: the options of deforming real CTs, and what is made of them."""

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
from .options import plan_of

VARIANTS = 3  # of each pair, where the command does not say
_OF_MODELS = {
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
    how = parser.add_argument_group("real CTs, deformed with their masks, instead of a model's")
    how.add_argument(
        "--warp",
        type=Path,
        metavar="CT",
        help=(
            "no model: deform this CT (a volume, a DICOM series, or a folder of such, matched by"
            f" name) with its mask; {VARIANTS} variants where --variants does not say"
        ),
    )
    how.add_argument(
        "--intensity-jitter",
        choices=("on", "off"),
        help=(
            "of --warp: move the intensities of each label and tissue at random, too (default: on)"
        ),
    )


def check_warp(options: argparse.Namespace) -> None:
    """Raise `UsageError` for options that have no effect with --warp, or without it."""
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
                    "--model FOLDER, which makes CTs of masks, or --warp CT, which deforms real"
                    " ones with theirs"
                ),
                remedy="add one of them",
            )
        return
    for name, default in _OF_MODELS.items():
        if getattr(options, name) != default:
            raise UsageError(
                f"--{name.replace('_', '-')} has no effect beside --warp, which takes no model",
                expected="one of them",
                remedy="leave one out",
            )


def warp_source(
    cases: Sequence[Case], options: argparse.Namespace
) -> tuple[WarpSource, list[Case], Plan]:
    """What deforms the CTs, the cases with their CTs, and what is made of them.

    Raises `UsageError`s.
    """
    options.variants = VARIANTS if options.variants is None else options.variants
    pairs = with_images(cases, options.warp)
    table, label_map = label_table(pairs, options.labels)
    source = WarpSource(table, None if options.intensity_jitter == "off" else IntensityJitter())
    given, options.labels = options.labels, None  # what they lead to is the table
    made = replace(plan_of(options, options.output, table, resume=options.resume), labels=label_map)
    options.labels = given
    return source, pairs, made
