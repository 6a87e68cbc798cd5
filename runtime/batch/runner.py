"""Many masks → many CTs: files in, files out, overlapped, resumable; one bad case never stops
the others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..core.atomic_files import filename_fits, key_of, sha256_of
from ..core.deformation import DeformationParams
from ..core.errors import InputError, UnreadableVolume, reading, writing
from ..core.labels import LabelMap
from ..core.threads import BackgroundWriter, Prefetcher
from ..core.version import VERSION
from ..core.volume import CTSlab
from ..io.archive import opened, outer
from ..io.cases import Case, like_digests, read_case
from ..io.ct_source import CTSource, Variant
from ..io.writers.registry import DEFAULT_OPTIONS, FormatOptions, OutputRecord, result_name
from .completion_log import CompletionIndex, Entry
from .plan import Plan

State = tuple[int, int, int, int, int, float]
YOUNG = 2.0  # s: file systems state times in steps of up to so long
LARGE_MASK = (
    96 << 20
)  # bytes; above, nothing is held but the one mask being synthesized, and what comes next waits


@dataclass(frozen=True)
class CaseResult:
    """What became of one mask in one variant.

    `variant` is None when none were asked for; `error` is None when it is done.

    `mask`: its path, or for a DICOM source the name of the case: its path may name a patient.

    `input`, `sha256`: SHA-256 by file name of what was read and written; `mask_sha256`: of all that
    the mask was read from, as the journal has it; `image_sha256`: the same of the real CT that is
    deformed with it, empty where there is none. `seconds`: by stage, spent working and not waiting;
    stages overlap. `skipped`: it was complete already, and proven so.
    """

    case: str
    mask: Path
    variant: int | None
    files: tuple[Path, ...] = ()
    slices: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    error: InputError | None = None
    input: Mapping[str, str] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)
    skipped: bool = False
    mask_sha256: str = ""
    image_sha256: str = ""


def synthesize(
    synthesizer: CTSource,
    cases: Sequence[Case],
    output: Path,
    *,
    format: str = "nifti",
    options: FormatOptions = DEFAULT_OPTIONS,
    variants: int | None = None,
    ranges: DeformationParams | None = None,
    seed: int = 0,
    labels: LabelMap | None = None,
    resume: bool = False,
    shared: bool = False,
    on_slice: Callable[[int], None] | None = None,
) -> Generator[CaseResult]:
    """Synthesize each case into `output`, as `runtime.io.writers.registry` says for `format`;
    `variants` = K writes K pairs of CT and mask for each, 0 to K - 1: the first of the mask as it
    is, the others deformed within `ranges` (see `runtime.core.deformation`).

    `shared`: what is made of a DICOM source may be read as the umask says; else by its owner alone.

    `resume`: what the folder's journal proves complete, by the SHA-256 of input and output and all
    that the bytes depend on, is not made again; without it existing results are replaced.

    Returns a generator of one result per CT, given once it is on disk, in the order they are done;
    masks are read ahead and results written behind while the caller's thread synthesizes. A mask
    that cannot be used gives its error and the next one follows; `OutputError` is raised, for what
    cannot be written for one cannot for any. `on_slice(n)` is told that n slices of the case are
    synthesized. Raises `UsageError` and `OutputError` at once, before any work, for options that
    are wrong, a folder that cannot be written, or a file in it that is not ours and would be
    replaced; and when it starts, if another run is writing into the folder.
    """
    plan = Plan(
        output,
        format,
        options,
        variants,
        ranges or DeformationParams(),
        seed,
        labels,
        resume,
        shared=shared,
    )
    return make(synthesizer, cases, plan, on_slice)


def make(
    source: CTSource,
    cases: Sequence[Case],
    plan: Plan,
    on_slice: Callable[[int], None] | None = None,
) -> Generator[CaseResult]:
    """`synthesize`, of what the recipe says."""
    plan.check(source.manifest, cases)
    return _locked(source, plan, cases, on_slice)


def _locked(
    source: CTSource, plan: Plan, cases: Sequence[Case], on_slice: Callable[[int], None] | None
) -> Generator[CaseResult]:
    with plan.journal(source.manifest, cases) as journal:
        yield from BatchRunner(source, plan, journal, on_slice).results(cases)


@dataclass(frozen=True)
class _Item:
    """A result to synthesize, or, without a `variant`, what there is to say instead."""

    result: CaseResult
    key: str
    variant: Variant | None = None


@dataclass(frozen=True)
class _Job:
    """What the writer is given of a result before its slabs.

    `seconds` holds the stages before its own when the last slab is through.
    """

    item: _Item
    record: OutputRecord
    seconds: dict[str, float]


class BatchRunner:
    """The stages of one call: `_prepare` in a thread, `results` in the caller's, `_write` in
    another. Who holds the lock is not asked.
    """

    def __init__(
        self,
        source: CTSource,
        plan: Plan,
        journal: CompletionIndex,
        on_slice: Callable[[int], None] | None = None,
    ):
        self._source, self._journal, self._on_slice = source, journal, on_slice
        self._plan, self._output, self._format, self._variants = (
            plan,
            plan.output,
            plan.writer,
            plan.variant_ids,
        )
        self._ranges, self._seed, self._labels, self._resume = (
            plan.ranges,
            plan.seed,
            plan.labels,
            plan.resume,
        )
        self._like = cache(like_digests)  # of one run: an image that all cases share is read once

    def results(self, cases: Sequence[Case]) -> Generator[CaseResult]:
        prefetch, behind = Prefetcher(self._prepare(cases)), BackgroundWriter(self._write)
        try:
            for item in prefetch:
                large = item.variant is not None and item.variant.nbytes > LARGE_MASK
                if not large:
                    prefetch.request_next()
                if item.variant is None:
                    yield item.result
                else:
                    yield from self._synthesize(item, item.variant, behind)
                del item
                yield from behind.finished(wait=large)
                if large:
                    prefetch.request_next()
            yield from behind.finished(wait=True)
        finally:
            behind.close()
            prefetch.close()

    def _prepare(self, cases: Sequence[Case]) -> Iterator[_Item]:
        """Read, check and deform; what is complete or cannot be used is passed on as its result."""
        for case in cases:
            started = time.perf_counter()
            try:
                self._check_names(case)
                before = _states(case)
                inputs = self._input(case)
                images = self._input(case, image=True)
                mask, image = (
                    key_of({"input": _content(case, inputs)}),
                    key_of({"image": sorted(images.values())}) if images else "",
                )
                keys = {
                    variant: self._key(case, variant, inputs, image) for variant in self._variants
                }
                if not self._plan.replace:
                    self._refuse_to_replace(case, mask)
                find_complete = {
                    v: entry
                    for v, key in keys.items()
                    if self._resume
                    and (entry := self._journal.find_complete(result_name(case.name, v), key))
                }
                for variant, entry in find_complete.items():
                    files = self._format.files(self._output, case.name, variant)
                    yield _Item(
                        CaseResult(
                            case.name,
                            case.display_name,
                            variant,
                            files,
                            entry.slices,
                            warnings=entry.warnings,
                            input={**inputs, **images},
                            sha256=entry.files,
                            skipped=True,
                            mask_sha256=mask,
                            image_sha256=image,
                        ),
                        entry.key,
                    )
                if len(find_complete) == len(keys):
                    continue
                volume = read_case(case, self._source.manifest.labels, self._labels)
                variants = self._source.variants(case, volume, self._ranges, self._seed)
                self._check_unchanged(case, before, {**inputs, **images})
                self._format.check_mask(volume)
                warnings = (*volume.notes, *self._source.notes(case.display_name.name, volume))
                volume.digest  # noqa: B018 - computed here, beside the inference thread, and kept
            except InputError as exc:
                exc.file = exc.file or case.display_name
                yield _Item(CaseResult(case.name, case.display_name, None, error=exc), "")
                continue
            seconds = {"read": time.perf_counter() - started}
            for variant in [variant for variant in keys if variant not in find_complete]:
                started = time.perf_counter()
                deformed = variants(variant or 0)
                times = {**seconds, "deform": time.perf_counter() - started} if variant else seconds
                said = (
                    *warnings,
                    *(
                        f"{case.display_name.name}, variant {variant}: {fact}"
                        for fact in deformed.warnings
                    ),
                )
                result = CaseResult(
                    case.name,
                    case.display_name,
                    variant,
                    seconds=times,
                    warnings=said,
                    input={**inputs, **images},
                    mask_sha256=mask,
                    image_sha256=image,
                )
                item = _Item(result, keys[variant], deformed)
                del deformed
                yield item
                del item  # a mask lives as long as whoever uses it
                seconds = {"read": 0.0}
            del volume, variants

    def _synthesize(
        self, item: _Item, variant: Variant, behind: BackgroundWriter[_Job, CaseResult]
    ) -> Iterator[CaseResult]:
        """Synthesize one result into the writer, passing on meanwhile what it has finished."""
        result, source = item.result, self._source
        record = OutputRecord(
            result.case,
            result.variant,
            variant.mask,
            source.manifest,
            source.backend,
            source.file,
            self._seed,
            result.image_sha256,
        )
        slabs = _Meter(variant.slabs(), self._on_slice)
        job = _Job(item, record, dict(result.seconds))
        behind.begin(job)
        try:
            for slab in slabs:
                behind.put(slab)
                yield from behind.finished()
            job.seconds["synthesize"] = slabs.seconds
            behind.end()
        except InputError as exc:
            behind.abort()
            exc.file = exc.file or result.mask
            yield replace(result, error=exc)

    def _write(self, job: _Job, slabs: Iterable[CTSlab]) -> CaseResult:
        """Write one result and, when it is whole, its line in the journal."""
        result, counted = job.item.result, _Meter(iter(slabs))
        started = time.perf_counter()
        dicom = job.record.mask.dicom is not None
        # reading back what is there, to digest it, may fail too
        with writing(self._output / job.record.name), self._plan.private(dicom):
            files = self._format.write(self._output, job.record, counted)
        digests = {
            file.relative_to(self._output).as_posix(): digest for file, digest in files.items()
        }
        self._journal.add(
            Entry(
                job.record.name,
                job.item.key,
                digests,
                counted.slices,
                result.warnings,
                result.mask_sha256,
            )
        )
        seconds = {**job.seconds, "write": time.perf_counter() - started - counted.seconds}
        return replace(
            result, files=tuple(files), slices=counted.slices, seconds=seconds, sha256=digests
        )

    def _input(self, case: Case, *, image: bool = False) -> dict[str, str]:
        """SHA-256 of each file that the case's mask is read from, or its `image`.

        Files of a DICOM source are numbered: their names may name a patient.
        """
        digests, files = {}, case.image if image else (*case.files, *case.grid)
        owner = f"image of {case.display_name.name}" if image else case.display_name.name
        for n, file in enumerate(files):
            numbered = owner if len(files) == 1 else f"{owner} {n + 1}"
            name = (
                numbered
                if image
                else {"volume": file.name, "classes": f"{owner} {file.name}"}.get(
                    case.kind, numbered
                )
            )
            with reading(case.display_name, "a file that can be read"), opened(file) as handle:
                digests[name] = sha256_of(handle)
        return digests

    def _check_unchanged(
        self, case: Case, before: tuple[State, ...], inputs: Mapping[str, str]
    ) -> None:
        """Refuse a mask that changed between its digest and its reading: the result would be called
        made of another one.

        The files are digested once more only where their system's state leaves a doubt: it is
        another one, or so young that a further change would not show in it.
        """
        if _states(case) == before and all(
            abs(time.time() - changed) > YOUNG for *_, changed in before
        ):
            return
        if {**self._input(case), **self._input(case, image=True)} != inputs:
            raise UnreadableVolume(
                f"{case.display_name.name} changed while it was read",
                expected="a mask that stays as it is until its CT is made",
                remedy="give it again when it is complete",
                file=case.display_name,
            )

    def _key(self, case: Case, variant: int | None, inputs: Mapping[str, str], image: str) -> str:
        """Of everything the result's bytes depend on.

        A field that a `Case` or a format gains is part of it.
        """
        source = self._source
        case_facts = {
            f.name: repr(getattr(case, f.name))
            for f in fields(case)
            if f.name not in ("path", "files", "grid", "image", "options")
        }
        # as keywords: a name that occurs twice is an error, and hides no option
        return key_of(
            dict(
                version=VERSION,
                model=key_of(source.manifest.to_json()),
                engine=[source.engine, source.file],
                case=case_facts,
                reading=repr(replace(case.options, like=None)),
                like=self._like(case.options.like),
                input=_content(case, inputs),
                **({"image": image} if image else {}),
                **self._plan.content_key(variant),
            )
        )

    def _refuse_to_replace(self, case: Case, mask: str) -> None:
        if there := [
            name
            for variant in self._variants
            if self._journal.belongs_to_other_mask(name := result_name(case.name, variant), mask)
        ]:
            raise InputError(
                f"the output folder holds {there[0]}, made of another mask",
                file=case.display_name,
                expected="a name of its own for each case",
                remedy="rename the mask, or take that result away",
            )

    def _check_names(self, case: Case) -> None:
        if not all(map(filename_fits, self._plan.files(case.name))):
            raise UnreadableVolume(
                f"the name of {case.display_name.name} is too long for what is written beside it",
                expected="some 200 bytes at most",
                remedy="rename it",
                file=case.display_name,
            )


def _states(case: Case) -> tuple[State, ...]:
    """Of each file that the case is read from: device, number, bytes, nanoseconds of change of
    content and of state, seconds of the latter.
    """
    states = []
    for file in (*case.files, *case.grid, *case.image):
        with reading(case.display_name, "a file that can be read"):
            s = os.stat(outer(file))
        states.append((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ctime))
    return tuple(states)


def _content(case: Case, inputs: Mapping[str, str]) -> list[Any]:
    """What a case was read from, whatever its files are called; but of one a class the name is
    what it means.
    """
    return sorted(inputs.items() if case.kind == "classes" else inputs.values())


class _Meter:
    """Passes slabs on, counting slices and the seconds spent making them."""

    def __init__(self, slabs: Iterator[CTSlab], on_slice: Callable[[int], None] | None = None):
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
