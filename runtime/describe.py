"""What a model folder says of itself, for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .contract import MANIFEST, Manifest
from .engines.onnx_file import check_weights
from .engines.registry import BACKENDS
from .errors import ModelError, printable

USES = {"train": "to train on", "valid": "to choose and prove with", "test": "to test on"}
ORGAN_HEAD = ("", "median", "true", "error", "IQR", "true", "texture ratio")
PARITY_HEAD = ("file", "backend", "on", "slices", "mean", "p99.9", "max", "body mean", "organs", "1 - SSIM", "slices/s")


def describe(manifest: Manifest, folder: Path) -> str:
    """The manifest as text, every file's SHA-256 compared on the way. Raises `ModelError` for one that is missing or altered."""
    try:
        return _describe(manifest, folder)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as exc:
        raise ModelError(f"what {MANIFEST} says of training, export or proof cannot be read: {exc!r:.200}", expected="a manifest as export writes it",
                         remedy="export the run again", file=folder / MANIFEST) from exc  # fmt: skip


def _describe(manifest: Manifest, folder: Path) -> str:
    grid, intensity = manifest.grid, manifest.intensity
    scale = (
        "each slice fitted to it"
        if grid.pixel_spacing is None
        else f"{grid.pixel_spacing[0]} x {grid.pixel_spacing[1]} mm a pixel, grows in steps of {grid.divisor} where labels need it"
    )
    apart = f", {grid.slice_spacing} mm apart" if grid.slices > 1 else ""
    rows = [
        ("model", manifest.name),
        ("license", manifest.license or "not stated: whoever trained the model must say under which it may be used"),
        ("labels", str(manifest.labels)),
        ("canvas", f"{grid.canvas[0]} x {grid.canvas[1]}, {scale}"),
        ("slices", f"{grid.slices}{apart}"),
        (
            "paints",
            f"{intensity.low} … {intensity.high} {intensity.unit}, noise {'yes' if manifest.noise else 'no'}, style of {manifest.style}",
        ),
    ]
    for name, file in manifest.files.items():
        manifest.verify(folder, [name])
        if file.kind == "onnx":
            check_weights(folder / name)
        rows.append(("file", f"{name}: {file.precision}, {file.bytes / 1e6:.1f} MB, sha256 {file.sha256} verified"))
    for backend in BACKENDS:
        if manifest.file_of(*backend.file):
            why = backend.absent(manifest) or ("proven" if backend.proven(manifest) else "not proven when this model was exported")
            rows.append(("backend", f"{backend.name}: {why}{'' if backend.automatic else ', by name only'}"))
    rows += [("training", text) for text in training_lines(manifest)] + [("export", text) for text in export_lines(manifest)]
    parts = ["\n".join(f"{key:<10} {printable(value)}" for key, value in rows)]
    if organs := organ_rows(manifest):
        parts.append(f"held-out patients, {printable(intensity.unit)}, painted and true\n{aligned(ORGAN_HEAD, organs)}")
    if proof := parity_rows(manifest):
        parts.append(f"proof: differences of the files from the network, {printable(intensity.unit)}\n{aligned(PARITY_HEAD, proof)}")
    return "\n\n".join(parts)


def training_lines(manifest: Manifest) -> list[str]:
    """How the weights came to be, as sentences."""
    known, lines = manifest.training, []
    data = known.get("data", {})
    counts = [
        f"{n} patients, {data['slices'][split]} slices {USES.get(split, split)}" for split, n in data.get("patients", {}).items() if n
    ]
    if counts:
        lines.append("; ".join(counts))
    if body := known.get("metrics", {}).get("body"):
        lines.append(
            f"mean absolute error inside held-out bodies {body['mae']:.0f}, of painting each label with its mean {body['mae_mean_painting']:.0f}"
        )
    versions = " ".join(f"{name} {version}" for name, version in known.get("versions", {}).items())
    facts = [f"{known['step']} steps" if "step" in known else "", versions, f"commit {known['commit']}" if known.get("commit") else ""]
    if "weights_sha256" in known:
        facts.append(f"weights {known['weights_sha256']}")
    return [*lines, *[", ".join(filter(None, facts))]] if any(facts) else lines


def export_lines(manifest: Manifest) -> list[str]:
    """How the files were made, as sentences."""
    known = dict(manifest.export)
    int8 = known.pop("int8", None)
    lines = [" ".join(f"{name} {version}" for name, version in known.items())] if known else []
    if int8 and int8["layers"]:
        left = f"; in floating point: {', '.join(int8['floating'])}" if int8["floating"] else ""
        lines.append(f"INT8: {int8['layers']} of {int8['of']} layers, calibrated on {int8['calibrated_on']}{left}")
    elif int8:
        lines.append("INT8: left out, no layer can be quantised within the limits")
    return lines


def organ_rows(manifest: Manifest) -> list[tuple[str, ...]]:
    """The metrics of each organ on the held-out patients, in the columns of `ORGAN_HEAD`."""
    organs: Mapping[str, Any] = manifest.training.get("metrics", {}).get("organs", {})
    keys = ("median", "median_true", "median_error", "iqr", "iqr_true", "texture_ratio")
    return [(name, *(_short(organ.get(key)) for key in keys)) for name, organ in organs.items() if organ]


def parity_rows(manifest: Manifest) -> list[tuple[str, ...]]:
    """The proof of each file in each backend, in the columns of `PARITY_HEAD`."""
    rows = []
    for file, backends in manifest.parity.items():
        for backend, proof in backends.items():
            for what, n in proof.items():
                if isinstance(n, Mapping):
                    organs = max((abs(shift) for shift in n["organs"].values() if shift is not None), default=None)
                    numbers = (n["mean"], n["p99_9"], n["max"], n["body_mean"], organs, n["dssim"])
                    rows.append((file, backend, what, str(n["slices"]), *map(_short, numbers), _short(proof["slices_per_second"])))
    return rows


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows))


def _short(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}"
