"""Real CTs beside masks: which CT belongs to which mask, and its voxels on the mask's grid.

A CT and a mask belong together if they have one name, or if a DICOM mask refers to the series.
Voxels are reordered and cropped, not interpolated: a CT on another grid is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...core.errors import GeometryError, InputError, UnreadableVolume, UsageError
from ...core.volume import Geometry, LabelVolume, Volume
from .. import archive
from ..cases import Case
from ..dicom.files import map_dicom_errors, scan, walk
from ..dicom.header import opened
from ..marks import written_by_mask2ct
from ..volume_files import SUFFIXES, stem, volume_files
from .dicom_series import read_ct
from .volume import read_volume

# Endings of a CT's name; the first is nnU-Net's channel 0.
IMAGE_ENDINGS = ("_0000", "_image", "_img", "_ct", "_mr")
MASK_ENDINGS = ("_label", "_labels", "_mask", "_seg", "_segmentation", "_gt")
# Voxels between the corners of the two grids: headers round their numbers.
PLACE_TOLERANCE = 0.02
# HU between the lowest and the highest value: rounding to integers would lose a smaller range.
LEAST_RANGE = 100.0


@dataclass(frozen=True)
class _Image:
    """One CT.

    Attributes:
        name: Its name without `IMAGE_ENDINGS`; empty for a DICOM series.
        series: UID of a DICOM series; empty for a volume file.
        files: Its files.
    """

    name: str
    series: str
    files: tuple[Path, ...]


def with_images(cases: Sequence[Case], place: Path, option: str = "--warp") -> list[Case]:
    """Assign a real CT to each case.

    Args:
        cases: Masks, as `find_cases` returns them.
        place: A volume file, or a folder or zip of them, whose names without `IMAGE_ENDINGS` and
            `MASK_ENDINGS` tell their masks; or DICOM series, to which the masks refer. One mask and
            one CT belong together whatever their names.
        option: The option that named the place, for messages.

    Returns:
        The cases with their CTs; a case without exactly one CT is unchanged. A case that is the CT
        of another case is left out.

    Raises:
        UsageError: There is no CT, or none that belongs to a mask.
    """
    cases = [case for case in cases if not _is_image_of(case, cases)]
    masks = {file.absolute() for case in cases for file in case.files}
    images = [
        image
        for image in _images_at(place, option)
        if not masks & {file.absolute() for file in image.files}
    ]
    if not images:
        raise UsageError(
            f"{option}: {place} holds no CT",
            expected=(
                f"a real CT: a file ending in {', '.join(SUFFIXES)}, a DICOM series, or a folder"
                " with such files"
            ),
            remedy="check the path; a CT that mask2ct wrote is not a real CT",
            file=place,
        )
    if len(images) == len(cases) == 1:
        return [_with_image(cases[0], images[0])]
    pairs = [(case, _matching_images(case, images)) for case in cases]
    if not any(matching for _, matching in pairs):
        raise UsageError(
            f"{option}: none of {len(images)} CTs belongs to one of {len(cases)} masks",
            expected=(
                "CASE.nii.gz or CASE_0000.nii.gz for the mask CASE.nii.gz, or the series that a"
                " DICOM mask refers to"
            ),
            remedy="rename them, or give one mask and its CT",
            file=place,
        )
    return [
        _with_image(case, matching[0]) if len(matching) == 1 else case for case, matching in pairs
    ]


def read_image(case: Case, mask: LabelVolume) -> Volume:
    """Read the CT of a case on the grid of its mask.

    Args:
        case: A case with an image.
        mask: Its labels.

    Returns:
        HU (D, H, W), int16.

    Raises:
        InputError: The case has no CT.
        UnreadableVolume: The CT cannot be read, or is not in HU.
        GeometryError: Its voxels are not those of the mask's grid.
    """
    if not case.image:
        raise InputError(
            f"there is no CT for {case.display_name.name}, or more than one",
            expected="one CT of the mask's name, or the series that it refers to",
            remedy="rename it, or give one mask and its CT",
            file=case.display_name,
        )
    name = f"the CT of {case.display_name.name}"
    if _is_volume(case.image[0]):
        with archive.on_disk(case.image[0]) as path:
            volume = read_volume(path)
    else:
        volume = read_ct(case.image, name)
    values = _on_grid(volume, mask, case)
    return Volume(_to_int16_hu(values, name), mask.geometry, notes=volume.notes)


def _is_image_of(case: Case, cases: Sequence[Case]) -> bool:
    """Whether a case is the CT of another case, from a folder with masks and CTs."""
    name = without_ending(case.name, IMAGE_ENDINGS)
    masks = {
        without_ending(mask.name, MASK_ENDINGS)
        for mask in cases
        if mask.kind == "volume" and mask is not case
    }
    return case.kind == "volume" and name != case.name and name in masks


def _images_at(place: Path, option: str) -> list[_Image]:
    """The real CTs at a file, folder or zip."""
    if not archive.exists(place):
        raise UsageError(
            f"{option}: {place} does not exist",
            expected="a real CT",
            remedy="check the path",
            file=place,
        )
    if archive.is_zip(place):
        files: list[Path] = archive.members(place)
        volumes = [path for path in files if _is_volume(path)]
    elif place.is_dir():
        files = walk(place)
        volumes = sorted(path for path in place.iterdir() if _is_volume(path) and path.is_file())
    else:
        files, volumes = [place], [place] if _is_volume(place) else []
    named = [path for path in volumes if len(volumes) == 1 or not stem(path).endswith(MASK_ENDINGS)]
    images = [
        _Image(without_ending(stem(path), IMAGE_ENDINGS), "", volume_files(path))
        for path in named
        if not written_by_mask2ct(path)
    ]
    series: dict[str, list[Path]] = {}
    for instance in scan(path for path in files if not _is_volume(path)):
        if instance.kind == "image" and not instance.written_by_mask2ct:
            series.setdefault(instance.series, []).append(instance.path)
    return images + [_Image("", uid, tuple(paths)) for uid, paths in series.items()]


def _matching_images(case: Case, images: Iterable[_Image]) -> list[_Image]:
    if case.kind in ("volume", "classes"):
        name = without_ending(case.name, MASK_ENDINGS)
        return [image for image in images if image.name and image.name == name]
    series = _series_referred_to(case)
    return [image for image in images if image.series in series]


def _series_referred_to(case: Case) -> set[str]:
    """UIDs of the series that a DICOM mask was drawn on; empty if it states none."""
    from .dicom_rtstruct import references

    if case.kind == "rtstruct":
        return set(references(case.files[0], case.name).series)
    sequence = "ReferencedSeriesSequence"
    with (
        map_dicom_errors(case.name),
        opened(case.files[0], ["SOPInstanceUID"], [sequence]) as source,
    ):
        return {str(item.get("SeriesInstanceUID", "")) for item in source.items(sequence)} - {""}


def _with_image(case: Case, image: _Image) -> Case:
    """The case with its CT, on whose grid contours are filled if they have no other grid."""
    case = replace(case, image=image.files)
    if case.kind != "rtstruct" or case.grid or case.options.like is not None:
        return case
    if image.series:
        return replace(case, grid=image.files)
    return replace(case, options=replace(case.options, like=image.files[0]))


def _on_grid(image: Volume, mask: LabelVolume, case: Case) -> NDArray[np.generic]:
    """The image's voxels in the order and within the bounds of the mask's; a view.

    Raises:
        GeometryError: A voxel of the mask's grid is not a voxel of the image.
    """
    # From voxels of the mask to voxels of the image.
    step = np.linalg.inv(image.geometry.affine) @ mask.geometry.affine
    turn, start = np.rint(step[:3, :3]).astype(int), np.rint(step[:3, 3]).astype(int)
    size = np.array(mask.labels.shape[::-1])
    corners = np.stack(np.meshgrid(*([0, n - 1] for n in size), indexing="ij"), -1).reshape(-1, 3)
    exact = corners @ step[:3, :3].T + step[:3, 3]
    places = corners @ turn.T + start
    is_reordering = (np.abs(turn).sum(0) == 1).all() and (np.abs(turn).sum(1) == 1).all()
    inside = (places >= 0).all() and (places < np.array(image.values.shape[::-1])).all()
    if not is_reordering or np.abs(exact - places).max() > PLACE_TOLERANCE or not inside:
        raise GeometryError(
            f"{case.display_name.name} and its CT are not on one grid: the mask has"
            f" {_grid_text(mask.labels.shape, mask.geometry)}, the CT"
            f" {_grid_text(image.values.shape, image.geometry)}",
            expected="a mask whose voxels are voxels of its CT",
            remedy="resample the mask onto its CT, with nearest neighbour",
            file=case.display_name,
        )
    # The axis of the image's array for each axis of the mask's array.
    image_axes = [2 - int(np.flatnonzero(turn[:, 2 - axis])[0]) for axis in range(3)]
    view = image.values.transpose(image_axes)
    cut = []
    for axis, image_axis in enumerate(image_axes):
        sign = int(turn[2 - image_axis, 2 - axis])
        first = int(start[2 - image_axis])
        end = first + sign * mask.labels.shape[axis]
        cut.append(slice(first, None if end < 0 else end, sign))
    return view[tuple(cut)]


def _to_int16_hu(values: NDArray[np.generic], name: str) -> NDArray[np.int16]:
    """The values rounded to int16 HU.

    Raises:
        UnreadableVolume: The values are not those of a CT in HU.
    """
    out = np.empty(values.shape, np.int16)
    low, high = np.inf, -np.inf
    for k, plane in enumerate(values):
        numbers = np.asarray(plane, np.float64)
        if not np.isfinite(numbers).all():
            raise UnreadableVolume(
                f"{name} holds values that are not finite numbers",
                expected="Hounsfield units",
                remedy="export it again",
            )
        low, high = min(low, float(numbers.min())), max(high, float(numbers.max()))
        if low < -32768 or high > 32767:
            break
        out[k] = np.rint(numbers)
    if low < -32768 or high > 32767 or high - low < LEAST_RANGE or low >= 0:
        raise UnreadableVolume(
            f"{name} spans {low:g} to {high:g}",
            expected="a CT in Hounsfield units: air lies near -1000",
            remedy="export it in Hounsfield units; for other units, use runtime.RandWarp",
        )
    return out


def _grid_text(shape: Sequence[int], geometry: Geometry) -> str:
    size, spacing, origin = (
        " x ".join(f"{n:.6g}" for n in numbers)
        for numbers in (shape[::-1], geometry.spacing, geometry.origin)
    )
    return f"{size} voxels of {spacing} mm from {origin.replace(' x ', ', ')}"


def without_ending(name: str, endings: Sequence[str]) -> str:
    """A name without the ending that marks it as an image or a mask.

    Args:
        name: The name of a file, without the suffix of its format.
        endings: `IMAGE_ENDINGS`, `MASK_ENDINGS`.
    """
    return next(
        (name[: -len(ending)] for ending in endings if name.endswith(ending) and name != ending),
        name,
    )


def _is_volume(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")
