"""The results in an output folder: which images mask2ct wrote there, with their masks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..core.errors import GeometryError, UnreadableVolume
from ..core.volume import Geometry, Layers, Volume
from .dicom.files import scan, walk
from .marks import is_marked_derived, is_marked_mask, written_by_mask2ct
from .readers.image import IMAGE_ENDINGS, MASK_ENDINGS, without_ending
from .volume_files import SUFFIXES, stem

# Folders of a training set, whose names are no part of a case's.
_TRAINING_FOLDERS = ("imagesTr", "labelsTr")
_VARIANT = re.compile(r"(.+)_v(\d+)")
# How far two grids may differ, in mm: headers round their numbers.
_TOLERANCE_MM = 0.01


@dataclass(frozen=True)
class Result:
    """One image that mask2ct wrote.

    Attributes:
        case: The name of its case.
        variant: Its number; None for a result without variants.
        files: The volume file, or the files of the DICOM series.
        mask: Its mask, or its SEG; None where none lies beside it.
        modality: What the image's name ends with: "ct", "mr", "image".
        derived: Whether it is a deformed real CT. A DICOM series does not tell.
    """

    case: str
    variant: int | None
    files: tuple[Path, ...]
    mask: Path | None
    modality: str = "ct"
    derived: bool = False

    @property
    def title(self) -> str:
        """What tells it from the other images of its case."""
        kind = "deformed" if self.derived else "synthetic"
        return kind if self.variant is None else f"variant {self.variant}"

    @property
    def is_dicom(self) -> bool:
        """Whether it is a DICOM series."""
        return not self.files[0].name.lower().endswith(SUFFIXES)


def find_results(folder: Path) -> list[Result]:
    """Find the images that mask2ct wrote below a folder, in any of its formats.

    Args:
        folder: An output folder of `synth`.

    Returns:
        The results by case and variant.
    """
    files = walk(folder)
    volumes = [
        path for path in files if path.name.lower().endswith(SUFFIXES) and written_by_mask2ct(path)
    ]
    masks = {_name(path, folder): path for path in volumes if is_marked_mask(path)}
    results = [
        _result(_name(path, folder), (path,), masks.get(_name(path, folder)))
        for path in volumes
        if not is_marked_mask(path)
    ]
    results += _dicom_results(folder, [path for path in files if path.suffix == ".dcm"])
    return sorted(results, key=lambda result: (result.case, result.variant or 0))


def read_result(result: Result) -> tuple[Volume, Volume | None]:
    """Read the image of a result, and its mask where there is one.

    Args:
        result: The result.

    Returns:
        The image, (D, H, W); its mask, whose `segments` name values where the file does.

    Raises:
        InputError: A file cannot be read, or the mask is not on the image's grid.
    """
    from .readers.dicom_seg import read_seg
    from .readers.dicom_series import read_ct
    from .readers.volume import read_mask, read_volume

    if not result.is_dicom:
        image = read_volume(result.files[0])
        return image, None if result.mask is None else flat(read_mask(result.mask), image, result)
    if len(result.files) == 1:
        raise UnreadableVolume(
            f"{result.case} is an Enhanced CT, one file of all slices",
            expected="a classic series, one file a slice, or a volume file",
            remedy="synthesize it once more without --enhanced to look at it here",
        )
    image = read_ct(result.files, result.case)
    if result.mask is None:
        return image, None
    seg = read_seg(result.mask, result.case)
    # The names in it are the model's: mask2ct wrote it.
    segments = tuple(replace(segment, private=False) for segment in seg.segments)
    return image, flat(replace(seg, segments=segments), image, result)


def flat(mask: Volume | Layers, image: Volume, result: Result) -> Volume:
    """A mask as one value a voxel, on the grid of its image.

    Args:
        mask: The mask; of segments that overlap the last one is shown.
        image: The image.
        result: The result that both belong to.

    Raises:
        GeometryError: The mask is not on the image's grid.
    """
    values: NDArray[np.generic]
    if isinstance(mask, Layers):
        numbers = np.zeros(mask.shape, np.int32)
        for number, k, inside in mask.pieces():
            numbers[k][inside] = number
        values = numbers
    else:
        values = mask.values
    if values.shape != image.values.shape or not _equal(mask.geometry, image.geometry):
        raise GeometryError(
            f"the mask of {result.case} is not on the grid of its image",
            expected="the mask that the image was synthesized from",
            remedy="give the folder of those masks, or leave it out",
        )
    return Volume(values, image.geometry, segments=mask.segments)


def _equal(one: Geometry, other: Geometry) -> bool:
    return bool(np.allclose(one.affine, other.affine, rtol=0, atol=_TOLERANCE_MM))


def _name(path: Path, folder: Path) -> str:
    """The name of a result from that of its image or mask, with the folders above it."""
    parent = path.parent.parent if path.parent.name in _TRAINING_FOLDERS else path.parent
    name = without_ending(stem(path), (*IMAGE_ENDINGS, *MASK_ENDINGS))
    # Of a folder that is a result or a part of one itself, no name is above it.
    above = parent.relative_to(folder) if parent.is_relative_to(folder) else Path()
    return (above / name).as_posix()


def _result(name: str, files: tuple[Path, ...], mask: Path | None) -> Result:
    match = _VARIANT.fullmatch(name)
    case, variant = (match[1], int(match[2])) if match else (name, None)
    ending = stem(files[0]).rpartition("_")[2]
    return Result(
        case,
        variant,
        files,
        mask,
        ending if ending in ("mr", "image") else "ct",
        is_marked_derived(files[0]),
    )


def _dicom_results(folder: Path, files: list[Path]) -> Iterator[Result]:
    """A result for each folder of DICOM files."""
    images: dict[Path, list[Path]] = {}
    masks: dict[Path, Path] = {}
    for instance in scan(files):
        if not instance.written_by_mask2ct:
            continue
        if instance.kind == "image":
            images.setdefault(instance.path.parent, []).append(instance.path)
        elif instance.kind == "seg":
            masks[instance.path.parent] = instance.path
    for place, paths in images.items():
        name = place.relative_to(folder).as_posix() if place != folder else folder.name
        yield _result(name, tuple(paths), masks.get(place))
