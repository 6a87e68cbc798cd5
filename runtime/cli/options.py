"""The options that several commands share, and what turns them into models, plans and cases."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..batch.model_router import RULES_HELP, Models, named
from ..batch.plan import Plan
from ..batch.ray_runner import RaySynthesizer
from ..batch.runner import CaseResult, make
from ..core.deformation import DeformationParams
from ..core.errors import InputError, UsageError, printable
from ..core.label_presets import class_names
from ..core.labels import MAP_HELP, MM_WHS, PRESETS, LabelMap, load_map, lost, names_of
from ..core.manifest import LabelTable, Manifest
from ..engines.memory import parse_bytes
from ..engines.registry import CHOICES
from ..io.case_finding import OWN, find_cases
from ..io.cases import Case, PassedOver, ReadOptions
from ..io.ct_source import CTSource
from ..io.dicom.files import LINKED, OUTSIDE
from ..io.readers.class_files import contradicted, is_class_name
from ..io.volume_files import SUFFIXES
from ..io.writers.registry import FORMATS, FormatOptions
from ..synthesizer import DEFAULT_BATCH, VolumeSynthesizer

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
        help="print each failed case in full (default: many failures become a table of reasons)",
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


def open_models(options: argparse.Namespace) -> Models:
    """Open the models that the options name.

    Args:
        options: Parsed options of `add_engine`.

    Returns:
        The models; the caller closes them.

    Raises:
        UsageError: For options or model folders that cannot be used.
        MissingComponent: When the engine's package or device is absent.
    """
    return Models.open(options.model, rules=options.rules, use=options.use, **engine(options))


def engine(options: argparse.Namespace) -> dict[str, Any]:
    """Turn the engine's options into keyword arguments.

    Args:
        options: Parsed options of `add_engine`.

    Returns:
        Keyword arguments of `Synthesizer.open` besides the models.

    Raises:
        UsageError: For fewer than one worker.
    """
    if options.workers is not None and options.workers < 1:
        raise UsageError(
            f"--workers is {options.workers}",
            expected="1 or more",
            remedy="leave it out for the default",
        )
    return {
        name: getattr(options, name)
        for name in ("backend", "batch", "max_memory", "device", "workers")
    }


def introduce(models: Mapping[str, VolumeSynthesizer | RaySynthesizer]) -> None:
    """Print the name and the backend of each model to standard error.

    Args:
        models: Open models by name.
    """
    for name, synth in models.items():
        display_name = f" {name}:" if len(models) > 1 else ""
        print(
            printable(f"model{display_name} {synth.manifest.name}, backend {synth.backend}"),
            file=sys.stderr,
        )


def choose(models: Models, case: Case, plans_by_model: Mapping[str, Plan], *, quiet: bool) -> str:
    """Choose the model of a case, and print the choice with its reason.

    Args:
        models: Open models.
        case: The case to be synthesized.
        plans_by_model: By model name, the plan whose label map applies.
        quiet: Whether to print nothing.

    Returns:
        The model's name.

    Raises:
        InputError: When no model fits the case, or more than one.
    """
    name, reason = models.decide(
        case, {name: plan_of.labels for name, plan_of in plans_by_model.items()}
    )
    if len(models) > 1 and not quiet:
        print(printable(f"{case.display_name.name}: {name} ({reason})"), file=sys.stderr)
    return name


def synthesize_cases(
    models: Models,
    cases: Sequence[Case],
    plans_by_model: Mapping[str, Plan],
    *,
    quiet: bool,
    on_slice: Callable[[int], None] | None = None,
    sources: Mapping[str, CTSource] | None = None,
) -> Iterator[tuple[CaseResult, str]]:
    """Synthesize each case with the model that fits it.

    Args:
        models: Open models.
        cases: The cases to be synthesized.
        plans_by_model: By model name, what to write for a mask.
        quiet: Whether to print nothing about the choice of models.
        on_slice: Called as slices are done, with their number.
        sources: By model name, what makes the CTs; None: the models.

    Yields:
        Each result with its model's name, which is empty where no model fits.
    """
    cases_by_model: dict[str, list[Case]] = {}
    for case in cases:
        try:
            name = choose(models, case, plans_by_model, quiet=quiet)
            cases_by_model.setdefault(name, []).append(case)
        except InputError as exc:
            yield CaseResult(case.name, case.display_name, None, error=exc), ""
    results_by_model = {
        name: make((sources or models)[name], model_cases, plans_by_model[name], on_slice)
        for name, model_cases in cases_by_model.items()
    }
    # One model after the other, so that a lack of memory makes none open twice.
    for name, results in results_by_model.items():
        for result in results:
            yield result, name


def plans_by_model(
    options: argparse.Namespace, models: Models, output: Path, *, resume: bool
) -> dict[str, Plan]:
    """Make the plan of each model. Of a label map for several models each takes its own entries.

    Args:
        options: Parsed options of `add_results` and `add_reading`.
        models: Open models.
        output: The folder that receives the results.
        resume: Whether to keep results that the journal lists as complete.

    Returns:
        Plans by model name.

    Raises:
        UsageError: For options that contradict each other, or a label map that cannot be used.
    """
    tables = [synth.manifest.labels for synth in models.values()]
    return {
        name: plan_of(options, output, synth.manifest.labels, tables, resume=resume)
        for name, synth in models.items()
    }


def plan_of(
    options: argparse.Namespace,
    output: Path,
    table: LabelTable,
    tables: Sequence[LabelTable] = (),
    *,
    resume: bool,
) -> Plan:
    """Make the plan of one model, and warn of labels that a preset loses.

    Args:
        options: Parsed options of `add_results` and `add_reading`.
        output: The folder that receives the results.
        table: The model's labels.
        tables: The labels of all models that share the label map.
        resume: Whether to keep results that the journal lists as complete.

    Returns:
        What to write for each mask.

    Raises:
        UsageError: For options that contradict each other, or a label map that cannot be used.
    """
    deformation = DeformationParams(
        options.deform,
        options.rotate,
        options.scale,
        topology=not options.any_topology,
        mirror=options.mirror,
    )
    if options.variants is None and deformation != DeformationParams():
        raise UsageError(
            "--deform, --rotate, --scale, --any-topology and --mirror change variants alone",
            expected="--variants K with them",
            remedy="add --variants, or leave them out",
        )
    format_options = FormatOptions(
        attach=options.attach, enhanced=options.enhanced, segmentation=options.segmentation
    )
    return Plan(
        output,
        format=options.format,
        options=format_options,
        variants=options.variants,
        ranges=deformation,
        seed=options.seed,
        labels=label_map(options, table, tables),
        resume=resume,
        shared=getattr(options, "shared", False),
    )


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
    for case in cases:
        if case.kind == "classes":
            print(
                f"{printable(case.display_name)}: {len(case.files)} binary files, one a class, are"
                f" read as one mask, {case.name}",
                file=sys.stderr,
            )
        elif case.kind == "volume" and is_class_name(case.path, structures):
            _refuse_contradicted(case, options)
            print(
                f"warning: {printable(case.display_name)} is called like a structure and read by"
                " its values; give the folder of all classes to read each by its name",
                file=sys.stderr,
            )
    _print_skipped(skipped, paths=every)
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


def _print_skipped(skipped: Sequence[PassedOver], *, paths: bool) -> None:
    """Warn of each file that mask2ct wrote, and of each kind of link and folder in one line.

    With `paths`, that line has full paths; else only names that cannot be a patient's.
    """
    paths_by_kind: dict[str, list[Path]] = {}
    for item in skipped:
        if item.what != OWN:
            paths_by_kind.setdefault(item.what, []).append(item.path)
            continue
        name = item.path.name if item.path.name.lower().endswith(SUFFIXES) else "a DICOM file"
        print(
            f"warning: {printable(name)} was written by mask2ct and is not taken for a mask (name"
            " it to have it)",
            file=sys.stderr,
        )
    for kind, places in paths_by_kind.items():
        printed = (
            places
            if paths
            else [Path(place.name) for place in places if place.name.lower().endswith(SUFFIXES)]
        )
        names = ", ".join(map(printable, printed[:12])) + (", …" if len(printed) > 12 else "")
        hint = "" if paths else " (--list shows where)"
        if kind in (LINKED, OUTSIDE):
            hint = " (give what a link leads to itself)"
        plural = "s" if len(places) > 1 else ""
        colon = ": " if printed else ""
        print(
            f"warning: {len(places)} {kind}{plural} not read{hint}{colon}{names}", file=sys.stderr
        )


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
