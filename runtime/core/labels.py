"""What files call a structure → the model's indices 0..K, by a table; nothing is guessed.

A structure is known to a file by its value and, in DICOM and in Slicer's files, by a coded type and
a name as well. The code counts first, then the name, then the code without what modifies it, then
the value, in the model's own table and in a MAP.json alike.
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

# A value, a code (as `runtime.core.label_codes.canonical` writes it) or a name (as `plain` does),
# None for every other → model index.
LabelMap = Mapping[int | str | None, int]
MAP_HELP = (
    'a JSON file such as {"51": "left ventricle", "SCT:54247002": "ascending aorta", "*":'
    ' "background"}'
)
# What says nothing of its own, so that the number may speak: "Segment_3", "ROI 3", "3"; tissue,
# organ, body structure, region of interest.
_NUMBERED = re.compile(r"(segment|label|roi|region|structure|class)?[ #.-]*\d*")
_GENERIC = {"sct:85756007", "sct:113343008", "sct:123037004", "sct:91723000", "dcm:111099"}

# Coding schemes that are published, and how their codes are written (PS3.16, 8.2).
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
    """The label map of a preset; what a file calls its values must agree with it."""

    def __init__(self, name: str, entries: LabelMap):
        super().__init__(entries)
        self.name = name

    def __reduce__(self) -> tuple[type[Preset], tuple[str, dict[int | str | None, int]]]:
        return Preset, (self.name, dict(self))


def plain(text: str) -> str:
    """A name as it is compared: case, surrounding blanks, and underscores for blanks do not
    count; all else does.
    """
    return " ".join(text.replace("_", " ").casefold().split())


def load_map(
    source: str | Path, table: LabelTable, others: Sequence[LabelTable] = ()
) -> dict[int | str | None, int]:
    """Read `--labels MAP.json`, or take the preset of that name: value, code ("SCT:80891009", with
    modifiers "SCT:59652004+SCT:7771000") or name → the model's label, by name or by value; "*" is
    for every other one.

    Returns keys as `LabelMap` has them → model index; without the entries that lead to a label of
    `others` alone, models that the same map is for. Raises `UsageError` when the file or an entry
    is wrong.
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
            and any(target in other.by_name or target in other.by_value for other in others)
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
    """The names of structures, as `plain` writes them, that a label map (also its file, or a
    preset's name) and models know.
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
    """What a MAP.json says, as it is written, or with its keys as a `LabelMap` has them.

    Raises `UsageError`.
    """
    entries = _entries(path)
    return {_key(key): target for key, target in entries.items()} if parsed else entries


def code_of(segment: Segment) -> str:
    """A structure's code as a `LabelMap` has it; empty without one."""
    return canonical(segment.code) if segment.code else ""


def _entries(path: Path) -> dict[str, Any]:
    """What a MAP.json says."""
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
    if text == "*":
        return None
    if re.fullmatch(r"\s*[+-]?\d{1,18}\s*", text):
        return int(text)
    return canonical(text) if is_code(text) else plain(text)


def _preset(name: str, table: LabelTable) -> Preset:
    """The preset's values → the model's label of the same code, or name; what the model has no
    label for is its background.
    """
    known = _own(table)
    result: dict[int | str | None, int] = {}
    for value, class_name in CLASSES.get(name, {}).items():
        result.update({value: 0, plain(class_name): 0})
    for label in PRESETS[name].labels:
        keys = [
            f"sct:{label.snomed}",
            f"sct:{STANDS_FOR.get(label.snomed or '')}",
            plain(label.name),
        ]
        index = next((known[key] for key in keys if key in known), 0)
        result.update(dict.fromkeys((label.value, *label.aliases), index))
        result.update(
            {key: index for key in (keys[0], keys[2]) if label.value and key != "sct:None"}
        )
    return Preset(name, result)


def lost(name: str, table: LabelTable) -> list[str]:
    """The structures of a preset that the model has no label for, so that they become its
    background.
    """
    mapped = _preset(name, table)
    return [
        f"{label.value} {label.name}"
        for label in PRESETS[name].labels[1:]
        if mapped[label.value] == 0
    ]


@lru_cache(maxsize=16)
def _own(table: LabelTable) -> LabelMap:
    """What the model's own table says of codes, names and values."""
    known: dict[int | str | None, int] = dict(table.by_value.items())
    known.update({plain(name): index for name, index in table.by_name.items()})
    known.update(
        {f"sct:{label.snomed}": index for index, label in enumerate(table.labels) if label.snomed}
    )
    return known


def match(segment: Segment, table: LabelTable, label_map: LabelMap | None = None) -> int | None:
    """The model's index for a structure, None when there is none: by its code, else its name, else
    its code without modifiers, else its number, else "*".

    Without a `label_map` the number counts only where code and name say nothing of their own
    ("Segment_3", tissue): the third segment of a file is not the model's third label because both
    are third. A code without modifiers does not count against the side that it was given: a right
    atrium is no "left atrium".
    """
    known: LabelMap = _own(table) if label_map is None else label_map
    whole, partial = _code_keys(segment)
    name = plain(segment.name)
    for key in (whole, name):
        if key and key in known:
            return known[key]
    if partial in known and not _is_other_side(segment, table, known[partial]):
        return known[partial]
    counts = label_map is not None and not (
        segment.strict and (segment.number < 0 or isinstance(label_map, Preset))
    )
    if counts or (_NUMBERED.fullmatch(name) and (not whole or whole in _GENERIC)):
        return known.get(segment.number, known.get(None))
    return known.get(None)


def _code_keys(segment: Segment) -> tuple[str, str]:
    """A structure's code as it is compared, and its type alone where something modifies it; each
    may be empty.
    """
    if not segment.code:
        return "", ""
    whole, partial = canonical(segment.code), unmodified(segment.code)
    return whole, partial if partial != whole else ""


def _is_other_side(segment: Segment, table: LabelTable, index: int) -> bool:
    """Whether a model's label is of the other side than a structure."""
    own, label = sides(segment.code), table.labels[index]
    words = set(plain(label.name).split())
    theirs = sides(f"SCT:{label.snomed}") | {
        side for word, side in (("left", LEFT), ("right", RIGHT)) if word in words
    }
    return bool(theirs) and not own <= theirs


def _refuse_unmapped(
    segments: Sequence[Segment],
    table: LabelTable,
    label_map: LabelMap | None = None,
    *,
    file: Path | None = None,
) -> None:
    """Raise `UnknownLabels` for structures that nothing maps, and as `refuse_contradictions`
    does.
    """
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
    """Raise `UnknownLabels` where a file's own names are not those of the preset, and where
    different structures would become one label by a part of what they are called.
    """
    if isinstance(label_map, Preset):
        _refuse_misnamed(
            [s for s in segments if match(s, table, label_map) is None], label_map.name, file
        )
    _refuse_merged(segments, table, label_map, file)


def _refuse_merged(
    segments: Sequence[Segment], table: LabelTable, label_map: LabelMap | None, file: Path | None
) -> None:
    """Raise where structures of different codes would become one label because the map has the type
    alone, or a name that both sides have. What becomes background is not merged.
    """
    known: LabelMap = _own(table) if label_map is None else label_map
    groups: dict[str, list[Segment]] = {}
    for segment in segments:
        whole, partial = _code_keys(segment)
        name = plain(segment.name)
        key = next((key for key in (whole, name, partial) if key and key in known), "")
        if key:
            groups.setdefault(key, []).append(segment)
    for key, group in groups.items():
        codes = {canonical(s.code): s for s in group if s.code}
        of_both_sides = {LEFT, RIGHT} <= set().union(*(sides(code) for code in codes))
        by_name = any(key == plain(s.name) for s in codes.values())
        if known[key] and len(codes) > 1 and (of_both_sides or not by_name):
            first, second = [*codes.values()][:2]
            whose, known_as = (
                "model" if label_map is None else "label map",
                key.upper() if is_code(key) else repr(key),
            )
            raise UnknownLabels(
                f"{'the mask' if file is None else file.name} holds {describe(first)} and"
                f" {describe(second)}, and the {whose} has {known_as} alone, which would make both"
                f" {table.labels[known[key]].name}",
                expected="an entry for each of the two",
                remedy=(
                    f"give --labels MAP.json with the whole codes as keys: {_as_key(first)} and"
                    f" {_as_key(second)}"
                ),
                file=file,
            )


def describe(segment: Segment) -> str:
    """For a message: 3 'left ventricle' (SCT:87878005); of a DICOM source its number, and its
    code if that is of a public scheme.
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
    """A segment's code as the key of a map."""
    hidden = segment.private and not _is_public(segment.code)
    return (
        f"the code that mask2ct labels FILE shows of {segment.number}"
        if hidden
        else f'"{segment.code}"'
    )


def _is_public(code: str) -> bool:
    """Whether a code, with what modifies it, is of standard schemes and written as their codes
    are: it says no more than they do.
    """
    parts = [part.strip().partition(":") for part in code.split("+")]
    return all(
        re.fullmatch(_PUBLIC.get(scheme.upper(), r"(?!)"), value) for scheme, _, value in parts
    )


def where_names_are(segments: Iterable[Segment]) -> str:
    """The end of a remedy where `describe` leaves names out."""
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
    """Map an integer array of file values to model indices, same shape, uint8; `segments` tell what
    its values mean, if the file does.

    Without `label_map` the table's own values (and aliases) are used. Raises `UnknownLabels`,
    listing what was found, what the model knows and the remedy, when a value has no index; and
    `UnreadableVolume` for an image, unless `force`.
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
    """`to_indices` of one plane after the other; what is wrong is told when all were seen."""
    named = {segment.number: segment for segment in segments}
    known: dict[int, int | None] = {}
    if segments and 0 not in named:  # what no segment claims
        known[0] = match(Segment(0), table, label_map) or 0
    _check_map(label_map, table, file)
    census = Census()
    for plane in planes:  # by runs of one value: to look every voxel up takes three times as long
        values, lengths = runs(plane)
        distinct, positions = census.add(values, lengths)
        for value in distinct.tolist():
            if value not in known:
                known[value] = match(named.get(value, Segment(value)), table, label_map)
        indices = np.array([known[value] or 0 for value in distinct.tolist()], np.uint8)
        yield np.repeat(indices[positions], lengths).reshape(plane.shape)
    if not force:
        census.refuse_image(file)
    present = [named.get(value, Segment(value)) for value in sorted(census.voxels)]
    refuse_contradictions(present, table, label_map, file=file)
    _refuse([s for s in present if known[s.number] is None], present, table, label_map, file)


def overlay(
    layers: Layers,
    table: LabelTable,
    label_map: LabelMap | None = None,
    *,
    order: Sequence[str] = (),
    file: Path | None = None,
) -> NDArray[np.uint8]:
    """Segments that may overlap → model indices, uint8 of `layers.shape`.

    Where two that mean different labels overlap, the one that `order` names first wins (by code,
    name, number or the model's label); one that is not named yields to one that is. What maps to
    the background is not synthesized. Raises `UnknownLabels`, and `InputError` listing the pairs
    when an overlap is not settled.
    """
    _check_map(label_map, table, file)
    _refuse_unmapped(layers.segments, table, label_map, file=file)
    targets = [match(segment, table, label_map) for segment in layers.segments]
    lut = np.array(
        [0, *(index or 0 for index in targets)], np.uint8
    )  # owner → model index; owner 0: nobody
    ranks = np.array(
        [
            len(order),
            *(
                _rank(s, table.labels[i or 0].name, order)
                for s, i in zip(layers.segments, targets, strict=True)
            ),
        ]
    )
    number = {segment.number: n + 1 for n, segment in enumerate(layers.segments)}
    owners = np.zeros(layers.shape, np.uint8 if len(lut) <= 256 else np.uint16)
    conflicts: dict[tuple[int, int], int] = {}
    for value, k, piece in layers.pieces():
        new = number[value]
        rows = np.flatnonzero(piece.any(axis=1))
        if lut[new] == 0 or not rows.size:
            continue
        plane, mask = owners[k, rows[0] : rows[-1] + 1], piece[rows[0] : rows[-1] + 1]
        there = plane[mask]
        if there.any():
            rivals = (there != 0) & (lut[there] != lut[new])
            for old in np.unique(there[rivals & (ranks[there] == ranks[new])]).tolist():
                pair = (min(old, new), max(old, new))
                conflicts[pair] = conflicts.get(pair, 0) + int(np.count_nonzero(there == old))
            there[(there == 0) | (ranks[there] > ranks[new])] = new
            plane[mask] = there
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
            remedy="say which wins, first one first: --overlap-order NAME,NAME"
            + where_names_are(layers.segments),
            file=file,
        )
    if owners.dtype == np.uint8:
        for plane in owners:
            plane[...] = lut[plane]
        return owners
    return lut[owners]


def segment_names(segment: Segment) -> set[str]:
    """All that a person may call a structure, as `plain` writes it: its code (also without
    modifiers), its name, its number.
    """
    return {plain(segment.code), *_code_keys(segment), plain(segment.name), str(segment.number)} - {
        ""
    }


def _rank(segment: Segment, label: str, order: Sequence[str]) -> int:
    names = segment_names(segment) | {plain(label)}
    return next((n for n, name in enumerate(order) if plain(name) in names), len(order))


def _refuse(
    unknown: Sequence[Segment],
    found: Sequence[Segment],
    table: LabelTable,
    label_map: LabelMap | None,
    file: Path | None,
) -> None:
    """Raise for what nothing maps."""
    if unknown:
        name, whose = (
            "the mask" if file is None else file.name,
            "model" if label_map is None else "label map",
        )
        by_name = all(segment.strict and segment.number < 0 for segment in unknown)
        keys = sorted(
            (k for k in label_map or () if k is not None),
            key=lambda k: (isinstance(k, str) != by_name, k),
        )
        raise UnknownLabels(
            f"{name} holds {listed(unknown)}, which the {whose} does not know; all its values:"
            f" {listed(found)}",
            expected=(
                f"only {table}" if label_map is None else f"only {', '.join(map(str, keys[:40]))}"
            ),
            remedy=(
                f"give {_presets_for(found)}--labels MAP.json, {MAP_HELP}{where_names_are(found)}"
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
    """Raise where a file's own names for its values are not the preset's."""
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
    """Raise for a map that leads nowhere."""
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
    """For a person: the first `most` of them, and how many there are."""
    shown = ", ".join(describe(segment) for segment in segments[:most])
    return shown + (f", … ({len(segments)} values)" if len(segments) > most else "")
