"""PNG, TIFF, BMP and JPEG files as images and label maps, and folders of such pairs.

A picture states no size of its pixels in mm, so that each slice is fitted to the canvas. The pages
of a TIFF are slices.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.core.errors import UnreadableVolume, UsageError, importing, reading
from runtime.core.volume import Geometry, Volume
from runtime.io.volume_files import SUFFIXES, stem

from ..config import DataConfig
from .pairs import LEAST_PATIENTS, Layout, Pair, lacks

# A JPEG is no label map: its compression changes values.
LOSSY = (".jpg", ".jpeg")
PICTURES = (".png", ".tif", ".tiff", ".bmp", *LOSSY)
IMAGE_FOLDERS = ("images", "image", "imgs")
LABEL_FOLDERS = ("labels", "masks", "label", "mask", "segmentations", "annotations")
# What the name of a label map may add to that of its image, and what image names may end with.
LABEL_ENDINGS = ("", "_label", "_labels", "_mask", "_seg", "_gt")
IMAGE_ENDINGS = ("", "_image", "_img")
SPLIT_FOLDERS = {"train": "train", "val": "valid", "valid": "valid", "test": "test"}
# Pillow's modes with one value per pixel.
_GREY_MODES = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L")
_EXPECTED = "a PNG, TIFF, BMP or JPEG file with one value per pixel"


def is_picture(path: Path) -> bool:
    """Say whether a file is read by `read_picture`.

    Args:
        path: The file.
    """
    return path.suffix.lower() in PICTURES


def read_picture(path: Path, *, labels: bool = False) -> Volume:
    """Read a picture.

    Args:
        path: The file.
        labels: Whether it is a label map; then a palette's indices are the labels.

    Returns:
        Values (pages, H, W) on a grid of 1 mm.

    Raises:
        UnreadableVolume: The file is damaged, has colours, or is a label map in a lossy format.
    """
    if labels and path.suffix.lower() in LOSSY:
        raise UnreadableVolume(
            f"{path.name} is a JPEG, whose compression changes labels",
            expected="a label map as PNG or TIFF",
            remedy="export the label map again, as PNG",
            file=path,
        )
    with importing("PIL", "Pillow, which reads pictures", "pip install pillow"):
        from PIL import Image, ImageSequence
    with reading(path, _EXPECTED):
        try:
            with Image.open(path) as picture:
                planes = [
                    _plane(page, path, labels=labels) for page in ImageSequence.Iterator(picture)
                ]
        except (SyntaxError, Image.DecompressionBombError) as exc:
            raise ValueError(str(exc)) from exc
    if len({plane.shape for plane in planes}) != 1:
        raise UnreadableVolume(
            f"the pages of {path.name} differ in size",
            expected="pages of one size",
            remedy="write one file per image",
            file=path,
        )
    return Volume(np.stack(planes), Geometry(np.eye(4)))


def picture_shape(path: Path) -> tuple[int, int, int]:
    """Read the size of a picture from its header.

    Args:
        path: The file.

    Returns:
        (pages, H, W).

    Raises:
        UnreadableVolume: The file is not a picture.
    """
    with importing("PIL", "Pillow, which reads pictures", "pip install pillow"):
        from PIL import Image
    with reading(path, _EXPECTED), Image.open(path) as picture:
        width, height = picture.size
        return int(getattr(picture, "n_frames", 1)), height, width


def is_picture_folder(folder: Path) -> bool:
    """Say whether a folder holds pairs in folders named images and labels, or pictures by name.

    Args:
        folder: The folder.
    """
    return any(True for _ in _pair_folders(folder)) or bool(_flat_labels(folder))


def pictures(folder: Path, data: DataConfig) -> Layout:
    """Read `images` and `labels`, also below train, val and test, or NAME and NAME_label.

    Args:
        folder: The folder.
        data: The section of the config.

    Returns:
        The layout.

    Raises:
        UsageError: An image has no label map, or there are no images.
    """
    pairs = [
        pair
        for images, labels, split in _pair_folders(folder)
        for pair in _pairs_of(images, labels, split)
    ]
    flat = _flat_labels(folder)
    pairs += [Pair(_image_name(image), image, label) for image, label in flat]
    if not pairs:
        raise UsageError(
            f"{folder.name or folder} has folders for images and labels without a picture",
            expected="images/NAME.png + labels/NAME.png",
            remedy="check --dataset-path",
            file=folder,
        )
    splits = {pair.split for pair in pairs}
    if not {"train", "valid"} <= splits:
        # A split without both sides is none.
        pairs = [Pair(p.name, p.image, p.label, p.patient) for p in pairs]
    pairs, grouped = _with_patients(pairs)
    patients = len({pair.who for pair in pairs})
    says = f"{len(pairs)} pairs of images and label maps of {patients} patients"
    if grouped:
        says += "; what a name has before its last number is the patient"
    elif patients == len(pairs):
        says += (
            "; each image counts as a patient: if several are of one, write a CSV table with the"
            " column patient"
        )
    return Layout(pairs, says)


def _plane(page: Any, path: Path, *, labels: bool) -> NDArray[Any]:
    """One page as values (H, W)."""
    if page.mode in _GREY_MODES or (labels and page.mode == "P"):
        values: NDArray[Any] = np.asarray(page)
        return values.astype(np.uint8) if values.dtype == bool else values.copy()
    colours = np.asarray(page.convert("RGB"))
    if (colours != colours[..., :1]).any():
        count = len(np.unique(colours.reshape(-1, 3), axis=0))
        raise UnreadableVolume(
            f"{path.name} has colours ({count} of them)",
            expected=_EXPECTED,
            remedy=(
                "write one number per class instead of its colour"
                if labels
                else "convert it to grey values"
            ),
            file=path,
        )
    return colours[..., 0].copy()


def _is_image_file(path: Path) -> bool:
    name = path.name.lower()
    return not name.startswith(".") and name.endswith((*PICTURES, *SUFFIXES)) and path.is_file()


def _pair_folders(folder: Path) -> Iterator[tuple[Path, Path, str | None]]:
    """Folders of images and of their labels, with the split that their place states."""
    places: list[tuple[Path, str | None]] = [(folder, None)]
    places += [(folder / name, split) for name, split in SPLIT_FOLDERS.items()]
    for place, split in places:
        images = next((place / n for n in IMAGE_FOLDERS if (place / n).is_dir()), None)
        labels = next((place / n for n in LABEL_FOLDERS if (place / n).is_dir()), None)
        if images is None or labels is None:
            continue
        below = [name for name in SPLIT_FOLDERS if (images / name).is_dir()]
        if not below:
            yield images, labels, split
        for name in below:
            yield images / name, labels / name, SPLIT_FOLDERS[name]


def _pairs_of(images: Path, labels: Path, split: str | None) -> Iterator[Pair]:
    """The pairs of two folders, whose own folders are patients."""
    label_of = {
        file.relative_to(labels).parent / stem(file): file
        for file in sorted(labels.rglob("*"))
        if _is_image_file(file)
    }
    for image in sorted(images.rglob("*")):
        if not _is_image_file(image):
            continue
        place, name = image.relative_to(images).parent, _image_name(image)
        names = [place / f"{n}{ending}" for n in (stem(image), name) for ending in LABEL_ENDINGS]
        label = next((label_of[key] for key in names if key in label_of), None)
        if label is None:
            raise lacks(str(place / name), f"{labels.name}/{place / name}.png", image)
        patient = "" if place == Path() else place.as_posix()
        yield Pair((place / name).as_posix(), image, label, patient, split)


def _flat_labels(folder: Path) -> list[tuple[Path, Path]]:
    """Pictures of one folder with their label maps: NAME_label, NAME_mask and so on."""
    if not folder.is_dir():
        return []
    files = {stem(file): file for file in sorted(folder.iterdir()) if is_picture(file)}
    pairs = []
    for name, file in files.items():
        if name.endswith(LABEL_ENDINGS[1:]) or name.startswith("."):
            continue
        labels = [f"{_image_name(file)}{ending}" for ending in LABEL_ENDINGS[1:]]
        label = next((files[key] for key in labels if key in files), None)
        if label is not None:
            pairs.append((file, label))
    return pairs


def _image_name(image: Path) -> str:
    """The name of an image's pair."""
    name = stem(image)
    return next((name[: -len(e)] for e in IMAGE_ENDINGS[1:] if name.endswith(e)), name)


def _with_patients(pairs: list[Pair]) -> tuple[list[Pair], bool]:
    """The pairs, with patients from names such as p07_slice012 where these make enough of them."""
    if any(pair.patient for pair in pairs):
        return pairs, False
    prefixes = [re.sub(r"[^0-9]*[0-9]+$", "", Path(pair.name).name) for pair in pairs]
    counts = Counter(prefixes)
    if "" in counts or len(counts) < LEAST_PATIENTS or len(counts) == len(pairs):
        return pairs, False
    return [
        Pair(pair.name, pair.image, pair.label, prefix, pair.split)
        for pair, prefix in zip(pairs, prefixes, strict=True)
    ], True
