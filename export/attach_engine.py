"""Add a TensorRT engine to a model folder whose graphs are validated.

The engine is built, its FP16 layers are counted, it is validated, and only then listed. An engine
of TensorRT for RTX that is built where there is no GPU is listed without a validation, and no
backend chooses it by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.core.atomic_files import atomic_file, sha256_of, write_json, write_text
from runtime.core.console import Progress
from runtime.core.errors import MissingComponent, ModelError
from runtime.core.manifest import MANIFEST, Manifest, ModelFile
from runtime.engines.gpu.probe import Device
from runtime.engines.gpu.tensorrt import collecting_logger
from runtime.engines.gpu.tensorrt_rtx import COMPUTE_CAPABILITIES, written
from runtime.engines.registry import BACKENDS

from .model_card import CARD, model_card
from .precision_audit import Inspection, half_convolutions, half_weights, inspect_plan, require_half
from .to_tensorrt import (
    CLASSIC,
    FOR_RTX,
    BuildOptions,
    Built,
    OnProgress,
    Target,
    build,
    shapes_of,
)

if TYPE_CHECKING:  # a GPU machine that has neither torch nor scipy can build too
    from .graph import LabelsToIntensity

ParityCheck = Callable[[Manifest], Mapping[str, Any]]
CAPABILITIES = tuple(map(written, COMPUTE_CAPABILITIES))  # "8.9" …


def add_engine(
    folder: Path,
    options: BuildOptions,
    check_parity: ParityCheck | None,
    *,
    gpu: Device | None,
    say: Callable[[str], None],
    target: Target = CLASSIC,
    quiet: bool = False,
    trt: Any = None,
) -> Manifest:
    """Build the graph of a precision, write the engine and its layers, and list both.

    The manifest is written last: until then, and after any error, the folder is the validated ONNX
    model that it was, without an engine.

    Args:
        folder: The model folder.
        options: How to build the engine.
        check_parity: Runs the engine beside FP32 PyTorch; returns its report in the form of
            `Manifest.parity`, or raises. None: there is no GPU to run it on.
        gpu: The GPU that the engine is built on; None where the target needs none.
        say: Prints a line of progress.
        target: What to build for.
        quiet: No progress bars.
        trt: The builder's module (default: import it).

    Returns:
        The manifest that was written.

    Raises:
        ModelError: The folder holds no graph of that precision.
        BuildError: TensorRT refuses the graph, or too few convolutions are FP16.
    """
    trt = trt or target.load()
    before = _without_engine(folder, target)
    # TensorRT takes another form of INT8 than CPUs do
    name = before.file_of("onnx", "int8-gpu" if options.precision == "int8" else options.precision)
    if name is None:
        raise ModelError(
            f"{folder} holds no {options.precision} graph",
            expected="the graphs that the export writes before it builds an engine",
            remedy="export the run again; where INT8 left the limits, choose another --precision",
            file=folder,
        )
    before.verify(folder, [name])
    onnx, half = folder / name, options.precision == "fp16"
    if half:
        require_half(half_weights(onnx), "its weights", onnx)
    gpus = gpu if target.needs_gpu else f"compute capabilities {', '.join(CAPABILITIES)}"
    builder = f"{target.library.title} {trt.__version__}"
    say(f"building {target.file} from {name} with {builder} for {gpus}")
    built = build(
        onnx,
        shapes_of(before, options.max_batch),
        options,
        target=target,
        trt=trt,
        on_progress=progress(quiet),
    )
    for note in built.notes:
        say(f"  {note}")
    if half:
        require_half(built.layers.half, "the convolutions TensorRT parsed", onnx)
    inspection = Inspection(reason=f"{target.library.title} is inspected on a GPU alone")
    if target.needs_gpu:
        inspection = inspect_plan(
            trt, built.plan, built.profile, native=options.native, logger=collecting_logger(trt, [])
        )
    facts = facts_of(before, name, built, options, inspection, gpu, target)
    if half and facts.get("convolutions"):
        require_half(
            facts["half_convolutions"] / facts["convolutions"],
            "the built engine's convolutions",
            onnx,
        )
    try:
        with atomic_file(folder / target.file) as handle:
            handle.write(built.plan)
        write_json(
            folder / target.layers,
            {
                "network": built.layers.to_json(),
                "engine": inspection.information,
                "reason": inspection.reason,
            },
        )
        listed = {
            target.file: _describe(folder / target.file, target.kind, options.precision, facts),
            target.layers: _describe(folder / target.layers, "layers", options.precision, {}),
        }
        manifest = replace(before, files={**before.files, **listed})
        if check_parity is not None:
            say(f"validating {target.file} on the GPU")
            report = check_parity(manifest)
            manifest = replace(manifest, parity={**manifest.parity, target.file: report})
        write_json(folder / MANIFEST, manifest.to_json())
    except BaseException:
        for file in (target.file, target.layers):
            (folder / file).unlink(missing_ok=True)
        raise
    write_text(folder / CARD, model_card(manifest))
    return manifest


def _without_engine(folder: Path, target: Target) -> Manifest:
    """The folder's manifest without its engine, which is no longer listed during a build."""
    manifest = Manifest.load(folder)
    names = (target.file, target.layers)
    files = {name: file for name, file in manifest.files.items() if name not in names}
    if len(files) == len(manifest.files):
        return manifest
    parity = {name: report for name, report in manifest.parity.items() if name not in names}
    manifest = replace(manifest, files=files, parity=parity)
    write_json(folder / MANIFEST, manifest.to_json())
    write_text(folder / CARD, model_card(manifest))
    return manifest


def parity_checker(
    graph: LabelsToIntensity,
    masks: NDArray[np.uint8],
    folder: Path,
    precision: str,
    target: Target = CLASSIC,
) -> ParityCheck:
    """The parity check of an engine, run through the runtime as the hospital will.

    Args:
        graph: The trained network, FP32.
        masks: uint8 (n, Z, H, W) of held-out slices, the same that the ONNX graphs were validated
            on.
        folder: The model folder.
        precision: "fp16", "fp32" or "int8".
        target: What the engine is built for.

    Returns:
        A function of the manifest that returns the report. It raises `ParityError` where the engine
        differs too much, `MissingComponent` where no runtime is installed.
    """
    from . import parity

    def check_parity(manifest: Manifest) -> Mapping[str, Any]:
        name = f"{target.backend}-int8" if precision == "int8" else target.backend
        backend = next(b for b in BACKENDS if b.name == name)
        if why := backend.uninstalled():
            raise MissingComponent(
                f"{target.file} cannot be validated: {why}",
                expected="the runtime that will run it",
                remedy=target.install,
            )
        return {
            backend.name: parity.check_parity(
                folder / target.file,
                precision,
                backend,
                manifest,
                parity.references(graph, manifest, masks),
            )
        }

    return check_parity


def facts_of(
    manifest: Manifest,
    onnx: str,
    built: Built,
    options: BuildOptions,
    inspection: Inspection,
    gpu: Device | None,
    target: Target = CLASSIC,
) -> dict[str, Any]:
    """What the manifest says of the engine.

    With it, whoever loads the engine can tell, before TensorRT does, whether it will run.

    Args:
        manifest: The folder's manifest.
        onnx: The name of the graph that the engine was built from.
        built: The engine.
        options: How it was built.
        inspection: What the engine says of itself.
        gpu: The GPU that it was built on; None where the target needs none.
        target: What it was built for.

    Returns:
        JSON data.
    """
    facts: dict[str, Any] = {
        **_tied_to(built, options, gpu, target),
        "profiles": [
            {
                name: dict(zip(("min", "opt", "max"), map(list, shapes), strict=True))
                for name, shapes in built.profile.items()
            }
        ],
        "device_memory": None if inspection.activations is None else list(inspection.activations),
        "workspace": options.workspace,
        "onnx_sha256": manifest.files[onnx].sha256,
        # the share of the convolutions in the network that TensorRT parsed
        "half_network": round(built.layers.half, 4),
    }
    if inspection.information is not None:
        facts["half_convolutions"], facts["convolutions"] = half_convolutions(
            inspection.information
        )
    if inspection.reason:
        facts["not_inspected"] = inspection.reason
    return facts


def _tied_to(
    built: Built, options: BuildOptions, gpu: Device | None, target: Target
) -> dict[str, Any]:
    """The library and the GPUs that load the engine."""
    if target is FOR_RTX:
        return {"tensorrt_rtx": built.version, "compute_capabilities": list(CAPABILITIES)}
    assert gpu is not None, "this target is built on a GPU"
    return {
        "tensorrt": built.version,
        "gpu": gpu.name,
        "compute_capability": list(gpu.compute_capability),
        "hardware": options.hardware,
        "version_compatible": not options.native,
    }


def progress(quiet: bool) -> OnProgress:
    """A progress line for each phase of a build.

    Args:
        quiet: Print nothing.

    Returns:
        A function of the phase, the steps done and the steps in all.
    """
    bars: dict[str, Progress] = {}

    def update(phase: str, step: int, steps: int) -> None:
        bar = bars.setdefault(phase, Progress(phase, steps, quiet=quiet))
        bar.update(step)
        if step >= steps:
            bars.pop(phase).close()

    return update


def _describe(path: Path, kind: str, precision: str, facts: Mapping[str, Any]) -> ModelFile:
    return ModelFile(kind, precision, path.stat().st_size, sha256_of(path), facts)
