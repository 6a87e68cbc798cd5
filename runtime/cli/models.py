"""Turn the options of models and results into open models and plans, and synthesize cases."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..batch.model_router import Models
from ..batch.plan import Plan
from ..batch.ray_runner import RaySynthesizer
from ..batch.runner import CaseResult, make
from ..core.deformation import DeformationParams
from ..core.errors import InputError, UsageError, printable
from ..core.manifest import LabelTable
from ..io.cases import Case
from ..io.ct_source import CTSource
from ..io.writers.registry import FormatOptions
from ..synthesizer import VolumeSynthesizer
from .masks import label_map


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
        attach=options.attach,
        enhanced=options.enhanced,
        segmentation=options.segmentation,
        one_patient=options.one_patient,
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
