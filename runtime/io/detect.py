"""What lies at the given paths: which masks, of which kind, under which case names; and how each kind is read.

Finding reads headers alone. A volume file's case is called by its file name, its owner's choice; a DICOM source by a digest, because
archives write patients into file names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..contract import LabelTable
from ..errors import InputError, UnreadableVolume, UsageError, printable, reading
from ..labels import LabelMap, present_values
from ..volume import DicomSource, Geometry, LabelVolume, Layers, Segment, Volume
from . import archive
from .dicom_files import Instance, is_dicom, neutral, scan, walk
from .headers import SUFFIXES, check_header, is_synthetic, stem


@dataclass(frozen=True)
class ReadOptions:
    """How a person settles what a mask leaves open.

    `overlap_order`: segments, the first wins; `threshold`: the fraction from which on a voxel is inside; `like`: a volume file, or a
    folder with one DICOM series, whose grid contours are filled on; `allow_missing_references`: fill them on the series that is there.
    """

    overlap_order: tuple[str, ...] = ()
    threshold: float | None = None
    like: Path | None = None
    allow_missing_references: bool = False

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise UsageError(f"--threshold is {self.threshold}", expected="a fraction above 0, up to 1", remedy="give 0.5")
        if self.like is not None and not self.like.exists():
            raise UsageError(f"--like: {self.like} does not exist", expected="a volume, or a folder with one DICOM series", remedy="check the path",
                             file=self.like)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One mask that was found. Plain data: it may cross to another process.

    `name`: of its results; `path`: the file, folder or zip that was given; `kind`: "volume" for a NIfTI, NRRD or MHA file, "seg", "rtstruct",
    or "series" for DICOM images; `files`: what it is read from; `grid`: the image series that contours were drawn on. `size` (columns, rows,
    slices or frames) and `title` are for the screen: a title may name a patient.
    """

    name: str
    path: Path
    kind: str
    files: tuple[Path, ...]
    grid: tuple[Path, ...] = ()
    options: ReadOptions = ReadOptions()
    number: str = ""  # SeriesNumber
    series: str = field(default="", repr=False)  # SeriesInstanceUID
    size: tuple[int, ...] = ()
    title: str = field(default="", repr=False)

    @property
    def called(self) -> Path:
        """What messages and logs may call it: a volume by its path, without folders in a zip, a DICOM source by its case name."""
        return archive.called(self.path) if self.kind == "volume" else Path(self.name)


def find_cases(
    arguments: Sequence[Path],
    skipped: list[Path] | None = None,
    *,
    options: ReadOptions | None = None,
    series: str | None = None,
    every: bool = False,
) -> list[Case]:
    """The masks at files, folders and zips, in their order: of a folder the volumes directly in it and the DICOM objects anywhere below.

    Each SEG and each RTSTRUCT is a case; image series beside one are what it was drawn on. Where there are image series alone, the
    one is a case; of several, `series` must choose: its UID, SeriesNumber or case name (`every`: all of them, for a listing). What
    mask2ct itself wrote into such a folder is no mask: it is passed over and appended to `skipped`.

    Raises `UsageError` for a folder without masks, two masks of one case name, and series that nobody chose from. A file that does not
    exist stays in the list: it is that case's failure, not the run's.
    """
    cases: dict[str, Case] = {}
    loose: list[Path] = []  # DICOM files given one by one: the slices of a series among them belong together
    options, skipped = options or ReadOptions(), [] if skipped is None else skipped
    for argument in arguments:
        if _is(argument, Path.is_dir) or (archive.is_zip(argument) and _is(argument, Path.is_file)):
            found = _in_folder(argument, skipped, series, every)
        elif not argument.name.lower().endswith(SUFFIXES) and is_dicom(argument):
            loose.append(argument)
            continue
        else:
            found = [_volume(argument)]
        _add(cases, found, options)
    for case in _of_instances(scan(loose)):
        beside = scan(walk(case.files[0].parent)) if case.kind == "rtstruct" else []
        _add(cases, [replace(case, path=case.files[0], grid=_grid_of(case, beside))], options)
    return list(cases.values())


def _add(cases: dict[str, Case], found: Iterable[Case], options: ReadOptions) -> None:
    for case in found:
        other = cases.setdefault(case.name, replace(case, options=options))
        if [f.absolute() for f in other.files] != [f.absolute() for f in case.files]:
            raise UsageError(f"{other.called} and {case.called} would both be written as {case.name}", expected="each case name once",
                             remedy="rename one, leave one out, or run them into two output folders", file=case.called)  # fmt: skip


def _in_folder(folder: Path, skipped: list[Path], series: str | None, every: bool) -> list[Case]:
    if archive.is_zip(folder):
        files = archive.members(folder)
        volumes = [p for p in files if _is_volume(p)]
    else:
        with reading(folder, "a folder that can be listed", UsageError):
            volumes = sorted(p for p in folder.iterdir() if _is_volume(p))
        files = walk(folder)
    own = [path for path in volumes if not archive.is_zip(folder) and is_synthetic(path)]
    instances = scan(p for p in files if not _is_volume(p))
    own += [instance.path for instance in instances if instance.ours]
    skipped += own
    cases = [replace(_volume(path), path=path) for path in volumes if path not in own]
    dicom = _of_instances(i for i in instances if not i.ours)
    cases += [replace(case, path=folder, grid=_grid_of(case, instances)) for case in _chosen(folder, dicom, series, every)]
    if not cases:
        raise UsageError(f"the folder {folder} holds no masks", expected=f"DICOM masks, or files ending in {', '.join(SUFFIXES)}",
                         remedy="check the path", file=folder)  # fmt: skip
    return cases


def _chosen(folder: Path, cases: list[Case], series: str | None, every: bool) -> list[Case]:
    if every:
        return cases
    if series is not None:
        chosen = [case for case in cases if series in (case.series, case.number, case.name)]
        if not chosen or len({case.series for case in chosen}) > 1:
            raise _ask(folder, chosen or cases, f"{'several' if chosen else 'no'} series in {folder} are called {series}")
        return chosen
    masks = [case for case in cases if case.kind != "series"]
    if masks or len(cases) < 2:
        return masks or cases
    raise _ask(folder, cases, f"{folder} holds {len(cases)} image series, of which any may be the mask")


def _ask(folder: Path, cases: Sequence[Case], fact: str) -> UsageError:
    listed = "; ".join(f"{c.name} (series {c.number or '-'}, {' x '.join(map(str, c.size))})" for c in cases[:12])
    return UsageError(f"{fact}: {listed}{'; …' if len(cases) > 12 else ''}", expected="one mask, or --series UID|NUMBER|NAME to choose it",
                      remedy="see their descriptions with --list, then choose", file=folder)  # fmt: skip


def _of_instances(instances: Iterable[Instance]) -> list[Case]:
    """A case for each SEG, each RTSTRUCT, each image series and each DICOM file that is none of these (which reading will refuse)."""
    groups: dict[tuple[str, str], list[Instance]] = {}
    for instance in instances:
        key = (instance.kind or "other", instance.series if instance.kind == "image" else instance.uid)
        groups.setdefault(key, []).append(instance)
    cases = []
    for (kind, uid), group in groups.items():
        columns, rows, frames = group[0].size
        size = (columns, rows, max(frames, len(group)))
        cases.append(Case(neutral("series" if kind == "image" else kind if kind != "other" else "dicom", uid), group[0].path,
                          "series" if kind == "image" else kind, tuple(i.path for i in group), number=group[0].number, series=group[0].series,
                          size=size, title=group[0].title))  # fmt: skip
    return [case for case in cases if case.kind != "other"] or cases


def _grid_of(case: Case, instances: Sequence[Instance]) -> tuple[Path, ...]:
    """The one image series that contours were drawn on; else the one referred to, else the one in their frame of reference; else none."""
    if case.kind != "rtstruct":
        return ()
    from .rtstruct import references

    try:
        refers = references(case.files[0], case.name)
    except UnreadableVolume:  # reading it will say so
        return ()
    series: dict[str, list[Instance]] = {}
    for instance in instances:
        if instance.kind == "image" and not instance.ours:
            series.setdefault(instance.series, []).append(instance)
    drawn = {uid for uid, group in series.items() if any(i.uid in refers.instances for i in group)}
    framed = {uid for uid, group in series.items() if group[0].frame_of_reference == refers.frame_of_reference}
    found = next((uids for uids in (drawn, set(series) & refers.series, framed) if uids), set())
    return tuple(i.path for i in series[found.pop()]) if len(found) == 1 else ()


def read_mask(case: Case) -> Volume | Layers:
    """What the case's files hold, in their own values. Raises `InputError`s that say which case."""
    options = case.options
    with _naming(case):
        if case.kind == "seg":
            from .seg import read_seg

            return read_seg(case.files[0], case.name, threshold=options.threshold)
        if case.kind == "rtstruct":
            from .rtstruct import read_rtstruct

            return read_rtstruct(
                case.files[0], case.name, _grid(case), like=options.like is not None, allow_missing=options.allow_missing_references
            )
        if case.kind == "series":
            from .label_series import read_series

            return read_series(case.files, case.name)
        if case.kind != "volume":
            raise UnreadableVolume(f"{case.name} is {'a damaged DICOM file' if case.kind == 'damaged' else 'a DICOM file without pixels or contours'}",
                                   expected="a DICOM SEG, an RTSTRUCT or a series of labels", remedy="give the mask")  # fmt: skip
        from . import nifti

        with archive.on_disk(case.path) as path:
            return nifti.read_mask(path)


def read_case(case: Case, table: LabelTable, label_map: LabelMap | None = None) -> LabelVolume:
    """The case's labels in the model's indices. Raises `InputError`s that say which case."""
    from . import nifti

    order = case.options.overlap_order
    with _naming(case):
        if case.kind == "volume":
            with archive.on_disk(case.path) as path:
                return nifti.read_labels(path, table, label_map, order=order, file=case.called)
        return nifti.labels_of(read_mask(case), table, label_map, order=order, file=case.called)


@contextmanager
def _naming(case: Case) -> Iterator[None]:
    """Errors are about what the case is called."""
    try:
        yield
    except InputError as exc:
        exc.file = case.called
        raise


def structures(mask: Volume | Layers, file: Path) -> list[Segment]:
    """What a mask holds: the segments that it states, or the values that occur, named where it names them."""
    from .nifti import as_integers

    if isinstance(mask, Layers):
        return [*mask.segments]
    named = {segment.number: segment for segment in mask.segments}
    found = [value for value in present_values(as_integers(mask.values, file)) if value or not named or 0 in named]
    return [named.get(value, Segment(value)) for value in found]


def count(mask: Volume | Layers, file: Path) -> list[tuple[Segment, int]]:
    """Each value or segment that occurs, with its voxels; segments that overlap count the shared ones each."""
    from .nifti import as_integers

    if isinstance(mask, Layers):
        voxels = dict.fromkeys((segment.number for segment in mask.segments), 0)
        for number, _, piece in mask.pieces():
            voxels[number] += int(np.count_nonzero(piece))
        return [(segment, voxels[segment.number]) for segment in mask.segments]
    values, named = as_integers(mask.values, file), {segment.number: segment for segment in mask.segments}
    return [(named.get(v, Segment(v)), int(np.count_nonzero(values == v))) for v in present_values(values)]


def _grid(case: Case) -> tuple[Geometry, tuple[int, int, int], DicomSource] | None:
    """The grid that a structure set is filled on: the one given, else that of its series, else None."""
    from .label_series import series_grid
    from .nifti import read_volume

    like = case.options.like
    if like is None:
        return series_grid(case.grid, case.name) if case.grid else None
    if not like.is_dir() and not is_dicom(like):
        volume = read_volume(like)
        depth, height, width = volume.values.shape
        return volume.geometry, (depth, height, width), DicomSource("", (), "", {})
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
    return series_grid(next(iter(groups.values())), case.name)


def listing(case: Case) -> str:
    """A line for the screen: kind, name, size, the file, and what its owner called it. It may name a patient: it is for no log."""
    size = case.size
    if case.kind == "volume":
        try:
            with archive.on_disk(case.path) as path:
                size = _volume_size(path)
        except InputError as exc:
            return printable(f"{case.kind:<9} {case.name:<24} {'unreadable':<16} {case.path}  {exc.fact}")
    text = " x ".join(map(str, size)) if all(size) else "contours"
    where = str(case.files[0]) if len(case.files) == 1 else f"{case.files[0].parent} ({len(case.files)} files)"
    notes = [f"series {case.number}" if case.number else "", case.title, f"on {len(case.grid)} images" if case.grid else ""]
    return printable("  ".join(x for x in [f"{case.kind:<9} {case.name:<24} {text:<16} {where}", *notes] if x))


def _volume_size(path: Path) -> tuple[int, ...]:
    from .nifti import simpleitk

    check_header(path, voxels=False)
    reader = simpleitk().ImageFileReader()
    reader.SetFileName(str(path))
    with reading(path, "a volume"):
        reader.ReadImageInformation()
    return tuple(int(n) for n in reader.GetSize()[:3])


def _volume(path: Path) -> Case:
    return Case(stem(path), path, "volume", (path,))


def _is_volume(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")


def _is(path: Path, check: Callable[[Path], bool]) -> bool:
    try:
        return check(path)
    except (OSError, ValueError):  # a name that no file system takes
        return False
