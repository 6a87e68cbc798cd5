"""Turn the options of reading into cases and label maps, and tell what is not read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..batch.model_router import named
from ..core.errors import UsageError, printable
from ..core.label_presets import class_names
from ..core.labels import MM_WHS, PRESETS, LabelMap, load_map, lost, names_of
from ..core.manifest import LabelTable, Manifest
from ..io.case_finding import OWN, find_cases
from ..io.cases import Case, PassedOver, ReadOptions
from ..io.dicom.files import LINKED, OUTSIDE
from ..io.readers.class_files import contradicted, is_class_name
from ..io.volume_files import SUFFIXES
from .options import MOST_NAMES


def find(
    options: argparse.Namespace, masks: Sequence[Path], *, every: bool = False, say: bool = True
) -> list[Case]:
    """Find the cases in files and folders, and print what is skipped.

    Args:
        options: Parsed options of `add_reading`.
        masks: Files, folders and zips.
        every: Whether to list each series of a folder as a case of its own, and skipped files
            with their paths.
        say: Whether to print what is skipped or read in an unexpected way.

    Returns:
        The cases, which later are read as the options say.

    Raises:
        UsageError: For a folder without masks, or options that do not fit the files.
    """
    skipped: list[PassedOver] = []
    order = tuple(name.strip() for name in options.overlap_order.split(",") if name.strip())
    read_options = ReadOptions(
        order,
        options.threshold,
        options.like,
        options.allow_missing_references,
        options.force_labels,
    )
    structures = _structure_names(options)
    cases = find_cases(
        masks,
        skipped,
        options=read_options,
        series=options.series,
        every=every,
        names=structures,
    )
    if not say:
        return cases
    read_by_values: list[Path] = []
    for case in cases:
        if case.kind == "classes":
            print(
                f"{printable(case.display_name)}: {len(case.files)} binary files, one a class, are"
                f" read as one mask, {case.name}",
                file=sys.stderr,
            )
        elif case.kind == "volume" and is_class_name(case.path, structures):
            _refuse_contradicted(case, options)
            read_by_values.append(case.display_name)
    most = None if getattr(options, "verbose", False) else MOST_NAMES
    if len(read_by_values) == 1:
        fact = f"{printable(read_by_values[0])} is called like a structure and read by its values"
    else:
        listed = _listed(read_by_values, most)
        fact = f"{len(read_by_values)} files ({listed}) are called like a structure and read by"
        fact += " their values"
    if read_by_values:
        remedy = "give the folder of all classes to read each by its name"
        print(f"warning: {fact}; {remedy}", file=sys.stderr)
    _print_skipped(skipped, paths=every, most=most)
    return cases


def _refuse_contradicted(case: Case, options: argparse.Namespace) -> None:
    """Raise `UsageError` for a single class whose name is not what the preset calls its value."""
    if options.labels not in PRESETS:
        return
    if preset_name := contradicted(case.path, class_names(options.labels)):
        raise UsageError(
            f"{printable(case.display_name)} is called like a structure, and the preset"
            f" {options.labels} calls its value {preset_name!r}",
            expected="a file with the preset's values, or a folder of one file per class",
            remedy=("give the folder of all classes, or a --labels MAP.json that names the value"),
            file=case.display_name,
        )


def _structure_names(options: argparse.Namespace) -> frozenset[str]:
    """The names that --labels and the models give to structures."""
    if isinstance(options.model, Path):
        folders = [options.model]
    else:
        folders = [*named(options.model or ()).values()]
    tables = [Manifest.load(folder).labels for folder in folders]
    return names_of(options.labels, tables or [MM_WHS])


def _listed(paths: Sequence[Path], most: int | None) -> str:
    """The paths with commas, at most `most` of them."""
    more = most is not None and len(paths) > most
    return ", ".join(map(printable, paths[:most])) + (", …" if more else "")


def _print_skipped(skipped: Sequence[PassedOver], *, paths: bool, most: int | None) -> None:
    """Warn of paths that are not read, in one line for each kind.

    Args:
        skipped: The paths.
        paths: Whether a line has full paths; else only names that cannot be a patient's.
        most: How many of them a line has; None for all.
    """
    paths_by_kind: dict[str, list[Path]] = {}
    for item in skipped:
        paths_by_kind.setdefault(item.what, []).append(item.path)
    for kind, places in paths_by_kind.items():
        printed = (
            places
            if paths
            else [Path(place.name) for place in places if place.name.lower().endswith(SUFFIXES)]
        )
        if kind == OWN and len(places) == 1:
            name = printable(printed[0]) if printed else "a DICOM file"
            print(
                f"warning: {name} was written by mask2ct and is not taken for a mask (name it to"
                " have it)",
                file=sys.stderr,
            )
            continue
        plural = "s" if len(places) > 1 else ""
        fact, hint = f"{kind}{plural} not read", "" if paths else " (--list shows where)"
        if kind == OWN:
            fact = "files were written by mask2ct and are not taken for masks"
            hint = " (name them to have them)"
        elif kind in (LINKED, OUTSIDE):
            hint = " (give what a link leads to itself)"
        names = f": {_listed(printed, most)}" if printed else ""
        print(f"warning: {len(places)} {fact}{hint}{names}", file=sys.stderr)


def label_map(
    options: argparse.Namespace, table: LabelTable, tables: Sequence[LabelTable] = ()
) -> LabelMap | None:
    """Load the label map of `--labels`, and warn of labels that a preset loses.

    Args:
        options: Parsed options of `add_reading`.
        table: The model's labels.
        tables: The labels of all models that share the map.

    Returns:
        The map; None without `--labels`.

    Raises:
        UsageError: For a map that cannot be used.
    """
    if options.labels is None:
        return None
    if options.labels in PRESETS and (missing := lost(options.labels, table)):
        names = printable(", ".join(missing))
        print(
            f"warning: the model has no label for {names} of {options.labels}: they become"
            " background",
            file=sys.stderr,
        )
    return load_map(options.labels, table, tables)
