"""What a model folder says of itself, for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.checked_json import Object, mapping, nesting, number, text, texts, whole, word
from ..core.errors import ModelError, printable, quantity
from ..core.manifest import MANIFEST, Manifest
from ..engines.onnx_file import check_weights
from ..engines.registry import BACKENDS

USES = {"train": "to train on", "valid": "to choose and prove with", "test": "to test on"}
ORGAN_HEAD = ("", "median", "true", "error", "IQR", "true", "texture ratio")
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
    """The manifest as text, every file's SHA-256 compared on the way.

    Raises `ModelError` for one that is missing or altered.
    """
    try:
        with nesting():
            return _describe(manifest, folder)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as exc:
        raise ModelError(
            f"{MANIFEST} cannot be used: {str(exc)[:500]}",
            expected="a manifest as export writes it",
            remedy="export the run again",
            file=folder / MANIFEST,
        ) from exc


def _describe(manifest: Manifest, folder: Path) -> str:
    grid, intensity = manifest.grid, manifest.intensity
    scale = (
        "each slice fitted to it"
        if grid.pixel_spacing is None
        else (
            f"{grid.pixel_spacing[0]} x {grid.pixel_spacing[1]} mm a pixel, grows in steps of"
            f" {grid.divisor} where labels need it"
        )
    )
    apart = f", {grid.slice_spacing} mm apart" if grid.slices > 1 else ""
    rows = [
        ("model", manifest.name),
        (
            "license",
            manifest.license
            or "not stated: whoever trained the model must say under which it may be used",
        ),
        ("labels", str(manifest.labels)),
        ("canvas", f"{grid.canvas[0]} x {grid.canvas[1]}, {scale}"),
        ("slices", f"{grid.slices}{apart}"),
        (
            "synthesizes",
            (
                f"{intensity.low} … {intensity.high} {intensity.unit}, noise"
                f" {'yes' if manifest.noise else 'no'}, style of {manifest.style}"
            ),
        ),
    ]
    for name, file in manifest.files.items():
        manifest.verify(folder, [name])
        if file.kind == "onnx":
            check_weights(folder / name)
        rows.append(
            (
                "file",
                (
                    f"{name}: {file.precision}, {file.bytes / 1e6:.1f} MB, sha256 {file.sha256}"
                    " verified"
                ),
            )
        )
    for backend in BACKENDS:
        if manifest.file_of(*backend.file):
            why = backend.absent(manifest) or (
                "validated"
                if backend.validated(manifest)
                else "not validated when this model was exported"
            )
            rows.append(
                ("backend", f"{backend.name}: {why}{'' if backend.automatic else ', by name only'}")
            )
    rows += [("training", text) for text in training_lines(manifest)] + [
        ("export", text) for text in export_lines(manifest)
    ]
    parts = ["\n".join(f"{key:<10} {printable(value)}" for key, value in rows)]
    if organs := organ_rows(manifest):
        parts.append(
            f"held-out patients, {printable(intensity.unit)}, synthetic and"
            f" true\n{aligned(ORGAN_HEAD, organs)}"
        )
    if proof := parity_rows(manifest):
        parts.append(
            "proof: differences of the files from the network,"
            f" {printable(intensity.unit)}\n{aligned(PARITY_HEAD, proof)}"
        )
    return "\n\n".join(parts)


def training_lines(manifest: Manifest) -> list[str]:
    """How the weights came to be, as sentences.

    Raises ValueError for what export does not write.
    """
    known, lines = mapping(manifest.training, "'training'"), []
    data, metrics, versions = (_part(known, key) for key in ("data", "metrics", "versions"))
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
        # models of mask2ct 0.1 state the baseline under its old name
        key = "mae_label_mean" if "mae_label_mean" in body else "mae_mean_painting"
        error, baseline = body.read("mae", number), body.read(key, number)
        lines.append(
            f"mean absolute error inside held-out bodies {error:.0f}, of each label's mean in its"
            f" place {baseline:.0f}"
        )
    facts = [f"{quantity(known.read('step', whole), 'step')}" if "step" in known else ""]
    facts.append(" ".join(f"{name} {versions.read(name, word)}" for name in versions))
    facts.append(f"commit {known.read('commit', text)}" if known.get("commit") else "")
    if "weights_sha256" in known:
        facts.append(f"weights {known.read('weights_sha256', text)}")
    return [*lines, *[", ".join(filter(None, facts))]] if any(facts) else lines


def export_lines(manifest: Manifest) -> list[str]:
    """How the files were made, as sentences. Raises ValueError for what export does not write."""
    known = mapping(manifest.export, "'export'")
    int8 = _part(known, "int8")
    versions = [f"{name} {known.read(name, word)}" for name in known if name != "int8"]
    lines = [" ".join(versions)] if versions else []
    if int8 and (layers := int8.read("layers", whole)):
        kept = int8.read("floating", texts)
        left = f"; in floating point: {', '.join(kept)}" if kept else ""
        counts, masks = int8.read("of", whole), int8.read("calibrated_on", word)
        lines.append(f"INT8: {layers} of {quantity(counts, 'layer')}, calibrated on {masks}{left}")
    elif int8:
        lines.append("INT8: left out, no layer can be quantised within the limits")
    return lines


def organ_rows(manifest: Manifest) -> list[tuple[str, ...]]:
    """The metrics of each organ on the held-out patients, in the columns of `ORGAN_HEAD`.

    Raises ValueError as above.
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
    """The proof of each file in each backend, in the columns of `PARITY_HEAD`.

    Raises ValueError as above.
    """
    rows = []
    for file, backends in manifest.parity.items():
        for backend in (proofs := mapping(backends, f"{file!r} of 'parity'")):
            proof = proofs.read(backend, mapping)
            for what in proof:
                if isinstance(proof[what], Mapping):
                    n, speed = proof.read(what, mapping), proof.read("slices_per_second", _or_null)
                    organs = n.read("organs", mapping)
                    shifts = [
                        abs(shift)
                        for organ in organs
                        if (shift := organs.read(organ, _or_null)) is not None
                    ]
                    numbers = [
                        n.read(key, _or_null)
                        for key in ("mean", "p99_9", "max", "body_mean", "dssim")
                    ]
                    numbers.insert(4, max(shifts, default=None))
                    rows.append(
                        (
                            file,
                            backend,
                            what,
                            str(n.read("slices", whole)),
                            *map(_short, numbers),
                            _short(speed),
                        )
                    )
    return rows


def _part(known: Object, key: str) -> Object:
    """An object within another, empty where it is missing or null."""
    return known.read_or(key, mapping, Object({}, repr(key)))


def _or_null(value: Any, what: str) -> float | None:
    return None if value is None else number(value, what)


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    )


def _short(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}"
