"""`mask2ct labels`: list the labels of a mask and the model's labels that they map to."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..core.console import EXIT_CODES
from ..core.errors import InputError, printable
from ..core.labels import MAP_HELP, MM_WHS, LabelMap, match, refuse_contradictions
from ..core.manifest import LabelTable, Manifest
from ..io.cases import Case, count, read_mask
from .failures import Failures
from .options import MASK_HELP, add_reading, add_verbose, find, label_map


def add(commands: Any) -> None:
    """Add `labels` to the command line.

    Args:
        commands: What argparse's `add_subparsers` returned.
    """
    labels = commands.add_parser(
        "labels",
        help="list a mask's labels and the model's labels that they map to",
        epilog=EXIT_CODES,
    )
    labels.set_defaults(command=_labels)
    labels.add_argument("file", nargs="+", type=Path, metavar="MASK", help=MASK_HELP)
    labels.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="map to this model's labels (default: the MM-WHS table)",
    )
    add_reading(labels)
    add_verbose(labels)


def _labels(options: argparse.Namespace) -> int:
    table = MM_WHS if options.model is None else Manifest.load(options.model).labels
    mapped, code = label_map(options, table), 0
    cases, failures = find(options, options.file), Failures(verbose=options.verbose)
    for case in cases:
        if len(cases) > 1:
            print(f"{printable(case.display_name)}")
        try:
            code = max(code, _print_labels(case, table, mapped))
        except InputError as exc:
            failures.add(exc)
    failures.close()
    return max(code, failures.code)


def _print_labels(case: Case, table: LabelTable, mapped: LabelMap | None) -> int:
    """Print a mask's labels and their targets; return 1 when a label has no target, else 0."""
    mask = read_mask(case)
    for note in mask.notes:
        print(f"warning: {printable(note)}", file=sys.stderr)
    counts = count(mask, case.display_name, force=case.options.force_labels)
    millilitres = float(np.prod(mask.geometry.spacing)) / 1000
    print(f"{'value':>7} {'voxels':>11} {'ml':>10}  {'maps to':<24}  name and code")
    unknown = 0
    for segment, voxels in counts:
        index = match(segment, table, mapped)
        if index is None and mask.segments and segment.number == 0:
            index = 0
        unknown += index is None
        target = "UNKNOWN" if index is None else table.labels[index].name
        number = "" if segment.strict and segment.number < 0 else segment.number
        row = (
            f"{number:>7} {voxels:>11} {voxels * millilitres:>10.1f}  {target:<24}  {segment.name}"
            f" {segment.code}"
        )
        print(printable(row.rstrip()))
    if unknown:
        print(
            f"{unknown} unknown: synth needs --labels MAP.json, {MAP_HELP}; the table knows"
            f" {printable(str(table))}"
        )
    refuse_contradictions([segment for segment, _ in counts], table, mapped, file=case.display_name)
    return 1 if unknown else 0
