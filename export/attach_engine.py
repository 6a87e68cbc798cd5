"""The engine joins a model folder whose graphs are written and validated: built, counted, run,
and only then listed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
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
from runtime.engines.registry import BACKENDS

from .model_card import CARD, model_card
from .precision_audit import Inspection, half_convolutions, half_weights, inspect_plan, require_half
from .to_tensorrt import INSTALL, BuildOptions, Built, OnProgress, build, shapes_of

if TYPE_CHECKING:  # a GPU machine that has neither torch nor scipy can build too
    from .graph import LabelsToIntensity

ENGINE, LAYERS = "model.engine", "model.engine.json"
ParityCheck = Callable[[Manifest], Mapping[str, Any]]


def add_engine(
    folder: Path,
    options: BuildOptions,
    check_parity: ParityCheck,
    *,
    gpu: Device,
    say: Callable[[str], None],
    quiet: bool = False,
    trt: Any = None,
) -> Manifest:
    """Build `folder`'s graph of that precision, write model.engine and model.engine.json, and list
    them in the manifest.

    `prove` runs the engine beside FP32 torch and returns its proof as `Manifest.parity` holds it,
    or raises. The manifest is written last: until then, and after any error, the folder is the
    validated ONNX model it was, without an engine.
    """
    trt = trt or import_module("tensorrt")
    before = _without_engine(folder)
    name = before.file_of("onnx", options.precision)
    if name is None:
        raise ModelError(
            f"{folder} holds no {options.precision} graph",
            expected="the graphs export writes before it builds",
            remedy="export the run again",
            file=folder,
        )
    before.verify(folder, [name])
    onnx, half = folder / name, options.precision == "fp16"
    if half:
        require_half(half_weights(onnx), "its weights", onnx)
    say(f"building {ENGINE} from {name} with TensorRT {trt.__version__} for {gpu}")
    built = build(
        onnx, shapes_of(before, options.max_batch), options, trt=trt, on_progress=progress(quiet)
    )
    for note in built.notes:
        say(f"  {note}")
    if half:
        require_half(built.layers.half, "the convolutions TensorRT parsed", onnx)
    inspection = inspect_plan(
        trt, built.plan, built.profile, native=options.native, logger=collecting_logger(trt, [])
    )
    facts = facts_of(before, name, built, options, inspection, gpu)
    if half and facts.get("convolutions"):
        require_half(
            facts["half_convolutions"] / facts["convolutions"],
            "the built engine's convolutions",
            onnx,
        )
    try:
        with atomic_file(folder / ENGINE) as handle:
            handle.write(built.plan)
        write_json(
            folder / LAYERS,
            {
                "network": built.layers.to_json(),
                "engine": inspection.information,
                "reason": inspection.reason,
            },
        )
        listed = {
            ENGINE: _describe(folder / ENGINE, "engine", options.precision, facts),
            LAYERS: _describe(folder / LAYERS, "layers", options.precision, {}),
        }
        whole = replace(before, files={**before.files, **listed})
        say(f"proving {ENGINE} on the GPU")
        whole = replace(whole, parity={**whole.parity, ENGINE: check_parity(whole)})
        write_json(folder / MANIFEST, whole.to_json())
    except BaseException:
        for file in (ENGINE, LAYERS):
            (folder / file).unlink(missing_ok=True)
        raise
    write_text(folder / CARD, model_card(whole))
    return whole


def _without_engine(folder: Path) -> Manifest:
    """The folder's manifest without its engine: an older engine is no longer listed while its
    successor is built.
    """
    found = Manifest.load(folder)
    kept = {name: file for name, file in found.files.items() if name not in (ENGINE, LAYERS)}
    if len(kept) == len(found.files):
        return found
    bare = replace(
        found,
        files=kept,
        parity={
            name: parity_report for name, parity_report in found.parity.items() if name != ENGINE
        },
    )
    write_json(folder / MANIFEST, bare.to_json())
    write_text(folder / CARD, model_card(bare))
    return bare


def parity_checker(
    graph: LabelsToIntensity, masks: NDArray[np.uint8], folder: Path, precision: str
) -> ParityCheck:
    """Runs the engine as the hospital will, through the runtime, on what the ONNX graphs were
    validated on. Raises `ParityError`.
    """
    from . import parity

    def check_parity(manifest: Manifest) -> Mapping[str, Any]:
        backend = next((b for b in BACKENDS if b.name == "tensorrt"), None)
        why = "this mask2ct has no TensorRT runtime" if backend is None else backend.uninstalled()
        if backend is None or why:
            raise MissingComponent(
                f"{ENGINE} cannot be validated: {why}",
                expected="the runtime that will run it",
                remedy=INSTALL,
            )
        return {
            backend.name: parity.check_parity(
                folder / ENGINE,
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
    gpu: Device,
) -> dict[str, Any]:
    """What the manifest says of the engine: whoever loads it can tell, before TensorRT does,
    whether it will.
    """
    facts: dict[str, Any] = {
        "tensorrt": built.version,
        "gpu": gpu.name,
        "compute_capability": list(gpu.compute_capability),
        "hardware": options.hardware,
        "version_compatible": not options.native,
        "profiles": [
            {
                name: dict(zip(("min", "opt", "max"), map(list, shapes), strict=True))
                for name, shapes in built.profile.items()
            }
        ],
        "device_memory": None if inspection.activations is None else list(inspection.activations),
        "workspace": options.workspace,
        "onnx_sha256": manifest.files[onnx].sha256,
        "half_network": round(
            built.layers.half, 4
        ),  # share of the convolutions in the network TensorRT parsed
    }
    if inspection.information is not None:
        facts["half_convolutions"], facts["convolutions"] = half_convolutions(
            inspection.information
        )
    if inspection.reason:
        facts["not_inspected"] = inspection.reason
    return facts


def progress(quiet: bool) -> OnProgress:
    """A progress line for each phase of a build."""
    bars: dict[str, Progress] = {}

    def tell(phase: str, done: int, steps: int) -> None:
        bar = bars.setdefault(phase, Progress(phase, steps, quiet=quiet))
        bar.update(done)
        if done >= steps:
            bars.pop(phase).close()

    return tell


def _describe(path: Path, kind: str, precision: str, facts: Mapping[str, Any]) -> ModelFile:
    return ModelFile(kind, precision, path.stat().st_size, sha256_of(path), facts)
