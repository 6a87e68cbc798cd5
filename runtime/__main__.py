"""`python -m runtime` and `mask2ct`: synth, labels, describe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from .console import EXIT_CODES, run
from .contract import LabelTable, Manifest
from .describe import describe
from .engines.registry import CHOICES
from .errors import InputError, UsageError, printable
from .files import write_json
from .io.archive import exists
from .io.detect import Case, ReadOptions, count, find_cases, listing, read_case, read_mask
from .io.formats import FORMATS, FormatOptions
from .io.headers import SUFFIXES
from .labels import MAP_HELP, MM_WHS, PRESETS, LabelMap, load_map, lost, match
from .memory import parse_bytes
from .report import Summary
from .stream import check_writable, synthesize
from .synthesizer import DEFAULT_BATCH, Synthesizer
from .variants import Ranges
from .version import VERSION

MASK_HELP = "a NIfTI, NRRD or MHA label map, a DICOM SEG or RTSTRUCT, the slices of a DICOM label series, or a folder or zip of such"


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    command: Any = options.command
    return int(command(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mask2ct", description="Paint a synthetic CT for any label mask.", epilog=EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"mask2ct {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    synth = commands.add_parser("synth", help="paint a CT for each mask", epilog=EXIT_CODES)
    synth.set_defaults(command=_synth)
    synth.add_argument("masks", nargs="+", type=Path, metavar="MASK", help=MASK_HELP)
    synth.add_argument("--model", type=Path, required=True, help="a model folder, as export/build_engine.py writes it")
    synth.add_argument("--output", type=Path, required=True, help="the folder that receives CASE_ct.nii.gz")
    synth.add_argument("--format", choices=list(FORMATS), default="nifti", help="what to write (default: %(default)s)")
    synth.add_argument("--attach", action="store_true", help="dicom: into the mask's own patient, study and frame of reference")
    synth.add_argument("--enhanced", action="store_true", help="dicom: one multi-frame Enhanced CT and not a file a slice")
    synth.add_argument(
        "--segmentation",
        choices=("binary", "labelmap", "none"),
        default="binary",
        help="dicom: the SEG beside the series (default: %(default)s)",
    )
    synth.add_argument(
        "--backend",
        choices=CHOICES,
        default="auto",
        help="what runs the model (default: the fastest that is installed and proven for it; INT8 must be asked for)",
    )
    synth.add_argument(
        "--variants", type=int, metavar="K", help="write K different CTs per mask, each with its mask, deformed but for the first"
    )
    synth.add_argument(
        "--deform",
        type=float,
        metavar="MM",
        default=Ranges.deform,
        help="of variants 1, 2 …: bend the mask by up to this (default: %(default)s)",
    )
    synth.add_argument(
        "--rotate", type=float, metavar="DEGREES", default=Ranges.rotate, help="turn it about each axis (default: %(default)s)"
    )
    synth.add_argument(
        "--scale", type=float, metavar="FRACTION", default=Ranges.scale, help="stretch it along each axis (default: %(default)s)"
    )
    synth.add_argument("--any-topology", action="store_true", help="also when a label falls apart, merges or vanishes by that")
    synth.add_argument("--seed", type=int, default=0, help="of all randomness (default: %(default)s)")
    _add_reading(synth)
    synth.add_argument(
        "--batch", type=_batch, default=DEFAULT_BATCH, metavar="N",
        help="slices held at once; the result is the same (default: %(default)s). auto: on a GPU, paint as many together as fit",
    )  # fmt: skip
    synth.add_argument(
        "--max-memory",
        type=parse_bytes,
        metavar="SIZE",
        help="of the GPU, 2GiB or bytes (default: what the engine needs); else of the host",
    )
    synth.add_argument("--device", type=int, default=0, metavar="N", help="which GPU, in the driver's order (default: %(default)s)")
    synth.add_argument(
        "--workers", type=int, metavar="N", help="slices painted at once on a CPU; the result is the same (default: one a core, up to 4)"
    )
    synth.add_argument("--resume", action="store_true", help="keep what the output folder's journal proves complete")
    synth.add_argument("--report", type=Path, metavar="FILE.json", help="write what became of each case")
    synth.add_argument("--list", action="store_true", help="print the cases that were found and stop")
    synth.add_argument("--dry-run", action="store_true", help="check the model and every mask, write nothing")
    synth.add_argument("--quiet", action="store_true", help="print errors and warnings only")

    labels = commands.add_parser("labels", help="what a mask holds and how it would map", epilog=EXIT_CODES)
    labels.set_defaults(command=_labels)
    labels.add_argument("file", nargs="+", type=Path, help=MASK_HELP)
    labels.add_argument("--model", type=Path, help="map to this model's labels (default: the MM-WHS table)")
    _add_reading(labels)

    describe = commands.add_parser("describe", help="what a model folder holds; checks every file", epilog=EXIT_CODES)
    describe.set_defaults(command=_describe)
    describe.add_argument("model", type=Path)
    return parser


def _batch(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--batch is {text}", expected="1 or more, or auto", remedy="leave it out for the default")
    return int(text)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    """How a mask is read, for every command that reads masks."""
    how = parser.add_argument_group("reading masks")
    how.add_argument("--labels", metavar="MAP.json|PRESET", help=f"{MAP_HELP}; or a preset: {', '.join(PRESETS)}")
    how.add_argument("--series", metavar="UID|NUMBER|NAME", help="which of several DICOM series in a folder is the mask")
    how.add_argument("--overlap-order", default="", metavar="NAME,NAME", help="which segment wins where several overlap, first one first")
    how.add_argument(
        "--threshold", type=float, metavar="F", help="the fraction from which on a voxel of a FRACTIONAL segmentation is inside"
    )
    how.add_argument("--like", type=Path, metavar="IMAGE", help="a volume, or a DICOM series' folder, on whose grid contours are filled")
    how.add_argument(
        "--allow-missing-references",
        action="store_true",
        help="fill contours on the series that is there, though it is not the one referred to",
    )


def _find(options: argparse.Namespace, masks: Sequence[Path], *, every: bool = False) -> list[Case]:
    """The cases, read as the options say; what was passed over is said."""
    skipped: list[Path] = []
    order = tuple(name.strip() for name in options.overlap_order.split(",") if name.strip())
    how = ReadOptions(order, options.threshold, options.like, options.allow_missing_references)
    cases = find_cases(masks, skipped, options=how, series=options.series, every=every)
    for path in skipped:
        name = path.name if path.name.lower().endswith(SUFFIXES) else "a DICOM file"
        print(f"warning: {name} was written by mask2ct and is not taken for a mask (name it to have it)", file=sys.stderr)
    return cases


def _synth(options: argparse.Namespace) -> int:
    if options.workers is not None and options.workers < 1:
        raise UsageError(f"--workers is {options.workers}", expected="1 or more", remedy="leave it out for the default")
    cases = _find(options, options.masks, every=options.list)
    if options.list:
        missing = [case for case in cases if not exists(case.path)]
        print("\n".join(listing(case) for case in cases if case not in missing))
        for case in missing:
            print(f"error: {printable(case.path)} does not exist", file=sys.stderr)
        return 1 if missing else 0
    with Synthesizer.open(
        options.model,
        backend=options.backend,
        batch=options.batch,
        max_memory=options.max_memory,
        device=options.device,
        workers=options.workers,
    ) as synth:
        label_map = _label_map(options, synth.manifest.labels)
        if not options.quiet:
            print(f"model {synth.manifest.name}, backend {synth.backend}", file=sys.stderr)
        if options.dry_run:
            return _dry_run(synth, cases, label_map, options)
        return _run(synth, cases, label_map, options)


def _format_options(options: argparse.Namespace) -> FormatOptions:
    return FormatOptions(attach=options.attach, enhanced=options.enhanced, segmentation=options.segmentation)


def _run(synth: Synthesizer, cases: Sequence[Case], label_map: Any, options: argparse.Namespace) -> int:
    ranges = Ranges(options.deform, options.rotate, options.scale, topology=not options.any_topology)
    if options.report is not None:
        check_writable(options.report.parent)
    summary = Summary(synth, options.seed, len(cases) * (options.variants or 1), quiet=options.quiet)
    try:
        for result in synthesize(
            synth, cases, options.output, format=options.format, options=_format_options(options), variants=options.variants, ranges=ranges,
            seed=options.seed, labels=label_map, resume=options.resume, on_slice=summary.painting,
        ):  # fmt: skip
            summary.add(result)
            for warning in result.warnings:
                print(f"warning: {warning}", file=sys.stderr)
            if result.error is not None:
                print(f"error: {result.error}", file=sys.stderr)
    finally:  # what was done is told also of a run that was stopped
        if options.report is not None:
            write_json(options.report, summary.to_json())
    summary.close()
    if not options.quiet:
        print(f"{summary} → {options.output}")
    return 1 if summary.failed else 0


def _dry_run(synth: Synthesizer, cases: Sequence[Case], label_map: Any, options: argparse.Namespace) -> int:
    failed, writer = 0, FORMATS[options.format](_format_options(options))
    writer.check(synth.manifest, options.output)
    for case in cases:
        try:
            volume = read_case(case, synth.manifest.labels, label_map)
            writer.check_mask(volume)
        except InputError as exc:
            failed += 1
            print(f"error: {exc}", file=sys.stderr)
            continue
        depth, height, width = volume.labels.shape
        grid = synth.grid(volume)
        spacing = " x ".join(f"{s:.3g}" for s in volume.geometry.spacing)
        if not options.quiet:
            print(
                f"{printable(case.called)}: {width} x {height} x {depth} voxels of {spacing} mm, "
                f"{grid.count} slices on a canvas of {grid.size[0]} x {grid.size[1]}"
            )
    return 1 if failed else 0


def _label_map(options: argparse.Namespace, table: LabelTable) -> LabelMap | None:
    """--labels as a map; what a preset loses is said."""
    if options.labels is None:
        return None
    if options.labels in PRESETS and (without := lost(options.labels, table)):
        print(f"warning: the model has no label for {', '.join(without)} of {options.labels}: they become background", file=sys.stderr)
    return load_map(options.labels, table)


def _labels(options: argparse.Namespace) -> int:
    table = MM_WHS if options.model is None else Manifest.load(options.model).labels
    label_map, code = _label_map(options, table), 0
    cases = _find(options, options.file)
    for case in cases:
        if len(cases) > 1:
            print(f"{printable(case.called)}")
        try:
            code = max(code, _print_labels(case, table, label_map))
        except InputError as exc:
            code = 1
            print(f"error: {exc}", file=sys.stderr)
    return code


def _print_labels(case: Case, table: LabelTable, label_map: LabelMap | None) -> int:
    """What one mask holds and how it would map; 1 when something would not."""
    import numpy as np

    mask = read_mask(case)
    for note in mask.notes:
        print(f"warning: {note}", file=sys.stderr)
    counts = count(mask, case.called)
    millilitres = float(np.prod(mask.geometry.spacing)) / 1000
    print(f"{'value':>7} {'voxels':>11} {'ml':>10}  {'maps to':<24}  name and code")
    unknown = 0
    for segment, voxels in counts:
        index = match(segment, table, label_map)
        if index is None and mask.segments and segment.number == 0:
            index = 0
        unknown += index is None
        known = "UNKNOWN" if index is None else table.labels[index].name
        print(f"{segment.number:>7} {voxels:>11} {voxels * millilitres:>10.1f}  {known:<24}  {segment.name} {segment.code}".rstrip())
    if unknown:
        print(f"{unknown} unknown: synth needs --labels MAP.json, {MAP_HELP}; the table knows {table}")
    return 1 if unknown else 0


def _describe(options: argparse.Namespace) -> int:
    print(describe(Manifest.load(options.model), options.model))
    return 0


def entry() -> int:
    """The console script."""
    return run(main)


if __name__ == "__main__":
    sys.exit(entry())
