"""Label values of files → the model's indices 0..K, by a table; nothing is guessed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .contract import Label, LabelTable
from .errors import UnknownLabels, UsageError

# The seven structures of MM-WHS with the values its label files hold, in that order (Zhuang & Shen, Medical Image
# Analysis 31, 2016); the released labels also hold a stray 421, which means 420. Codes: SNOMED CT.
MM_WHS = LabelTable(
    (
        Label("background", 0),
        Label("myocardium", 205, snomed="74281007"),
        Label("left atrium", 420, aliases=(421,), snomed="82471001"),
        Label("left ventricle", 500, snomed="87878005"),
        Label("right atrium", 550, snomed="73829009"),
        Label("right ventricle", 600, snomed="53085002"),
        Label("ascending aorta", 820, snomed="54247002"),
        Label("pulmonary artery", 850, snomed="81040000"),
    )
)
# The same structures numbered 0..7, as slices prepared for the original system hold them.
MM_WHS_INDICES = LabelTable(tuple(Label(x.name, index, snomed=x.snomed) for index, x in enumerate(MM_WHS.labels)))
PRESETS: dict[str, LabelTable] = {"mm-whs": MM_WHS, "mm-whs-indices": MM_WHS_INDICES}

LabelMap = Mapping[int, int]  # file value → model index
MAP_HELP = 'a JSON file such as {"51": "left ventricle", "52": "ascending aorta", "*": "background"}'


def load_map(path: Path, table: LabelTable) -> dict[int | None, int]:
    """Read `--labels MAP.json`: file value → the model's label, by name or by value; "*" is for every other value.

    Returns file value → model index, with None for "*". Raises `UsageError` when the file or an entry is wrong.
    """
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise UsageError(
            f"the label map cannot be read: {exc}", expected=MAP_HELP, remedy="check the path and the JSON", file=path
        ) from exc
    if not isinstance(data, dict) or not data:
        raise UsageError("the label map is not a JSON object with entries", expected=MAP_HELP, remedy="write it as one", file=path)
    result: dict[int | None, int] = {}
    for key, target in data.items():
        index = table.by_name.get(target) if isinstance(target, str) else table.by_value.get(target) if type(target) is int else None
        if index is None:
            raise UsageError(f"the label map sends {key!r} to {target!r}", expected=f"a label of the model, by name or value: {table}",
                             remedy="correct the entry", file=path)  # fmt: skip
        try:
            result[None if key == "*" else int(key)] = index
        except ValueError as exc:
            raise UsageError(
                f"the label map has the key {key!r}", expected='an integer file value, or "*"', remedy="correct the entry", file=path
            ) from exc
    return result


def to_indices(
    values: NDArray[Any], table: LabelTable, label_map: Mapping[int | None, int] | None = None, *, file: Path | None = None
) -> NDArray[np.uint8]:
    """Map an integer array of file values to model indices, same shape, uint8.

    Without `label_map` the table's own values (and aliases) are used. Raises `UnknownLabels`, listing what was found, what
    the model knows and the remedy, when a value has no index.
    """
    found = present_values(values)
    known: dict[int | None, int] = dict(table.by_value.items() if label_map is None else label_map.items())
    rest = known.get(None)
    unknown = [v for v in found if v not in known] if rest is None else []
    if unknown:
        name = "the mask" if file is None else file.name
        raise UnknownLabels(
            f"{name} holds {_listed(unknown)}, which the {'model' if label_map is None else 'label map'} does not know; all its values: {_listed(found)}",
            expected=f"only {table}" if label_map is None else f"only {_listed(sorted(k for k in known if k is not None))}",
            remedy=f"give --labels MAP.json, {MAP_HELP}",
            file=file,
        )
    indices = [known.get(v, rest) for v in found]
    if wrong := [index for index in indices if not isinstance(index, int) or not 0 <= index < len(table)]:
        raise UsageError(f"the label map leads to {wrong[0]!r}", expected=f"model indices 0 to {len(table) - 1}: {table}",
                         remedy="map to indices, or read a map with runtime.labels.load_map", file=file)  # fmt: skip
    targets = np.asarray(indices, np.uint8)
    order = np.asarray(found)
    out = np.empty(values.shape, np.uint8)
    if found and found[0] >= 0 and found[-1] < 1 << 16:
        lut = np.zeros(found[-1] + 1, np.uint8)
        lut[order] = targets
        for n, plane in enumerate(values):  # plane by plane: no wide copy of the volume is ever made
            out[n] = lut[plane]
    else:  # negative or sparse values
        for n, plane in enumerate(values):
            out[n] = targets[np.searchsorted(order, plane)]
    return out


def present_values(values: NDArray[Any]) -> list[int]:
    """The distinct values of an integer array (D, H, W), ascending."""
    found: set[int] = set()
    for plane in values:
        if plane.dtype.kind == "u" and plane.dtype.itemsize <= 2:
            found.update(np.flatnonzero(np.bincount(plane.ravel())).tolist())
        else:
            found.update(np.unique(plane).tolist())
    return sorted(found)


def _listed(values: list[int], most: int = 24) -> str:
    shown = ", ".join(str(v) for v in values[:most])
    return shown + (f", … ({len(values)} values)" if len(values) > most else "")
