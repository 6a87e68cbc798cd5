"""`mask2ct synth`: a CT for each mask, once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..batch.audit_log import AuditTrail
from ..batch.model_router import Models, named
from ..batch.plan import Plan, any_dicom
from ..batch.ray_runner import RaySynthesizer
from ..batch.runner import CaseResult, make
from ..batch.summary import Summary
from ..batch.warp_source import WARP, WarpSource
from ..core.atomic_files import check_writable, private, write_json
from ..core.console import EXIT_CODES
from ..core.errors import InputError, UsageError, printable
from ..core.volume import LabelVolume
from ..io.archive import exists
from ..io.cases import Case, listing, read_case
from .failures import Failures
from .options import (
    MASK_HELP,
    add_audit,
    add_engine,
    add_reading,
    add_results,
    add_verbose,
    choose,
    engine,
    find,
    introduce,
    open_models,
    plan_of,
    plans_by_model,
    synthesize_cases,
)
from .warp import add_warp, check_warp, warp_source

if TYPE_CHECKING:
    from ..batch.summary import Maker


def add(commands: Any) -> None:
    synth = commands.add_parser("synth", help="synthesize a CT for each mask", epilog=EXIT_CODES)
    synth.set_defaults(command=_synth)
    synth.add_argument("masks", nargs="+", type=Path, metavar="MASK", help=MASK_HELP)
    add_engine(synth, required=False)
    add_warp(synth)
    add_results(synth)
    add_reading(synth)
    synth.add_argument(
        "--resume",
        action="store_true",
        help="keep what the output folder's journal proves complete",
    )
    synth.add_argument(
        "--report", type=Path, metavar="FILE.json", help="write what became of each case"
    )
    add_audit(synth, "no such file")
    synth.add_argument(
        "--list", action="store_true", help="print the cases that were found and stop"
    )
    synth.add_argument(
        "--dry-run", action="store_true", help="check the model and every mask, write nothing"
    )
    add_verbose(synth)
    synth.add_argument("--quiet", action="store_true", help="print errors and warnings only")
    how = synth.add_argument_group("several processes or machines, by Ray; the result is the same")
    how.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="on workers: of this machine, or auto or HOST:PORT for a cluster's",
    )
    how.add_argument(
        "--ray-workers",
        type=int,
        metavar="N",
        help="how many (default: one a GPU, without any one for every --workers cores)",
    )
    how.add_argument(
        "--ray-gpus",
        type=float,
        metavar="F",
        help="GPUs of each, a fraction shares one (default: 1 where there are some)",
    )


def _synth(options: argparse.Namespace) -> int:
    _check(options)
    cases = find(options, options.masks, every=options.list)
    if options.list:
        missing = [case for case in cases if not exists(case.path)]
        print("\n".join(listing(case) for case in cases if case not in missing))
        for case in missing:
            print(f"error: {printable(case.path)} does not exist", file=sys.stderr)
        return 1 if missing else 0
    if options.warp is not None:
        return _warp(cases, options)
    if options.ray is not None and not options.dry_run:
        return _on_ray(cases, options)
    with open_models(options) as models:
        made = plans_by_model(options, models, options.output, resume=options.resume)
        if not options.quiet:
            introduce(models)
        if options.dry_run:
            return _dry_run(models, cases, made, options)
        summary = _summary(models, cases, options)
        results = synthesize_cases(
            models, cases, made, quiet=options.quiet, on_slice=summary.slice_done
        )
        return _run(summary, results, cases, options, models)


def _check(options: argparse.Namespace) -> None:
    """Raise `UsageError` for options that would have no effect beside the others."""
    check_warp(options)
    without = (
        ("dry_run", "report", "audit", "ray", "ray_workers", "ray_gpus")
        if options.list
        else ("report", "audit")
        if options.dry_run
        else ()
    )
    for name in without:
        if getattr(options, name) not in (None, False):
            what = "--list" if options.list else "--dry-run"
            raise UsageError(
                f"--{name.replace('_', '-')} has no effect beside {what}, which synthesizes"
                " nothing",
                expected="one of them",
                remedy="leave one out",
            )
    if options.ray is None and (options.ray_workers is not None or options.ray_gpus is not None):
        raise UsageError(
            "--ray-workers and --ray-gpus are for Ray",
            expected="--ray with them",
            remedy="add --ray, or leave them out",
        )


def _on_ray(cases: Sequence[Case], options: argparse.Namespace) -> int:
    (name, folder), *more = named(options.model).items()
    if more or options.rules or options.use:
        raise UsageError(
            "--ray takes one model, and nothing to choose it by",
            expected="one --model, without --use and --rules",
            remedy="run the command once for each model's masks",
        )
    how = {"address": options.ray, "count": options.ray_workers, "gpus": options.ray_gpus}
    with RaySynthesizer.open(folder, **how, **engine(options)) as synth:
        made = plan_of(options, options.output, synth.manifest.labels, resume=options.resume)
        if not options.quiet:
            introduce({name: synth})
        results = synth.make(cases, made)
        return _run(
            _summary({name: synth}, cases, options),
            ((result, name) for result in results),
            cases,
            options,
            {name: synth},
        )


def _warp(cases: Sequence[Case], options: argparse.Namespace) -> int:
    """`--warp`: real CTs, each deformed with its mask, and no model."""
    source, cases, made = warp_source(cases, options)
    if options.dry_run:
        return _dry_run_warp(source, cases, made, options)
    summary = _summary({WARP: source}, cases, options)
    results = make(source, cases, made, summary.slice_done)
    return _run(summary, ((result, WARP) for result in results), cases, options, {WARP: source})


def _summary(
    models: Mapping[str, Maker], cases: Sequence[Case], options: argparse.Namespace
) -> Summary:
    if options.report is not None:
        check_writable(options.report.parent)
    return Summary(models, options.seed, len(cases) * (options.variants or 1), quiet=options.quiet)


def _run(
    summary: Summary,
    results: Iterator[tuple[CaseResult, str]],
    cases: Sequence[Case],
    options: argparse.Namespace,
    models: Mapping[str, Maker],
) -> int:
    failures = Failures(verbose=options.verbose)
    try:
        # Ray says there what becomes of its workers
        with redirect_stdout(sys.stderr), AuditTrail(options.audit, "synth") as audit:
            audit.load(models)
            for result, model in results:
                audit.result(result, model, options.seed)
                summary.add(result, model)
                for warning in result.warnings:
                    print(f"warning: {printable(warning)}")
                if result.error is not None:
                    failures.add(result.error)
    finally:  # what was done is told also of a run that was stopped
        failures.close()
        if options.report is not None:
            with private(any_dicom(cases) and not options.shared):
                write_json(options.report, summary.to_json())
    summary.close()
    if not options.quiet:
        with suppress(BrokenPipeError):  # nobody reads it: the code counts
            print(printable(f"{summary} → {options.output}"))
    return failures.code


def _dry_run(
    models: Models, cases: Sequence[Case], plans: Mapping[str, Plan], options: argparse.Namespace
) -> int:
    for name, made in plans.items():
        made.writer.check(models[name].manifest, options.output)

    def checked(case: Case) -> tuple[LabelVolume, str]:
        name = choose(models, case, plans, quiet=options.quiet)
        synth = models[name]
        volume = read_case(case, synth.manifest.labels, plans[name].labels)
        plans[name].writer.check_mask(volume)
        grid = synth.grid(volume)
        return volume, f"{grid.count} slices on a canvas of {grid.size[0]} x {grid.size[1]}"

    return _tried(cases, checked, options)


def _dry_run_warp(
    source: WarpSource, cases: Sequence[Case], made: Plan, options: argparse.Namespace
) -> int:
    made.writer.check(source.manifest, options.output)

    def checked(case: Case) -> tuple[LabelVolume, str]:
        volume = read_case(case, source.manifest.labels, made.labels)
        made.writer.check_mask(volume)
        source.variants(case, volume, made.ranges, made.seed)
        return volume, "its CT is on the same grid"

    return _tried(cases, checked, options)


def _tried(
    cases: Sequence[Case],
    checked: Callable[[Case], tuple[LabelVolume, str]],
    options: argparse.Namespace,
) -> int:
    """Say of each case what `checked` says of it, or what is wrong with it."""
    failures = Failures(verbose=options.verbose)
    for case in cases:
        try:
            volume, said = checked(case)
        except InputError as exc:
            exc.file = exc.file or case.display_name
            failures.add(exc)
            continue
        depth, height, width = volume.labels.shape
        spacing = " x ".join(f"{s:.3g}" for s in volume.geometry.spacing)
        if not options.quiet:
            print(
                f"{printable(case.display_name)}: {width} x {height} x {depth} voxels of {spacing}"
                f" mm, {said}"
            )
    failures.close()
    return failures.code
