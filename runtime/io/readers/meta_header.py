"""MetaImage headers (itk.org/Wiki/ITK/MetaIO/Documentation), parsed once and strictly."""

from __future__ import annotations

from collections.abc import Mapping
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
    slice_note,
    spacings,
    third_axis,
    voxel_file,
)

_TYPES = {
    f"MET_{unsigned}{name}": f"{code}{size}"
    for unsigned, code in (("", "i"), ("U", "u"))
    for name, size in (("CHAR", 1), ("SHORT", 2), ("INT", 4), ("LONG", 4), ("LONG_LONG", 8))
} | {"MET_FLOAT": "f4", "MET_DOUBLE": "f8"}
_BOOLEANS = dict.fromkeys(("true", "t", "1", "yes"), True) | dict.fromkeys(
    ("false", "f", "0", "no"), False
)
# Alternative names of one field.
_MATRIX = ("transformmatrix", "rotation", "orientation")
_OFFSET = ("offset", "position", "origin")
_ORDER = ("binarydatabyteordermsb", "elementbyteordermsb")
# Difference of a direction's length from 1.
UNIT_DIRECTION = 1e-3


def read_header(path: Path, handle: BinaryIO) -> Header:
    """Read the header of a MetaImage.

    Args:
        path: The file.
        handle: The open file, at its first byte.

    Raises:
        UnreadableVolume: It is not one scalar volume, or its voxels cannot be in the file.
        GeometryError: The header does not state the grid.
    """
    fields = read_fields(path, handle)
    if fields.get("objecttype", "image").lower() != "image":
        raise bad(path, f"is a MetaIO {fields['objecttype'][:40]}, not an image")
    sizes = integers(path, fields, "dimsize")
    if integers(path, fields, "ndims") != [len(sizes)]:
        raise bad(path, f"states {len(sizes)} sizes for {fields['ndims']} dimensions")
    shape = check_shape(path, sizes)
    if fields.get("elementnumberofchannels", "1") != "1":
        raise bad(
            path,
            f"holds {fields['elementnumberofchannels'][:40]} channels",
            "save the labels as one integer per voxel",
        )
    for key, identity in (("slope", 1.0), ("offset", 0.0)):
        name = f"elementtointensityfunction{key}"
        if name in fields and lengths(path, name, fields[name]) != [identity]:
            raise bad(
                path,
                f"rescales its values ({name} = {fields[name][:40]})",
                "save the labels themselves",
            )
    columns, origin, notes = _place(path, fields, len(sizes))
    geometry, sheared = geometry_of(path, columns, origin)
    voxels = _voxels(path, handle, fields, shape)
    return Header(
        geometry,
        voxels,
        oriented=_stated_field(path, fields, _MATRIX) is not None,
        notes=(*notes, *sheared),
    )


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
    name = read_fields(path, handle)["elementdatafile"]
    return None if name.upper() == "LOCAL" else name


def read_fields(path: Path, handle: BinaryIO) -> dict[str, str]:
    """The `Key = value` lines up to ElementDataFile, with keys in lower case.

    Args:
        path: The file.
        handle: The open file, at its first byte; afterwards it is at the end of the header.

    Raises:
        UnreadableVolume: It is not a MetaImage, states a field twice, or has no ElementDataFile.
    """
    fields: dict[str, str] = {}
    for number, line in enumerate(header_lines(path, handle), 1):
        key, separator, value = line.partition("=")
        name = key.strip().lower().replace(" ", "")
        if not separator and not fields:
            raise bad(path, "does not start as its suffix promises")
        # MetaIO reads ":" as "=".
        if not separator or ":" in key:
            raise bad(path, f"has a line in its header that is not 'Key = value': line {number}")
        if fields.setdefault(name, value.strip()) != value.strip():
            raise bad(path, f"states '{name}' twice in its header")
        if name == "elementdatafile":
            return fields
    raise bad(path, "has a header without an end")


def _stated_field(path: Path, fields: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    """The name among `names` that is stated; two are refused with `UnreadableVolume`."""
    stated = [name for name in names if name in fields]
    if len(stated) > 1:
        raise bad(path, f"states both '{stated[0]}' and '{stated[1]}' in its header")
    return stated[0] if stated else None


def _boolean(path: Path, fields: Mapping[str, str], key: str, default: bool) -> bool:
    """The value of a field that is true or false."""
    value = fields.get(key, str(default)).lower()
    if value not in _BOOLEANS:
        raise bad(path, f"states {key} = {value[:40]}", "write True or False")
    return _BOOLEANS[value]


def _voxels(
    path: Path, handle: BinaryIO, fields: Mapping[str, str], shape: tuple[int, int, int]
) -> Voxels:
    """Where the values lie, as the header states it."""
    type_ = fields.get("elementtype", "").upper()
    if type_ not in _TYPES:
        raise bad(path, f"holds values of the type {type_[:40]!r}", "save the labels as integers")
    order = _stated_field(path, fields, _ORDER)
    big = order is not None and _boolean(path, fields, order, False)
    dtype = np.dtype(_TYPES[type_]).newbyteorder(">" if big else "<")
    packed = _boolean(path, fields, "compresseddata", False)
    text = not _boolean(path, fields, "binarydata", True)
    if packed and text:
        raise bad(path, "states that its voxels are compressed and text")
    encoding = "zlib" if packed else "text" if text else "raw"
    name = fields["elementdatafile"]
    local = name.upper() == "LOCAL"
    file, start = (path, handle.tell()) if local else (voxel_file(path, name), 0)
    (skip,) = integers(path, fields, "headersize")[:1] if "headersize" in fields else (0,)
    if skip and (local or encoding != "raw"):
        raise bad(
            path,
            f"states HeaderSize = {skip} for voxels that follow its header or are packed",
            "write it again, without HeaderSize",
        )
    voxels = Voxels(file, start, skip, encoding, dtype, shape)
    if skip == -1:
        # The voxels are the last bytes of the file.
        start = max(0, file.stat().st_size - voxels.size)
        voxels = Voxels(file, start, 0, encoding, dtype, shape)
    return check_voxels(path, voxels)


def _place(
    path: Path, fields: Mapping[str, str], dimension: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[str, ...]]:
    """The columns (3, 3) and the origin (3) of the grid, LPS in mm, and notes."""
    axes = min(3, dimension)
    stated = next((f for f in ("elementspacing", "elementsize") if f in fields), None)
    steps = spacings(path, "ElementSpacing", fields[stated] if stated else None, dimension)[:axes]
    directions, origin = np.eye(dimension), np.zeros(3)
    if (name := _stated_field(path, fields, _MATRIX)) is not None:
        numbers = lengths(path, name, fields[name])
        if len(numbers) == dimension**2:
            # A row of the file is the direction of an axis.
            directions = np.array(numbers).reshape(dimension, dimension).T
        # Further axes must not mix with the first three.
        mixed = (
            np.delete(directions[:axes], slice(axes), 1),
            np.delete(directions[:, :axes], slice(axes), 0),
        )
        is_unit = np.abs(np.linalg.norm(directions[:axes, :axes], axis=0) - 1) <= UNIT_DIRECTION
        if len(numbers) != dimension**2 or any(part.any() for part in mixed) or not is_unit.all():
            raise bad_grid(
                path,
                f"states the {name} {fields[name][:80]}",
                "directions of length 1",
                "write a valid header",
            )
    if (name := _stated_field(path, fields, _OFFSET)) is not None:
        numbers = lengths(path, name, fields[name])
        if len(numbers) != dimension:
            raise bad_grid(
                path,
                f"states the {name} {fields[name][:80]}",
                f"{dimension} numbers",
                "write a valid header",
            )
        origin[:axes] = numbers[:axes]
    columns = np.zeros((3, axes))
    columns[:axes] = directions[:axes, :axes] * np.array(steps)
    mm = _millimetres(path, fields)
    columns, origin = columns * mm, origin * mm
    if axes == 3:
        return columns, origin, ()
    return third_axis(columns), origin, (slice_note(path),)


def _millimetres(path: Path, fields: Mapping[str, str]) -> float:
    """Millimetres per unit of the header."""
    unit = fields.get("distanceunits", "mm").lower()
    if unit not in ("mm", "um", "cm", "?", ""):
        raise bad_grid(
            path, f"states the DistanceUnits {unit[:40]}", "mm, um or cm", "write the grid in mm"
        )
    return MILLIMETRES.get(unit, 1.0)
