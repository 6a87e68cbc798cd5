"""What lies at the given paths: which masks, of which kind, under which case names; and how each
kind is read.

Finding reads headers alone. A volume file's case is called by its file name, its owner's choice; a
DICOM source by a digest, because archives write patients into file names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..core.atomic_files import belongs_to, sha256_of
from ..core.errors import InputError, UnreadableVolume, UsageError, printable, reading
from ..core.intensity_check import Census
from ..core.labels import LabelMap
from ..core.manifest import LabelTable
from ..core.volume import DicomSource, LabelVolume, Layers, Segment, Volume
from . import archive
from .dicom.files import Instance, is_broken_link, is_dicom, pseudonym, scan, walk
from .readers.class_files import classes_among
from .readers.damaged_files import counted, damaged_beside
from .volume_files import SUFFIXES, check_header, is_synthetic, stem, volume_files

if TYPE_CHECKING:
    from .readers.dicom_rtstruct import Grid


@dataclass(frozen=True)
class ReadOptions:
    """How a person settles what a mask leaves open.

    `overlap_order`: segments, the first wins; `threshold`: the fraction from which on a voxel is
    inside; `like`: a volume file, or a folder with one DICOM series, whose grid contours are filled
    on; `allow_missing_references`: fill them on the series that is there; `force_labels`: what
    looks like an image is a label map all the same.
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
    """One mask that was found. Plain data: it may cross to another process.

    `name`: of its results; `path`: the file, folder or zip that was given; `kind`: "volume" for a
    NIfTI, NRRD or MHA file, "classes" for several of them, one a class, "seg", "rtstruct", "series"
    for DICOM images, or "damaged" for the files of one folder that cannot be read as DICOM;
    `files`: what it is read from; `grid`: the image series that contours were drawn on; `image`:
    the real CT that is to be deformed with it (`runtime.io.readers.image`). `size` (columns, rows,
    slices or frames) and `title` are for the screen: a title may name a patient. `damage`: of DICOM
    what is wrong with a file of it, or with one beside it that may belong to it, a reason for each;
    `lacking`: images that it refers to and that are not there; `doubts`: what else says that it is
    not complete.
    """

    name: str
    path: Path
    kind: str
    files: tuple[Path, ...]
    grid: tuple[Path, ...] = ()
    image: tuple[Path, ...] = ()
    options: ReadOptions = ReadOptions()
    number: str = ""  # SeriesNumber
    series: str = field(default="", repr=False)  # SeriesInstanceUID
    size: tuple[int, ...] = ()
    title: str = field(default="", repr=False)
    damage: tuple[str, ...] = ()
    lacking: int = 0
    doubts: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether nothing says that a file of it is missing or damaged: a copy may be under way."""
        closed = self.options.like is not None or self.options.allow_missing_references
        return not (self.damage or self.doubts or (self.lacking and not closed))

    @property
    def display_name(self) -> Path:
        """What messages and logs may call it: a volume by its path, without folders in a zip, a
        DICOM source by its case name.
        """
        return (
            archive.display_name(self.path)
            if self.kind in ("volume", "classes")
            else Path(self.name)
        )


@dataclass(frozen=True)
class PassedOver:
    """What lies in a folder and is not read, with what it is: for the screen."""

    path: Path
    what: str


OWN = "file that mask2ct wrote"


def find_cases(
    arguments: Sequence[Path],
    skipped: list[PassedOver] | None = None,
    *,
    options: ReadOptions | None = None,
    series: str | None = None,
    every: bool = False,
    names: Collection[str] = (),
) -> list[Case]:
    """The masks at files, folders and zips, in their order: of a folder the volumes directly in it
    and the DICOM objects anywhere below.

    Each SEG and each RTSTRUCT is a case; image series beside one are what it was drawn on. Where
    there are image series alone, the one is a case; of several, `series` must choose: its UID,
    SeriesNumber or case name (`every`: all of them, for a listing). Binary volumes of a folder that
    are called like structures are together one case, called like the folder. Files that cannot be
    read as DICOM though they pass for it are a case for each folder, which fails; beside a label
    series they are its failure.

    Args:
        arguments: files, folders and zips.
        skipped: receives what is passed over: what mask2ct itself wrote into such a folder, links that are not followed or lead
            nowhere, and folders that are called like a volume or cannot be listed.
        options: how masks are read.
        series: see above.
        every: see above.
        names: what structures are called, as `runtime.core.labels.names_of` has them; TotalSegmentator's classes count as well.

    Raises:
        UsageError: for a folder without masks, two masks of one case name, series that nobody chose from, and a grid (`like`) for a mask
            that has its own. A file that does not exist stays in the list: it is that case's failure, not the run's.
    """
    cases: dict[str, Case] = {}
    options, skipped = options or ReadOptions(), [] if skipped is None else skipped
    folders = {
        argument
        for argument in arguments
        if _is(argument, Path.is_dir) or (archive.is_zip(argument) and _is(argument, Path.is_file))
    }
    others: list[
        Path
    ] = []  # files given one by one: the slices of a series among them belong together
    instances = scan(
        (path for path in arguments if path not in folders and not _is_volume(path)), others
    )
    damaged = damaged_beside(instances, (path for path in others if _is(path, os.path.lexists)))
    volumes = set(others) - {one.path for one in damaged}
    for argument in arguments:
        if argument in folders:
            _add(cases, _in_folder(argument, skipped, series, every, names), options)
        elif argument in volumes or _is_volume(argument):
            _add(cases, [_volume(argument)], options)
    single = _of_instances([*instances, *damaged], every=every)
    for case in single if every else _counted_once(single):
        beside = scan(walk(case.files[0].parent)) if case.kind == "rtstruct" else []
        _add(cases, [_on_grid(replace(case, path=case.files[0]), beside)], options)
    return list(cases.values())


def _add(cases: dict[str, Case], found: Iterable[Case], options: ReadOptions) -> None:
    for case in found:
        other = cases.setdefault(case.name, replace(case, options=options))
        if [f.absolute() for f in other.files] != [f.absolute() for f in case.files]:
            raise UsageError(
                f"{other.display_name} and {case.display_name} would both be written as"
                f" {case.name}",
                expected="each case name once",
                remedy="rename one, leave one out, or run them into two output folders",
                file=case.display_name,
            )
        if (
            options.like is not None
            and case.kind in ("volume", "classes", "seg", "series")
            and archive.exists(case.path)
        ):
            raise UsageError(
                f"--like has no effect on {case.display_name}: its voxels state their own grid",
                expected="contours (RTSTRUCT), which have none",
                remedy=(
                    "leave --like out; to have the mask on another grid, resample it first with a"
                    " tool for that"
                ),
                file=case.display_name,
            )


def _in_folder(
    folder: Path, skipped: list[PassedOver], series: str | None, every: bool, names: Collection[str]
) -> list[Case]:
    unread: dict[str, list[Path]] = {}
    if archive.is_zip(folder):
        files = archive.members(folder)
        volumes, own = [p for p in files if _is_volume(p)], []
    else:
        with reading(folder, "a folder that can be listed", UsageError):
            volumes = sorted(p for p in folder.iterdir() if _is_volume(p))
        files = walk(folder, unread)
        unread["folder called like a volume"] = [path for path in volumes if _is(path, Path.is_dir)]
        volumes = [
            path for path in volumes if belongs_to(folder, path) or is_broken_link(path)
        ]  # a broken one is a mask that is missing
        own = [path for path in volumes if is_synthetic(path)]
    others: list[Path] = []
    instances = scan((p for p in files if not _is_volume(p)), others)
    damaged = damaged_beside(instances, others)
    own += [instance.path for instance in instances if instance.ours]
    unread["broken link"] = [
        path for path in others if is_broken_link(path) and all(path != one.path for one in damaged)
    ]
    passed_over = [PassedOver(path, what) for what, paths in unread.items() for path in paths]
    skipped += [*(PassedOver(path, OWN) for path in own), *passed_over]
    volumes = [path for path in volumes if path not in own]
    classes = classes_among(volumes, names)
    cases = [Case(_folder_name(folder), folder, "classes", tuple(classes))] if classes else []
    cases += [replace(_volume(path), path=path) for path in volumes if path not in classes]
    dicom = _of_instances([*(i for i in instances if not i.ours), *damaged], every=every)
    cases += [
        _on_grid(replace(case, path=folder), instances)
        for case in _chosen(folder, dicom, series, every)
    ]
    if not cases:
        also = counted([one.what for one in passed_over])
        raise UsageError(
            f"the folder {folder} holds no masks{f' (but {also})' if also else ''}",
            expected=f"DICOM masks, or files ending in {', '.join(SUFFIXES)}",
            remedy="give what a link leads to itself" if "link" in also else "check the path",
            file=folder,
        )
    return cases


def _chosen(folder: Path, cases: list[Case], series: str | None, every: bool) -> list[Case]:
    if every:
        return cases
    if series is not None:
        chosen = [case for case in cases if series in (case.series, case.number, case.name)]
        if not chosen or len({case.series for case in chosen}) > 1:
            raise _ask(
                folder,
                chosen or cases,
                f"{'several' if chosen else 'no'} series in {folder} are called {series}",
            )
        return chosen
    masks = [case for case in cases if case.kind not in ("series", "damaged")]
    images = [case for case in cases if case.kind == "series"]
    if not masks and len(images) > 1:
        raise _ask(
            folder,
            images,
            f"{folder} holds {len(images)} image series, of which any may be the mask",
        )
    return _counted_once([*(masks or images), *(case for case in cases if case.kind == "damaged")])


def _counted_once(cases: Sequence[Case]) -> list[Case]:
    """Without the damaged files of folders whose series is among the cases: they are its damage."""
    if all(case.kind != "damaged" for case in cases):
        return [*cases]
    folders = {file.parent for case in cases if case.kind == "series" for file in case.files}
    return [
        case
        for case in cases
        if case.kind != "damaged" or not folders.issuperset(file.parent for file in case.files)
    ]


def _ask(folder: Path, cases: Sequence[Case], fact: str) -> UsageError:
    listed = "; ".join(
        f"{c.name} (series {c.number or '-'}, {' x '.join(map(str, c.size))})" for c in cases[:12]
    )
    return UsageError(
        f"{fact}: {listed}{'; …' if len(cases) > 12 else ''}",
        expected="one mask, or --series UID|NUMBER|NAME to choose it",
        remedy="see their descriptions with --list, then choose",
        file=folder,
    )


def _of_instances(instances: Iterable[Instance], *, every: bool) -> list[Case]:
    """A case for each SEG, each RTSTRUCT, each image series and each DICOM file that is none of
    these (which reading will refuse).

    The damaged files of a folder are one case (with `every`, one each). They are also the damage of
    each image series in that folder, and of a series in several folders where nothing else is in
    theirs: some exporters give each slice a folder.
    """
    groups: dict[tuple[str, str], list[Instance]] = {}
    damaged: dict[Path, list[Instance]] = {}
    for instance in instances:
        if instance.kind != "damaged":
            uid = instance.series if instance.kind == "image" else instance.uid
            groups.setdefault((instance.kind or "other", uid), []).append(instance)
        if instance.kind == "damaged" or (instance.kind == "image" and instance.damage):
            damaged.setdefault(instance.path.parent, []).append(instance)
    for folder, those in damaged.items():
        for one in those:
            groups.setdefault(("damaged", str(one.path if every else folder)), []).append(one)
    alone = {*damaged} - {
        one.path.parent
        for (kind, _), group in groups.items()
        if kind != "damaged"
        for one in group
        if not one.damage
    }
    cases = []
    for (kind, uid), group in groups.items():
        columns, rows, frames = group[0].size
        damage = [instance.damage for instance in group if instance.damage]
        if kind == "image":
            folders = {i.path.parent for i in group} if damaged else set()
            beside = [
                one
                for folder, those in damaged.items()
                if folder in folders or (len(folders) > 1 and folder in alone)
                for one in those
            ]
            damage += [one.damage for one in beside if one not in group]
        cases.append(
            Case(
                pseudonym(
                    "series" if kind == "image" else kind if kind != "other" else "dicom", uid
                ),
                group[0].path,
                "series" if kind == "image" else kind,
                tuple(i.path for i in group),
                number=group[0].number,
                series=group[0].series,
                size=(columns, rows, max(frames, len(group))),
                title=group[0].title,
                damage=tuple(damage),
                doubts=tuple(_ends(group)) if kind == "image" else (),
            )
        )
    return [case for case in cases if case.kind != "other"] or cases


def _ends(group: Sequence[Instance]) -> Iterator[str]:
    """What the numbers of a series' images say against its being complete; holes between them
    show by the positions.
    """
    numbers = {
        instance.instance_number for instance in group if instance.instance_number is not None
    }
    stated = {instance.images for instance in group}
    if (
        len(stated) == 1
        and len(group) < (images := stated.pop())
        and len(numbers) == len(group)
        and max(numbers) <= images
    ):
        yield f"it has {len(group)} of the {images} images that its files speak of"
    elif (
        len(group) > 1
        and len(numbers) == len(group) == max(numbers) - min(numbers) + 1
        and min(numbers) > 1
    ):
        yield f"its images are numbered from {min(numbers)}, not from 1"


def _on_grid(case: Case, instances: Sequence[Instance]) -> Case:
    """With the one image series that contours were drawn on; else the one referred to, else the
    one in their frame of reference; else none.
    """
    if case.kind != "rtstruct":
        return case
    from .readers.dicom_rtstruct import references

    try:
        refers = references(case.files[0], case.name)
    except UnreadableVolume:  # reading it will say so
        return case
    series: dict[str, list[Instance]] = {}
    for instance in instances:
        if instance.kind == "image" and not instance.ours:
            series.setdefault(instance.series, []).append(instance)
    drawn = {uid for uid, group in series.items() if any(i.uid in refers.instances for i in group)}
    framed = {
        uid
        for uid, group in series.items()
        if group[0].frame_of_reference == refers.frame_of_reference
    }
    found = next((uids for uids in (drawn, set(series) & refers.series, framed) if uids), set())
    grid = series[found.pop()] if len(found) == 1 else []
    lacking = len(refers.instances - {instance.uid for instance in grid})
    return replace(case, grid=tuple(i.path for i in grid), lacking=lacking)


def read_mask(case: Case) -> Volume | Layers:
    """What the case's files hold, in their own values. Raises `InputError`s that say which case."""
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
            return replace(
                volume,
                notes=(
                    *(f"{case.name} may not be complete: {doubt}" for doubt in case.doubts),
                    *volume.notes,
                ),
            )
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


def read_case(case: Case, table: LabelTable, label_map: LabelMap | None = None) -> LabelVolume:
    """The case's labels in the model's indices. Raises `InputError`s that say which case."""
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
    """Refuse a DICOM case a file of which is damaged, or may be."""
    remedy = (
        "copy or export what is damaged again, or take away what is no part of it; --list shows"
        " which files those are"
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
            f"{case.name} is not complete: of its files and those beside them {len(case.damage)}"
            f" cannot be read ({counted(case.damage)})",
            expected="all slices of the series",
            remedy=remedy,
        )
    if case.kind in ("seg", "rtstruct") and len(case.files) > 1:
        raise UnreadableVolume(
            f"{case.name}: {len(case.files)} files of one SOP Instance UID differ in what they"
            " hold",
            expected="one file of each UID",
            remedy="give the one that is meant; --list shows which files those are",
        )


@contextmanager
def _naming(case: Case) -> Iterator[None]:
    """Errors are about what the case is called."""
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
    """What a mask holds: the segments that it states, or the values that occur, named where it
    names them. Raises as `count` does.
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
    """Each value or segment that occurs, with its voxels; segments that overlap count the shared
    ones each. Raises `UnreadableVolume` for an image, unless `force`.
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
    """The grid that a structure set is filled on: the one given, else that of its series, else
    None; and what is to be said of it.
    """
    from .readers.dicom_series import series_grid
    from .readers.volume import read_volume

    like = case.options.like
    if like is None:
        return (
            series_grid(case.grid, f"the image series that {case.name} was drawn on")
            if case.grid
            else (None, ())
        )
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
    return series_grid(
        next(iter(groups.values())), f"the image series that --like gives {case.name}"
    )


def like_digests(like: Path | None) -> list[str]:
    """SHA-256 of what --like names: the file, or every file of the folder, in no order of names.

    Raises `InputError`s.
    """
    if like is None:
        return []
    digests = []
    for file in walk(like) if like.is_dir() else [like]:
        with reading(file, "a file that can be read"), archive.opened(file) as handle:
            digests.append(sha256_of(handle))
    return sorted(digests)


def listing(case: Case) -> str:
    """A line for the screen: kind, name, size, the file, and what its owner called it.

    It may name a patient: it is for no log.
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
    if len(case.files) == 1 or case.kind not in ("series", "classes"):  # several of one UID
        where = ", ".join(map(str, case.files))
    differ = (
        f"{len(case.files)} files of one UID that differ"
        if len(case.files) > 1 and case.kind in ("seg", "rtstruct")
        else ""
    )
    notes = [
        differ,
        f"series {case.number}" if case.number else "",
        case.title,
        f"on {len(case.grid)} images" if case.grid else "",
    ]
    return printable(
        "  ".join(x for x in [f"{case.kind:<9} {case.name:<24} {text:<16} {where}", *notes] if x)
    )


def _volume_size(path: Path) -> tuple[int, ...]:
    return check_header(path, voxels=False).voxels.shape[::-1]


def _folder_name(folder: Path) -> str:
    """What a mask is called that a whole folder or zip holds."""
    return folder.stem if archive.is_zip(folder) else folder.absolute().resolve().name


def _volume(path: Path) -> Case:
    return Case(stem(path), path, "volume", volume_files(path))


def _is_volume(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")


def _is(path: Path, check: Callable[[Path], bool]) -> bool:
    try:
        return check(path)
    except (OSError, ValueError):  # a name that no file system takes
        return False
