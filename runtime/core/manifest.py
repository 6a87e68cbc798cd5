"""The contract between training, export and runtime: `manifest.json` as typed, validated data.

The exported graph computes everything between a label mask and Hounsfield units. The runtime needs
only these tensors:

    in   labels  uint8   [N, Z, H, W]   model indices of Z neighbouring axial slices; the network
                                        synthesizes the middle one
    in   style   float32 [N, S]         optional: one vector per volume, for patient and scanner
    in   noise   uint8   [N, H, W]      optional: white noise that the network turns into CT texture
    out  ct      uint8   [N, H, W, 2]   int16 as little-endian bytes: `.view("<i2")[..., 0]` does
                                        not copy

This module imports only the standard library, because training and export use it as well.
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
from .context import MAX_CLASSES as MAX_LABELS
from .context import Context
from .errors import ModelError, reading

SCHEMA_VERSION = 2
# Of a manifest with 'context' or 'noise_along_z', which an older mask2ct would pass over.
CONTEXT_VERSION = 3
MANIFEST = "manifest.json"
# What the images may be; the names of results follow it.
MODALITIES = ("CT", "MR", "other")
METADATA = "mask2ct"  # the key of the signature in a graph file
# The limits of a manifest: far beyond any network, and low enough that a manifest cannot fill the
# memory of a machine.
MAX_BYTES = 4 << 20  # of manifest.json
MAX_CANVAS, MAX_SLICES, MAX_STYLE = 8192, 255, 4096
MIN_SPACING, MAX_SPACING = 1e-6, 1000.0  # mm


@dataclass(frozen=True)
class Label:
    """One class.

    Attributes:
        name: The name of the structure.
        value: Its value in files.
        aliases: Other values with the same meaning (MM-WHS: 421 is 420).
        snomed: The SNOMED CT code of the structure, if it has one.
    """

    name: str
    value: int
    aliases: tuple[int, ...] = ()
    snomed: str | None = None


@dataclass(frozen=True)
class LabelTable:
    """The classes in the model's order.

    Attributes:
        labels: The classes; the first one is the background, the voxels without a label.

    Raises:
        ValueError: There are too few or too many classes, or a name or a value occurs twice.
    """

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
        if repeated_names := [name for name, count in Counter(names).items() if count > 1]:
            raise _no(f"label name {repeated_names[0]!r} occurs twice", "each once")
        if repeated := [value for value, count in Counter(values).items() if count > 1]:
            raise _no(
                f"label value {repeated[0]} occurs twice in 'value' and 'aliases' of 'labels'",
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
        """Label name → model index."""
        return {label.name: index for index, label in enumerate(self.labels)}

    def __str__(self) -> str:
        return ", ".join(f"{label.value} {label.name}" for label in self.labels)


@dataclass(frozen=True)
class GridPolicy:
    """How a mask's grid is resampled to the model's canvas, and the synthetic CT back.

    Labels are resampled with the nearest neighbour, the CT linearly (`runtime.core.resampling`).

    Attributes:
        canvas: (H, W) in pixels, as in training; multiples of `divisor`.
        pixel_spacing: (row, column) distance of pixels in mm; the canvas grows only where labels
            need it. None fits each slice to the canvas, whatever its size in mm.
        divisor: What the network needs H and W to be multiples of.
        slices: Z, the slices of one input; odd.
        slice_spacing: Distance of these slices in mm; None when Z = 1.

    Raises:
        ValueError: A value is out of its range.
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
    """The meaning of the output's numbers.

    Attributes:
        unit: "HU", or "a.u." for MR.
        low: The lowest value that the model can synthesize, in that unit.
        high: The highest one.

    Raises:
        ValueError: The range is empty or beyond int16.
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

    Attributes:
        name: The name of the tensor in the graph.
        dtype: The name of its dtype.
        shape: Its dimensions; "N", "H" and "W" for those that the caller chooses.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def tensor_specs(slices: int, style: int, noise: bool) -> tuple[tuple[TensorSpec, ...], TensorSpec]:
    """The tensors that the contract prescribes.

    Args:
        slices: Z, the slices of one input.
        style: S, the length of the style vector; 0 for a model without one.
        noise: Whether the model has a noise input.

    Returns:
        The inputs and the output.
    """
    inputs = [TensorSpec("labels", "uint8", ("N", slices, "H", "W"))]
    if style:
        inputs.append(TensorSpec("style", "float32", ("N", style)))
    if noise:
        inputs.append(TensorSpec("noise", "uint8", ("N", "H", "W")))
    return tuple(inputs), TensorSpec("ct", "uint8", ("N", "H", "W", 2))


@dataclass(frozen=True)
class ModelFile:
    """One file of a model folder.

    Attributes:
        kind: Its role: "onnx", "engine" (TensorRT), "rtx-engine" (TensorRT for RTX), "layers" or
            "layout" (`runtime.core.layout_model`).
        precision: Its precision.
        bytes: Its size in bytes.
        sha256: Its SHA-256, 64 hexadecimal digits.
        facts: The conditions of an engine (TensorRT's version, compute capability, shapes, device
            memory); empty for a graph.
    """

    kind: str
    precision: str
    bytes: int
    sha256: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The description of a model folder (JSON Schema: manifest.schema.json, beside this module).

    Attributes:
        name: The name of the model.
        labels: Its classes.
        grid: How a mask is resampled for it.
        intensity: The meaning of its output.
        style: S, the length of the style vector; 0 for a model without one.
        noise: Whether it has a noise input.
        files: The files of the folder, by name.
        parity: File name → backend → the measurements of export: errors against the network in HU,
            slices/s, versions.
        training: How training made the weights.
        export: How export made the files.
        license: The license of the weights.
        context: Its classes for voxels without a label; None for a model that has none.
        noise_along_z: The share of a neighbouring slice's noise in a slice's noise, relative to
            that of its own (`runtime.core.rng`); 0: the noise of each slice is its own.
        derived: The CTs are real CTs, deformed, and not synthetic. No model folder says so.
        modality: One of `MODALITIES`, which names of results follow; empty: the model does not
            state it, as older ones, and its results are named like CTs.

    Raises:
        ValueError: There is no such modality.
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
    context: Context | None = None
    noise_along_z: float = 0.0
    derived: bool = False
    modality: str = ""

    def __post_init__(self) -> None:
        if self.modality and self.modality not in MODALITIES:
            raise _no(f"'modality' is {shown(self.modality)}", f"one of {', '.join(MODALITIES)}")

    @property
    def classes(self) -> int:
        """The number of classes of the graph: 1 + expert labels + context classes."""
        return len(self.labels) + (0 if self.context is None else len(self.context))

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs of the graph, in their order."""
        return tensor_specs(self.grid.slices, self.style, self.noise)[0]

    @property
    def output(self) -> TensorSpec:
        """The output of the graph."""
        return tensor_specs(self.grid.slices, self.style, self.noise)[1]

    def file_of(self, kind: str, precision: str) -> str | None:
        """The name of a file, or None.

        Args:
            kind: Its role, as in `ModelFile`.
            precision: Its precision.
        """
        return next(
            (name for name, f in self.files.items() if (f.kind, f.precision) == (kind, precision)),
            None,
        )

    def signature(self) -> str:
        """The signature of a graph for this manifest, as JSON.

        Export writes it into each graph file, so that a graph for other labels, inputs or
        intensities is recognized.
        """
        intensity = [self.intensity.unit, self.intensity.low, self.intensity.high]
        labels = [[label.name, label.value] for label in self.labels.labels]
        signature = {
            "labels": labels,
            "slices": self.grid.slices,
            "divisor": self.grid.divisor,
            "style": self.style,
            "noise": self.noise,
            "intensity": intensity,
        }
        if self.context is not None:
            signature["context"] = list(self.context.names)
        return json.dumps(signature)

    def check_signature(self, stated: str | None, path: Path) -> None:
        """Compare the signature of a graph file with this manifest.

        Args:
            stated: The signature in the file; None for a file without one.
            path: The file, for the message.

        Raises:
            ModelError: The graph was exported for other labels, inputs or intensities.
        """
        expected = json.loads(self.signature())
        try:
            signature = json.loads(stated or "{}")
            wrong = {
                key: signature.get(key) for key in expected if signature.get(key) != expected[key]
            }
        except (ValueError, AttributeError, RecursionError):
            wrong = {"signature": stated}
        if wrong:
            raise ModelError(
                f"{path.name} was exported for other {', '.join(wrong)}: {json.dumps(wrong)[:300]}",
                expected=(
                    f"what {MANIFEST} says:"
                    f" {json.dumps({key: expected.get(key) for key in wrong})[:300]}"
                ),
                remedy="restore the model folder, or export the run again",
                file=path,
            )

    def to_json(self) -> dict[str, Any]:
        """The content of `manifest.json`."""
        data = {
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
        # Absent where they say nothing: the resume key of an older model is a hash of all this.
        if self.modality:
            data["modality"] = self.modality
        if self.context is not None:
            data["context"] = self.context.to_json()
        if self.noise_along_z:
            data["noise_along_z"] = self.noise_along_z
        if {"context", "noise_along_z"} & set(data):
            data["schema_version"] = CONTEXT_VERSION
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Check the content of `manifest.json` and build the manifest from it.

        Args:
            data: The parsed JSON.

        Raises:
            ValueError: A key is missing or its value is wrong. The text says which.
        """
        data = mapping(data, "the manifest")
        if data["schema_version"] not in (SCHEMA_VERSION, CONTEXT_VERSION):
            raise _no(
                f"'schema_version' is {shown(data['schema_version'])}",
                f"{SCHEMA_VERSION} or {CONTEXT_VERSION}, which this mask2ct reads",
            )
        intensity = mapping(data["intensity"], "'intensity'")
        files = mapping(data["files"], "'files'")
        described = {
            key: mapping(data.get(key, {}), f"{key!r}") for key in ("parity", "training", "export")
        }
        for name, measurements in described["parity"].items():
            mapping(measurements, f"the parity of {name!r}")
        if type(data["noise"]) is not bool:
            raise _no(f"'noise' is {shown(data['noise'])}", "true or false")
        labels = labels_from_json(data["labels"])
        context = data.get("context")
        manifest = cls(
            name=text(data["name"], "'name'"),
            labels=labels,
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
            modality=text(data.get("modality", ""), "'modality'"),
            parity=described["parity"],
            training=described["training"],
            export=described["export"],
            context=None if context is None else Context.from_json(context, len(labels)),
            noise_along_z=float(data.read_or("noise_along_z", number, 0.0)),
        )
        if not 0 <= manifest.noise_along_z <= 1:
            raise _no(f"'noise_along_z' is {manifest.noise_along_z}", "a number from 0 to 1")
        if context is not None and manifest.style not in (0, manifest.classes):
            raise _no(
                f"'style' is {manifest.style}", f"0 or {manifest.classes}, one for each class"
            )
        inputs = [_spec(s, "a part of 'inputs'") for s in items(data["inputs"], "'inputs'")]
        outputs = [_spec(data["output"], "'output'")]
        for key, stated, prescribed in (
            ("inputs", inputs, [*manifest.inputs]),
            ("output", outputs, [manifest.output]),
        ):
            if stated != prescribed:
                raise _no(
                    f"{key!r} does not fit 'slices', 'style' and 'noise'",
                    "the tensors that the contract prescribes",
                )
        return manifest

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read `manifest.json` of a model folder; the other files are not read.

        Args:
            folder: The model folder.

        Raises:
            ModelError: The manifest is missing or wrong.
        """
        path = folder / MANIFEST
        remedy = "point --model at a folder that `python export/build_engine.py RUN -o MODEL` wrote"
        with reading(folder, "a folder with manifest.json", ModelError):
            is_folder, has_manifest = folder.is_dir(), path.exists()
        if not is_folder:
            raise ModelError(
                f"model folder {folder} does not exist",
                expected="a folder with manifest.json",
                remedy=remedy,
                file=folder,
            )
        if not has_manifest:
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
        """Compare the size and SHA-256 of files with the manifest.

        Args:
            folder: The model folder.
            names: The names of the files.

        Raises:
            ModelError: A file is missing or differs.
        """
        remedy = "copy the model folder again from where it was built"
        for name in names:
            path, stated = folder / name, self.files[name]
            expected = f"{stated.bytes} bytes with sha256 {stated.sha256}"
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
    """Check one entry of 'files'."""
    data = mapping(data, f"the file {name!r}")
    if Path(name).name != name or name == ".." or "\\" in name:
        raise _no(f"file name {name!r}", "a plain name in the model folder")
    if unknown := set(data) - {"kind", "precision", "bytes", "sha256", "facts"}:
        raise _no(
            f"the file {name!r} has a key {min(unknown)!r}", "only keys that this mask2ct knows"
        )
    digest = text(data["sha256"], f"the sha256 of {name!r}")
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise _no(f"the sha256 of {name!r} is {digest!r:.100}", "64 hexadecimal digits")
    return ModelFile(
        text(data["kind"], f"the kind of {name!r}"),
        text(data["precision"], f"the precision of {name!r}"),
        whole(data["bytes"], f"the size of {name!r}", 1, 1 << 50),
        digest,
        mapping(data.get("facts", {}), f"the facts of {name!r}"),
    )


def _spec(data: Any, what: str) -> TensorSpec:
    """Check one input or output."""
    data = mapping(data, what)
    name, dtype = data.read("name", text), data.read("dtype", text)
    shape = data.read("shape", items)
    if not all(isinstance(side, (int, str)) for side in shape):
        raise _no(f"'shape' of {what} is {shown(shape)}", "integers and names")
    return TensorSpec(name, dtype, tuple(shape))


def labels_to_json(table: LabelTable) -> list[dict[str, Any]]:
    """The rows of 'labels' in `manifest.json`.

    Args:
        table: The classes.
    """
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
    """Check the rows of 'labels' and build the label table from them.

    Args:
        rows: The rows in the order of their index.

    Raises:
        ValueError: A row is wrong or out of order. The text says which.
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
    """The object 'grid' of `manifest.json`.

    Args:
        grid: The policy.
    """
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in vars(grid).items()
    }


def grid_from_json(data: Mapping[str, Any]) -> GridPolicy:
    """Check the object 'grid' and build the policy from it.

    Args:
        data: The parsed JSON.

    Raises:
        ValueError: A key is missing or its value is wrong. The text says which.
    """
    data = mapping(data, "'grid'")
    height, width = (
        whole(side, "a side of 'canvas'", 1, MAX_CANVAS)
        for side in items(data["canvas"], "'canvas'", 2)
    )
    pixel_spacing, slice_spacing = data["pixel_spacing"], data["slice_spacing"]
    if pixel_spacing is not None:
        pixel_spacing = tuple(
            float(number(step, "'pixel_spacing'"))
            for step in items(pixel_spacing, "'pixel_spacing'", 2)
        )
    return GridPolicy(
        canvas=(height, width),
        pixel_spacing=pixel_spacing,
        divisor=whole(data["divisor"], "'divisor'", 1, MAX_CANVAS),
        slices=whole(data["slices"], "'slices'", 1, MAX_SLICES),
        slice_spacing=(None if slice_spacing is None else number(slice_spacing, "'slice_spacing'")),
    )
