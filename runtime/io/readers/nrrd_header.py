"""NRRD headers (teem.sourceforge.net/nrrd/format.html), parsed once and strictly.

A field that is stated twice, cut, or known to other readers by another name is refused. No other
reader parses these headers after us, so what is checked is what is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from .volume_header import (
    MILLIMETRES,
    Header,
    Voxels,
    bad,
    bad_grid,
    check_shape,
    check_voxels,
    geometry_of,
    header_lines,
    integers,
    lengths,
    no_spacing,
    slice_note,
    spacings,
    third_axis,
    voxel_file,
)

_FIELDS = {
    "axismaxs",
    "axismins",
    "blocksize",
    "byteskip",
    "centers",
    "content",
    "datafile",
    "dimension",
    "encoding",
    "endian",
    "kinds",
    "labels",
    "lineskip",
    "max",
    "measurementframe",
    "min",
    "number",
    "oldmax",
    "oldmin",
    "sampleunits",
    "sizes",
    "space",
    "spacedimension",
    "spacedirections",
    "spaceorigin",
    "spaceunits",
    "spacings",
    "thicknesses",
    "type",
    "units",
}
_ALIASES = {"centerings": "centers"}
_TYPES = {
    name: code
    for code, names in {
        "i1": "signed char,int8,int8_t",
        "u1": "uchar,unsigned char,uint8,uint8_t",
        "i2": "short,short int,signed short,signed short int,int16,int16_t",
        "u2": "ushort,unsigned short,unsigned short int,uint16,uint16_t",
        "i4": "int,signed int,int32,int32_t",
        "u4": "uint,unsigned int,uint32,uint32_t",
        "i8": (
            "longlong,long long,long long int,signed long long,signed long long int,int64,int64_t"
        ),
        "u8": "ulonglong,unsigned long long,unsigned long long int,uint64,uint64_t",
        "f4": "float",
        "f8": "double",
    }.items()
    for name in names.split(",")
}
_ENCODINGS = {"raw": "raw", "gz": "gzip", "gzip": "gzip", "hex": "hex"} | dict.fromkeys(
    ("txt", "text", "ascii"), "text"
)
# Signs that turn the axes of a space into LPS.
_SPACES = {
    "left-posterior-superior": (1, 1, 1),
    "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1),
    "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1),
    "las": (1, -1, 1),
}
# Spaces that do not name the patient's axes and are not mirrored.
_UNORIENTED = ("", "3d-right-handed", "3dr")
_SCALAR = ("domain", "space", "???", "none")


def read_header(path: Path, handle: BinaryIO) -> Header:
    """Read the header of an NRRD.

    Args:
        path: The file.
        handle: The open file, at its first byte.

    Raises:
        UnreadableVolume: It is not an NRRD, is not one scalar volume, with or without layers, or
            its voxels cannot be in the file.
        GeometryError: The header does not state the grid, or not in the patient's axes.
    """
    fields, keys, ended = read_fields(path, handle)
    sizes = integers(path, fields, "sizes")
    if integers(path, fields, "dimension") != [len(sizes)]:
        raise bad(path, f"states {len(sizes)} sizes for {fields['dimension']} dimensions")
    kinds = fields.get("kinds", "").lower().split()
    layered = len(sizes) == 4 and kinds[:1] == ["list"]
    axes = range(1, 4) if layered else range(min(3, len(sizes)))
    shape = check_shape(path, sizes[1:] if layered else sizes)
    if any(kind not in _SCALAR for kind in (kinds[n] for n in axes if n < len(kinds))):
        raise bad(
            path, f"has axes of the kinds {' '.join(kinds)[:80]}", "save one number per voxel"
        )
    if layered and not 1 <= sizes[0] <= 1 << 16:
        raise bad(path, f"claims {sizes[0]} layers")
    columns, origin, notes = _place(path, fields, len(sizes), axes)
    geometry, sheared = geometry_of(path, columns, origin)
    voxels = _voxels(path, handle, fields, shape, sizes[0] if layered else 1, ended)
    oriented = "spacedirections" in fields and fields.get("space", "").lower() not in _UNORIENTED
    return Header(geometry, voxels, oriented=oriented, notes=(*notes, *sheared), keys=keys)


def voxel_file_of(path: Path, handle: BinaryIO) -> str | None:
    """The name of the file with the voxels, as the header states it.

    Args:
        path: The file.
        handle: The open file, at its first byte.

    Returns:
        The name; None if the voxels follow the header.

    Raises:
        UnreadableVolume: The header cannot be read.
    """
    return read_fields(path, handle)[0].get("datafile")


def read_fields(path: Path, handle: BinaryIO) -> tuple[dict[str, str], dict[str, str], bool]:
    """The lines of an NRRD header.

    Args:
        path: The file.
        handle: The open file, at its first byte; afterwards it is at the end of the header.

    Returns:
        The fields, and the key/value pairs, with keys in lower case without blanks; and whether an
        empty line ends the header, so that voxels may follow.

    Raises:
        UnreadableVolume: It is not an NRRD, or has a line that is not a field, or a field twice.
    """
    if not re.fullmatch(rb"NRRD00(\.01|0[1-6])\r?\n", handle.readline(64)):
        raise bad(path, "is not an NRRD file")
    fields: dict[str, str] = {}
    keys: dict[str, str] = {}
    for number, line in enumerate(header_lines(path, handle), 2):
        if not line:
            return fields, keys, True
        if line.startswith("#"):
            continue
        key, colon, value = line.partition(":")
        name = _field_name(key)
        if colon and not value.startswith("=") and name in _FIELDS:
            _set_once(path, fields, name, value.strip())
        elif ":=" in line:
            key, _, value = line.partition(":=")
            _set_once(path, keys, _field_name(key), value.strip())
        else:
            raise bad(path, f"has a line in its header that is not an NRRD field: line {number}")
    return fields, keys, False


def _field_name(key: str) -> str:
    """The name of a field in lower case without blanks; the one that is stored for aliases."""
    name = key.strip().lower().replace(" ", "")
    return _ALIASES.get(name, name)


def _set_once(path: Path, fields: dict[str, str], name: str, value: str) -> None:
    """Set a field; a second, different value is refused with `UnreadableVolume`."""
    if fields.setdefault(name, value) != value:
        raise bad(path, f"states '{name}' twice in its header")


def _voxels(
    path: Path,
    handle: BinaryIO,
    fields: Mapping[str, str],
    shape: tuple[int, int, int],
    layers: int,
    ended: bool,
) -> Voxels:
    """Where the values lie, as the header states it."""
    type_ = " ".join(fields.get("type", "").lower().split())
    if type_ not in _TYPES:
        raise bad(path, f"holds values of the type {type_[:40]!r}", "save the labels as integers")
    encoding = fields.get("encoding", "").lower()
    if encoding not in _ENCODINGS:
        raise bad(path, f"has the encoding {encoding[:40]!r}", "save it raw or with gzip")
    dtype = np.dtype(_TYPES[type_])
    if dtype.itemsize > 1 and _ENCODINGS[encoding] != "text":
        endian = fields.get("endian", "").lower()
        if endian not in ("little", "big"):
            raise bad(path, f"does not state its byte order (endian: {endian[:40] or None})")
        dtype = dtype.newbyteorder("<" if endian == "little" else ">")
    name = fields.get("datafile")
    file, start = (path, handle.tell()) if name is None else (voxel_file(path, name), 0)
    if name is None and not ended:
        raise bad(path, "has a header without an end")
    if "lineskip" in fields and integers(path, fields, "lineskip") != [0]:
        raise bad(path, "skips lines before its voxels", "save it again, without 'line skip'")
    (skip,) = integers(path, fields, "byteskip")[:1] if "byteskip" in fields else (0,)
    voxels = Voxels(file, start, skip, _ENCODINGS[encoding], dtype, shape, layers)
    if skip and voxels.encoding in ("text", "hex"):
        raise bad(path, "skips bytes before voxels that are text", "save it raw or with gzip")
    if skip == -1 and voxels.encoding == "raw":
        # The voxels are the last bytes of the file.
        begin = max(start, file.stat().st_size - voxels.size)
        voxels = Voxels(file, begin, 0, "raw", dtype, shape, layers)
    return check_voxels(path, voxels)


def _place(
    path: Path, fields: Mapping[str, str], dimension: int, axes: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[str, ...]]:
    """The columns (3, 3) and the origin (3) of the grid, LPS in mm, and notes.

    Sums and products are in the order of ITK's NRRD reader, so that a grid has the same bits.
    """
    if "spacedirections" not in fields:
        return _place_by_spacings(path, fields, axes)
    if "spacings" in fields and re.sub(r"nan|none", "", fields["spacings"].lower()).strip():
        raise bad_grid(
            path,
            "states both 'space directions' and 'spacings'",
            "one of them",
            "remove the wrong one from its header",
        )
    space = fields.get("space", "").lower()
    if space not in _SPACES and space not in _UNORIENTED:
        raise bad_grid(
            path,
            f"states its axes in the space {space[:40]!r}, which does not say how they lie in the"
            " patient",
            "left-posterior-superior, or another space that names the patient's axes",
            "write it with such a space",
        )
    vectors = _vectors(path, "space directions", fields["spacedirections"])
    stated = [vectors[n] for n in axes if n < len(vectors)]
    width = {len(vector) for vector in stated if vector is not None}
    if len(vectors) != dimension or any(v is None for v in stated) or width not in ({3}, {2}):
        raise no_spacing(path, "space directions", fields["spacedirections"])
    (components,) = width
    if components == 2 and len(axes) != 2:
        raise no_spacing(path, "space directions", fields["spacedirections"])
    if "spacedimension" in fields and integers(path, fields, "spacedimension") != [components]:
        raise bad_grid(
            path,
            f"states a space of {fields['spacedimension'][:40]} dimensions and directions of"
            f" {components}",
            "one number of dimensions",
            "write a valid header",
        )
    columns = np.zeros((3, len(axes)))
    columns[:components] = np.array(stated, float).T
    origin, notes = np.zeros(3), []
    if "spaceorigin" in fields:
        origins = _vectors(path, "space origin", fields["spaceorigin"])
        if len(origins) != 1 or origins[0] is None or len(origins[0]) != components:
            raise bad_grid(
                path,
                f"states the spaceorigin {fields['spaceorigin'][:80]}",
                f"one vector of {components} numbers",
                "write a valid header",
            )
        origin[:components] = origins[0]
    else:
        notes.append(f"{path.name} states no origin: its first voxel is taken to lie at 0, 0, 0")
    mm = np.ones(3)
    mm[:components] = _units(path, fields, "spaceunits", components)
    if set(_units(path, fields, "units", dimension)) != {1.0}:
        raise bad_grid(
            path,
            f"states 'units' {fields['units'][:60]} beside 'space directions'",
            "'space units'",
            "remove 'units' from its header",
        )
    signs = np.array(_SPACES.get(space, (1, 1, 1)), float)
    columns, origin = columns * mm[:, None], origin * mm * signs
    if len(axes) == 2:
        columns = third_axis(columns)
        notes.append(slice_note(path))
    if not (steps := np.sqrt((columns * columns).sum(axis=0))).all():
        raise no_spacing(path, "space directions", fields["spacedirections"])
    return columns * signs[:, None] * (1 / steps) * steps, origin, tuple(notes)


def _place_by_spacings(
    path: Path, fields: Mapping[str, str], axes: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[str, ...]]:
    """As `_place`, for a header that states only distances."""
    words = fields.get("spacings", "").split()
    picked = " ".join(words[axes[0] : axes[-1] + 1])
    steps = spacings(path, "space directions", picked or None, len(axes))
    units = _units(path, fields, "units", len(words))[axes[0] :]
    steps = [step * mm for step, mm in zip(steps, units, strict=False)]
    origin = np.zeros(3)
    if "axismins" in fields:
        mins = fields["axismins"].split()
        low = lengths(path, "axis mins", " ".join(mins[axes[0] : axes[-1] + 1]))
        if len(low) != len(axes):
            raise bad_grid(
                path,
                f"states the axis mins {fields['axismins'][:80]}",
                "one number per axis",
                "write a valid header",
            )
        centers = [*fields.get("centers", "").lower().split()[axes[0] :], "", "", ""]
        mm = _units(path, fields, "units", len(mins))[axes[0] :]
        for n, (at, step) in enumerate(zip(low, steps, strict=True)):
            origin[n] = at * mm[n] + (0 if centers[n] == "node" else step / 2)
    notes = () if len(axes) == 3 else (slice_note(path),)
    return np.diag([*steps, 1.0][:3]), origin, notes


def _vectors(path: Path, key: str, text: str) -> list[list[float] | None]:
    """Vectors such as "(1,0,0) none (0,0,2.5)"; None stands for `none`."""
    words = re.findall(r"\([^()]*\)|[^\s()]+|[()]", text)
    vectors: list[list[float] | None] = []
    for word in words:
        if word.lower() == "none":
            vectors.append(None)
        elif word.startswith("(") and word.endswith(")") and len(word) > 2:
            vectors.append(lengths(path, key.replace(" ", ""), word[1:-1].replace(",", " ")))
        else:
            raise no_spacing(path, key, text)
    return vectors


def _units(path: Path, fields: Mapping[str, str], key: str, count: int) -> list[float]:
    """Millimetres per unit of each axis; 1 if no unit is stated.

    Raises:
        GeometryError: A unit is not a length.
    """
    if key not in fields:
        return [1.0] * count
    words = re.findall(r'"([^"]*)"|([^\s"]+)', fields[key])
    names = [(quoted or bare).strip() for quoted, bare in words]
    names = ["" if name.lower() in ("none", "???") else name for name in names]
    factors = [1.0 if not name else MILLIMETRES.get(name.lower(), 0.0) for name in names]
    if len(factors) != count or 0.0 in factors:
        raise bad_grid(
            path,
            f"states the {key} {fields[key][:80]}",
            "one unit per axis: mm, cm, m or um",
            "write the grid in mm",
        )
    return factors
