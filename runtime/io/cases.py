"""What a case is (one mask, with the files that it is read from), and how each kind is read.

`runtime.io.case_finding` finds the cases.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..core.atomic_files import sha256_of
from ..core.errors import InputError, UnreadableVolume, UsageError, printable, reading
from ..core.intensity_check import Census
from ..core.labels import LabelMap
from ..core.manifest import LabelTable
from ..core.volume import DicomSource, LabelVolume, Layers, Segment, Volume
from . import archive
from .dicom.files import is_dicom, scan, walk
from .readers.damaged_files import counted
from .volume_files import SUFFIXES, check_header

if TYPE_CHECKING:
    from .readers.dicom_rtstruct import Grid

# Bytes of a file that is read for its digest before its header is checked.
SMALL = 64 << 20


@dataclass(frozen=True)
class ReadOptions:
    """The user's decisions where a mask leaves something open.

    Attributes:
        overlap_order: Segments by name; where they overlap, the first wins.
        threshold: Fraction (0 to 1] from which a voxel of a FRACTIONAL SEG is inside.
        like: A volume file, or a folder with one DICOM series; contours are filled on its grid.
        allow_missing_references: Whether contours are filled on the available series although
            images that they refer to are missing.
        force_labels: Whether a file that looks like an image is read as a label map.
    """

    overlap_order: tuple[str, ...] = ()
    threshold: float | None = None
    like: Path | None = None
    allow_missing_references: bool = False
    force_labels: bool = False

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise UsageError(
                f"--threshold is {self.threshold}",
                expected="a fraction above 0, up to 1",
                remedy="give 0.5",
            )
        if self.like is not None and not self.like.exists():
            raise UsageError(
                f"--like: {self.like} does not exist",
                expected="a volume, or a folder with one DICOM series",
                remedy="check the path",
                file=self.like,
            )


@dataclass(frozen=True)
class Case:
    """One mask. It is plain data: it may be sent to another process.

    Attributes:
        name: Name of its results.
        path: The file, folder or zip that the user gave.
        kind: "volume" for a NIfTI, NRRD or MHA file; "classes" for several of them, one per class;
            "seg"; "rtstruct"; "series" for DICOM images; "damaged" for files of one folder that
            cannot be read as DICOM.
        files: The files that it is read from.
        grid: The image series that contours were drawn on.
        image: The real CT that is deformed with it, or that gives a synthetic CT its layout
            (`runtime.io.readers.image`).
        options: How it is read.
        number: SeriesNumber of a DICOM source.
        series: SeriesInstanceUID of a DICOM source.
        size: Columns, rows, and slices or frames; for the screen.
        title: Description for the screen; it may name a patient.
        damage: Of DICOM, one reason for each damaged file of the case, and for each damaged file
            beside it that may belong to it.
        lacking: Number of images that it refers to and that are missing.
        doubts: Other signs that it is not complete.
    """

    name: str
    path: Path
    kind: str
    files: tuple[Path, ...]
    grid: tuple[Path, ...] = ()
    image: tuple[Path, ...] = ()
    options: ReadOptions = ReadOptions()
    number: str = ""
    series: str = field(default="", repr=False)
    size: tuple[int, ...] = ()
    title: str = field(default="", repr=False)
    damage: tuple[str, ...] = ()
    lacking: int = 0
    doubts: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether nothing shows a missing or damaged file, as while a copy is still running."""
        closed = self.options.like is not None or self.options.allow_missing_references
        return not (self.damage or self.doubts or (self.lacking and not closed))

    @property
    def display_name(self) -> Path:
        """The name for messages and logs, which shows no folder of a zip and no file of DICOM.

        A volume is called by its path, a DICOM source by its case name.
        """
        return (
            archive.display_name(self.path)
            if self.kind in ("volume", "classes")
            else Path(self.name)
        )


@dataclass(frozen=True)
class PassedOver:
    """A path in a folder that is not read, and what it is; for the screen."""

    path: Path
    what: str


def read_mask(case: Case) -> Volume | Layers:
    """Read the mask of a case, with the values that its files hold.

    Returns:
        A `Volume` of values (D, H, W), or `Layers` where segments may overlap.

    Raises:
        InputError: The files cannot be read, or are not a mask; the error names the case.
    """
    options = case.options
    with _naming(case):
        _check_whole(case)
        if case.kind == "seg":
            from .readers.dicom_seg import read_seg

            return read_seg(case.files[0], case.name, threshold=options.threshold)
        if case.kind == "rtstruct":
            from .readers.dicom_rtstruct import read_rtstruct

            grid, notes = _grid(case)
            layers = read_rtstruct(
                case.files[0],
                case.name,
                grid,
                like=options.like is not None,
                allow_missing=options.allow_missing_references,
            )
            return replace(layers, notes=(*notes, *layers.notes))
        if case.kind == "series":
            from .readers.dicom_series import read_series

            volume = read_series(case.files, case.name, force=options.force_labels)
            doubts = (f"{case.name} may not be complete: {doubt}" for doubt in case.doubts)
            return replace(volume, notes=(*doubts, *volume.notes))
        if case.kind == "classes":
            from .readers.class_files import read_classes

            return read_classes(case.files, case.display_name)
        if case.kind != "volume":
            raise UnreadableVolume(
                f"{case.name} is a DICOM file without pixels or contours",
                expected="a DICOM SEG, an RTSTRUCT or a series of labels",
                remedy="give the mask",
            )
        from .readers import volume as volume_reader

        with archive.on_disk(case.path) as path:
            return volume_reader.read_mask(path)


def check_large_files(case: Case) -> None:
    """Refuse a case with a large volume for its header, before it is read for its digest.

    A small volume, and one in a zip, are not opened: that reads them costs little.

    Args:
        case: What will be read.

    Raises:
        InputError: A header is refused, or a mask does not fit into memory; it names the case.
    """
    if not any(path.is_file() and path.stat().st_size > SMALL for path in _volumes(case)):
        return
    from .readers.volume import check_before_reading

    with _naming(case):
        for path in _volumes(case):
            if path.is_file() and path.name.lower().endswith(SUFFIXES):
                check_before_reading(path, case.display_name)


def _volumes(case: Case) -> list[Path]:
    """The volume files that a case is read from: masks, their voxels, its CT and its grid."""
    like = case.options.like
    masks = case.files if case.kind in ("volume", "classes") else ()
    return [*masks, *case.image, *([] if like is None else [like])]


def read_case(case: Case, table: LabelTable, label_map: LabelMap | None = None) -> LabelVolume:
    """Read the labels of a case, as indices of the model.

    Args:
        case: What to read.
        table: The model's label table.
        label_map: The user's map from values, codes or names to indices.

    Returns:
        Indices (D, H, W), uint8, with their grid.

    Raises:
        InputError: As `read_mask`, and for labels that the model does not know; it names the case.
    """
    from .readers import volume as volume_reader

    order, force = case.options.overlap_order, case.options.force_labels
    with _naming(case):
        if case.kind == "volume":
            with archive.on_disk(case.path) as path:
                return volume_reader.read_labels(
                    path, table, label_map, order=order, force=force, file=case.display_name
                )
        return volume_reader.labels_of(
            read_mask(case), table, label_map, order=order, force=force, file=case.display_name
        )


def _check_whole(case: Case) -> None:
    """Refuse a DICOM case with a damaged file, or with one that may be damaged."""
    remedy = (
        "copy or export the damaged files again, or remove them if they are not part of the mask;"
        " --list shows which files they are"
    )
    if case.kind == "damaged":
        files = "1 file" if len(case.files) == 1 else f"{len(case.files)} files of a folder"
        raise UnreadableVolume(
            f"{case.name}: {files} cannot be read as DICOM ({counted(case.damage)})",
            expected="complete DICOM files",
            remedy=remedy,
        )
    if case.kind == "series" and case.damage:
        raise UnreadableVolume(
            f"{case.name} is not complete: among its files and the files beside them"
            f" {len(case.damage)} cannot be read ({counted(case.damage)})",
            expected="all slices of the series",
            remedy=remedy,
        )
    if case.kind in ("seg", "rtstruct") and len(case.files) > 1:
        raise UnreadableVolume(
            f"{case.name}: {len(case.files)} files of one SOP Instance UID differ",
            expected="one file of each UID",
            remedy="give the file that you mean; --list shows which files they are",
        )


@contextmanager
def _naming(case: Case) -> Iterator[None]:
    """Set the case's display name on errors."""
    try:
        yield
    except InputError as exc:
        exc.file = case.display_name
        raise
    except MemoryError as exc:
        raise UnreadableVolume(
            f"{case.display_name.name} needs more memory than this run has:"
            f" {exc or 'none is left'}",
            expected="a mask that fits into memory",
            remedy="cut it, raise the limit, or use a larger machine",
            file=case.display_name,
        ) from exc


def structures(mask: Volume | Layers, file: Path, *, force: bool = False) -> list[Segment]:
    """The segments that a mask declares, or the values that occur in it, with their names.

    Args:
        mask: As `read_mask` returns it.
        file: The file that errors name.
        force: Whether values are listed even if they look like an image.

    Raises:
        UnreadableVolume: The values look like an image, and `force` is not set.
    """
    if isinstance(mask, Layers):
        return [*mask.segments]
    named = {segment.number for segment in mask.segments}
    return [
        segment
        for segment, _ in count(mask, file, force=force)
        if segment.number or not named or 0 in named
    ]


def count(mask: Volume | Layers, file: Path, *, force: bool = False) -> list[tuple[Segment, int]]:
    """Each value or segment of a mask with its number of voxels.

    Segments that overlap each count the voxels that they share.

    Args:
        mask: As `read_mask` returns it.
        file: The file that errors name.
        force: Whether values are counted even if they look like an image.

    Raises:
        UnreadableVolume: The values look like an image, and `force` is not set.
    """
    from .readers.volume import as_integers

    if isinstance(mask, Layers):
        voxels = dict.fromkeys((segment.number for segment in mask.segments), 0)
        for number, _, piece in mask.pieces():
            voxels[number] += int(np.count_nonzero(piece))
        return [(segment, voxels[segment.number]) for segment in mask.segments]
    named = {segment.number: segment for segment in mask.segments}
    census = Census.of(as_integers(mask.values, file))
    if not force:
        census.refuse_image(file)
    return [
        (named.get(value, Segment(value)), voxels)
        for value, voxels in sorted(census.voxels.items())
    ]


def _grid(case: Case) -> tuple[Grid | None, tuple[str, ...]]:
    """The grid on which a structure set is filled, and notes for the user.

    It is the grid of `--like`, else of the series that the contours were drawn on, else None.
    """
    from .readers.dicom_series import series_grid
    from .readers.volume import read_volume

    like = case.options.like
    if like is None:
        if not case.grid:
            return None, ()
        return series_grid(case.grid, f"the image series that {case.name} was drawn on")
    if not like.is_dir() and not is_dicom(like):
        volume = read_volume(like)
        depth, height, width = volume.values.shape
        return (volume.geometry, (depth, height, width), DicomSource("", (), "", {})), ()
    groups: dict[str, list[Path]] = {}
    for instance in scan(walk(like) if like.is_dir() else [like]):
        if instance.kind == "image":
            groups.setdefault(instance.series, []).append(instance.path)
    if len(groups) != 1:
        raise InputError(
            f"{case.name}: the folder given by --like holds {len(groups)} image series",
            expected="one",
            remedy="give a folder with one series",
        )
    (paths,) = groups.values()
    return series_grid(paths, f"the image series that --like gives {case.name}")


def like_digests(like: Path | None) -> list[str]:
    """SHA-256 of the file that `--like` names, or of every file of the folder.

    Returns:
        Hexadecimal digests, sorted, so that they do not depend on file names.

    Raises:
        InputError: A file cannot be read.
    """
    if like is None:
        return []
    digests = []
    for file in walk(like) if like.is_dir() else [like]:
        with reading(file, "a file that can be read"), archive.opened(file) as handle:
            digests.append(sha256_of(handle))
    return sorted(digests)


def listing(case: Case) -> str:
    """A line for the screen: kind, name, size, files, and description.

    It may name a patient: do not write it to a log. A damaged case has one line per file.

    Returns:
        The text, without control characters.
    """
    size = case.size
    if case.kind == "damaged":
        files = zip(case.damage, case.files, strict=True)
        return "\n".join(
            f"{case.kind:<9} {case.name:<24} {reason:<16} {printable(file)}"
            for reason, file in files
        )
    if case.kind == "volume":
        try:
            with archive.on_disk(case.path) as path:
                size = _volume_size(path)
        except InputError as exc:
            return printable(
                f"{case.kind:<9} {case.name:<24} {'unreadable':<16} {case.path}  {exc.fact}"
            )
    text = " x ".join(map(str, size)) if all(size) else "contours"
    where = f"{case.files[0].parent} ({len(case.files)} files)"
    # Several files of another kind have one UID: each is listed, to choose from.
    if len(case.files) == 1 or case.kind not in ("series", "classes"):
        where = ", ".join(map(str, case.files))
    columns = [f"{case.kind:<9} {case.name:<24} {text:<16} {where}"]
    if len(case.files) > 1 and case.kind in ("seg", "rtstruct"):
        columns.append(f"{len(case.files)} files of one UID that differ")
    if case.number:
        columns.append(f"series {case.number}")
    if case.title:
        columns.append(case.title)
    if case.grid:
        columns.append(f"on {len(case.grid)} images")
    return printable("  ".join(columns))


def _volume_size(path: Path) -> tuple[int, ...]:
    return check_header(path, voxels=False).voxels.shape[::-1]
