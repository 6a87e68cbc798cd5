"""The options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..batch.model_router import RULES_HELP
from ..core.deformation import DeformationParams
from ..core.errors import UsageError
from ..core.labels import MAP_HELP, PRESETS
from ..engines.memory import parse_bytes
from ..engines.registry import CHOICES
from ..io.writers.registry import FORMATS
from ..synthesizer import DEFAULT_BATCH

# Names in a warning about many files.
MOST_NAMES = 12
MASK_HELP = (
    "a NIfTI, NRRD or MHA label map, a DICOM SEG or RTSTRUCT, the slices of a DICOM label series,"
    " or a folder or zip of these"
)


def add_engine(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the options that choose a model and its engine, for every command that synthesizes.

    Args:
        parser: Receives the options.
        required: Whether the command needs a `--model`.
    """
    parser.add_argument(
        "--model",
        action="append",
        required=required,
        metavar="[NAME=]FOLDER",
        help=(
            "a model folder that export/build_engine.py wrote; repeatable: the model that knows a"
            " mask's labels synthesizes it"
        ),
    )
    selection = parser.add_mutually_exclusive_group()
    selection.add_argument(
        "--use", metavar="NAME", help="use this one of several models for every mask"
    )
    selection.add_argument(
        "--rules",
        type=Path,
        metavar="RULES.json",
        help=f"choose one of several models by rules: {RULES_HELP}",
    )
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--backend",
        choices=CHOICES,
        default="auto",
        help=(
            "the engine that runs the model (default: the fastest that is installed and validated"
            " for it; INT8 runs only when it is named)"
        ),
    )
    group.add_argument(
        "--batch",
        type=_batch,
        default=DEFAULT_BATCH,
        metavar="N",
        help=(
            "hold N slices in memory at once; the result is the same (default: %(default)s). auto:"
            " a GPU synthesizes as many slices together as fit into its memory"
        ),
    )
    group.add_argument(
        "--max-memory",
        type=parse_bytes,
        metavar="SIZE",
        help=(
            "limit the memory of all models together, such as 2GiB, or in bytes: GPU memory for an"
            " engine on a GPU, else host memory (default: what the engine needs)"
        ),
    )
    group.add_argument(
        "--device",
        type=int,
        default=0,
        metavar="N",
        help="use GPU number N, in the driver's order (default: %(default)s)",
    )
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help=(
            "synthesize N slices at once on a CPU; the result is the same (default: one per core,"
            " up to 16)"
        ),
    )


def add_results(parser: argparse.ArgumentParser) -> None:
    """Add the options of results, for every command that writes them into a folder.

    Args:
        parser: Receives the options.
    """
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="write the results into this folder, as CASE_ct.nii.gz",
    )
    group = parser.add_argument_group("results")
    group.add_argument(
        "--format",
        choices=list(FORMATS),
        default="nifti",
        help="the file format of the results (default: %(default)s)",
    )
    group.add_argument(
        "--shared",
        action="store_true",
        help=(
            "let the umask decide who may read results of DICOM masks (default: their owner alone)"
        ),
    )
    add_making(group)


def refuse_beside(option: str, options: argparse.Namespace, others: Sequence[str]) -> None:
    """Refuse options beside which another one has no effect.

    Args:
        option: The option that would have none, such as "--context".
        options: Parsed options.
        others: Names of options whose default is None or False, without their dashes.

    Raises:
        UsageError: One of them is given.
    """
    for name in others:
        if getattr(options, name) not in (None, False):
            raise UsageError(
                f"{option} has no effect beside --{name}",
                expected="one of them",
                remedy="leave one out",
            )


def add_making(group: argparse._ArgumentGroup) -> None:
    """Add the options of a result's content, for every command that synthesizes.

    Args:
        group: Receives the options.
    """
    group.add_argument(
        "--attach",
        action="store_true",
        help="dicom: put the CT into the mask's own patient, study and frame of reference",
    )
    group.add_argument(
        "--enhanced",
        action="store_true",
        help="dicom: write one multi-frame Enhanced CT instead of one file per slice",
    )
    group.add_argument(
        "--segmentation",
        choices=("binary", "labelmap", "none"),
        default="binary",
        help="dicom: the type of the SEG beside the series (default: %(default)s)",
    )
    group.add_argument(
        "--one-patient",
        action="store_true",
        help="dicom: make the variants of a mask series of one synthetic patient and study",
    )
    group.add_argument(
        "--variants",
        type=int,
        metavar="K",
        help="write K different CTs per mask, each with its mask; all but the first are deformed",
    )
    group.add_argument(
        "--deform",
        type=float,
        metavar="MM",
        default=DeformationParams.deform,
        help="bend the mask of variants 1, 2 … by up to this (default: %(default)s)",
    )
    group.add_argument(
        "--rotate",
        type=float,
        metavar="DEGREES",
        default=DeformationParams.rotate,
        help="rotate it about each axis by up to this (default: %(default)s)",
    )
    group.add_argument(
        "--scale",
        type=float,
        metavar="FRACTION",
        default=DeformationParams.scale,
        help="stretch or shrink it along each axis by up to this (default: %(default)s)",
    )
    group.add_argument(
        "--any-topology",
        action="store_true",
        help="allow a deformation that splits, merges or removes labels",
    )
    group.add_argument(
        "--mirror",
        action="store_true",
        help="mirror some variants left to right (default: left stays left)",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="the seed of all random numbers (default: %(default)s)"
    )


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """Add `--verbose`, for every command that lists failed cases at its end.

    Args:
        parser: Receives the option.
    """
    parser.add_argument(
        "--verbose",
        action="store_true",
        help=(
            "print each failed case in full, and all names in a warning (default: many failures"
            f" become a table of reasons, and a warning has {MOST_NAMES} names)"
        ),
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the options of reading, for every command that reads masks.

    Args:
        parser: Receives the options.
    """
    group = parser.add_argument_group("reading masks")
    group.add_argument(
        "--labels", metavar="MAP.json|PRESET", help=f"{MAP_HELP}; or a preset: {', '.join(PRESETS)}"
    )
    group.add_argument(
        "--series",
        metavar="UID|NUMBER|NAME",
        help="the DICOM series that is the mask, where a folder holds several",
    )
    group.add_argument(
        "--overlap-order",
        default="",
        metavar="NAME,NAME",
        help="the order of precedence of overlapping segments: the first name wins",
    )
    group.add_argument(
        "--threshold",
        type=float,
        metavar="F",
        help="a voxel of a FRACTIONAL segmentation belongs to it from this fraction on",
    )
    group.add_argument(
        "--like",
        type=Path,
        metavar="IMAGE",
        help="RTSTRUCT: fill the contours on the grid of this volume or DICOM series folder",
    )
    group.add_argument(
        "--allow-missing-references",
        action="store_true",
        help="RTSTRUCT: fill the contours on the series at hand if they refer to another one",
    )
    group.add_argument(
        "--force-labels",
        action="store_true",
        help="read a file as a label map even if it looks like an image",
    )


def add_audit(parser: argparse.ArgumentParser, default: str) -> None:
    """Add `--audit`, for every command that keeps an audit file.

    Args:
        parser: Receives the option.
        default: The default as the help text states it.
    """
    parser.add_argument(
        "--audit",
        type=Path,
        metavar="FILE.jsonl",
        help=f"append a line for each result with its mask and its model (default: {default})",
    )


def _batch(text: str) -> int | Literal["auto"]:
    """Parse the value of `--batch`."""
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(
            f"--batch is {text}",
            expected="1 or more, or auto",
            remedy="leave it out for the default",
        )
    return int(text)
