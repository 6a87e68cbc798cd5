"""A mask kept as one binary file a class, in a folder of its own: aorta.nii.gz, liver.nii.gz …
as TotalSegmentator writes it.
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

LEAST_NAMES = 2  # files called like structures; one alone may be a patient's
GRID_TOLERANCE = 0.01  # mm that the same voxel may lie apart in two files
_ON = (1, 255)  # what a binary file may hold besides 0
_CLASS_NAMES = frozenset(map(plain, CLASS_NAMES))


def is_class_name(path: Path, names: Collection[str]) -> bool:
    """Whether a file is called like a structure: one of `names` (as `plain` writes them) or a
    class of TotalSegmentator.
    """
    name = plain(stem(path))
    return name in names or name in _CLASS_NAMES


def classes_among(volumes: Sequence[Path], names: Collection[str]) -> list[Path]:
    """Which of the volume files in a folder are together one mask; none when each is a mask of its
    own.

    They are when at least two are called like structures and are binary; then every binary file
    belongs to it.
    """
    if (
        sum(is_class_name(path, names) for path in volumes) < LEAST_NAMES
        or len({path.parent for path in volumes}) > 1
    ):
        return []
    binary = [path for path in volumes if _is_binary(path)]
    return binary if sum(is_class_name(path, names) for path in binary) >= LEAST_NAMES else []


def contradicted(path: Path, value_names: Mapping[int, str]) -> str:
    """What a table calls the one value of a file that is called like another structure; empty where
    nothing is contradicted.

    A binary file that its owner called `aorta` holds an aorta, whatever its value means in a table
    of many structures.

    Args:
        path: a volume file that `is_class_name` takes for a class.
        value_names: what the table calls the values.
    """
    if not _is_binary(path):
        return ""
    own = plain(stem(path))
    meanings = [value_names[value] for value in (1, 255) if value in value_names]
    return "" if not meanings or any(plain(name) == own for name in meanings) else meanings[0]


def read_classes(files: Sequence[Path], display_name: Path) -> Layers:
    """Read such files as the segments of one mask, each named after its file.

    What holds nothing is left out.

    Raises:
        InputError: a file cannot be read, or is not binary.
        GeometryError: two files lie on different grids.
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
                remedy="give it alone, or take it out of the folder",
            )
        if geometry is None:
            geometry, shape, notes = volume.geometry, volume.values.shape, volume.notes  # type: ignore[assignment]
        elif (
            volume.values.shape != shape
            or _apart(volume.geometry, geometry, shape) > GRID_TOLERANCE
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
            for k, plane in enumerate(
                np.unpackbits(bits, axis=2, count=columns.stop - columns.start)
            ):
                piece = np.zeros(shape[1:], bool)
                piece[rows, columns] = plane
                yield segment.number, planes.start + k, piece

    return Layers(tuple(segments), shape, geometry, pieces, notes=notes)


def _box(values: NDArray[Any]) -> tuple[slice, slice, slice] | None:
    """The smallest box around what is not 0."""
    planes = np.flatnonzero(np.any(values, axis=(1, 2)))
    if not planes.size:
        return None
    seen = np.any(values[planes[0] : planes[-1] + 1], axis=0)
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    return _span(planes), _span(rows), _span(columns)


def _span(where: NDArray[np.intp]) -> slice:
    return slice(int(where[0]), int(where[-1]) + 1)


def _apart(one: Geometry, other: Geometry, shape: tuple[int, ...]) -> float:
    """How far, at most, a corner lies apart in two grids of one shape (D, H, W), in mm."""
    corners = np.array(
        [
            [i, j, k, 1]
            for i in (0, shape[2] - 1)
            for j in (0, shape[1] - 1)
            for k in (0, shape[0] - 1)
        ],
        float,
    )
    return float(np.linalg.norm(corners @ (one.affine - other.affine).T, axis=1).max())


def _is_binary(path: Path) -> bool:
    """Whether a volume file holds 0 and one other value; one that cannot be read counts as such,
    for reading it will say so.
    """
    try:
        with archive.on_disk(path) as on_disk:
            about = on_disk.stat()
            return _checked(on_disk, about.st_mtime_ns, about.st_size)
    except (InputError, OSError):
        return True


@lru_cache(maxsize=512)
def _checked(path: Path, changed: int, size: int) -> bool:
    """Kept by what the file is: a watcher looks several times."""
    return _holds_one_value(read_volume(path).values)


def _holds_one_value(values: NDArray[Any]) -> bool:
    """Whether values are 0 and, at most, 1 or 255."""
    return any(bool(((values == 0) | (values == on)).all()) for on in _ON)
