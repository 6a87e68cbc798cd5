"""Describe a model folder in plain text: manifest, files, training, metrics and parity checks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..core.checked_json import Object, mapping, nesting, number, text, texts, whole, word
from ..core.errors import ModelError, printable, quantity
from ..core.manifest import MANIFEST, Manifest
from .onnx_file import check_weights
from .registry import BACKENDS, Backend

T = TypeVar("T")

USES = {"train": "to train on", "valid": "to validate with", "test": "to test on"}
ORGAN_HEAD = ("", "median", "true", "error", "IQR", "true", "texture ratio")
INT8_TITLES = {"int8": "INT8", "int8-gpu": "INT8 for TensorRT"}
PARITY_HEAD = (
    "file",
    "backend",
    "on",
    "slices",
    "mean",
    "p99.9",
    "max",
    "body mean",
    "organs",
    "1 - SSIM",
    "slices/s",
)


def describe(manifest: Manifest, folder: Path) -> str:
    """Describe a model, and check the SHA-256 of each file on the way.

    Args:
        manifest: The folder's manifest.
        folder: The model folder.

    Returns:
        Several paragraphs and tables.

    Raises:
        ModelError: For a file that is missing or altered, or a manifest that cannot be used.
    """
    return _checked(_describe, manifest, folder)


def describe_json(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """Describe a model for a program, after the same checks as `describe`.

    Args:
        manifest: The folder's manifest.
        folder: The model folder.

    Returns:
        "model", the manifest, and "backends", those that have a file in the folder: "name",
        whether it is "usable" here, whether "auto" may choose it, and the "state" for a person.

    Raises:
        ModelError: As `describe`.
    """
    return _checked(_describe_json, manifest, folder)


def _checked(make: Callable[[Manifest, Path], T], manifest: Manifest, folder: Path) -> T:
    """Map what an unusable manifest raises to `ModelError`."""
    try:
        with nesting():
            return make(manifest, folder)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as exc:
        raise ModelError(
            f"{MANIFEST} cannot be used: {str(exc)[:500]}",
            expected="a manifest as export writes it",
            remedy="export the run again",
            file=folder / MANIFEST,
        ) from exc


def _describe_json(manifest: Manifest, folder: Path) -> dict[str, Any]:
    _describe(manifest, folder)
    model = manifest.to_json()
    json.dumps(model, allow_nan=False)
    backends = [
        {
            "name": backend.name,
            "usable": not backend.absent(manifest),
            "auto": backend.automatic,
            "state": state,
        }
        for backend, state in _backend_states(manifest)
    ]
    return {"model": model, "backends": backends}


def _describe(manifest: Manifest, folder: Path) -> str:
    unit = printable(manifest.intensity.unit)
    rows = [
        *_contract_rows(manifest),
        *_file_rows(manifest, folder),
        *(
            ("backend", f"{backend.name}: {state}{'' if backend.automatic else ', by name only'}")
            for backend, state in _backend_states(manifest)
        ),
        *(("training", text) for text in training_lines(manifest)),
        *(("export", text) for text in export_lines(manifest)),
    ]
    parts = ["\n".join(f"{key:<10} {printable(value)}" for key, value in rows)]
    if organs := organ_rows(manifest):
        parts.append(
            f"held-out patients, {unit}, synthetic and true\n{aligned(ORGAN_HEAD, organs)}"
        )
    if parity := parity_rows(manifest):
        parts.append(
            f"parity check: differences of the files from the network, {unit}\n"
            f"{aligned(PARITY_HEAD, parity)}"
        )
    return "\n\n".join(parts)


def _contract_rows(manifest: Manifest) -> list[tuple[str, str]]:
    """What the model takes and gives."""
    grid, intensity = manifest.grid, manifest.intensity
    if grid.pixel_spacing is None:
        scale = "each slice fitted to it"
    else:
        rows, columns = grid.pixel_spacing
        scale = (
            f"{rows} x {columns} mm a pixel, grows in steps of {grid.divisor} where labels need it"
        )
    spacing = f", {grid.slice_spacing} mm apart" if grid.slices > 1 else ""
    no_license = "not stated: whoever trained the model must say under which it may be used"
    noise = "yes" if manifest.noise else "no"
    return [
        ("model", manifest.name),
        ("license", manifest.license or no_license),
        ("labels", str(manifest.labels)),
        ("canvas", f"{grid.canvas[0]} x {grid.canvas[1]}, {scale}"),
        ("slices", f"{grid.slices}{spacing}"),
        (
            "synthesizes",
            f"{intensity.low} … {intensity.high} {intensity.unit}, noise {noise}, style of"
            f" {manifest.style}",
        ),
    ]


def _file_rows(manifest: Manifest, folder: Path) -> Iterator[tuple[str, str]]:
    """Each file, after its SHA-256 and its weights are checked."""
    for name, file in manifest.files.items():
        manifest.verify(folder, [name])
        if file.kind == "onnx":
            check_weights(folder / name)
        size = f"{file.bytes / 1e6:.1f} MB"
        yield "file", f"{name}: {file.precision}, {size}, sha256 {file.sha256} verified"


def _backend_states(manifest: Manifest) -> Iterator[tuple[Backend, str]]:
    """Each backend that has a file, and whether it can be used here."""
    for backend in BACKENDS:
        if manifest.file_of(*backend.file):
            state = backend.absent(manifest)
            if not state:
                state = "not validated when this model was exported"
                if backend.validated(manifest):
                    state = "validated"
            yield backend, state


def training_lines(manifest: Manifest) -> list[str]:
    """Describe data, metrics and versions of the training.

    Args:
        manifest: The manifest of a model folder.

    Returns:
        Sentences.

    Raises:
        ValueError: For entries that no export writes.
    """
    training, lines = mapping(manifest.training, "'training'"), []
    data, metrics, versions = (_part(training, key) for key in ("data", "metrics", "versions"))
    patients, slices = _part(data, "patients"), _part(data, "slices")
    counts = [
        f"{quantity(n, 'patient')}, {quantity(slices.read(split, whole), 'slice')}"
        f" {USES.get(split, split)}"
        for split in patients
        if (n := patients.read(split, whole))
    ]
    if counts:
        lines.append("; ".join(counts))
    if body := _part(metrics, "body"):
        # Models of mask2ct 0.1 state the baseline under its old name.
        key = "mae_label_mean" if "mae_label_mean" in body else "mae_mean_painting"
        error, baseline = body.read("mae", number), body.read(key, number)
        lines.append(
            f"mean absolute error inside held-out bodies {error:.0f}, of each label's mean in its"
            f" place {baseline:.0f}"
        )
    facts = [f"{quantity(training.read('step', whole), 'step')}" if "step" in training else ""]
    facts.append(" ".join(f"{name} {versions.read(name, word)}" for name in versions))
    facts.append(f"commit {training.read('commit', text)}" if training.get("commit") else "")
    if "weights_sha256" in training:
        facts.append(f"weights {training.read('weights_sha256', text)}")
    return [*lines, ", ".join(filter(None, facts))] if any(facts) else lines


def export_lines(manifest: Manifest) -> list[str]:
    """Describe the versions of the export and its INT8 files.

    Args:
        manifest: The manifest of a model folder.

    Returns:
        Sentences.

    Raises:
        ValueError: For entries that no export writes.
    """
    export = mapping(manifest.export, "'export'")
    versions = [f"{name} {export.read(name, word)}" for name in export if name not in INT8_TITLES]
    lines = [" ".join(versions)] if versions else []
    for key, title in INT8_TITLES.items():
        int8 = _part(export, key)
        if int8 and (quantised := int8.read("layers", whole)):
            floating = int8.read("floating", texts)
            exceptions = f"; in floating point: {', '.join(floating)}" if floating else ""
            layers, masks = int8.read("of", whole), int8.read("calibrated_on", word)
            of = f"{quantised} of {quantity(layers, 'layer')}"
            lines.append(f"{title}: {of}, calibrated on {masks}{exceptions}")
        elif int8:
            lines.append(f"{title}: left out, no layer can be quantised within the limits")
    return lines


def organ_rows(manifest: Manifest) -> list[tuple[str, ...]]:
    """List the metrics of each organ on the held-out patients.

    Args:
        manifest: The manifest of a model folder.

    Returns:
        A row per organ, in the columns of `ORGAN_HEAD`.

    Raises:
        ValueError: For entries that no export writes.
    """
    organs = _part(_part(mapping(manifest.training, "'training'"), "metrics"), "organs")
    keys = ("median", "median_true", "median_error", "iqr", "iqr_true", "texture_ratio")
    rows = [(name, _part(organs, name)) for name in organs]
    return [
        (name, *(_short(organ.read_or(key, _or_null, None)) for key in keys))
        for name, organ in rows
        if organ
    ]


def parity_rows(manifest: Manifest) -> list[tuple[str, ...]]:
    """List the parity checks: each file in each backend on each set of masks.

    Args:
        manifest: The manifest of a model folder.

    Returns:
        A row per check, in the columns of `PARITY_HEAD`.

    Raises:
        ValueError: For entries that no export writes.
    """
    rows = []
    for file, entry in manifest.parity.items():
        backends = mapping(entry, f"{file!r} of 'parity'")
        for backend in backends:
            checks = backends.read(backend, mapping)
            for masks in checks:
                if isinstance(checks[masks], Mapping):
                    rows.append((file, backend, masks, *_parity_cells(checks, masks)))
    return rows


def _parity_cells(checks: Object, masks: str) -> list[str]:
    """The cells of one parity check, from the number of slices on."""
    metrics, speed = checks.read(masks, mapping), checks.read("slices_per_second", _or_null)
    organs = metrics.read("organs", mapping)
    shifts = [organs.read(organ, _or_null) for organ in organs]
    numbers = [
        metrics.read(key, _or_null) for key in ("mean", "p99_9", "max", "body_mean", "dssim")
    ]
    # The organs' column shows the largest shift of an organ's mean.
    numbers.insert(4, max((abs(shift) for shift in shifts if shift is not None), default=None))
    return [str(metrics.read("slices", whole)), *map(_short, numbers), _short(speed)]


def _part(parent: Object, key: str) -> Object:
    """Return an object within another; an empty one where it is missing or null."""
    return parent.read_or(key, mapping, Object({}, repr(key)))


def _or_null(value: Any, what: str) -> float | None:
    """Read a number or null."""
    return None if value is None else number(value, what)


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align a table in plain text.

    Args:
        head: The titles of the columns.
        rows: A cell per column each.

    Returns:
        The lines of the table, its head first.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    )


def _short(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}"
