"""The contract between training, export and runtime: what `manifest.json` says, as typed, validated
data.

Everything between a label mask and Hounsfield units is inside the exported graph, so the runtime
needs nothing but this:

    in   labels  uint8   [N, Z, H, W]   model indices of Z neighbouring axial slices; the middle one is synthesized
    in   style   float32 [N, S]         optional: what patient and scanner bring, one vector per volume
    in   noise   uint8   [N, H, W]      optional: white noise, shaped by the network into CT texture
    out  ct      uint8   [N, H, W, 2]   int16 as little-endian bytes: `.view("<i2")[..., 0]` copies nothing

Standard library only: training and export import this module too.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .atomic_files import open_input, sha256_of
from .checked_json import items, mapping, nesting, number, parse, shown, text, whole
from .checked_json import refusal as _no
from .errors import ModelError, reading

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
METADATA = "mask2ct"  # the key under which a graph file states what it was exported for
MAX_LABELS = 256  # indices cross the seams as uint8
# What a manifest may ask for. Far beyond any network, and little enough that no manifest fills a
# machine.
MAX_BYTES = 4 << 20  # of manifest.json
MAX_CANVAS, MAX_SLICES, MAX_STYLE = 8192, 255, 4096
MIN_SPACING, MAX_SPACING = 1e-6, 1000.0  # mm


@dataclass(frozen=True)
class Label:
    """One class. `value`: what files hold for it; `aliases`: other values that mean the same
    (MM-WHS: 421 is 420).
    """

    name: str
    value: int
    aliases: tuple[int, ...] = ()
    snomed: str | None = None  # SNOMED CT code of the structure


@dataclass(frozen=True)
class LabelTable:
    """The classes in the model's own order: position 0, the background, is what is not labelled."""

    labels: tuple[Label, ...]

    def __post_init__(self) -> None:
        if not all(
            -(1 << 31) <= v < 1 << 31
            for label in self.labels
            for v in (label.value, *label.aliases)
        ):
            raise _no("a label value is beyond 32 bits", "integers of 32 bits")
        if not 2 <= len(self.labels) <= MAX_LABELS:
            raise _no(
                f"'labels' has {len(self.labels)} rows",
                f"a background and 1 to {MAX_LABELS - 1} structures",
            )
        names = [label.name for label in self.labels]
        values = [value for label in self.labels for value in (label.value, *label.aliases)]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise _no(f"label name {twice[0]!r} occurs twice", "each once")
        if again := [value for value, count in Counter(values).items() if count > 1]:
            raise _no(
                f"label value {again[0]} occurs twice in 'value' and 'aliases' of 'labels'",
                "each once",
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def by_value(self) -> dict[int, int]:
        """File value (or alias) → model index."""
        return {
            v: index
            for index, label in enumerate(self.labels)
            for v in (label.value, *label.aliases)
        }

    @property
    def by_name(self) -> dict[str, int]:
        return {label.name: index for index, label in enumerate(self.labels)}

    def __str__(self) -> str:
        return ", ".join(f"{label.value} {label.name}" for label in self.labels)


@dataclass(frozen=True)
class GridPolicy:
    """How a mask's grid becomes the model's: labels are resampled nearest, the synthetic CT
    linearly back.

    `canvas`: (H, W) in pixels that the network was trained on. `pixel_spacing`: (row, column)
    distance in mm, the slice lying on the canvas as `runtime.core.resampling` says, which grows
    only where labels need it; None: each slice is fitted to the canvas, whatever its size in mm. H
    and W are multiples of `divisor`. `slices`: Z, odd; `slice_spacing`: mm between them (None when
    Z = 1).
    """

    canvas: tuple[int, int]
    pixel_spacing: tuple[float, float] | None
    divisor: int
    slices: int = 1
    slice_spacing: float | None = None

    def __post_init__(self) -> None:
        if self.divisor < 1 or any(n < 1 or n % self.divisor for n in self.canvas):
            raise _no(
                f"'canvas' is {self.canvas} with divisor {self.divisor}",
                "positive multiples of the divisor",
            )
        if max(self.canvas) > MAX_CANVAS:
            raise _no(f"'canvas' is {self.canvas}", f"at most {MAX_CANVAS} pixels a side")
        if self.pixel_spacing is not None and not all(
            MIN_SPACING <= s < 100 for s in self.pixel_spacing
        ):
            raise _no(f"'pixel_spacing' is {self.pixel_spacing}", "two positive numbers of mm")
        if not 1 <= self.slices <= MAX_SLICES or self.slices % 2 == 0:
            raise _no(f"'slices' is {self.slices}", f"an odd number, 1 to {MAX_SLICES}")
        if self.slices > 1 and not (
            self.slice_spacing and MIN_SPACING <= self.slice_spacing <= MAX_SPACING
        ):
            raise _no(
                "'slice_spacing' is"
                f" {'null' if self.slice_spacing is None else self.slice_spacing}",
                "a positive number of mm when slices > 1",
            )


@dataclass(frozen=True)
class Intensity:
    """What the output's numbers mean: `unit` ("HU", or "a.u." for MR) and the range [low, high]
    the model can synthesize.
    """

    unit: str
    low: int
    high: int

    def __post_init__(self) -> None:
        if (
            not all(type(n) is int for n in (self.low, self.high))
            or not -32768 <= self.low < self.high <= 32767
        ):
            raise _no(f"'low' and 'high' are {self.low} and {self.high}", "low < high within int16")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of the graph.

    Dimensions that a caller chooses are named: "N", "H", "W".
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def tensor_specs(slices: int, style: int, noise: bool) -> tuple[tuple[TensorSpec, ...], TensorSpec]:
    """The (inputs, output) that the contract above prescribes for Z = `slices`, S = `style` and
    a noise input or none.
    """
    inputs = [TensorSpec("labels", "uint8", ("N", slices, "H", "W"))]
    if style:
        inputs.append(TensorSpec("style", "float32", ("N", style)))
    if noise:
        inputs.append(TensorSpec("noise", "uint8", ("N", "H", "W")))
    return tuple(inputs), TensorSpec("ct", "uint8", ("N", "H", "W", 2))


@dataclass(frozen=True)
class ModelFile:
    """One file of a model folder: its role ("onnx", "engine", "layers"), precision, size in bytes
    and SHA-256.

    `facts`: what an engine is tied to (TensorRT's version, compute capability, shapes, device
    memory); empty for a graph.
    """

    kind: str
    precision: str
    bytes: int
    sha256: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What a model folder says of itself (JSON Schema: manifest.schema.json, beside this module).

    `parity`: file name → backend → what was measured at export: the errors against the network in
    HU, slices/s, versions. `training`, `export`: how the weights and the files were made.
    `derived`: the CTs are real ones, deformed, and not synthetic; no model folder says so.
    """

    name: str
    labels: LabelTable
    grid: GridPolicy
    intensity: Intensity
    style: int
    noise: bool
    files: Mapping[str, ModelFile]
    parity: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    export: Mapping[str, Any] = field(default_factory=dict)
    license: str = ""
    derived: bool = False

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return tensor_specs(self.grid.slices, self.style, self.noise)[0]

    @property
    def output(self) -> TensorSpec:
        return tensor_specs(self.grid.slices, self.style, self.noise)[1]

    def file_of(self, kind: str, precision: str) -> str | None:
        """The name of the file of that kind and precision, or None."""
        return next(
            (name for name, f in self.files.items() if (f.kind, f.precision) == (kind, precision)),
            None,
        )

    def signature(self) -> str:
        """What a graph file must have been exported for to serve this manifest, as JSON; it is
        written into the file itself.
        """
        intensity = [self.intensity.unit, self.intensity.low, self.intensity.high]
        labels = [[label.name, label.value] for label in self.labels.labels]
        return json.dumps(
            {
                "labels": labels,
                "slices": self.grid.slices,
                "divisor": self.grid.divisor,
                "style": self.style,
                "noise": self.noise,
                "intensity": intensity,
            }
        )

    def check_signature(self, stated: str | None, path: Path) -> None:
        """Raise `ModelError` when the graph in `path` was exported for other labels, inputs or
        intensities than this manifest's.
        """
        wanted = json.loads(self.signature())
        try:
            found = json.loads(stated or "{}")
            wrong = {key: found.get(key) for key in wanted if found.get(key) != wanted[key]}
        except (ValueError, AttributeError, RecursionError):
            wrong = {"statement": stated}
        if wrong:
            raise ModelError(
                f"{path.name} was exported for other {', '.join(wrong)}: {json.dumps(wrong)[:300]}",
                expected=(
                    f"what {MANIFEST} says:"
                    f" {json.dumps({key: wanted.get(key) for key in wrong})[:300]}"
                ),
                remedy="restore the model folder, or export the run again",
                file=path,
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "license": self.license,
            "labels": labels_to_json(self.labels),
            "grid": grid_to_json(self.grid),
            "intensity": vars(self.intensity),
            "style": self.style,
            "noise": self.noise,
            "inputs": [vars(spec) for spec in self.inputs],
            "output": vars(self.output),
            "files": {name: vars(file) for name, file in self.files.items()},
            "parity": self.parity,
            "training": self.training,
            "export": self.export,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Rebuild from `to_json`'s form.

        Raises KeyError, TypeError or ValueError that say what is wrong.
        """
        data = mapping(data, "the manifest")
        if data["schema_version"] != SCHEMA_VERSION:
            raise _no(
                f"'schema_version' is {shown(data['schema_version'])}",
                f"{SCHEMA_VERSION}, which this mask2ct reads",
            )
        intensity = mapping(data["intensity"], "'intensity'")
        files = mapping(data["files"], "'files'")
        described = {
            key: mapping(data.get(key, {}), f"{key!r}") for key in ("parity", "training", "export")
        }
        for name, proof in described["parity"].items():
            mapping(proof, f"the parity of {name!r}")
        if type(data["noise"]) is not bool:
            raise _no(f"'noise' is {shown(data['noise'])}", "true or false")
        manifest = cls(
            name=text(data["name"], "'name'"),
            labels=labels_from_json(data["labels"]),
            grid=grid_from_json(data["grid"]),
            intensity=Intensity(
                intensity.read("unit", text),
                *(
                    whole(intensity[key], f"{key!r} of 'intensity'", -32768, 32767)
                    for key in ("low", "high")
                ),
            ),
            style=whole(data["style"], "'style'", 0, MAX_STYLE),
            noise=data["noise"],
            files={name: _file(name, file) for name, file in files.items()},
            license=text(data.get("license", ""), "'license'"),
            parity=described["parity"],
            training=described["training"],
            export=described["export"],
        )
        stated = {
            "inputs": [_spec(s, "a part of 'inputs'") for s in items(data["inputs"], "'inputs'")]
        }
        stated["output"] = [_spec(data["output"], "'output'")]
        for key, prescribed in (("inputs", [*manifest.inputs]), ("output", [manifest.output])):
            if stated[key] != prescribed:
                raise _no(
                    f"{key!r} does not fit 'slices', 'style' and 'noise'",
                    "the tensors that the contract prescribes",
                )
        return manifest

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read `folder/manifest.json`.

        Raises `ModelError` when it is missing or wrong; the files are not read.
        """
        path = folder / MANIFEST
        remedy = "point --model at a folder that `python export/build_engine.py RUN -o MODEL` wrote"
        with reading(folder, "a folder with manifest.json", ModelError):
            there, stated = folder.is_dir(), path.exists()
        if not there:
            raise ModelError(
                f"model folder {folder} does not exist",
                expected="a folder with manifest.json",
                remedy=remedy,
                file=folder,
            )
        if not stated:
            raise ModelError(
                f"{folder} holds no {MANIFEST}",
                expected="a model folder",
                remedy=remedy,
                file=folder,
            )
        with (
            reading(path, "a manifest as export writes it", ModelError),
            open_input(path) as handle,
        ):
            content = handle.read(MAX_BYTES + 1)
        try:
            if len(content) > MAX_BYTES:
                raise _no(f"it has more than {MAX_BYTES} bytes", "some thousand")
            with nesting():
                return cls.from_json(parse(content))
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as exc:
            raise ModelError(
                f"{MANIFEST} cannot be used: {str(exc)[:500]}",
                expected="a manifest as export writes it",
                remedy=remedy,
                file=path,
            ) from exc

    def verify(self, folder: Path, names: Iterable[str]) -> None:
        """Compare the size and SHA-256 of the named files with the manifest's.

        Raises `ModelError` on any difference.
        """
        for name in names:
            path, stated = folder / name, self.files[name]
            expected, remedy = (
                f"{stated.bytes} bytes with sha256 {stated.sha256}",
                "copy the model folder again from where it was built",
            )
            with reading(path, expected, ModelError):
                missing, altered = not path.exists(), False
                if not missing:
                    with open_input(path) as handle:
                        altered = (
                            os.fstat(handle.fileno()).st_size != stated.bytes
                            or sha256_of(handle) != stated.sha256
                        )
            if missing:
                raise ModelError(
                    f"{name} is missing from the model folder",
                    expected=expected,
                    remedy=remedy,
                    file=path,
                )
            if altered:
                raise ModelError(
                    f"{name} is not the file its manifest describes",
                    expected=expected,
                    remedy=remedy,
                    file=path,
                )


def _file(name: str, data: Any) -> ModelFile:
    data = mapping(data, f"the file {name!r}")
    if Path(name).name != name or name == ".." or "\\" in name:
        raise _no(f"file name {name!r}", "a plain name in the model folder")
    if unknown := set(data) - {"kind", "precision", "bytes", "sha256", "facts"}:
        raise _no(f"the file {name!r} has a key {min(unknown)!r}", "those that this mask2ct knows")
    digest = text(data["sha256"], f"the sha256 of {name!r}")
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise _no(f"the sha256 of {name!r} is {digest!r:.100}", "64 hexadecimal digits")
    return ModelFile(
        text(data["kind"], f"the kind of {name!r}"),
        text(data["precision"], f"the precision of {name!r}"),
        whole(data["bytes"], f"the size of {name!r}", 1, 1 << 50),
        digest,
        mapping(data.get("facts", {}), f"what is said of {name!r}"),
    )


def _spec(data: Any, what: str) -> TensorSpec:
    data = mapping(data, what)
    name, dtype, shape = (
        data.read("name", text),
        data.read("dtype", text),
        data.read("shape", items),
    )
    if not all(isinstance(side, (int, str)) for side in shape):
        raise _no(f"'shape' of {what} is {shown(shape)}", "integers and names")
    return TensorSpec(name, dtype, tuple(shape))


def labels_to_json(table: LabelTable) -> list[dict[str, Any]]:
    return [
        {
            "index": i,
            "name": x.name,
            "value": x.value,
            "aliases": list(x.aliases),
            "snomed": x.snomed,
        }
        for i, x in enumerate(table.labels)
    ]


def labels_from_json(rows: Iterable[Mapping[str, Any]]) -> LabelTable:
    """Raises KeyError, TypeError or ValueError when a row is wrong or the rows are not in the
    order of their index.
    """
    labels = []
    for position, row in enumerate(items(rows, "'labels'")):
        row = mapping(row, f"row {position} of 'labels'")
        name = row.read("name", text)
        if row.get("index", position) != position:
            raise _no(
                f"label {name!r} has 'index' {shown(row['index'])} at position {position}",
                "labels in the order of their index",
            )
        values = [row["value"], *items(row.get("aliases", ()), f"'aliases' of label {name!r}")]
        value, *aliases = [
            whole(n, f"'value' or one of 'aliases' of label {name!r}", -(1 << 31), (1 << 31) - 1)
            for n in values
        ]
        snomed = row.get("snomed")
        code = None if snomed is None else text(snomed, f"'snomed' of label {name!r}")
        labels.append(Label(name, value, tuple(aliases), code))
    return LabelTable(tuple(labels))


def grid_to_json(grid: GridPolicy) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in vars(grid).items()
    }


def grid_from_json(data: Mapping[str, Any]) -> GridPolicy:
    data = mapping(data, "'grid'")
    height, width = (
        whole(side, "a side of 'canvas'", 1, MAX_CANVAS)
        for side in items(data["canvas"], "'canvas'", 2)
    )
    pixel, apart = data["pixel_spacing"], data["slice_spacing"]
    if pixel is not None:
        pixel = tuple(
            float(number(step, "'pixel_spacing'")) for step in items(pixel, "'pixel_spacing'", 2)
        )
    return GridPolicy(
        canvas=(height, width),
        pixel_spacing=pixel,
        divisor=whole(data["divisor"], "'divisor'", 1, MAX_CANVAS),
        slices=whole(data["slices"], "'slices'", 1, MAX_SLICES),
        slice_spacing=None if apart is None else number(apart, "'slice_spacing'"),
    )
