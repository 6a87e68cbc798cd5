"""`mask2ct synth`: synthesize a CT for each mask, then end."""

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
from ..core.console import epilog
from ..core.errors import InputError, UsageError, printable
from ..core.volume import LabelVolume
from ..io.archive import exists
from ..io.cases import Case, listing, read_case
from ..io.ct_source import CTSource
from .context import add_context, add_layout, apply_layout, check_context, with_context
from .failures import Failures, Warnings
from .intensity import add_intensity, apply_intensity, check_intensity
from .masks import find
from .models import (
    choose,
    engine,
    introduce,
    open_models,
    plan_of,
    plans_by_model,
    synthesize_cases,
)
from .options import (
    MASK_HELP,
    add_audit,
    add_engine,
    add_reading,
    add_results,
    add_verbose,
)
from .warp import add_warp, check_warp, warp_source

if TYPE_CHECKING:
    from ..batch.summary import Maker


def add(commands: Any) -> None:
    """Add `synth` to the command line.

    Args:
        commands: What argparse's `add_subparsers` returned.
    """
    synth = commands.add_parser(
        "synth",
        epilog=epilog(
            "mask2ct synth MASK --model MODEL --output OUT",
            "mask2ct synth MASKS --model MODEL --output OUT --variants 5 --resume",
            "mask2ct synth MASKS --model MODEL --output OUT --labels totalsegmentator",
            "mask2ct synth MASKS --warp IMAGES --output OUT",
        ),
    )
    synth.set_defaults(command=run_synth)
    synth.add_argument("masks", nargs="+", type=Path, metavar="MASK", help=MASK_HELP)
    add_engine(synth, required=False)
    add_warp(synth)
    add_context(synth)
    add_layout(synth)
    add_intensity(synth)
    add_results(synth)
    add_reading(synth)
    add_run(synth)
    group = synth.add_argument_group(
        "several processes or machines with Ray (the result is the same)"
    )
    group.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help=(
            "synthesize on Ray workers of this machine; with ADDRESS, auto or HOST:PORT, on those"
            " of a cluster"
        ),
    )
    group.add_argument(
        "--ray-workers",
        type=int,
        metavar="N",
        help="start N workers (default: one per GPU; without a GPU one per --workers cores)",
    )
    group.add_argument(
        "--ray-gpus",
        type=float,
        metavar="F",
        help="give each worker F GPUs; workers share one by a fraction (default: 1 if there are)",
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the options of one run over masks.

    Args:
        parser: Receives the options.
    """
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep results that the output folder's journal lists as complete",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE.json",
        help="write a report with the outcome of each case",
    )
    add_audit(parser, "no audit file")
    parser.add_argument("--list", action="store_true", help="print the cases, then stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the model and every mask, but write nothing"
    )
    add_verbose(parser)
    parser.add_argument("--quiet", action="store_true", help="print errors and warnings only")


def run_synth(options: argparse.Namespace) -> int:
    """Carry out `synth` or `warp`.

    Args:
        options: The parsed options of either.

    Returns:
        The exit code.
    """
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
        apply_intensity(models, options)
        apply_layout(models, options)
        sources, cases = with_context(models, cases, options)
        plans = plans_by_model(options, models, options.output, resume=options.resume)
        if not options.quiet:
            introduce(models)
        if options.dry_run:
            return _dry_run(models, cases, plans, options, sources)
        summary = _summary(models, cases, options)
        results = synthesize_cases(
            models,
            cases,
            plans,
            quiet=options.quiet,
            on_slice=summary.slice_done,
            sources=sources,
        )
        return _run(summary, results, cases, options, models)


def _check(options: argparse.Namespace) -> None:
    """Raise `UsageError` for options that have no effect together with the others."""
    check_warp(options)
    check_context(options)
    check_intensity(options)
    mode, without_effect = "", tuple[str, ...]()
    if options.list:
        mode = "--list"
        without_effect = ("dry_run", "report", "audit", "ray", "ray_workers", "ray_gpus")
    elif options.dry_run:
        mode, without_effect = "--dry-run", ("report", "audit")
    for name in without_effect:
        if getattr(options, name) not in (None, False):
            raise UsageError(
                f"--{name.replace('_', '-')} has no effect beside {mode}, which synthesizes"
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
    """Synthesize on Ray workers (`--ray`)."""
    (name, folder), *more_models = named(options.model).items()
    if more_models or options.rules or options.use:
        raise UsageError(
            "--ray takes one model, and no options that choose among several",
            expected="one --model, without --use and --rules",
            remedy="run the command once for each model's masks",
        )
    workers = {"address": options.ray, "count": options.ray_workers, "gpus": options.ray_gpus}
    with RaySynthesizer.open(folder, **workers, **engine(options)) as synth:
        plan = plan_of(options, options.output, synth.manifest.labels, resume=options.resume)
        if not options.quiet:
            introduce({name: synth})
        results = synth.make(cases, plan)
        return _run(
            _summary({name: synth}, cases, options),
            ((result, name) for result in results),
            cases,
            options,
            {name: synth},
        )


def _warp(cases: Sequence[Case], options: argparse.Namespace) -> int:
    """Deform real CTs with their masks, without a model (`--warp`)."""
    source, cases, plan = warp_source(cases, options)
    if options.dry_run:
        return _dry_run_warp(source, cases, plan, options)
    summary = _summary({WARP: source}, cases, options)
    results = make(source, cases, plan, summary.slice_done)
    return _run(summary, ((result, WARP) for result in results), cases, options, {WARP: source})


def _summary(
    models: Mapping[str, Maker], cases: Sequence[Case], options: argparse.Namespace
) -> Summary:
    """Start the summary, after a check that the report can be written."""
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
    """Consume the results, and print warnings, errors and the summary; return the exit code."""
    failures, warnings = Failures(verbose=options.verbose), Warnings(verbose=options.verbose)
    try:
        # Ray prints about its workers on standard output, which is for the summary alone.
        with redirect_stdout(sys.stderr), AuditTrail(options.audit, "synth") as audit:
            audit.load(models)
            for result, model in results:
                audit.result(result, model, options.seed)
                summary.add(result, model)
                for warning in result.warnings:
                    warnings.add(warning)
                if result.error is not None:
                    failures.add(result.error)
    finally:
        # A run that was stopped reports its results, too.
        warnings.close()
        failures.close()
        if options.report is not None:
            with private(any_dicom(cases) and not options.shared):
                write_json(options.report, summary.to_json())
    summary.close()
    if not options.quiet:
        # The exit code counts where nobody reads the summary.
        with suppress(BrokenPipeError):
            print(printable(f"{summary} → {options.output}"))
    return failures.code


def _dry_run(
    models: Models,
    cases: Sequence[Case],
    plans: Mapping[str, Plan],
    options: argparse.Namespace,
    sources: Mapping[str, CTSource],
) -> int:
    """Check every mask against its model, and its CT where there is one (`--dry-run`)."""
    for name, plan in plans.items():
        plan.writer.check(models[name].manifest, options.output)

    def check(case: Case) -> tuple[LabelVolume, str]:
        name = choose(models, case, plans, quiet=options.quiet)
        synth = models[name]
        volume = read_case(case, synth.manifest.labels, plans[name].labels)
        plans[name].writer.check_mask(volume)
        if options.context is not None:
            sources[name].variants(case, volume, plans[name].ranges, plans[name].seed)
        grid = synth.grid(volume)
        return volume, f"{grid.count} slices on a canvas of {grid.size[0]} x {grid.size[1]}"

    return _check_cases(cases, check, options)


def _dry_run_warp(
    source: WarpSource, cases: Sequence[Case], plan: Plan, options: argparse.Namespace
) -> int:
    """Check every mask against its CT (`--warp` with `--dry-run`)."""
    plan.writer.check(source.manifest, options.output)

    def check(case: Case) -> tuple[LabelVolume, str]:
        volume = read_case(case, source.manifest.labels, plan.labels)
        plan.writer.check_mask(volume)
        source.variants(case, volume, plan.ranges, plan.seed)
        return volume, "its CT is on the same grid"

    return _check_cases(cases, check, options)


def _check_cases(
    cases: Sequence[Case],
    check: Callable[[Case], tuple[LabelVolume, str]],
    options: argparse.Namespace,
) -> int:
    """Print the grid of each case with the note that `check` returns, or the case's error."""
    failures = Failures(verbose=options.verbose)
    for case in cases:
        try:
            volume, note = check(case)
        except InputError as exc:
            exc.file = exc.file or case.display_name
            failures.add(exc)
            continue
        depth, height, width = volume.labels.shape
        spacing = " x ".join(f"{s:.3g}" for s in volume.geometry.spacing)
        if not options.quiet:
            print(
                f"{printable(case.display_name)}: {width} x {height} x {depth} voxels of {spacing}"
                f" mm, {note}"
            )
    failures.close()
    return failures.code
