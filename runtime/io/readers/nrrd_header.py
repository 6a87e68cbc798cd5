"""NRRD headers (teem.sourceforge.net/nrrd/format.html), read once and strictly.

What is stated twice, cut, or known to other readers by another name is refused: nobody else reads
these headers after us, so that what was checked is what is read.
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
# Signs that turn the space's axes into those to the left, to the back and to the head.
_SPACES = {
    "left-posterior-superior": (1, 1, 1),
    "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1),
    "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1),
    "las": (1, -1, 1),
}
_UNORIENTED = ("", "3d-right-handed", "3dr")  # no words on the patient, and not mirrored
_SCALAR = ("domain", "space", "???", "none")


def read_header(path: Path, handle: BinaryIO) -> Header:
    """The header of an NRRD; `handle` is at its first byte.

    Raises:
        UnreadableVolume: For what is no NRRD, and for what is not one scalar volume, with or
            without layers, whose voxels can be there.
        GeometryError: When it does not state where it lies, or in words that say nothing of the
            patient.
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
    """What the header calls the file with its voxels; None where they follow the header."""
    return read_fields(path, handle)[0].get("datafile")


def read_fields(path: Path, handle: BinaryIO) -> tuple[dict[str, str], dict[str, str], bool]:
    """The fields and the key/value pairs, keys in lower case without blanks, and whether an empty
    line ends them, behind which voxels may follow."""
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
        name = _plain(key)
        if colon and not value.startswith("=") and name in _FIELDS:
            _add(path, fields, name, value.strip())
        elif ":=" in line:
            key, _, value = line.partition(":=")
            _add(path, keys, _plain(key), value.strip())
        else:
            raise bad(path, f"has a line in its header that is no field of NRRD: line {number}")
    return fields, keys, False


def _plain(key: str) -> str:
    name = key.strip().lower().replace(" ", "")
    return _ALIASES.get(name, name)


def _add(path: Path, fields: dict[str, str], name: str, value: str) -> None:
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
    if skip == -1 and voxels.encoding == "raw":  # the last bytes of the file
        begin = max(start, file.stat().st_size - voxels.size)
        voxels = Voxels(file, begin, 0, "raw", dtype, shape, layers)
    return check_voxels(path, voxels)


def _place(
    path: Path, fields: Mapping[str, str], dimension: int, axes: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[str, ...]]:
    """The columns (3, 3) and the origin of the grid, LPS in mm, and notes.

    Sums and products are ordered as in the NRRD reader of ITK, so that a grid has the same bits.
    """
    if "spacedirections" not in fields:
        return _place_by_spacings(path, fields, axes)
    if "spacings" in fields and re.sub(r"nan|none", "", fields["spacings"].lower()).strip():
        raise bad_grid(
            path,
            "states both 'space directions' and 'spacings'",
            "one of them",
            "take the wrong one out of its header",
        )
    space = fields.get("space", "").lower()
    if space not in _SPACES and space not in _UNORIENTED:
        raise bad_grid(
            path,
            f"states its axes in the space {space[:40]!r}, which does not say how they lie in the"
            " patient",
            "left-posterior-superior, or another named by the body",
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
        given = _vectors(path, "space origin", fields["spaceorigin"])
        if len(given) != 1 or given[0] is None or len(given[0]) != components:
            raise bad_grid(
                path,
                f"states the spaceorigin {fields['spaceorigin'][:80]}",
                f"one vector of {components} numbers",
                "write a valid header",
            )
        origin[:components] = given[0]
    else:
        notes.append(f"{path.name} states no origin: its first voxel is taken to lie at 0, 0, 0")
    mm = np.ones(3)
    mm[:components] = _units(path, fields, "spaceunits", components)
    if set(_units(path, fields, "units", dimension)) != {1.0}:
        raise bad_grid(
            path,
            f"states 'units' {fields['units'][:60]} beside 'space directions'",
            "'space units'",
            "take 'units' out of its header",
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
    """As `_place`, of a header that states distances alone."""
    words = fields.get("spacings", "").split()
    picked = " ".join(words[axes[0] : axes[-1] + 1])
    steps = spacings(path, "space directions", picked or None, len(axes))
    steps = [
        step * mm
        for step, mm in zip(
            steps, _units(path, fields, "units", len(words))[axes[0] :], strict=False
        )
    ]
    origin = np.zeros(3)
    if "axismins" in fields:
        mins = fields["axismins"].split()
        low = lengths(path, "axis mins", " ".join(mins[axes[0] : axes[-1] + 1]))
        if len(low) != len(axes):
            raise bad_grid(
                path,
                f"states the axis mins {fields['axismins'][:80]}",
                "one number an axis",
                "write a valid header",
            )
        centers = [*fields.get("centers", "").lower().split()[axes[0] :], "", "", ""]
        mm = _units(path, fields, "units", len(mins))[axes[0] :]
        for n, (at, step) in enumerate(zip(low, steps, strict=True)):
            origin[n] = at * mm[n] + (0 if centers[n] == "node" else step / 2)
    notes = () if len(axes) == 3 else (slice_note(path),)
    return np.diag([*steps, 1.0][:3]), origin, notes


def _vectors(path: Path, key: str, text: str) -> list[list[float] | None]:
    """Vectors as "(1,0,0) none (0,0,2.5)"; None stands for `none`."""
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
    """How many mm the unit of each axis has, 1 where none is stated.

    Raises:
        GeometryError: For a unit that is no length.
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
            "a unit an axis: mm, cm, m or um",
            "write the grid in mm",
        )
    return factors
