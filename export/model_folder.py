"""The model folder: graph files, their proof, the manifest and the model card, whole or absent."""

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
from runtime.core.manifest import MANIFEST, Manifest, ModelFile
from runtime.engines.registry import BACKENDS
from train.checkpoint import TrainedRun

from . import error_localization, parity
from .graph import LabelsToIntensity, fuse_batch_norm, to_fp16
from .model_card import CARD, model_card
from .quantize import candidates
from .to_onnx import to_onnx

Say = Callable[[str], None]
CALIBRATION_SLICES, TRIAL_SLICES = (
    32,
    16,
)  # of the training masks: to calibrate INT8 on, and to choose its layers by
FIT_SLICES, FIT_PIXELS = (
    48,
    48 << 16,
)  # at most, to fit its layers on, all held at once: masks by which they are not chosen
# of INT8's limits that its layers are chosen to keep on training masks: the proof's masks are
# others
MARGIN = 0.85
FILES = {"fp32": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}


def describe_file(path: Path, kind: str, precision: str) -> ModelFile:
    return ModelFile(kind, precision, path.stat().st_size, sha256_of(path))


def write_model(
    run: TrainedRun,
    graph: LabelsToIntensity,
    masks: NDArray[np.uint8],
    training_masks: NDArray[np.uint8] | None,
    folder: Path,
    *,
    say: Say,
) -> Manifest:
    """Export `graph` in FP32, FP16 and INT8, prove each in every engine that is here, write
    `folder`.

    `masks`: of held-out slices, uint8 (n, Z, H, W), to prove on; `training_masks`: of the training
    set, to calibrate INT8 on (None: a run that kept none; the held-out ones serve). Nothing is
    written, and a folder that was there stays as it was, when a proof fails (`ParityError`).
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
    )
    network = fuse_batch_norm(graph)
    if folder.parent.is_dir():
        remove_orphans(folder.parent)  # of exports that were killed
    with atomic_folder(folder) as part:
        references_by_name = parity.references(graph, manifest, masks)
        say(
            f"proving on {len(references_by_name[parity.ON_MASKS].values)} held-out slices"
            f" ({len(masks)} different masks) and {parity.RANDOM_SLICES} of random labels"
        )
        files: dict[str, ModelFile] = {}
        parity_reports: dict[str, Any] = {}

        def take(precision: str) -> None:
            path = part / FILES[precision]
            parity_reports[path.name] = validate(
                graph, path, precision, manifest, references_by_name, say
            )
            files[path.name] = describe_file(path, "onnx", precision)

        to_onnx(network, manifest, part / FILES["fp32"])
        take("fp32")
        to_onnx(to_fp16(network), manifest, part / FILES["fp16"])
        take("fp16")
        notes, parity_report = write_int8(
            graph,
            part,
            manifest,
            masks if training_masks is None else training_masks,
            references_by_name,
            say,
        )
        if parity_report is not None:
            notes["calibrated_on"] = (
                "validation masks" if training_masks is None else "training masks"
            )
            parity_reports[FILES["int8"]], files[FILES["int8"]] = (
                parity_report,
                describe_file(part / FILES["int8"], "onnx", "int8"),
            )
        whole = Manifest(
            **{
                **vars(manifest),
                "files": files,
                "parity": parity_reports,
                "export": {**versions(), "int8": notes},
            }
        )
        write_json(part / MANIFEST, whole.to_json())
        write_text(part / CARD, model_card(whole))
    return whole


def validate(
    graph: LabelsToIntensity,
    path: Path,
    precision: str,
    manifest: Manifest,
    references_by_name: Mapping[str, parity.Reference],
    say: Say,
) -> dict[str, Any]:
    """The proof of an ONNX file in every backend that runs it here; `ParityError` names the
    backend and the region of the network.
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
    """Where in the network the file goes wrong, for a person."""
    return error_localization.table(
        error_localization.regions(graph, path, references_by_name[parity.ON_MASKS].inputs),
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
    """One file in one engine, for a person."""
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
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Write the INT8 graph with as many layers as training masks say may be quantised, and the
    proof on `truths` allows.

    Returns how it was made, as JSON data ("layers" is 0 where none may be), and its proof.
    `ParityError` where a backend cannot run it.
    """
    picked = spread(len(masks), CALIBRATION_SLICES)
    tried_on = picked[:: CALIBRATION_SLICES // TRIAL_SLICES]
    truth = parity.reference(
        graph,
        parity.draw_inputs(
            manifest.inputs, parity.repeated(masks[tried_on], TRIAL_SLICES, manifest.inputs), seed=3
        ),
    )
    others = np.setdiff1d(
        np.arange(len(masks)), tried_on
    )  # what layers are fitted on says nothing of how well they are
    fitted_on = others if len(others) else picked
    most = max(1, min(FIT_SLICES, FIT_PIXELS // masks[0, 0].size))
    fit_on = parity.draw_inputs(
        manifest.inputs, masks[fitted_on[spread(len(fitted_on), min(most, len(fitted_on)))]], seed=2
    )
    backend = next(b for b in BACKENDS if b.file == ("onnx", "int8") and not b.uninstalled())

    def numbers(path: Path) -> dict[str, Any]:
        engine = backend.open(path, manifest)
        try:
            return parity.error_metrics(truth, parity.run_engine(engine, truth.inputs)[0], manifest)
        finally:
            engine.close()

    path, fp32, count = part / FILES["int8"], part / FILES["fp32"], 0
    inputs = parity.draw_inputs(manifest.inputs, masks[picked], seed=1)
    for made in candidates(
        fp32,
        path,
        inputs,
        fuse_batch_norm(graph),
        fit_on,
        lambda path: float(numbers(path)["mean"]),
        say,
    ):
        count = made.layers
        if any(
            value > MARGIN * limit
            for value, limit in parity.limit_violations("int8", numbers(path)).values()
        ):
            continue
        layers = count - len(made.floating)
        share = path.stat().st_size / fp32.stat().st_size
        say(
            f"  {path.name}: {layers} of {count} layers in INT8, {100 * share:.1f} % of"
            f" {fp32.name}'s size"
        )
        try:
            return {"layers": layers, "of": count, "floating": list(made.floating)}, _validate(
                path, "int8", manifest, references_by_name, say
            )
        except parity.Exceeded as exc:
            say(f"  not taken: {exc.fact}\n{localized(graph, path, 'int8', references_by_name)}")
    path.unlink()
    say(
        f"  {path.name} is left out: no layer can be quantised within {parity.LIMITS['int8']}"
        f" {manifest.intensity.unit}"
    )
    return {"layers": 0, "of": count, "floating": []}, None


def spread(count: int, most: int) -> NDArray[np.intp]:
    """`most` of `count` masks, from the first patient's to the last one's; some twice where
    there are fewer.
    """
    return np.linspace(0, count - 1, most).round().astype(int)


def versions() -> dict[str, str]:
    """Of what made the files."""
    from importlib.metadata import version

    names = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def provenance(run: TrainedRun) -> Mapping[str, Any]:
    """What the manifest says of the training: no path, no patient's name."""
    kept = ("step", "metrics", "data", "versions", "commit")
    return {
        "weights_sha256": run.data["weights"]["sha256"],
        **{key: run.data[key] for key in kept if key in run.data},
    }
