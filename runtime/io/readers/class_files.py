"""Masks with one binary file per class in a folder: aorta.nii.gz, liver.nii.gz and so on.

TotalSegmentator writes them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import GeometryError, InputError
from ...core.labels import plain
from ...core.totalsegmentator import CLASS_NAMES
from ...core.volume import Geometry, Layers, Segment
from .. import archive
from ..volume_files import stem
from .volume import as_integers, read_volume

# Files that must be named like structures: the name of a single one may be a patient's.
LEAST_NAMES = 2
# Distance in mm that one voxel may have in the grids of two files.
GRID_TOLERANCE = 0.01
# Values that a binary file may hold besides 0.
_ON = (1, 255)
_CLASS_NAMES = frozenset(map(plain, CLASS_NAMES))


def is_class_name(path: Path, names: Collection[str]) -> bool:
    """Whether a volume file is named like a structure.

    Args:
        path: The file.
        names: Names of structures as `plain` writes them; the classes of TotalSegmentator count
            too.
    """
    name = plain(stem(path))
    return name in names or name in _CLASS_NAMES


def classes_among(volumes: Sequence[Path], names: Collection[str]) -> list[Path]:
    """The volume files of a folder that are together one mask.

    They are one mask if at least two are named like structures and are binary; then every binary
    file belongs to it.

    Args:
        volumes: Volume files of one folder or zip.
        names: As in `is_class_name`.

    Returns:
        The files of the mask; empty if each file is a mask of its own.
    """
    if (
        sum(is_class_name(path, names) for path in volumes) < LEAST_NAMES
        or len({path.parent for path in volumes}) > 1
    ):
        return []
    binary = [path for path in volumes if _is_binary(path)]
    return binary if sum(is_class_name(path, names) for path in binary) >= LEAST_NAMES else []


def contradicted(path: Path, value_names: Mapping[int, str]) -> str:
    """The structure that a table gives for the value of a file named like another structure.

    A binary file with the name `aorta` holds an aorta, whatever its value means in a table of many
    structures.

    Args:
        path: A volume file that `is_class_name` takes for a class.
        value_names: The table: names of values.

    Returns:
        The table's name for the value; empty if it does not contradict the file's name.
    """
    if not _is_binary(path):
        return ""
    structure = plain(stem(path))
    meanings = [value_names[value] for value in _ON if value in value_names]
    if not meanings or any(plain(meaning) == structure for meaning in meanings):
        return ""
    return meanings[0]


def read_classes(files: Sequence[Path], display_name: Path) -> Layers:
    """Read the files of a mask as its segments, each named after its file.

    A file without a voxel of its class gives no segment.

    Args:
        files: Binary volume files.
        display_name: What errors call the mask.

    Returns:
        The segments, numbered -1, -2 and so on in the order of the files.

    Raises:
        InputError: A file cannot be read, or is not binary.
        GeometryError: Two files lie on different grids.
    """
    geometry: Geometry | None = None
    segments, packed, shape, notes = [], [], (0, 0, 0), ()
    for n, file in enumerate(files, 1):
        with archive.on_disk(file) as path:
            volume = read_volume(path)
        if not _holds_one_value(as_integers(volume.values, file)):
            raise InputError(
                f"{file.name} is not binary",
                expected="0, and 1 or 255, in a file of one class",
                file=display_name,
                remedy="give it alone, or remove it from the folder",
            )
        if geometry is None:
            geometry, shape, notes = volume.geometry, volume.values.shape, volume.notes  # type: ignore[assignment]
        elif (
            volume.values.shape != shape
            or _largest_offset(volume.geometry, geometry, shape) > GRID_TOLERANCE
        ):
            raise GeometryError(
                f"{file.name} lies on another grid than {files[0].name}",
                expected="all classes of a mask on one grid",
                remedy="resample it to the grid of the others (nearest neighbour)",
                file=display_name,
            )
        if (box := _box(volume.values)) is not None:
            segments.append(Segment(-n, stem(file), strict=True))
            packed.append((box, np.packbits(volume.values[box] != 0, axis=2)))
    assert geometry is not None

    def pieces() -> Iterator[tuple[int, int, NDArray[np.bool_]]]:
        for segment, ((planes, rows, columns), bits) in zip(segments, packed, strict=True):
            width = columns.stop - columns.start
            for k, plane in enumerate(np.unpackbits(bits, axis=2, count=width)):
                piece = np.zeros(shape[1:], bool)
                piece[rows, columns] = plane
                yield segment.number, planes.start + k, piece

    return Layers(tuple(segments), shape, geometry, pieces, notes=notes)


def _box(values: NDArray[Any]) -> tuple[slice, slice, slice] | None:
    """The smallest box around the voxels that are not 0; None where all are 0."""
    planes = np.flatnonzero(np.any(values, axis=(1, 2)))
    if not planes.size:
        return None
    projection = np.any(values[planes[0] : planes[-1] + 1], axis=0)
    rows = np.flatnonzero(projection.any(axis=1))
    columns = np.flatnonzero(projection.any(axis=0))
    return _span(planes), _span(rows), _span(columns)


def _span(indices: NDArray[np.intp]) -> slice:
    return slice(int(indices[0]), int(indices[-1]) + 1)


def _largest_offset(first: Geometry, second: Geometry, shape: tuple[int, ...]) -> float:
    """The largest distance, in mm, of one corner in two grids of one shape (D, H, W)."""
    corners = np.array(
        [
            [i, j, k, 1]
            for i in (0, shape[2] - 1)
            for j in (0, shape[1] - 1)
            for k in (0, shape[0] - 1)
        ],
        float,
    )
    return float(np.linalg.norm(corners @ (first.affine - second.affine).T, axis=1).max())


def _is_binary(path: Path) -> bool:
    """Whether a volume file is binary.

    A file that cannot be read counts as binary: reading the mask reports it.
    """
    try:
        with archive.on_disk(path) as on_disk:
            status = on_disk.stat()
            return _is_binary_on_disk(on_disk, status.st_mtime_ns, status.st_size)
    except (InputError, OSError):
        return True


@lru_cache(maxsize=512)
def _is_binary_on_disk(path: Path, modified: int, size: int) -> bool:
    """As `_is_binary`, cached by the file's state: a watched folder is looked at several times."""
    return _holds_one_value(read_volume(path).values)


def _holds_one_value(values: NDArray[Any]) -> bool:
    """Whether values are 0 and, at most, 1 or 255."""
    return any(bool(((values == 0) | (values == on)).all()) for on in _ON)
