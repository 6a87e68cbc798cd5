"""Many masks → many CTs: files in, files out, one bad case never stops the others."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError, UnreadableVolume, UsageError, writing
from .files import remove_orphans, temporary_name
from .io.detect import Case, read_case
from .io.formats import FORMATS, Format, Painting
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


def synthesize(
    synthesizer: Synthesizer,
    cases: Sequence[Case],
    output: Path,
    *,
    format: str = "nifti",
    variants: int | None = None,
    seed: int = 0,
    labels: Mapping[int | None, int] | None = None,
    on_slice: Callable[[int], None] | None = None,
) -> Iterator[CaseResult]:
    """Paint each case into `output`, as `runtime.io.formats` says for `format`; `variants` = K writes K pairs of CT and mask for
    each, 0 to K - 1. Existing results are replaced.

    Returns an iterator of one result per CT, given as soon as it is on disk. A mask that cannot be used gives its error
    and the next one follows; `OutputError` is raised, for what cannot be written for one cannot for any. `on_slice(n)` is
    told that n slices of the case are painted. Raises `UsageError` and `OutputError` at once, before any work, for options
    that are wrong, a folder that cannot be written, or a file in it that is not ours and would be replaced.
    """
    if variants is not None and variants < 1:
        raise UsageError(f"{variants} variants were asked for", expected="1 or more", remedy="leave the option out for one CT per mask")
    if format not in FORMATS:
        raise UsageError(f"there is no format {format!r}", expected=", ".join(FORMATS), remedy="choose one of these")
    writer = FORMATS[format]()
    writer.check(synthesizer.manifest)
    check_writable(output)
    for case in cases:
        for file in (file for variant in _variants(variants) for file in writer.files(output, case.name, variant)):
            if _fits(file) and file.exists() and not writer.is_ours(file):
                raise UsageError(f"{file.name} is in the way and was not written by mask2ct", expected="an output folder without files of that name",
                                 remedy="choose another --output, or move that file", file=file)  # fmt: skip
    return _cases(synthesizer, cases, output, writer, variants, seed, labels, on_slice)


def _cases(
    synthesizer: Synthesizer, cases: Sequence[Case], output: Path, writer: Format, variants: int | None, seed: int,
    labels: Mapping[int | None, int] | None, on_slice: Callable[[int], None] | None,
) -> Iterator[CaseResult]:  # fmt: skip
    for case in cases:
        started = time.perf_counter()
        try:
            if not all(_fits(file) for variant in _variants(variants) for file in writer.files(output, case.name, variant)):
                raise UnreadableVolume(f"the name of {case.path.name} is too long for what is written beside it", expected="some 200 bytes at most",
                                       remedy="rename it", file=case.path)  # fmt: skip
            volume = read_case(case, synthesizer.manifest.labels, labels)
            warnings = tuple(_warnings(case.path, volume, synthesizer))
        except InputError as exc:
            exc.file = exc.file or case.path
            yield CaseResult(case.name, case.path, None, error=exc)
            continue
        read = time.perf_counter() - started
        for variant in _variants(variants):
            started = time.perf_counter()
            slabs = _Meter(synthesizer.slabs(volume, seed=seed, variant=variant or 0), on_slice)
            painting = Painting(case.name, variant, volume, synthesizer.manifest, synthesizer.backend, synthesizer.file, seed)
            files = writer.write(output, painting, slabs)
            seconds = {"read": read, "paint": slabs.seconds, "write": time.perf_counter() - started - slabs.seconds}
            yield CaseResult(case.name, case.path, variant, files, slabs.slices, seconds, warnings)


def _variants(count: int | None) -> Sequence[int | None]:
    return [None] if count is None else range(count)


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
