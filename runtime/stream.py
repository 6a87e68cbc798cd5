"""Many masks → many CTs: files in, files out, one bad case never stops the others."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .contract import LabelTable
from .errors import InputError, UnreadableVolume, UsageError, reading, writing
from .files import remove_orphans, temporary_name
from .io.headers import NOTICE, SUFFIXES, is_synthetic, stem
from .io.nifti import isal_threaded, read_labels, write_nifti, write_values
from .volume import CTSlab, LabelVolume

if TYPE_CHECKING:
    from .synthesizer import Synthesizer

LONGEST_NAME = 255  # bytes of a file name on every common file system


@dataclass(frozen=True)
class CaseResult:
    """What became of one mask in one variant. `variant` is None when none were asked for; `error` is None when it is done."""

    case: str
    mask: Path
    variant: int | None
    files: tuple[Path, ...] = ()
    slices: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)  # wall time by stage
    warnings: tuple[str, ...] = ()
    error: InputError | None = None


def find_masks(arguments: Sequence[Path], skipped: list[Path] | None = None) -> list[Path]:
    """Files as given, and for a folder the volumes directly in it, sorted, each file once.

    What mask2ct itself wrote into such a folder is no mask: it is passed over and appended to `skipped`. Raises `UsageError`
    for an empty folder and for two masks of one case name. A file that does not exist stays in the list: it is that case's
    failure, not the run's.
    """
    masks: list[Path] = []
    for argument in arguments:
        if _is_folder(argument):
            with reading(argument, "a folder that can be listed", UsageError):
                found = sorted(p for p in argument.iterdir() if p.name.lower().endswith(SUFFIXES) and not p.name.startswith("."))
            own = [path for path in found if is_synthetic(path)]
            if skipped is not None:
                skipped += own
            if len(found) == len(own):
                raise UsageError(f"the folder {argument} holds no masks", expected=f"files ending in {', '.join(SUFFIXES)}",
                                 remedy="check the path", file=argument)  # fmt: skip
            masks += [path for path in found if path not in own]
        else:
            masks.append(argument)
    seen: dict[str, Path] = {}
    for mask in masks:
        other = seen.setdefault(stem(mask), mask)
        if other.absolute() != mask.absolute():
            raise UsageError(f"{other} and {mask} would both be written as {stem(mask)}_ct.nii.gz", expected="each case name once",
                             remedy="rename one, or run them into two output folders", file=mask)  # fmt: skip
    return list(seen.values())


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that no file system takes
        return False


def synthesize(
    synthesizer: Synthesizer,
    masks: Sequence[Path],
    output: Path,
    *,
    variants: int | None = None,
    seed: int = 0,
    labels: Mapping[int | None, int] | None = None,
    on_slice: Callable[[int], None] | None = None,
) -> Iterator[CaseResult]:
    """Paint each mask (files or folders) into `output`: CASE_ct.nii.gz; with `variants` = K, CASE_v0_ct.nii.gz and
    CASE_v0_mask.nii.gz (the mask in the model's own values) … up to K - 1. Existing results are replaced.

    Returns an iterator of one result per file pair, given as soon as it is on disk. A mask that cannot be used gives its error
    and the next one follows; `OutputError` is raised, for what cannot be written for one cannot for any. `on_slice(n)` is
    told that n slices of the case are painted. Raises `UsageError` and `OutputError` at once, before any work, for options
    that are wrong, a folder that cannot be written, or a file in it that is not ours and would be replaced.
    """
    if variants is not None and variants < 1:
        raise UsageError(f"{variants} variants were asked for", expected="1 or more", remedy="leave the option out for one CT per mask")
    cases = find_masks(masks)
    isal_threaded()
    check_writable(output)
    for mask in cases:
        for file in (file for variant in _variants(variants) for file in targets(output, stem(mask), variant)):
            if _fits(file) and file.exists() and not is_synthetic(file):
                raise UsageError(f"{file.name} is in the way and was not written by mask2ct", expected="an output folder without files of that name",
                                 remedy="choose another --output, or move that file", file=file)  # fmt: skip
    return _cases(synthesizer, cases, output, variants, seed, labels, on_slice)


def _cases(
    synthesizer: Synthesizer, masks: Sequence[Path], output: Path, variants: int | None, seed: int,
    labels: Mapping[int | None, int] | None, on_slice: Callable[[int], None] | None,
) -> Iterator[CaseResult]:  # fmt: skip
    for mask in masks:
        case, started = stem(mask), time.perf_counter()
        try:
            if not all(_fits(file) for variant in _variants(variants) for file in targets(output, case, variant)):
                raise UnreadableVolume(f"the name of {mask.name} is too long for what is written beside it", expected="some 200 bytes at most",
                                       remedy="rename it", file=mask)  # fmt: skip
            volume = read_labels(mask, synthesizer.manifest.labels, labels)
            warnings = tuple(_warnings(mask, volume, synthesizer))
        except InputError as exc:
            exc.file = exc.file or mask
            yield CaseResult(case, mask, None, error=exc)
            continue
        read = time.perf_counter() - started
        for variant in _variants(variants):
            started = time.perf_counter()
            slabs = _Meter(synthesizer.slabs(volume, seed=seed, variant=variant or 0), on_slice)
            files = _write_pair(targets(output, case, variant), volume, synthesizer.manifest.labels, slabs)
            seconds = {"read": read, "paint": slabs.seconds, "write": time.perf_counter() - started - slabs.seconds}
            yield CaseResult(case, mask, variant, files, slabs.slices, seconds, warnings)


def _variants(count: int | None) -> Sequence[int | None]:
    return [None] if count is None else range(count)


def targets(output: Path, case: str, variant: int | None) -> tuple[Path, ...]:
    """The files of one result: the CT, and its mask beside it when there are variants."""
    if variant is None:
        return (output / f"{case}_ct.nii.gz",)
    return output / f"{case}_v{variant}_ct.nii.gz", output / f"{case}_v{variant}_mask.nii.gz"


def _fits(file: Path) -> bool:
    """Whether the file's name, and the temporary one it is written under, are short enough."""
    return len(os.fsencode(temporary_name(file).name)) <= LONGEST_NAME


def _warnings(mask: Path, volume: LabelVolume, synthesizer: Synthesizer) -> Iterator[str]:
    """What is allowed, but may not be meant."""
    if not volume.labels.any():
        yield f"{mask.name} is empty: no voxel has a label, the CT shows background alone"
    if volume.nifti_header is not None and volume.nifti_header[252:256] == bytes(4):  # qform_code and sform_code
        yield f"{mask.name} states no orientation (qform and sform codes are 0): it is taken to run right to left, front to back, feet to head"
    if not synthesizer.grid(volume).covers:
        policy, intensity = synthesizer.manifest.grid, synthesizer.manifest.intensity
        seen = " x ".join(f"{side * step:.0f}" for side, step in zip(policy.canvas, policy.pixel_spacing or (), strict=True))
        yield f"{mask.name} shows more than the {seen} mm the model was trained on: beyond them the CT is {intensity.low} {intensity.unit}"


class _Meter:
    """Passes slabs on, counting slices and the seconds spent making them."""

    def __init__(self, slabs: Iterator[CTSlab], on_slice: Callable[[int], None] | None):
        self._slabs, self._on_slice = slabs, on_slice
        self.slices, self.seconds = 0, 0.0

    def __iter__(self) -> Iterator[CTSlab]:
        while True:
            before = time.perf_counter()
            slab = next(self._slabs, None)
            self.seconds += time.perf_counter() - before
            if slab is None:
                return
            self.slices += slab.hu.shape[slab.axis]
            yield slab
            if self._on_slice is not None:
                self._on_slice(self.slices)


def _write_pair(files: tuple[Path, ...], volume: LabelVolume, table: LabelTable, slabs: Iterable[CTSlab]) -> tuple[Path, ...]:
    depth, height, width = volume.labels.shape
    write_nifti(files[0], slabs, (depth, height, width), volume.geometry, nifti_header=volume.nifti_header, description=NOTICE)
    for mask in files[1:]:
        description = "mask of a " + NOTICE
        write_values(mask, file_values(volume, table), volume.geometry, nifti_header=volume.nifti_header, description=description)
    return files


def file_values(volume: LabelVolume, table: LabelTable) -> NDArray[Any]:
    """Model indices back to the table's own values (D, H, W), in the smallest of uint8, uint16, int16 and int32 that holds them."""
    values = np.array([label.value for label in table.labels])
    dtype = next(
        d for d in (np.uint8, np.uint16, np.int16, np.int32) if np.iinfo(d).min <= values.min() and values.max() <= np.iinfo(d).max
    )
    return values.astype(dtype)[volume.labels]


def check_writable(output: Path) -> None:
    """Make the folder and a file in it, and take the file away again. Raises `OutputError` before any work is done."""
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        remove_orphans(output)
        probe = temporary_name(output / "probe")
        try:
            probe.touch()
        finally:
            probe.unlink(missing_ok=True)
