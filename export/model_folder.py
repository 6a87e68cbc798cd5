"""The model folder: graphs, parity report, manifest and model card, all or none."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.core.atomic_files import (
    atomic_folder,
    remove_orphans,
    sha256_of,
    write_json,
    write_text,
)
from runtime.core.errors import ParityError
from runtime.core.layout_model import LAYOUT_FILE, LAYOUT_KIND, LayoutModel
from runtime.core.manifest import MANIFEST, Manifest, ModelFile
from runtime.engines.registry import BACKENDS
from train.checkpoint import TrainedRun, load_layouts
from train.config import modality

from . import error_localization, parity
from .graph import LabelsToIntensity, fuse_batch_norm, to_fp16
from .model_card import CARD, model_card
from .quantize import candidates
from .to_onnx import to_onnx
from .weight_reconstruction import ASYMMETRIC, SYMMETRIC

Say = Callable[[str], None]
# Slices of the training masks: to calibrate INT8 on, and to choose its layers by.
CALIBRATION_SLICES, TRIAL_SLICES = 32, 16
# The most slices, and their pixels, to reconstruct INT8 weights on; all are in memory at once. They
# are of other masks than those by which layers are chosen.
FIT_SLICES, FIT_PIXELS = 48, 48 << 16
# The share of INT8's limits that a choice of layers must keep on training masks, because the parity
# check has other masks.
MARGIN = 0.85
FILES = {
    "fp32": "model.onnx",
    "fp16": "model.fp16.onnx",
    "int8": "model.int8.onnx",  # for CPUs
    "int8-gpu": "model.int8-gpu.onnx",  # the form that TensorRT takes
}
STEPS = {"int8": ASYMMETRIC, "int8-gpu": SYMMETRIC}


def describe_file(path: Path, kind: str, precision: str) -> ModelFile:
    """The manifest's entry of a file.

    Args:
        path: The file.
        kind: "onnx", "engine" or "layers".
        precision: One of `FILES`.

    Returns:
        The entry, with size and SHA-256.
    """
    return ModelFile(kind, precision, path.stat().st_size, sha256_of(path))


def write_model(
    run: TrainedRun,
    graph: LabelsToIntensity,
    masks: NDArray[np.uint8],
    training_masks: NDArray[np.uint8] | None,
    folder: Path,
    *,
    say: Say,
    int8_gpu: bool = False,
) -> Manifest:
    """Export `graph` in FP32, FP16 and INT8, validate each in every engine that is installed.

    The folder is written as a whole: after an error it is what it was before.

    Args:
        run: The run's facts and weights.
        graph: The trained network.
        masks: uint8 (n, Z, H, W) of held-out slices, to validate on.
        training_masks: uint8 (n, Z, H, W) of the training set, to calibrate INT8 on. None: the run
            has none, and `masks` serve.
        folder: The model folder to write.
        say: Prints a line of progress.
        int8_gpu: Write INT8 in the form that TensorRT takes, too.

    Returns:
        The manifest that was written.

    Raises:
        ParityError: A file differs too much from the network, or does not run.
    """
    manifest = Manifest(
        name=str(run.data["name"]),
        labels=run.labels,
        grid=run.grid,
        intensity=run.intensity,
        style=run.style,
        noise=run.noise,
        files={},
        training=provenance(run),
        license=str(run.data.get("license", "")),
        modality=modality(run.config),
        context=run.context,
        noise_along_z=run.config.generator.noise_along_z,
    )
    network = fuse_batch_norm(graph)
    if folder.parent.is_dir():
        remove_orphans(folder.parent)  # of exports that were killed
    with atomic_folder(folder) as part:
        references_by_name = parity.references(graph, manifest, masks)
        say(
            f"validating on {len(references_by_name[parity.ON_MASKS].values)} held-out slices"
            f" ({len(masks)} different masks) and {parity.RANDOM_SLICES} of random labels"
        )
        files: dict[str, ModelFile] = {}
        parity_reports: dict[str, Any] = {}

        def add(precision: str) -> None:
            path = part / FILES[precision]
            parity_reports[path.name] = validate(
                graph, path, precision, manifest, references_by_name, say
            )
            files[path.name] = describe_file(path, "onnx", precision)

        to_onnx(network, manifest, part / FILES["fp32"])
        add("fp32")
        to_onnx(to_fp16(network), manifest, part / FILES["fp16"])
        add("fp16")
        notes = {}
        for precision in ("int8", *(["int8-gpu"] if int8_gpu else [])):
            notes[precision], parity_report = write_int8(
                graph,
                part,
                manifest,
                masks if training_masks is None else training_masks,
                references_by_name,
                say,
                precision,
            )
            if parity_report is None:
                continue
            notes[precision]["calibrated_on"] = (
                "validation masks" if training_masks is None else "training masks"
            )
            path = part / FILES[precision]
            parity_reports[path.name] = parity_report
            files[path.name] = describe_file(path, "onnx", precision)
        if (layouts := copy_layouts(run, part, manifest)) is not None:
            files[LAYOUT_FILE] = layouts
            say(f"  {LAYOUT_FILE}: tissues around masks that come alone")
        final = Manifest(
            **{
                **vars(manifest),
                "files": files,
                "parity": parity_reports,
                "export": {**versions(), **notes},
            }
        )
        write_json(part / MANIFEST, final.to_json())
        write_text(part / CARD, model_card(final))
    return final


def copy_layouts(run: TrainedRun, folder: Path, manifest: Manifest) -> ModelFile | None:
    """Copy a run's learned layouts into a model folder, once they are checked.

    Args:
        run: The run.
        folder: The model folder.
        manifest: The model's manifest.

    Returns:
        The manifest's entry; None for a run without layouts.

    Raises:
        ModelError: The file is missing, altered, or for other labels.
    """
    source = load_layouts(run)
    if source is None:
        return None
    LayoutModel.load(source, len(manifest.labels), manifest.classes)
    path = folder / LAYOUT_FILE
    path.write_bytes(source.read_bytes())
    return describe_file(path, LAYOUT_KIND, "fp32")


def validate(
    graph: LabelsToIntensity,
    path: Path,
    precision: str,
    manifest: Manifest,
    references_by_name: Mapping[str, parity.Reference],
    say: Say,
) -> dict[str, Any]:
    """The parity report of an ONNX file, from every installed backend that runs it.

    Args:
        graph: The network that the file was exported from.
        path: The ONNX file.
        precision: One of `FILES`.
        manifest: The model's manifest.
        references_by_name: The reference outputs.
        say: Prints a line of progress.

    Returns:
        The report of each backend, as JSON data.

    Raises:
        ParityError: The file differs too much; it names the backend and the stage of the network.
    """
    try:
        return _validate(path, precision, manifest, references_by_name, say)
    except parity.Exceeded as exc:
        rows = localized(graph, path, precision, references_by_name).splitlines()
        raise ParityError(exc.fact, rows=rows, expected=exc.expected, remedy=exc.remedy) from exc


def localized(
    graph: LabelsToIntensity,
    path: Path,
    precision: str,
    references_by_name: Mapping[str, parity.Reference],
) -> str:
    """A table for a person that shows in which stage of the network the file goes wrong.

    Args:
        graph: The network that the file was exported from.
        path: The ONNX file.
        precision: One of `FILES`.
        references_by_name: The reference outputs.

    Returns:
        Lines of text.
    """
    return error_localization.table(
        error_localization.stage_errors(graph, path, references_by_name[parity.ON_MASKS].inputs),
        precision,
    )


def _validate(
    path: Path,
    precision: str,
    manifest: Manifest,
    references_by_name: Mapping[str, parity.Reference],
    say: Say,
) -> dict[str, Any]:
    parity_report = {}
    for backend in (b for b in BACKENDS if b.file == ("onnx", precision)):
        if why := backend.uninstalled():
            say(f"  {path.name} is not validated in {backend.name}: {why}")
            continue
        parity_report[backend.name] = parity.check_parity(
            path, precision, backend, manifest, references_by_name
        )
        say("  " + line(path.name, parity_report[backend.name], manifest.intensity.unit))
    return parity_report


def line(file: str, parity_report: Mapping[str, Any], unit: str) -> str:
    """One file in one engine, in a line for a person.

    Args:
        file: The file's name.
        parity_report: What `parity.check_parity` returned.
        unit: The unit of the intensities, such as "HU".

    Returns:
        The line.
    """
    n = parity_report[parity.ON_MASKS]
    organs = max((abs(shift) for shift in n["organs"].values() if shift is not None), default=0)
    body = "" if n["body_mean"] is None else f", body mean {n['body_mean']:.3g}"
    return (
        f"{file} in {parity_report['engine']}: mean {n['mean']:.3g}, p99.9 {n['p99_9']:g}, max"
        f" {n['max']}{body}, organ medians within {organs:g} {unit}, 1 - SSIM {n['dssim']:.2g},"
        f" {parity_report['slices_per_second']:.0f} slices/s"
    )


def write_int8(
    graph: LabelsToIntensity,
    part: Path,
    manifest: Manifest,
    masks: NDArray[np.uint8],
    references_by_name: Mapping[str, parity.Reference],
    say: Say,
    precision: str = "int8",
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Write the INT8 graph with as many INT8 layers as the limits allow.

    Layers are chosen on training masks; the parity check on the reference outputs decides.

    Args:
        graph: The trained network.
        part: The folder that holds the FP32 graph.
        manifest: The model's manifest.
        masks: uint8 (n, Z, H, W), to calibrate, to fit and to choose on.
        references_by_name: The reference outputs.
        say: Prints a line of progress.
        precision: "int8" for CPUs, "int8-gpu" in the form that TensorRT takes.

    Returns:
        How it was quantized, as JSON data ("layers" is 0 where none may be), and its parity report.

    Raises:
        ParityError: A backend cannot run it.
    """
    picked = spread(len(masks), CALIBRATION_SLICES)
    tried_on = picked[:: CALIBRATION_SLICES // TRIAL_SLICES]
    truth = parity.reference(
        graph,
        parity.draw_inputs(
            manifest.inputs,
            parity.repeated(masks[tried_on], TRIAL_SLICES, manifest.inputs),
            seed=3,
            context=manifest.context,
        ),
    )
    # The slices that layers are fitted on do not show how good the fit is.
    not_tried_on = np.setdiff1d(np.arange(len(masks)), tried_on)
    fitted_on = not_tried_on if len(not_tried_on) else picked
    most = max(1, min(FIT_SLICES, FIT_PIXELS // masks[0, 0].size))
    fit_masks = masks[fitted_on[spread(len(fitted_on), min(most, len(fitted_on)))]]
    fit_on = parity.draw_inputs(manifest.inputs, fit_masks, seed=2, context=manifest.context)
    backend = next(b for b in BACKENDS if b.file == ("onnx", precision) and not b.uninstalled())

    def measure(path: Path) -> dict[str, Any]:
        engine = backend.open(path, manifest)
        try:
            return parity.error_metrics(truth, parity.run_engine(engine, truth.inputs)[0], manifest)
        finally:
            engine.close()

    path, fp32, count = part / FILES[precision], part / FILES["fp32"], 0
    inputs = parity.draw_inputs(manifest.inputs, masks[picked], seed=1, context=manifest.context)
    for candidate in candidates(
        fp32,
        path,
        inputs,
        fuse_batch_norm(graph),
        fit_on,
        lambda path: float(measure(path)["mean"]),
        say,
        STEPS[precision],
    ):
        count = candidate.layers
        if any(
            value > MARGIN * limit
            for value, limit in parity.limit_violations(precision, measure(path)).values()
        ):
            continue
        layers = count - len(candidate.floating)
        share = path.stat().st_size / fp32.stat().st_size
        say(
            f"  {path.name}: {layers} of {count} layers in INT8, {100 * share:.1f} % of"
            f" {fp32.name}'s size"
        )
        try:
            return {"layers": layers, "of": count, "floating": list(candidate.floating)}, _validate(
                path, precision, manifest, references_by_name, say
            )
        except parity.Exceeded as exc:
            say(f"  not taken: {exc.fact}\n{localized(graph, path, precision, references_by_name)}")
    path.unlink()
    say(
        f"  {path.name} is left out: no layer can be quantized within {parity.LIMITS[precision]}"
        f" {manifest.intensity.unit}"
    )
    return {"layers": 0, "of": count, "floating": []}, None


def spread(count: int, most: int) -> NDArray[np.intp]:
    """Pick masks evenly, from the first patient's to the last one's.

    Args:
        count: How many masks there are.
        most: How many to pick; some come twice where there are fewer.

    Returns:
        Indices (most,).
    """
    return np.linspace(0, count - 1, most).round().astype(int)


def versions() -> dict[str, str]:
    """The versions of the software that writes the files.

    Returns:
        Version by package, and Python's.
    """
    from importlib.metadata import version

    names = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def provenance(run: TrainedRun) -> Mapping[str, Any]:
    """What the manifest says of the training: no path, no patient's name.

    Args:
        run: The run.

    Returns:
        JSON data.
    """
    keys = ("step", "metrics", "quality", "verdict", "data", "versions", "commit")
    return {
        "weights_sha256": run.data["weights"]["sha256"],
        **{key: run.data[key] for key in keys if key in run.data},
        # Outputs are in percentiles of an image then, not in its scanner's unit.
        **({"normalize": "volume"} if run.config.data.normalize == "volume" else {}),
    }
