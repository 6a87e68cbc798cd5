"""What several commands share: their options, and what is made of them."""

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
from ..io.dicom.files import LINKED, OUTSIDE
from ..io.readers.class_files import contradicted, is_class_name
from ..io.volume_files import SUFFIXES
from ..io.writers.registry import FORMATS, FormatOptions
from ..synthesizer import DEFAULT_BATCH, VolumeSynthesizer

MASK_HELP = (
    "a NIfTI, NRRD or MHA label map, a DICOM SEG or RTSTRUCT, the slices of a DICOM label series,"
    " or a folder or zip of such"
)


def add_engine(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Which model, and what runs it: for every command that synthesizes."""
    parser.add_argument(
        "--model",
        action="append",
        required=required,
        metavar="[NAME=]FOLDER",
        help=(
            "a model folder, as export/build_engine.py writes it; more than one: each mask is"
            " synthesized by the one that knows its labels"
        ),
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--use", metavar="NAME", help="of several models, this one for every mask")
    which.add_argument(
        "--rules",
        type=Path,
        metavar="RULES.json",
        help=f"of several models, which one for which mask: {RULES_HELP}",
    )
    how = parser.add_argument_group("engine")
    how.add_argument(
        "--backend",
        choices=CHOICES,
        default="auto",
        help=(
            "what runs the model (default: the fastest that is installed and validated for it; INT8"
            " must be asked for)"
        ),
    )
    how.add_argument(
        "--batch",
        type=_batch,
        default=DEFAULT_BATCH,
        metavar="N",
        help=(
            "slices held at once; the result is the same (default: %(default)s). auto: on a GPU,"
            " synthesize as many together as fit"
        ),
    )
    how.add_argument(
        "--max-memory",
        type=parse_bytes,
        metavar="SIZE",
        help=(
            "of the GPU, 2GiB or bytes (default: what the engine needs); else of the host; of all"
            " models together"
        ),
    )
    how.add_argument(
        "--device",
        type=int,
        default=0,
        metavar="N",
        help="which GPU, in the driver's order (default: %(default)s)",
    )
    how.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help=(
            "slices synthesized at once on a CPU; the result is the same (default: one a core, up"
            " to 16)"
        ),
    )


def add_results(parser: argparse.ArgumentParser) -> None:
    """What is made of a mask, where to and how it is written: for every command that synthesizes
    into a folder.
    """
    parser.add_argument(
        "--output", type=Path, required=True, help="the folder that receives CASE_ct.nii.gz"
    )
    how = parser.add_argument_group("results")
    how.add_argument(
        "--format",
        choices=list(FORMATS),
        default="nifti",
        help="what to write (default: %(default)s)",
    )
    how.add_argument(
        "--shared",
        action="store_true",
        help="what is made of DICOM may be read as the umask says, and not by its owner alone",
    )
    add_making(how)


def add_making(how: argparse._ArgumentGroup) -> None:
    """What is made of a mask: for every command that synthesizes."""
    how.add_argument(
        "--attach",
        action="store_true",
        help="dicom: into the mask's own patient, study and frame of reference",
    )
    how.add_argument(
        "--enhanced",
        action="store_true",
        help="dicom: one multi-frame Enhanced CT and not a file a slice",
    )
    how.add_argument(
        "--segmentation",
        choices=("binary", "labelmap", "none"),
        default="binary",
        help="dicom: the SEG beside the series (default: %(default)s)",
    )
    how.add_argument(
        "--variants",
        type=int,
        metavar="K",
        help="write K different CTs per mask, each with its mask, deformed but for the first",
    )
    how.add_argument(
        "--deform",
        type=float,
        metavar="MM",
        default=DeformationParams.deform,
        help="of variants 1, 2 …: bend the mask by up to this (default: %(default)s)",
    )
    how.add_argument(
        "--rotate",
        type=float,
        metavar="DEGREES",
        default=DeformationParams.rotate,
        help="turn it about each axis (default: %(default)s)",
    )
    how.add_argument(
        "--scale",
        type=float,
        metavar="FRACTION",
        default=DeformationParams.scale,
        help="stretch it along each axis (default: %(default)s)",
    )
    how.add_argument(
        "--any-topology",
        action="store_true",
        help="also when a label falls apart, merges or vanishes by that",
    )
    how.add_argument(
        "--mirror",
        action="store_true",
        help="mirror some of them left to right; without it left stays left",
    )
    how.add_argument("--seed", type=int, default=0, help="of all randomness (default: %(default)s)")


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """For every command that ends with what failed."""
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="print each failed case in full (default: of many, a table of reasons)",
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """How a mask is read, for every command that reads masks."""
    how = parser.add_argument_group("reading masks")
    how.add_argument(
        "--labels", metavar="MAP.json|PRESET", help=f"{MAP_HELP}; or a preset: {', '.join(PRESETS)}"
    )
    how.add_argument(
        "--series",
        metavar="UID|NUMBER|NAME",
        help="which of several DICOM series in a folder is the mask",
    )
    how.add_argument(
        "--overlap-order",
        default="",
        metavar="NAME,NAME",
        help="which segment wins where several overlap, first one first",
    )
    how.add_argument(
        "--threshold",
        type=float,
        metavar="F",
        help="the fraction from which on a voxel of a FRACTIONAL segmentation is inside",
    )
    how.add_argument(
        "--like",
        type=Path,
        metavar="IMAGE",
        help="RTSTRUCT: a volume, or a DICOM series' folder, on whose grid contours are filled",
    )
    how.add_argument(
        "--allow-missing-references",
        action="store_true",
        help="fill contours on the series that is there, though it is not the one referred to",
    )
    how.add_argument(
        "--force-labels", action="store_true", help="read what looks like an image as a label map"
    )


def add_audit(parser: argparse.ArgumentParser, default: str) -> None:
    """Where it is noted what was made of what, by which model."""
    parser.add_argument(
        "--audit",
        type=Path,
        metavar="FILE.jsonl",
        help=(
            f"append what was made of which mask, by which model, a line each (default: {default})"
        ),
    )


def open_models(options: argparse.Namespace) -> Models:
    return Models.open(options.model, rules=options.rules, use=options.use, **engine(options))


def engine(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_engine` says besides the models, as `Synthesizer.open` takes it."""
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
    """Say which models there are and what runs each."""
    for name, synth in models.items():
        display_name = f" {name}:" if len(models) > 1 else ""
        print(
            printable(f"model{display_name} {synth.manifest.name}, backend {synth.backend}"),
            file=sys.stderr,
        )


def choose(models: Models, case: Case, plans_by_model: Mapping[str, Plan], *, quiet: bool) -> str:
    """The name of the model that the case is for; the choice is said with its reason.

    Raises `InputError`s.
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
) -> Iterator[tuple[CaseResult, str]]:
    """Synthesize each case by the model it is for: each result, with that model's name, empty
    where none fits.
    """
    chosen: dict[str, list[Case]] = {}
    for case in cases:
        try:
            chosen.setdefault(choose(models, case, plans_by_model, quiet=quiet), []).append(case)
        except InputError as exc:
            yield CaseResult(case.name, case.display_name, None, error=exc), ""
    checked = {
        name: make(models[name], those, plans_by_model[name], on_slice)
        for name, those in chosen.items()
    }
    for (
        name,
        results,
    ) in checked.items():  # one model after the other: none is opened twice for want of memory
        for result in results:
            yield result, name


def plans_by_model(
    options: argparse.Namespace, models: Models, output: Path, *, resume: bool
) -> dict[str, Plan]:
    """By model, `recipe`. A label map may be for several models: each takes its own entries."""
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
    """What `add_results` and --labels say. What a label preset loses is said."""
    ranges = DeformationParams(
        options.deform,
        options.rotate,
        options.scale,
        topology=not options.any_topology,
        mirror=options.mirror,
    )
    if options.variants is None and ranges != DeformationParams():
        raise UsageError(
            "--deform, --rotate, --scale, --any-topology and --mirror change variants alone",
            expected="--variants K with them",
            remedy="add --variants, or leave them out",
        )
    return Plan(
        output,
        options.format,
        FormatOptions(
            attach=options.attach, enhanced=options.enhanced, segmentation=options.segmentation
        ),
        options.variants,
        ranges,
        options.seed,
        label_map(options, table, tables),
        resume,
        shared=getattr(options, "shared", False),
    )


def find(
    options: argparse.Namespace, masks: Sequence[Path], *, every: bool = False, say: bool = True
) -> list[Case]:
    """The cases, read as the options say; what was passed over is said."""
    skipped: list[PassedOver] = []
    order = tuple(name.strip() for name in options.overlap_order.split(",") if name.strip())
    how = ReadOptions(
        order,
        options.threshold,
        options.like,
        options.allow_missing_references,
        options.force_labels,
    )
    known = _names(options)
    cases = find_cases(masks, skipped, options=how, series=options.series, every=every, names=known)
    for case in cases if say else ():
        if case.kind == "classes":
            print(
                f"{printable(case.display_name)}: {len(case.files)} binary files, one a class, are"
                f" read as one mask, {case.name}",
                file=sys.stderr,
            )
        elif case.kind == "volume" and is_class_name(case.path, known):
            _refuse_contradicted(case, options)
            print(
                f"warning: {printable(case.display_name)} is called like a structure and read by"
                " its values; give the folder of all classes to read each by its name",
                file=sys.stderr,
            )
    if say:
        _say_passed_over(skipped, paths=every)
    return cases


def _refuse_contradicted(case: Case, options: argparse.Namespace) -> None:
    """Raise `UsageError` for one class alone whose name is not what the preset calls its value."""
    if options.labels in PRESETS and (
        other := contradicted(case.path, class_names(options.labels))
    ):
        raise UsageError(
            f"{printable(case.display_name)} is called like a structure, and the preset"
            f" {options.labels} calls its value {other!r}",
            expected="a file whose values are those of the preset, or a folder of one file a class",
            remedy=(
                "give the folder of all classes, or a --labels MAP.json that says what the value is"
            ),
            file=case.display_name,
        )


def _names(options: argparse.Namespace) -> frozenset[str]:
    """What --labels and the models call structures."""
    models = (
        [options.model]
        if isinstance(options.model, Path)
        else [*named(options.model or ()).values()]
    )
    return names_of(options.labels, [Manifest.load(folder).labels for folder in models] or [MM_WHS])


def _say_passed_over(skipped: Sequence[PassedOver], *, paths: bool) -> None:
    """A line for each file that mask2ct wrote, and one for each kind of link and folder;
    `paths`: with theirs, for the screen.
    """
    others: dict[str, list[Path]] = {}
    for one in skipped:
        if one.what != OWN:
            others.setdefault(one.what, []).append(one.path)
            continue
        name = one.path.name if one.path.name.lower().endswith(SUFFIXES) else "a DICOM file"
        print(
            f"warning: {printable(name)} was written by mask2ct and is not taken for a mask (name"
            " it to have it)",
            file=sys.stderr,
        )
    for what, places in others.items():
        named = (
            places
            if paths
            else [Path(place.name) for place in places if place.name.lower().endswith(SUFFIXES)]
        )
        names = (
            f": {', '.join(map(printable, named[:12]))}{', …' if len(named) > 12 else ''}"
            if named
            else ""
        )
        hint = (
            " (give what a link leads to itself)"
            if what in (LINKED, OUTSIDE)
            else ""
            if paths
            else " (--list shows where)"
        )
        print(
            f"warning: {len(places)} {what}{'s' if len(places) > 1 else ''} not read{hint}{names}",
            file=sys.stderr,
        )


def label_map(
    options: argparse.Namespace, table: LabelTable, tables: Sequence[LabelTable] = ()
) -> LabelMap | None:
    """--labels as a map; what a preset loses is said."""
    if options.labels is None:
        return None
    if options.labels in PRESETS and (without := lost(options.labels, table)):
        names = printable(", ".join(without))
        print(
            f"warning: the model has no label for {names} of {options.labels}: they become"
            " background",
            file=sys.stderr,
        )
    return load_map(options.labels, table, tables)


def _batch(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(
            f"--batch is {text}",
            expected="1 or more, or auto",
            remedy="leave it out for the default",
        )
    return int(text)
