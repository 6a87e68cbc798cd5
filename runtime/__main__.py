"""`python -m runtime` and `mask2ct`: synth, labels, describe."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .console import EXIT_CODES, Progress, duration, run
from .contract import Manifest
from .describe import describe
from .engines.registry import CHOICES
from .errors import InputError, UsageError, printable
from .files import write_json
from .io.detect import Case, find_cases, read_case
from .io.formats import FORMATS
from .labels import MAP_HELP, MM_WHS, load_map, present_values
from .stream import CaseResult, check_writable, synthesize
from .synthesizer import DEFAULT_BATCH, Synthesizer
from .version import VERSION


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
    synth.add_argument("masks", nargs="+", type=Path, metavar="MASK", help="a NIfTI, NRRD or MHA label map, or a folder of them")
    synth.add_argument("--model", type=Path, required=True, help="a model folder, as export/build_engine.py writes it")
    synth.add_argument("--output", type=Path, required=True, help="the folder that receives CASE_ct.nii.gz")
    synth.add_argument("--format", choices=list(FORMATS), default="nifti", help="what to write (default: %(default)s)")
    synth.add_argument(
        "--backend",
        choices=CHOICES,
        default="auto",
        help="what runs the model (default: the fastest that is installed and proven for it; INT8 must be asked for)",
    )
    synth.add_argument("--variants", type=int, metavar="K", help="write K different CTs per mask, each with its mask")
    synth.add_argument("--seed", type=int, default=0, help="of all randomness (default: %(default)s)")
    synth.add_argument("--labels", type=Path, metavar="MAP.json", help=f"{MAP_HELP}")
    synth.add_argument(
        "--batch", type=int, default=DEFAULT_BATCH, metavar="N", help="slices held at once; the result is the same (default: %(default)s)"
    )
    synth.add_argument("--report", type=Path, metavar="FILE.json", help="write what became of each case")
    synth.add_argument("--list", action="store_true", help="print the cases that were found and stop")
    synth.add_argument("--dry-run", action="store_true", help="check the model and every mask, write nothing")
    synth.add_argument("--quiet", action="store_true", help="print errors and warnings only")

    labels = commands.add_parser("labels", help="what a mask holds and how it would map", epilog=EXIT_CODES)
    labels.set_defaults(command=_labels)
    labels.add_argument("file", type=Path)
    labels.add_argument("--model", type=Path, help="map to this model's labels (default: the MM-WHS table)")
    labels.add_argument("--labels", type=Path, metavar="MAP.json", help=MAP_HELP)

    describe = commands.add_parser("describe", help="what a model folder holds; checks every file", epilog=EXIT_CODES)
    describe.set_defaults(command=_describe)
    describe.add_argument("model", type=Path)
    return parser


def _synth(options: argparse.Namespace) -> int:
    if options.batch < 1:
        raise UsageError(f"--batch is {options.batch}", expected="1 or more", remedy="leave it out for the default")
    skipped: list[Path] = []
    cases = find_cases(options.masks, skipped)
    for path in skipped:
        print(f"warning: {path.name} was written by mask2ct and is not taken for a mask (name it to have it)", file=sys.stderr)
    if options.list:
        missing = [case for case in cases if not case.path.exists()]
        print("\n".join(printable(case.path) for case in cases if case not in missing))
        for case in missing:
            print(f"error: {printable(case.path)} does not exist", file=sys.stderr)
        return 1 if missing else 0
    with Synthesizer.open(options.model, backend=options.backend, batch=options.batch) as synth:
        label_map = None if options.labels is None else load_map(options.labels, synth.manifest.labels)
        if not options.quiet:
            print(f"model {synth.manifest.name}, backend {synth.backend}", file=sys.stderr)
        if options.dry_run:
            return _dry_run(synth, cases, label_map, options.quiet)
        return _run(synth, cases, label_map, options)


def _run(synth: Synthesizer, cases: Sequence[Case], label_map: Any, options: argparse.Namespace) -> int:
    started = time.perf_counter()
    if options.report is not None:
        check_writable(options.report.parent)
    progress = Progress("CTs", len(cases) * (options.variants or 1), quiet=options.quiet)
    results: list[CaseResult] = []
    try:
        for result in synthesize(
            synth, cases, options.output, format=options.format, variants=options.variants, seed=options.seed, labels=label_map,
            on_slice=lambda n: progress.update(len(results), f"{n} slices of the next"),
        ):  # fmt: skip
            results.append(result)
            progress.update(len(results), result.case)
            _say(result)
    finally:  # what was done is told also of a run that was stopped
        seconds = time.perf_counter() - started
        if options.report is not None:
            write_json(options.report, _report(synth, options, results, seconds))
    progress.close()
    slices, failed = sum(r.slices for r in results), [r for r in results if r.error]
    if not options.quiet:
        speed = f"{slices} slices in {duration(seconds)} ({slices / seconds:.1f} slices/s)"
        print(f"{len(results) - len(failed)} done, {len(failed)} failed, {speed} → {options.output}")
    return 1 if failed else 0


def _say(result: CaseResult) -> None:
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if result.error is not None:
        print(f"error: {result.error}", file=sys.stderr)


def _dry_run(synth: Synthesizer, cases: Sequence[Case], label_map: Any, quiet: bool) -> int:
    failed = 0
    for case in cases:
        try:
            volume = read_case(case, synth.manifest.labels, label_map)
        except InputError as exc:
            failed += 1
            print(f"error: {exc}", file=sys.stderr)
            continue
        depth, height, width = volume.labels.shape
        grid = synth.grid(volume)
        spacing = " x ".join(f"{s:.3g}" for s in volume.geometry.spacing)
        if not quiet:
            print(
                f"{printable(case.path)}: {width} x {height} x {depth} voxels of {spacing} mm, "
                f"{grid.count} slices on a canvas of {grid.size[0]} x {grid.size[1]}"
            )
    return 1 if failed else 0


def _report(synth: Synthesizer, options: argparse.Namespace, results: Sequence[CaseResult], seconds: float) -> dict[str, Any]:
    return {
        "version": VERSION,
        "model": synth.manifest.name,
        "model_files": {name: file.sha256 for name, file in synth.manifest.files.items()},
        "backend": synth.backend,
        "seed": options.seed,
        "seconds": round(seconds, 3),
        "cases": [
            {
                "case": r.case,
                "variant": r.variant,
                "files": [file.name for file in r.files],
                "slices": r.slices,
                "seconds": {stage: round(s, 4) for stage, s in r.seconds.items()},
                "warnings": list(r.warnings),
                "error": None if r.error is None else str(r.error),
            }
            for r in results
        ],
    }


def _labels(options: argparse.Namespace) -> int:
    import numpy as np

    from .io.nifti import as_integers, read_volume

    table = MM_WHS if options.model is None else Manifest.load(options.model).labels
    label_map = table.by_value if options.labels is None else load_map(options.labels, table)
    volume = read_volume(options.file)
    values = as_integers(volume.values, options.file)
    millilitres = float(np.prod(volume.geometry.spacing)) / 1000
    print(f"{'value':>7} {'voxels':>11} {'ml':>10}  maps to")
    unknown = 0
    for value in present_values(values):
        count = int(np.count_nonzero(values == value))
        index = label_map.get(value, label_map.get(None))  # type: ignore[call-overload]
        unknown += index is None
        print(f"{value:>7} {count:>11} {count * millilitres:>10.1f}  {'UNKNOWN' if index is None else table.labels[index].name}")
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
