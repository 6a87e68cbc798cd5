"""The structures of a file → the model's indices 0..K, by a table and never by a guess.

A file identifies a structure by its value and, in DICOM and in Slicer's files, also by a coded type
and a name. The code counts first, then the name, then the code without its modifiers, then the
value. The same order holds for the model's table and for a MAP.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .atomic_files import read_text
from .errors import InputError, UnknownLabels, UsageError
from .intensity_check import Census
from .label_codes import LEFT, RIGHT, canonical, is_code, sides, unmodified
from .label_presets import CLASSES, MM_WHS, MM_WHS_INDICES, PRESETS, STANDS_FOR, class_names
from .manifest import LabelTable
from .volume import Layers, Segment, runs

__all__ = [
    "MM_WHS",
    "MM_WHS_INDICES",
    "PRESETS",
    "LabelMap",
    "listed",
    "load_map",
    "lost",
    "match",
    "names_of",
    "overlay",
    "refuse_contradictions",
    "segment_names",
    "to_indices",
    "where_names_are",
]

# A value, a code (as `runtime.core.label_codes.canonical` writes it) or a name (as `plain` writes
# it) → model index. None stands for every other structure.
LabelMap = Mapping[int | str | None, int]
MAP_HELP = (
    'a JSON file such as {"51": "left ventricle", "SCT:54247002": "ascending aorta", "*":'
    ' "background"}'
)
# Names and codes that do not identify a structure, so that its number may count: "Segment_3",
# "ROI 3", "3"; tissue, organ, body structure, region of interest.
_NUMBERED = re.compile(r"(segment|label|roi|region|structure|class)?[ #.-]*\d*")
_GENERIC = {"sct:85756007", "sct:113343008", "sct:123037004", "sct:91723000", "dcm:111099"}

# Published coding schemes, and the form of their codes (DICOM PS3.16, 8.2).
_PUBLIC = {
    "SCT": r"\d{6,18}",
    "SRT": r"[A-Z]-[0-9A-F]{4,5}",
    "DCM": r"\d{4,6}",
    "FMA": r"\d{1,7}",
    "UMLS": r"C\d{7}",
    "NCIT": r"C\d{1,7}",
    "RADLEX": r"RID\d{1,6}",
    "LN": r"\d{1,7}-\d",
    "UBERON": r"\d{7}",
}


class Preset(dict[int | str | None, int]):
    """The label map of a preset: the names that a file gives its values must agree with it.

    Args:
        name: The preset's name.
        entries: Keys as `LabelMap` has them → model index.
    """

    def __init__(self, name: str, entries: LabelMap):
        super().__init__(entries)
        self.name = name

    def __reduce__(self) -> tuple[type[Preset], tuple[str, dict[int | str | None, int]]]:
        return Preset, (self.name, dict(self))


def plain(text: str) -> str:
    """A name in the form that is compared: lower case, single blanks, no underscores.

    Args:
        text: The name as a file or a person writes it.
    """
    return " ".join(text.replace("_", " ").casefold().split())


def load_map(
    source: str | Path, table: LabelTable, other_tables: Sequence[LabelTable] = ()
) -> dict[int | str | None, int]:
    """Read `--labels MAP.json`, or take the preset of that name.

    A key of the file is a value, a code ("SCT:80891009", with modifiers
    "SCT:59652004+SCT:7771000") or a name; "*" stands for every other structure. The key leads to
    a label of the model, by its name or its value.

    Args:
        source: The file, or the name of a preset.
        table: The label table of the model.
        other_tables: Label tables of other models that the same file serves. Entries that lead to
            their labels alone are left out.

    Returns:
        Keys as `LabelMap` has them → model index.

    Raises:
        UsageError: The file or an entry is wrong.
    """
    if str(source) in PRESETS:
        return _preset(str(source), table)
    path, data = Path(source), _entries(Path(source))
    result: dict[int | str | None, int] = {}
    for key, target in data.items():
        index = (
            table.by_name.get(target)
            if isinstance(target, str)
            else table.by_value.get(target)
            if type(target) is int
            else None
        )
        if (
            index is None
            and isinstance(target, (str, int))
            and any(target in t.by_name or target in t.by_value for t in other_tables)
        ):
            continue
        if index is None:
            raise UsageError(
                f"the label map sends {key!r} to {target!r}",
                expected=f"a label of the model, by name or value: {table}",
                remedy="correct the entry",
                file=path,
            )
        parsed = _key(key)
        if result.get(parsed, index) != index or parsed == "":
            raise UsageError(
                f"the label map has the key {key!r} twice, or it is empty",
                expected="each value, code and name once",
                remedy="correct the entry",
                file=path,
            )
        result[parsed] = index
    return result


def names_of(source: str | Path | LabelMap | None, tables: Iterable[LabelTable]) -> frozenset[str]:
    """The names of structures in a label map and in the label tables of models.

    Args:
        source: The label map, its file, or the name of a preset; None for tables alone.
        tables: The label tables of the models.

    Returns:
        The names as `plain` writes them.

    Raises:
        UsageError: The file is wrong.
    """
    names = {label.name for table in tables for label in table.labels[1:]}
    if isinstance(source, Mapping):
        names |= {key for key in source if isinstance(key, str) and not is_code(key)}
    elif source is not None and str(source) in PRESETS:
        names |= {name for value, name in class_names(str(source)).items() if value}
    elif source is not None:
        names |= {
            key for key in _entries(Path(source)) if isinstance(_key(key), str) and not is_code(key)
        }
    return frozenset(map(plain, names))


def read_entries(path: Path, *, parsed: bool = False) -> dict[Any, Any]:
    """Read the entries of a MAP.json.

    Args:
        path: The file.
        parsed: Return the keys as `LabelMap` has them, instead of the keys as written.

    Raises:
        UsageError: The file cannot be read, or is not a JSON object with entries.
    """
    entries = _entries(path)
    return {_key(key): target for key, target in entries.items()} if parsed else entries


def code_of(segment: Segment) -> str:
    """A structure's code as `LabelMap` has it; empty for a structure without a code.

    Args:
        segment: The structure.
    """
    return canonical(segment.code) if segment.code else ""


def _entries(path: Path) -> dict[str, Any]:
    """The entries of a MAP.json, with the keys as written."""
    try:
        data: Any = json.loads(read_text(path, encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as exc:
        raise UsageError(
            f"the label map cannot be read: {exc}",
            expected=f"{MAP_HELP}, or one of {', '.join(PRESETS)}",
            remedy="check the path and the JSON",
            file=path,
        ) from exc
    if not isinstance(data, dict) or not data:
        raise UsageError(
            "the label map is not a JSON object with entries",
            expected=MAP_HELP,
            remedy="write it as one",
            file=path,
        )
    return data


def _key(text: str) -> int | str | None:
    """A key of a MAP.json as `LabelMap` has it."""
    if text == "*":
        return None
    if re.fullmatch(r"\s*[+-]?\d{1,18}\s*", text):
        return int(text)
    return canonical(text) if is_code(text) else plain(text)


def _preset(name: str, table: LabelTable) -> Preset:
    """The preset's values → the model's label of the same code or name.

    A structure that the model has no label for becomes its background.
    """
    table_map = _table_map(table)
    result: dict[int | str | None, int] = {}
    for value, class_name in CLASSES.get(name, {}).items():
        result.update({value: 0, plain(class_name): 0})
    for label in PRESETS[name].labels:
        keys = [
            f"sct:{label.snomed}",
            f"sct:{STANDS_FOR.get(label.snomed or '')}",
            plain(label.name),
        ]
        index = next((table_map[key] for key in keys if key in table_map), 0)
        result.update(dict.fromkeys((label.value, *label.aliases), index))
        result.update(
            {key: index for key in (keys[0], keys[2]) if label.value and key != "sct:None"}
        )
    return Preset(name, result)


def lost(name: str, table: LabelTable) -> list[str]:
    """The structures of a preset that become background, because the model has no label for them.

    Args:
        name: The preset's name.
        table: The label table of the model.

    Returns:
        "VALUE NAME" of each.
    """
    mapped = _preset(name, table)
    return [
        f"{label.value} {label.name}"
        for label in PRESETS[name].labels[1:]
        if mapped[label.value] == 0
    ]


@lru_cache(maxsize=16)
def _table_map(table: LabelTable) -> LabelMap:
    """The codes, names and values of a model's label table as a label map."""
    entries: dict[int | str | None, int] = dict(table.by_value.items())
    entries.update({plain(name): index for name, index in table.by_name.items()})
    entries.update(
        {f"sct:{label.snomed}": index for index, label in enumerate(table.labels) if label.snomed}
    )
    return entries


def match(segment: Segment, table: LabelTable, label_map: LabelMap | None = None) -> int | None:
    """The model's index for a structure.

    Its code counts first, then its name, its code without modifiers, its number, and "*". Without
    a `label_map` the number counts only where code and name do not identify a structure
    ("Segment_3", tissue): the third segment of a file need not be the model's third label. A code
    without modifiers does not match a label of the other side: a right atrium is not a "left
    atrium".

    Args:
        segment: The structure.
        table: The label table of the model.
        label_map: The map to use instead of the table's codes, names and values.

    Returns:
        The index, or None where nothing matches.
    """
    entries: LabelMap = _table_map(table) if label_map is None else label_map
    full_code, base_code = _code_keys(segment)
    name = plain(segment.name)
    for key in (full_code, name):
        if key and key in entries:
            return entries[key]
    if base_code in entries and not _is_other_side(segment, table, entries[base_code]):
        return entries[base_code]
    number_counts = label_map is not None and not (
        segment.strict and (segment.number < 0 or isinstance(label_map, Preset))
    )
    is_generic = _NUMBERED.fullmatch(name) and (not full_code or full_code in _GENERIC)
    if number_counts or is_generic:
        return entries.get(segment.number, entries.get(None))
    return entries.get(None)


def _code_keys(segment: Segment) -> tuple[str, str]:
    """A structure's code in the form that is compared, and the code without its modifiers.

    The first is empty for a structure without a code, the second for a code without modifiers.
    """
    if not segment.code:
        return "", ""
    full_code, base_code = canonical(segment.code), unmodified(segment.code)
    return full_code, base_code if base_code != full_code else ""


def _is_other_side(segment: Segment, table: LabelTable, index: int) -> bool:
    """Whether a label of the model lies on the other side than a structure."""
    segment_sides, label = sides(segment.code), table.labels[index]
    words = set(plain(label.name).split())
    label_sides = sides(f"SCT:{label.snomed}") | {
        side for word, side in (("left", LEFT), ("right", RIGHT)) if word in words
    }
    return bool(label_sides) and not segment_sides <= label_sides


def _refuse_unmapped(
    segments: Sequence[Segment],
    table: LabelTable,
    label_map: LabelMap | None = None,
    *,
    file: Path | None = None,
) -> None:
    """Raise `UnknownLabels` for structures without an index, and as `refuse_contradictions`."""
    refuse_contradictions(segments, table, label_map, file=file)
    _refuse(
        [s for s in segments if match(s, table, label_map) is None],
        segments,
        table,
        label_map,
        file,
    )


def refuse_contradictions(
    segments: Sequence[Segment],
    table: LabelTable,
    label_map: LabelMap | None = None,
    *,
    file: Path | None = None,
) -> None:
    """Refuse a file whose names contradict the preset, or whose structures would merge.

    Args:
        segments: The structures of the file.
        table: The label table of the model.
        label_map: The map to use instead of the table's codes, names and values.
        file: The file, for the message.

    Raises:
        UnknownLabels: The file's names are not those of the preset, or different structures
            would become one label by a part of their code or by a name that they share.
    """
    if isinstance(label_map, Preset):
        _refuse_misnamed(
            [s for s in segments if match(s, table, label_map) is None], label_map.name, file
        )
    _refuse_merged(segments, table, label_map, file)


def _refuse_merged(
    segments: Sequence[Segment], table: LabelTable, label_map: LabelMap | None, file: Path | None
) -> None:
    """Raise where structures of different codes would become one label.

    That happens where the map has their type without modifiers, or a name that both sides have.
    Structures that become background do not count.
    """
    entries: LabelMap = _table_map(table) if label_map is None else label_map
    groups: dict[str, list[Segment]] = {}
    for segment in segments:
        full_code, base_code = _code_keys(segment)
        names = (full_code, plain(segment.name), base_code)
        key = next((name for name in names if name and name in entries), "")
        if key:
            groups.setdefault(key, []).append(segment)
    for key, group in groups.items():
        codes = {canonical(s.code): s for s in group if s.code}
        of_both_sides = {LEFT, RIGHT} <= set().union(*(sides(code) for code in codes))
        by_name = any(key == plain(s.name) for s in codes.values())
        if entries[key] and len(codes) > 1 and (of_both_sides or not by_name):
            first, second = [*codes.values()][:2]
            source = "model" if label_map is None else "label map"
            entry = key.upper() if is_code(key) else repr(key)
            raise UnknownLabels(
                f"{'the mask' if file is None else file.name} holds {describe(first)} and"
                f" {describe(second)}, and the {source} has {entry} alone, which would make both"
                f" {table.labels[entries[key]].name}",
                expected="an entry for each of the two",
                remedy=(
                    f"give --labels MAP.json with the complete codes as keys: {_as_key(first)} and"
                    f" {_as_key(second)}"
                ),
                file=file,
            )


def describe(segment: Segment) -> str:
    """A structure for a message: 3 'left ventricle' (SCT:87878005).

    A structure of a DICOM source has no name there, and a code only of a public scheme: the words
    of the source may identify a patient.

    Args:
        segment: The structure.
    """
    number = "" if segment.strict and segment.number < 0 else str(segment.number)
    name = repr(segment.name) if segment.name and not segment.private else ""
    code = (
        ""
        if not segment.code or (segment.private and not _is_public(segment.code))
        else f"({segment.code})"
    )
    return " ".join(text for text in (number, name, code) if text)


def _as_key(segment: Segment) -> str:
    """A structure's code as the key of a map, for a message."""
    hidden = segment.private and not _is_public(segment.code)
    return (
        f"the code that mask2ct labels FILE shows of {segment.number}"
        if hidden
        else f'"{segment.code}"'
    )


def _is_public(code: str) -> bool:
    """Whether a code and its modifiers have a published scheme and the form of its codes.

    Such a code cannot hold words about a patient.
    """
    parts = [part.strip().partition(":") for part in code.split("+")]
    return all(
        re.fullmatch(_PUBLIC.get(scheme.upper(), r"(?!)"), value) for scheme, _, value in parts
    )


def where_names_are(segments: Iterable[Segment]) -> str:
    """The end of a remedy where `describe` leaves names out; else empty.

    Args:
        segments: The structures that the message describes.
    """
    return (
        "; mask2ct labels FILE shows the names"
        if any(segment.private and segment.name for segment in segments)
        else ""
    )


def to_indices(
    values: NDArray[Any],
    table: LabelTable,
    label_map: LabelMap | None = None,
    *,
    segments: Sequence[Segment] = (),
    force: bool = False,
    file: Path | None = None,
) -> NDArray[np.uint8]:
    """Map an array of file values to model indices.

    Args:
        values: Integers (D, H, W).
        table: The label table of the model.
        label_map: The map to use instead of the table's codes, names and values.
        segments: The structures that the file names, if it names any.
        force: Accept values that look like an image.
        file: The file, for messages.

    Returns:
        uint8 (D, H, W).

    Raises:
        UnknownLabels: A value has no index. The message lists the values of the mask and of the
            model.
        UnreadableVolume: The values are an image, not labels, and `force` is not set.
        UsageError: The map leads to an index that the model does not have.
    """
    out = np.empty(values.shape, np.uint8)
    for n, plane in enumerate(
        index_planes(values, table, label_map, segments=segments, force=force, file=file)
    ):
        out[n] = plane
    return out


def index_planes(
    planes: Iterable[NDArray[Any]],
    table: LabelTable,
    label_map: LabelMap | None = None,
    *,
    segments: Sequence[Segment] = (),
    force: bool = False,
    file: Path | None = None,
) -> Iterator[NDArray[np.uint8]]:
    """Map planes of file values to model indices, one after the other.

    Args:
        planes: Integer planes (H, W).
        table: The label table of the model.
        label_map: The map to use instead of the table's codes, names and values.
        segments: The structures that the file names, if it names any.
        force: Accept values that look like an image.
        file: The file, for messages.

    Yields:
        uint8 planes (H, W). An unknown value has index 0 until the last plane has been mapped.

    Raises:
        InputError: After the last plane, as `to_indices`.
        UsageError: The map leads to an index that the model does not have.
    """
    named = {segment.number: segment for segment in segments}
    index_of: dict[int, int | None] = {}
    if segments and 0 not in named:  # voxels outside every segment
        index_of[0] = match(Segment(0), table, label_map) or 0
    _check_map(label_map, table, file)
    census = Census()
    for plane in planes:
        # By runs of equal values: one lookup per voxel takes three times as long.
        values, lengths = runs(plane)
        distinct, positions = census.add(values, lengths)
        for value in distinct.tolist():
            if value not in index_of:
                index_of[value] = match(named.get(value, Segment(value)), table, label_map)
        indices = np.array([index_of[value] or 0 for value in distinct.tolist()], np.uint8)
        yield np.repeat(indices[positions], lengths).reshape(plane.shape)
    if not force:
        census.refuse_image(file)
    present = [named.get(value, Segment(value)) for value in sorted(census.voxels)]
    refuse_contradictions(present, table, label_map, file=file)
    _refuse([s for s in present if index_of[s.number] is None], present, table, label_map, file)


def overlay(
    layers: Layers,
    table: LabelTable,
    label_map: LabelMap | None = None,
    *,
    order: Sequence[str] = (),
    file: Path | None = None,
) -> NDArray[np.uint8]:
    """Map segments that may overlap to model indices.

    Where segments of different labels overlap, the first one in `order` wins, and one in `order`
    wins over one that is not in it. Segments that map to the background are left out.

    Args:
        layers: The segments.
        table: The label table of the model.
        label_map: The map to use instead of the table's codes, names and values.
        order: Segments by code, name, number or model label, the winning one first.
        file: The file, for messages.

    Returns:
        uint8 (D, H, W).

    Raises:
        UnknownLabels: A segment has no index.
        InputError: `order` does not decide an overlap. The message lists the pairs.
        UsageError: The map leads to an index that the model does not have.
    """
    _check_map(label_map, table, file)
    _refuse_unmapped(layers.segments, table, label_map, file=file)
    targets = [match(segment, table, label_map) for segment in layers.segments]
    # Owner → model index. Owner n is the n-th segment, owner 0 none.
    lut = np.array([0, *(index or 0 for index in targets)], np.uint8)
    segment_ranks = (
        _rank(segment, table.labels[index or 0].name, order)
        for segment, index in zip(layers.segments, targets, strict=True)
    )
    ranks = np.array([len(order), *segment_ranks])
    number = {segment.number: n + 1 for n, segment in enumerate(layers.segments)}
    owners = np.zeros(layers.shape, np.uint8 if len(lut) <= 256 else np.uint16)
    conflicts: dict[tuple[int, int], int] = {}
    for value, k, piece in layers.pieces():
        new = number[value]
        rows = np.flatnonzero(piece.any(axis=1))
        if lut[new] == 0 or not rows.size:
            continue
        plane, mask = owners[k, rows[0] : rows[-1] + 1], piece[rows[0] : rows[-1] + 1]
        current = plane[mask]
        if current.any():
            rivals = (current != 0) & (lut[current] != lut[new])
            for old in np.unique(current[rivals & (ranks[current] == ranks[new])]).tolist():
                pair = (min(old, new), max(old, new))
                conflicts[pair] = conflicts.get(pair, 0) + int(np.count_nonzero(current == old))
            current[(current == 0) | (ranks[current] > ranks[new])] = new
            plane[mask] = current
        else:
            plane[mask] = new
    if conflicts:
        name = "the mask" if file is None else file.name
        pairs = [
            f"{describe(layers.segments[a - 1])} and {describe(layers.segments[b - 1])} in {n}"
            " voxels"
            for (a, b), n in conflicts.items()
        ]
        raise InputError(
            f"segments of {name} overlap: {'; '.join(pairs[:6])}{'; …' if len(pairs) > 6 else ''}",
            expected="one label per voxel",
            remedy="name the segment that wins first: --overlap-order NAME,NAME"
            + where_names_are(layers.segments),
            file=file,
        )
    if owners.dtype == np.uint8:
        for plane in owners:
            plane[...] = lut[plane]
        return owners
    return lut[owners]


def segment_names(segment: Segment) -> set[str]:
    """All names that a person may use for a structure, as `plain` writes them.

    Args:
        segment: The structure.

    Returns:
        Its code, also without modifiers, its name and its number.
    """
    code_keys = _code_keys(segment)
    names = {plain(segment.code), *code_keys, plain(segment.name), str(segment.number)}
    return names - {""}


def _rank(segment: Segment, label: str, order: Sequence[str]) -> int:
    """The position of a structure or its label in `order`; its length where it is not in it."""
    names = segment_names(segment) | {plain(label)}
    return next((n for n, name in enumerate(order) if plain(name) in names), len(order))


def _refuse(
    unknown: Sequence[Segment],
    present: Sequence[Segment],
    table: LabelTable,
    label_map: LabelMap | None,
    file: Path | None,
) -> None:
    """Raise for `unknown`, the structures without an index, among all that are `present`."""
    if unknown:
        name = "the mask" if file is None else file.name
        source = "model" if label_map is None else "label map"
        by_name = all(segment.strict and segment.number < 0 for segment in unknown)
        keys = sorted(
            (k for k in label_map or () if k is not None),
            key=lambda k: (isinstance(k, str) != by_name, k),
        )
        raise UnknownLabels(
            f"{name} holds {listed(unknown)}, which the {source} does not know; all its values:"
            f" {listed(present)}",
            expected=(
                f"only {table}" if label_map is None else f"only {', '.join(map(str, keys[:40]))}"
            ),
            remedy=(
                f"give {_presets_for(present)}--labels MAP.json,"
                f" {MAP_HELP}{where_names_are(present)}"
            ),
            file=file,
        )


def _presets_for(segments: Sequence[Segment]) -> str:
    """The presets that know every structure by its name, as the start of a remedy."""
    names = {plain(segment.name) for segment in segments if segment.number}
    return "".join(
        f"--labels {preset} or " for preset in PRESETS if names and names <= names_of(preset, ())
    )


def _refuse_misnamed(unknown: Sequence[Segment], preset: str, file: Path | None) -> None:
    """Raise where the names that a file gives its values are not the preset's."""
    for segment in unknown:
        expected_name = class_names(preset).get(segment.number)
        if not segment.strict or expected_name is None:
            continue
        fitting = [
            p
            for p in PRESETS
            if plain(class_names(p).get(segment.number, "")) == plain(segment.name)
        ]
        raise UnknownLabels(
            f"{'the mask' if file is None else file.name} itself calls its value {segment.number}"
            f" {segment.name!r}, the preset {preset} calls it {expected_name!r}",
            expected=f"a mask with the numbers of {preset}",
            remedy=(
                f"give {' or '.join(f'--labels {p}' for p in fitting) or 'a --labels MAP.json'} for"
                " the names that the file has"
            ),
            file=file,
        )


def _check_map(label_map: LabelMap | None, table: LabelTable, file: Path | None) -> None:
    """Raise for a map with an index that the model does not have."""
    if wrong := [
        index
        for index in (label_map or {}).values()
        if not isinstance(index, int) or not 0 <= index < len(table)
    ]:
        raise UsageError(
            f"the label map leads to {wrong[0]!r}",
            expected=f"model indices 0 to {len(table) - 1}: {table}",
            remedy="map to indices, or read a map with runtime.core.labels.load_map",
            file=file,
        )


def listed(segments: Sequence[Segment], most: int = 24) -> str:
    """Structures for a message: the first of them, and how many they are.

    Args:
        segments: The structures.
        most: How many to describe.
    """
    described = ", ".join(describe(segment) for segment in segments[:most])
    return described + (f", … ({len(segments)} values)" if len(segments) > most else "")
