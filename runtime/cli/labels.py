"""`mask2ct labels`: list the labels of a mask and the model's labels that they map to."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.console import add_json, epilog, print_json
from ..core.errors import InputError, printable
from ..core.labels import MAP_HELP, MM_WHS, LabelMap, match, refuse_contradictions
from ..core.manifest import LabelTable, Manifest
from ..core.volume import Segment
from ..io.cases import Case, count, read_mask
from .failures import Failures
from .masks import find, label_map
from .options import MASK_HELP, add_reading, add_verbose


def add(commands: Any) -> None:
    """Add `labels` to the command line.

    Args:
        commands: What argparse's `add_subparsers` returned.
    """
    labels = commands.add_parser(
        "labels",
        epilog=epilog(
            "mask2ct labels MASK --model MODEL",
            "mask2ct labels MASKS --labels totalsegmentator",
            "mask2ct labels MASK --json",
        ),
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
    add_json(labels)


def _labels(options: argparse.Namespace) -> int:
    table = MM_WHS if options.model is None else Manifest.load(options.model).labels
    mapped, code = label_map(options, table), 0
    cases, failures = find(options, options.file), Failures(verbose=options.verbose)
    masks = []
    for case in cases:
        if len(cases) > 1 and not options.json:
            print(f"{printable(case.display_name)}")
        result: dict[str, Any] = {"mask": str(case.display_name), "labels": [], "error": None}
        masks.append(result)
        try:
            segments, result["labels"] = _read_labels(case, table, mapped)
            unknown = sum(row["maps_to"] is None for row in result["labels"])
            code = max(code, int(unknown > 0))
            if not options.json:
                _print_labels(result["labels"], unknown, table)
            refuse_contradictions(segments, table, mapped, file=case.display_name)
        except InputError as exc:
            result["error"] = str(exc)
            failures.add(exc)
    if options.json:
        print_json({"masks": masks})
    failures.close()
    return max(code, failures.code)


def _read_labels(
    case: Case, table: LabelTable, mapped: LabelMap | None
) -> tuple[list[Segment], list[dict[str, Any]]]:
    """Count a mask's labels.

    Args:
        case: The mask.
        table: The label table that its labels map to.
        mapped: The map of `--labels`.

    Returns:
        The mask's structures, and for each the row of docs/reference/json.md.

    Raises:
        InputError: The mask cannot be read.
    """
    mask = read_mask(case)
    for note in mask.notes:
        print(f"warning: {printable(note)}", file=sys.stderr)
    counts = count(mask, case.display_name, force=case.options.force_labels)
    millilitres = float(np.prod(mask.geometry.spacing)) / 1000
    rows = []
    for segment, voxels in counts:
        index = match(segment, table, mapped)
        if index is None and mask.segments and segment.number == 0:
            index = 0
        rows.append(
            {
                "value": None if segment.strict and segment.number < 0 else segment.number,
                "voxels": voxels,
                "ml": voxels * millilitres,
                "maps_to": None if index is None else table.labels[index].name,
                "name": segment.name,
                "code": str(segment.code),
            }
        )
    return [segment for segment, _ in counts], rows


def _print_labels(rows: Sequence[Mapping[str, Any]], unknown: int, table: LabelTable) -> None:
    """Print a mask's labels and their targets as a table."""
    print(f"{'value':>7} {'voxels':>11} {'ml':>10}  {'maps to':<24}  name and code")
    for row in rows:
        number = "" if row["value"] is None else row["value"]
        target = "UNKNOWN" if row["maps_to"] is None else row["maps_to"]
        line = (
            f"{number:>7} {row['voxels']:>11} {row['ml']:>10.1f}  {target:<24}  {row['name']}"
            f" {row['code']}"
        )
        print(printable(line.rstrip()))
    if unknown:
        print(
            f"{unknown} unknown: synth needs --labels MAP.json, {MAP_HELP}; the table knows"
            f" {printable(str(table))}"
        )
