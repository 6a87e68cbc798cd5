"""Real CTs beside masks: which belongs to which, and its voxels on the mask's own grid.

A CT and its mask are one pair where they have one name, or where a DICOM mask refers to the series.
Voxels are reordered and cut out, never interpolated: a CT on another grid is refused.
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
from ..dicom.files import dataset, map_dicom_errors, scan, walk
from ..volume_files import SUFFIXES, is_synthetic, stem, volume_files
from .dicom_series import read_ct
from .volume import read_volume

IMAGE_ENDINGS = (
    "_0000",
    "_image",
    "_img",
    "_ct",
)  # behind a CT's name; the first is nnU-Net's channel 0
MASK_ENDINGS = ("_label", "_labels", "_mask", "_seg", "_segmentation", "_gt")
PLACE_TOLERANCE = 0.02  # voxels that corners of the two grids may lie apart: what headers round to
LEAST_RANGE = (
    100.0  # between lowest and highest value; less is lost when they are rounded to whole HU
)


@dataclass(frozen=True)
class _Image:
    """One CT that was found: its `name`, or for a DICOM series the `series` UID; and its files."""

    name: str
    series: str
    files: tuple[Path, ...]


def with_images(cases: Sequence[Case], place: Path) -> list[Case]:
    """The cases, each with the CT that belongs to it; one without stays as it is.

    Args:
        cases: masks, as `find_cases` found them.
        place: a volume file or a folder or zip of them, whose names tell which mask they belong to
            (`IMAGE_ENDINGS` and `MASK_ENDINGS` do not count); or DICOM series, to which the masks
            refer. With one mask and one CT names do not matter.

    Raises:
        UsageError: where there is no CT, or none that belongs to any of the masks.
    """
    cases = [case for case in cases if not _is_image_of(case, cases)]
    masks = {file.absolute() for case in cases for file in case.files}
    images = [
        image
        for image in _images_at(place)
        if not masks & {file.absolute() for file in image.files}
    ]
    if not images:
        raise UsageError(
            f"--warp: {place} holds no CT",
            expected=(
                f"a real CT: a file ending in {', '.join(SUFFIXES)}, a DICOM series, or a folder of"
                " such"
            ),
            remedy="check the path; what mask2ct wrote itself is no real CT",
            file=place,
        )
    if len(images) == len(cases) == 1:
        return [_drawn_on(cases[0], images[0])]
    pairs = [(case, _belonging(case, images)) for case in cases]
    if not any(those for _, those in pairs):
        raise UsageError(
            f"--warp: none of {len(images)} CTs belongs to one of {len(cases)} masks",
            expected=(
                "CASE.nii.gz or CASE_0000.nii.gz for the mask CASE.nii.gz, or the series that a"
                " DICOM mask refers to"
            ),
            remedy="rename them, or give one mask and its CT",
            file=place,
        )
    return [_drawn_on(case, those[0]) if len(those) == 1 else case for case, those in pairs]


def read_image(case: Case, mask: LabelVolume) -> Volume:
    """The case's CT, int16 HU (D, H, W), on the grid of its mask.

    Raises:
        UnreadableVolume: where it cannot be read, or is not in HU.
        GeometryError: where its voxels are not those of the mask's grid.
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
    return Volume(_whole(values, name), mask.geometry, notes=volume.notes)


def _is_image_of(case: Case, cases: Sequence[Case]) -> bool:
    """Whether a case is the CT of another: a folder of both was given as the folder of masks."""
    name = _plain(case.name, IMAGE_ENDINGS)
    masks = {
        _plain(other.name, MASK_ENDINGS)
        for other in cases
        if other.kind == "volume" and other is not case
    }
    return case.kind == "volume" and name != case.name and name in masks


def _images_at(place: Path) -> list[_Image]:
    if not archive.exists(place):
        raise UsageError(
            f"--warp: {place} does not exist",
            expected="a real CT",
            remedy="check the path",
            file=place,
        )
    if archive.is_zip(place):
        files: list[Path] = archive.members(place)
        volumes = [path for path in files if _is_volume(path)]
    elif place.is_dir():
        files, volumes = (
            walk(place),
            sorted(path for path in place.iterdir() if _is_volume(path) and path.is_file()),
        )
    else:
        files, volumes = [place], [place] if _is_volume(place) else []
    named = [path for path in volumes if len(volumes) == 1 or not stem(path).endswith(MASK_ENDINGS)]
    images = [
        _Image(_plain(stem(path), IMAGE_ENDINGS), "", volume_files(path))
        for path in named
        if not is_synthetic(path)
    ]
    series: dict[str, list[Path]] = {}
    for instance in scan(path for path in files if not _is_volume(path)):
        if instance.kind == "image" and not instance.ours:
            series.setdefault(instance.series, []).append(instance.path)
    return images + [_Image("", uid, tuple(paths)) for uid, paths in series.items()]


def _belonging(case: Case, images: Iterable[_Image]) -> list[_Image]:
    if case.kind in ("volume", "classes"):
        return [
            image
            for image in images
            if image.name and image.name == _plain(case.name, MASK_ENDINGS)
        ]
    series = _series_referred_to(case)
    return [image for image in images if image.series in series]


def _series_referred_to(case: Case) -> set[str]:
    """UIDs of the series that a DICOM mask was drawn on; empty where it does not say."""
    from .dicom_rtstruct import references

    if case.kind == "rtstruct":
        return set(references(case.files[0], case.name).series)
    with map_dicom_errors(case.name):
        header = dataset(case.files[0], tags=["ReferencedSeriesSequence"])
        return {
            str(item.get("SeriesInstanceUID", ""))
            for item in header.get("ReferencedSeriesSequence") or ()
        } - {""}


def _drawn_on(case: Case, image: _Image) -> Case:
    """The case with its CT, whose grid contours are filled on where they have no other."""
    case = replace(case, image=image.files)
    if case.kind != "rtstruct" or case.grid or case.options.like is not None:
        return case
    if image.series:
        return replace(case, grid=image.files)
    return replace(case, options=replace(case.options, like=image.files[0]))


def _on_grid(image: Volume, mask: LabelVolume, case: Case) -> NDArray[np.generic]:
    """The image's voxels in the order and within the bounds of the mask's; a view.

    Raises:
        GeometryError: where a voxel of the mask's grid is none of the image's.
    """
    step = (
        np.linalg.inv(image.geometry.affine) @ mask.geometry.affine
    )  # voxel of the mask → voxel of the image
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
    axes = [
        2 - int(np.flatnonzero(turn[:, 2 - axis])[0]) for axis in range(3)
    ]  # of the image's array, for each of the mask's
    view = image.values.transpose(axes)
    cut = []
    for axis, of in enumerate(axes):
        sign, first, count = (
            int(turn[2 - of, 2 - axis]),
            int(start[2 - of]),
            mask.labels.shape[axis],
        )
        end = first + sign * count
        cut.append(slice(first, None if end < 0 else end, sign))
    return view[tuple(cut)]


def _whole(values: NDArray[np.generic], name: str) -> NDArray[np.int16]:
    """Rounded to int16 HU. Raises `UnreadableVolume` for what no CT in HU holds."""
    out = np.empty(values.shape, np.int16)
    low, high = np.inf, -np.inf
    for k, plane in enumerate(values):
        numbers = np.asarray(plane, np.float64)
        if not np.isfinite(numbers).all():
            raise UnreadableVolume(
                f"{name} holds values that are no numbers",
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
            remedy=(
                "export it in Hounsfield units; for images in other units there is runtime.RandWarp"
            ),
        )
    return out


def _grid_text(shape: Sequence[int], geometry: Geometry) -> str:
    size, spacing, origin = (
        " x ".join(f"{n:.6g}" for n in numbers)
        for numbers in (shape[::-1], geometry.spacing, geometry.origin)
    )
    return f"{size} voxels of {spacing} mm from {origin.replace(' x ', ', ')}"


def _plain(name: str, endings: Sequence[str]) -> str:
    """A name without the last part that says whether it is an image or a mask."""
    return next(
        (name[: -len(ending)] for ending in endings if name.endswith(ending) and name != ending),
        name,
    )


def _is_volume(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")
