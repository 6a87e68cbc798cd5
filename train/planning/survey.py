"""What a plan needs to know of a dataset: grids, intensities and label values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.core.errors import InputError
from runtime.core.resampling import axial_axes
from runtime.io.readers.volume import as_integers

from ..data.checks import AIR_HU, HIGHEST_HU, read_image
from ..data.class_folders import class_files, class_labels
from ..data.dataset import grid_of
from ..data.intensities import PERCENTILES
from ..data.layouts import Layout
from ..data.pairs import Pair
from ..data.pictures import is_picture

# Images whose voxels are read; the grids of all are.
MOST_READ = 24
# More values than this in the label maps are grey values.
MOST_VALUES = 255


@dataclass(frozen=True)
class Grid:
    """The axial grid of one image.

    Attributes:
        slices: The number of axial slices.
        sides: (rows, columns) in pixels.
        spacing: (slices, rows, columns) in mm; None where the file states none.
    """

    slices: int
    sides: tuple[int, int]
    spacing: tuple[float, float, float] | None


@dataclass(frozen=True)
class Intensities:
    """The intensities of one image.

    Attributes:
        low: The lowest.
        high: The highest.
        percentiles: The 0.1 and the 99.9 percentile of all voxels.
        bright: The 99.9 percentile of the voxels above air, in HU.
    """

    low: float
    high: float
    percentiles: tuple[float, float]
    bright: float

    @property
    def in_hu(self) -> bool:
        """Whether they can be Hounsfield units."""
        return self.low <= AIR_HU and self.low >= -HIGHEST_HU and self.high <= HIGHEST_HU


@dataclass(frozen=True)
class Survey:
    """What was found in a dataset.

    Attributes:
        layout: Its layout.
        patients: Its real patients.
        grids: The grid of every real image.
        intensities: Those of the images that were read.
        integers: Whether the images that were read hold whole numbers.
    """

    layout: Layout
    patients: int
    grids: tuple[Grid, ...]
    intensities: tuple[Intensities, ...]
    integers: bool

    @property
    def spaced(self) -> bool:
        """Whether all images state their spacing."""
        return all(grid.spacing is not None for grid in self.grids)


def survey(layout: Layout) -> Survey:
    """Read the grids of all images, and the intensities of some.

    Args:
        layout: A recognised dataset.

    Returns:
        The survey.

    Raises:
        InputError: A file cannot be read.
    """
    real = [pair for pair in layout.pairs if not pair.synthetic]
    images = [_read(pair) for pair in _some(real)]
    return Survey(
        layout,
        len({pair.who for pair in real}),
        tuple(_grid(pair.image) for pair in real),
        tuple(_intensities(values) for values in images),
        all(bool((values == np.rint(values)).all()) for values in images),
    )


def label_values(pairs: Sequence[Pair]) -> dict[int, int]:
    """Count in how many label maps each value occurs.

    Args:
        pairs: The pairs of files.

    Returns:
        The number of label maps by value.

    Raises:
        InputError: A label map cannot be read, or holds more values than labels can have.
    """
    counts: Counter[int] = Counter()
    for pair in pairs:
        values = as_integers(read_image(pair.label, labels=True).values, pair.label)
        counts.update(np.unique(values).tolist())
        if len(counts) > MOST_VALUES:
            raise InputError(
                f"the label maps hold more than {MOST_VALUES} different values",
                expected="one value per class",
                remedy="check that the label maps are not images",
                file=pair.label,
            )
    return dict(sorted(counts.items()))


def labels_of_classes(pairs: Sequence[Pair]) -> list[dict[str, Any]] | None:
    """List the labels of label maps that are folders with one file per class.

    Args:
        pairs: The pairs of files.

    Returns:
        The labels as `data.labels` has them; None where a label map is a file.
    """
    if not all(pair.label.is_dir() for pair in pairs):
        return None
    return class_labels([file for pair in pairs for file in class_files(pair.label)])


def _some(pairs: Sequence[Pair]) -> list[Pair]:
    """At most `MOST_READ` of the pairs, spread over all."""
    numbers = np.linspace(0, len(pairs) - 1, min(MOST_READ, len(pairs)))
    return [pairs[int(n)] for n in np.unique(numbers.round())]


def _read(pair: Pair) -> NDArray[Any]:
    values = read_image(pair.image).values
    if not np.isfinite([float(values.min()), float(values.max())]).all():
        raise InputError(
            f"{pair.image.name} holds NaN or infinite values",
            expected="finite intensities",
            remedy="check how it was written, or take the patient out",
            file=pair.image,
        )
    return values


def _intensities(values: NDArray[Any]) -> Intensities:
    low, high = np.percentile(values, PERCENTILES)
    above_air = values[values > AIR_HU]
    bright = float(np.percentile(above_air, PERCENTILES[1])) if above_air.size else 0.0
    return Intensities(float(values.min()), float(values.max()), (float(low), float(high)), bright)


def _grid(image: Path) -> Grid:
    geometry, shape = grid_of(image)
    slices, rows, columns = axial_axes(geometry)
    spacing = tuple(geometry.spacing[2 - axis] for axis in (slices, rows, columns))
    # A picture, and a DICOM slice in the original's layout, may state no spacing.
    stated = not is_picture(image) and image.suffix.lower() != ".dcm"
    return Grid(
        shape[slices],
        (shape[rows], shape[columns]),
        (spacing[0], spacing[1], spacing[2]) if stated else None,
    )
