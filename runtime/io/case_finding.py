"""Which masks lie at the given paths: of which kind they are, and under which case names.

Only headers are read. The case of a volume file is called by its file name, which its owner chose.
The case of a DICOM source is called by a digest, because archives write patients into file names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..core.atomic_files import belongs_to
from ..core.errors import UnreadableVolume, UsageError, reading
from . import archive
from .cases import Case, PassedOver, ReadOptions
from .dicom.files import Instance, is_broken_link, pseudonym, scan, walk
from .marks import written_by_mask2ct
from .readers.class_files import classes_among
from .readers.damaged_files import counted, damaged_beside
from .volume_files import SUFFIXES, stem, volume_files

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
    """Find the masks at files, folders and zips.

    Of a folder these are the volume files directly in it, and the DICOM objects anywhere below it.
    Each SEG and each RTSTRUCT is a case; image series beside it are its images. Of image series
    alone, a single one is a case; of several, the user must choose one. Binary volumes of a folder
    that are named like structures are one case, named like the folder. Files that pass for DICOM by
    their name and cannot be read are one case for each folder, which fails; beside a label series
    they make that series fail.

    Args:
        arguments: Files, folders and zips.
        skipped: Receives the paths that are not read: files that mask2ct wrote, links that are
            broken or not followed, and folders that are called like a volume or cannot be listed.
        options: How masks are read.
        series: Which of several image series is the mask: its UID, SeriesNumber or case name.
        every: Whether all image series are returned, for a listing.
        names: Names of structures, as `runtime.core.labels.names_of` writes them; the classes of
            TotalSegmentator count as well.

    Returns:
        The cases in the order of `arguments`. A file that does not exist is in the list: its case
        fails, not the run.

    Raises:
        UsageError: A folder has no masks; two masks have one case name; several image series are
            there and none is chosen; or `like` is set for a mask that has a grid.
    """
    cases: dict[str, Case] = {}
    options, skipped = options or ReadOptions(), [] if skipped is None else skipped
    folders = {
        argument
        for argument in arguments
        if _is(argument, Path.is_dir) or (archive.is_zip(argument) and _is(argument, Path.is_file))
    }
    # Slices that are given one by one belong together.
    not_dicom: list[Path] = []
    single_files = (path for path in arguments if path not in folders and not _is_volume(path))
    instances = scan(single_files, not_dicom)
    damaged = damaged_beside(instances, (path for path in not_dicom if _is(path, os.path.lexists)))
    volumes = set(not_dicom) - {instance.path for instance in damaged}
    for argument in arguments:
        if argument in folders:
            _add(cases, _in_folder(argument, skipped, series, every, names), options)
        elif argument in volumes or _is_volume(argument):
            _add(cases, [_volume(argument)], options)
    single = _of_instances([*instances, *damaged], every=every)
    for case in single if every else _counted_once(single):
        neighbours = scan(walk(case.files[0].parent)) if case.kind == "rtstruct" else []
        _add(cases, [_on_grid(replace(case, path=case.files[0]), neighbours)], options)
    return list(cases.values())


def _add(cases: dict[str, Case], new_cases: Iterable[Case], options: ReadOptions) -> None:
    """Add cases that are not listed yet, with their options."""
    for case in new_cases:
        first = cases.setdefault(case.name, replace(case, options=options))
        if [f.absolute() for f in first.files] != [f.absolute() for f in case.files]:
            raise UsageError(
                f"{first.display_name} and {case.display_name} would both be written as"
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
                remedy="leave --like out; to change the grid of the mask, resample it first",
                file=case.display_name,
            )


def _in_folder(
    folder: Path, skipped: list[PassedOver], series: str | None, every: bool, names: Collection[str]
) -> list[Case]:
    """The cases of one folder or zip."""
    unread: dict[str, list[Path]] = {}
    results: list[Path] = []
    if archive.is_zip(folder):
        files = archive.members(folder)
        volumes = [path for path in files if _is_volume(path)]
    else:
        with reading(folder, "a folder that can be listed", UsageError):
            volumes = sorted(p for p in folder.iterdir() if _is_volume(p))
        files = walk(folder, unread)
        unread["folder called like a volume"] = [path for path in volumes if _is(path, Path.is_dir)]
        # A broken link is a mask that is missing: it stays in the list and fails.
        volumes = [path for path in volumes if belongs_to(folder, path) or is_broken_link(path)]
        results = [path for path in volumes if written_by_mask2ct(path)]
    not_dicom: list[Path] = []
    instances = scan((path for path in files if not _is_volume(path)), not_dicom)
    damaged = damaged_beside(instances, not_dicom)
    results += [instance.path for instance in instances if instance.written_by_mask2ct]
    damaged_paths = {instance.path for instance in damaged}
    unread["broken link"] = [
        path for path in not_dicom if is_broken_link(path) and path not in damaged_paths
    ]
    passed_over = [PassedOver(path, what) for what, paths in unread.items() for path in paths]
    skipped += [*(PassedOver(path, OWN) for path in results), *passed_over]
    volumes = [path for path in volumes if path not in results]
    classes = classes_among(volumes, names)
    cases = [Case(_folder_name(folder), folder, "classes", tuple(classes))] if classes else []
    cases += [replace(_volume(path), path=path) for path in volumes if path not in classes]
    dicom = _of_instances(
        [*(i for i in instances if not i.written_by_mask2ct), *damaged], every=every
    )
    cases += [
        _on_grid(replace(case, path=folder), instances)
        for case in _chosen(folder, dicom, series, every)
    ]
    if not cases:
        read = {*results, *(instance.path for instance in instances)}
        kinds = [OWN for _ in results]
        kinds += [_kind_of_file(path, folder) for path in files if path not in read]
        also = counted([one.what for one in passed_over] + kinds)
        raise UsageError(
            f"the folder {folder} holds no masks{f' (but {also})' if also else ''}",
            expected=f"DICOM masks, or files ending in {', '.join(SUFFIXES)}",
            remedy="give the target of the link itself" if "link" in also else "check the path",
            file=folder,
        )
    return cases


def _chosen(folder: Path, cases: list[Case], series: str | None, every: bool) -> list[Case]:
    """The DICOM cases of a folder that the user means."""
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
            f"{folder} holds {len(images)} image series, and each may be the mask",
        )
    return _counted_once([*(masks or images), *(case for case in cases if case.kind == "damaged")])


def _counted_once(cases: Sequence[Case]) -> list[Case]:
    """The cases without damaged files that already count as damage of an image series."""
    if all(case.kind != "damaged" for case in cases):
        return [*cases]
    folders = {file.parent for case in cases if case.kind == "series" for file in case.files}
    return [
        case
        for case in cases
        if case.kind != "damaged" or not folders.issuperset(file.parent for file in case.files)
    ]


def _ask(folder: Path, cases: Sequence[Case], fact: str) -> UsageError:
    """The error that asks the user to choose a series."""
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
    """A case for each SEG, each RTSTRUCT and each image series.

    Where there is none of these, each other DICOM file is a case, which reading refuses. The
    damaged files of a folder are one case (with `every`, one each). They also count as damage of
    each image
    series in that folder, and of a series in several folders if their folder has no readable file:
    some exporters give each slice a folder.
    """
    groups: dict[tuple[str, str], list[Instance]] = {}
    damaged: dict[Path, list[Instance]] = {}
    for instance in instances:
        if instance.kind != "damaged":
            uid = instance.series if instance.kind == "image" else instance.uid
            groups.setdefault((instance.kind or "other", uid), []).append(instance)
        if instance.kind == "damaged" or (instance.kind == "image" and instance.damage):
            damaged.setdefault(instance.path.parent, []).append(instance)
    for folder, damaged_here in damaged.items():
        for instance in damaged_here:
            key = "damaged", str(instance.path if every else folder)
            groups.setdefault(key, []).append(instance)
    folders_of_damage_alone = {*damaged} - {
        instance.path.parent
        for (kind, _), group in groups.items()
        if kind != "damaged"
        for instance in group
        if not instance.damage
    }
    cases = []
    for (kind, uid), group in groups.items():
        columns, rows, frames = group[0].size
        damage = [instance.damage for instance in group if instance.damage]
        if kind == "image":
            folders = {instance.path.parent for instance in group} if damaged else set()
            neighbours = [
                instance
                for folder, damaged_here in damaged.items()
                if folder in folders or (len(folders) > 1 and folder in folders_of_damage_alone)
                for instance in damaged_here
            ]
            damage += [instance.damage for instance in neighbours if instance not in group]
        prefix = {"image": "series", "other": "dicom"}.get(kind, kind)
        cases.append(
            Case(
                pseudonym(prefix, uid),
                group[0].path,
                "series" if kind == "image" else kind,
                tuple(instance.path for instance in group),
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
    """Signs in the instance numbers that a series is not complete at its start or end.

    A slice that is missing in between shows by the positions.
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
        yield f"it has {len(group)} of the {images} images that its files state"
    elif (
        len(group) > 1
        and len(numbers) == len(group) == max(numbers) - min(numbers) + 1
        and min(numbers) > 1
    ):
        yield f"its images are numbered from {min(numbers)}, not from 1"


def _on_grid(case: Case, instances: Sequence[Instance]) -> Case:
    """The case with the image series that its contours were drawn on, where exactly one fits.

    It is the series of the referenced images, else the referenced series, else the series in the
    same frame of reference. A CT that mask2ct wrote is no mask, but contours may be drawn on it.
    """
    if case.kind != "rtstruct":
        return case
    from .readers.dicom_rtstruct import references

    try:
        refers = references(case.files[0], case.name)
    except UnreadableVolume:
        # It raises again when the case is read.
        return case
    series: dict[str, list[Instance]] = {}
    for instance in instances:
        if instance.kind == "image":
            series.setdefault(instance.series, []).append(instance)
    acquired = {uid for uid, group in series.items() if not group[0].written_by_mask2ct}
    drawn = {uid for uid, group in series.items() if any(i.uid in refers.instances for i in group)}
    framed = {
        uid
        for uid, group in series.items()
        if group[0].frame_of_reference == refers.frame_of_reference
    }
    candidates = (drawn, set(series) & refers.series, framed & acquired, framed)
    uids = next((uids for uids in candidates if uids), set())
    grid = series[uids.pop()] if len(uids) == 1 else []
    lacking = len(refers.instances - {instance.uid for instance in grid})
    return replace(case, grid=tuple(i.path for i in grid), lacking=lacking)


def _kind_of_file(path: Path, folder: Path) -> str:
    """What to call a file that is no mask: its suffix alone, because a name may be a patient's."""
    if _is_volume(path):
        suffix = next(suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix))
        return f"{suffix} in a folder below" if path.parent != folder else suffix
    suffix = path.suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z][a-z0-9]{0,4}", suffix) else "file of another kind"


def _folder_name(folder: Path) -> str:
    """The case name of a mask that a folder or zip holds."""
    return folder.stem if archive.is_zip(folder) else folder.absolute().resolve().name


def _volume(path: Path) -> Case:
    return Case(stem(path), path, "volume", volume_files(path))


def _is_volume(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")


def _is(path: Path, check: Callable[[Path], bool]) -> bool:
    """Whether `check` holds for a path; False where the path cannot exist."""
    try:
        return check(path)
    except (OSError, ValueError):
        # No file system takes such a name.
        return False
