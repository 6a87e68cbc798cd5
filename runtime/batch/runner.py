"""Many masks in, many CTs out.

Reading, inference and writing overlap, a run can be resumed, and a mask that cannot be used does
not stop the run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..core.atomic_files import filename_fits, key_of, sha256_of
from ..core.errors import InputError, UnreadableVolume, reading, writing
from ..core.threads import BackgroundWriter, Prefetcher
from ..core.version import VERSION
from ..core.volume import CTSlab
from ..io.archive import opened, outer
from ..io.cases import Case, check_large_files, like_digests, read_case
from ..io.ct_source import CTSource, Variant
from ..io.writers.registry import OutputRecord, result_name
from .completion_log import CompletionIndex, Entry
from .plan import Plan
from .progress import ProgressEvent, Stage
from .result import CaseResult as CaseResult
from .result import log_result

FileState = tuple[int, int, int, int, int, float]
YOUNG = 2.0  # s: some file systems state times in steps of that length
# bytes; while a larger mask is synthesized the next one is not read, so that memory holds one alone
LARGE_MASK = 96 << 20


def synthesize(
    synthesizer: CTSource,
    cases: Sequence[Case],
    output: Path,
    *,
    on_slice: Callable[[int], None] | None = None,
    **options: Any,
) -> Generator[CaseResult]:
    """Synthesize each case into the output folder.

    This thread synthesizes, while others read the next mask and write the last result. A mask that
    cannot be used gives a result with its error, and the next one follows.

    Args:
        synthesizer: an open model, or another source of CTs.
        cases: masks, as `runtime.io.cases.find_cases` returns them.
        output: the folder that results are written into.
        on_slice: is called with the number of slices of the case that are synthesized.
        options: the other fields of `runtime.batch.plan.Plan` (`format`, `variants`, `seed`,
            `resume`, …); None stands for a default.

    Returns:
        One result per CT, each when it is on disk, in the order in which they are done.

    Raises:
        UsageError: before any work, for wrong options and for a file that would be replaced but was
            not written by mask2ct; at the first result, if another run writes into the folder.
        OutputError: if the folder, or later a result, cannot be written.
    """
    return make(synthesizer, cases, Plan.with_defaults(output, options), on_slice)


def make(
    source: CTSource,
    cases: Sequence[Case],
    plan: Plan,
    on_slice: Callable[[int], None] | None = None,
    on_progress: Callable[[ProgressEvent], None] | None = None,
) -> Generator[CaseResult]:
    """Carry out a plan, as `synthesize` does with its options.

    Args:
        source: an open model, or another source of CTs.
        cases: masks, as `runtime.io.cases.find_cases` returns them.
        plan: what to make of each mask.
        on_slice: as for `synthesize`.
        on_progress: is called with each step. What it raises stops the run: what is complete stays,
            and nothing half-written.

    Returns:
        One result per CT, as `synthesize` returns them.

    Raises:
        UsageError: as `synthesize` does.
        OutputError: as `synthesize` does.
    """
    plan.check(source.manifest, cases)
    return _locked(source, plan, cases, on_slice, on_progress)


def _locked(
    source: CTSource,
    plan: Plan,
    cases: Sequence[Case],
    on_slice: Callable[[int], None] | None,
    on_progress: Callable[[ProgressEvent], None] | None,
) -> Generator[CaseResult]:
    """Hold the journal while the cases are synthesized."""
    with plan.journal(source.manifest, cases) as journal:
        yield from BatchRunner(source, plan, journal, on_slice, on_progress).results(cases)


@dataclass(frozen=True)
class _Item:
    """A result to synthesize; without a `variant` one that is final already."""

    result: CaseResult
    key: str
    variant: Variant | None = None


@dataclass(frozen=True)
class _Job:
    """What the writing thread gets of a result before its slabs.

    When the last slab arrives, `seconds` holds all stages but the writer's own.
    """

    item: _Item
    record: OutputRecord
    seconds: dict[str, float]


class BatchRunner:
    """The stages of one run: `_prepare` and `_write` in threads, `results` in the caller's.

    It takes no lock: the caller sees to it that no other run writes into the folder.
    """

    def __init__(
        self,
        source: CTSource,
        plan: Plan,
        journal: CompletionIndex,
        on_slice: Callable[[int], None] | None = None,
        on_progress: Callable[[ProgressEvent], None] | None = None,
    ):
        self._source = source
        self._plan = plan
        self._journal = journal
        self._on_slice = on_slice
        self._on_progress = on_progress
        self._done = self._total = 0  # CTs
        self._output = plan.output
        self._format = plan.writer
        # for one run: an image that all cases share is read once
        self._like = cache(like_digests)

    def results(self, cases: Sequence[Case]) -> Generator[CaseResult]:
        """Synthesize the cases, and tell how far the run is.

        Args:
            cases: masks, as `runtime.io.cases.find_cases` returns them.

        Yields:
            One result per CT, in the order in which they are done.

        Raises:
            OutputError: if a result cannot be written.
        """
        self._total = len(cases) * len(self._plan.variant_ids)
        with closing(self._results(cases)) as results:
            for result in results:
                # A mask that cannot be used fails in all its variants at once.
                without_variant = result.variant is None and result.error is not None
                self._done += len(self._plan.variant_ids) if without_variant else 1
                self._done = min(self._done, self._total)
                stage: Stage = "kept" if result.skipped else "written"
                if result.error is not None:
                    stage = "failed"
                self._tell(stage, result, result.slices, result.slices)
                log_result(result)
                yield result

    def _tell(self, stage: Stage, result: CaseResult, slices: int, total: int) -> None:
        if self._on_progress is not None:
            self._on_progress(
                ProgressEvent(
                    result.case, result.variant, stage, slices, total, self._done, self._total
                )
            )

    def _results(self, cases: Sequence[Case]) -> Generator[CaseResult]:
        prefetch, writer = Prefetcher(self._prepare(cases)), BackgroundWriter(self._write)
        try:
            for item in prefetch:
                large = item.variant is not None and item.variant.nbytes > LARGE_MASK
                if not large:
                    prefetch.request_next()
                if item.variant is None:
                    yield item.result
                else:
                    yield from self._synthesize(item, item.variant, writer)
                # nothing here holds the mask any longer
                del item
                yield from writer.finished(wait=large)
                if large:
                    prefetch.request_next()
            yield from writer.finished(wait=True)
        finally:
            writer.close()
            prefetch.close()

    def _prepare(self, cases: Sequence[Case]) -> Iterator[_Item]:
        """Read, check and deform masks; yield at once the results that need no inference."""
        for case in cases:
            started = time.perf_counter()
            try:
                self._check_names(case)
                before = _states(case)
                check_large_files(case)
                inputs = self._input(case)
                images = self._input(case, image=True)
                all_inputs = {**inputs, **images}
                mask_digest = key_of({"input": _content(case, inputs)})
                image_digest = key_of({"image": sorted(images.values())}) if images else ""
                keys = {
                    variant: self._key(case, variant, inputs, image_digest)
                    for variant in self._plan.variant_ids
                }
                if not self._plan.replace:
                    self._refuse_to_replace(case, mask_digest)
                complete = self._find_complete(case, keys)
                for variant, entry in complete.items():
                    result = CaseResult(
                        case.name,
                        case.display_name,
                        variant,
                        self._format.files(
                            self._output, case.name, variant, self._source.manifest.modality
                        ),
                        entry.slices,
                        warnings=entry.warnings,
                        input=all_inputs,
                        sha256=entry.files,
                        skipped=True,
                        mask_sha256=mask_digest,
                        image_sha256=image_digest,
                    )
                    yield _Item(result, entry.key)
                if len(complete) == len(keys):
                    continue
                volume = read_case(case, self._source.manifest.labels, self._plan.labels)
                deform = self._source.variants(case, volume, self._plan.ranges, self._plan.seed)
                self._check_unchanged(case, before, all_inputs)
                self._format.check_mask(volume)
                warnings = (*volume.notes, *self._source.notes(case.display_name.name, volume))
                # here, so that the inference thread does not wait for it
                volume.compute_digest()
            except InputError as exc:
                exc.file = exc.file or case.display_name
                yield _Item(CaseResult(case.name, case.display_name, None, error=exc), "")
                continue
            seconds = {"read": time.perf_counter() - started}
            for variant in [variant for variant in keys if variant not in complete]:
                started = time.perf_counter()
                deformed = deform(variant or 0)
                if variant:
                    seconds["deform"] = time.perf_counter() - started
                prefix = f"{case.display_name.name}, variant {variant}"
                variant_warnings = [f"{prefix}: {fact}" for fact in deformed.warnings]
                result = CaseResult(
                    case.name,
                    case.display_name,
                    variant,
                    seconds=seconds,
                    warnings=(*warnings, *variant_warnings),
                    input=all_inputs,
                    mask_sha256=mask_digest,
                    image_sha256=image_digest,
                )
                item = _Item(result, keys[variant], deformed)
                # a mask must be freed as soon as its last user is done with it
                del deformed
                yield item
                del item
                seconds = {"read": 0.0}
            del volume, deform

    def _find_complete(self, case: Case, keys: Mapping[int | None, str]) -> dict[int | None, Entry]:
        """Return, by variant, the entries of results that a resumed run keeps."""
        if not self._plan.resume:
            return {}
        entries = {
            variant: self._journal.find_complete(result_name(case.name, variant), key)
            for variant, key in keys.items()
        }
        return {variant: entry for variant, entry in entries.items() if entry is not None}

    def _synthesize(
        self, item: _Item, variant: Variant, writer: BackgroundWriter[_Job, CaseResult]
    ) -> Iterator[CaseResult]:
        """Synthesize one result for the writer; yield meanwhile the results that it finished."""
        result, source = item.result, self._source
        record = OutputRecord(
            result.case,
            result.variant,
            variant.mask,
            source.manifest,
            source.backend,
            source.file,
            self._plan.seed,
            result.image_sha256,
            result.mask_sha256,
        )
        slabs = _Meter(variant.slabs(), self._on_slice)
        job = _Job(item, record, dict(result.seconds))
        writer.begin(job)
        try:
            for slab in slabs:
                writer.put(slab)
                slices_total = variant.mask.labels.shape[slab.axis]
                self._tell("synthesizing", result, slabs.slices, slices_total)
                yield from writer.finished()
            job.seconds["synthesize"] = slabs.seconds
            writer.end()
        except InputError as exc:
            writer.abort()
            exc.file = exc.file or result.mask
            yield replace(result, error=exc)

    def _write(self, job: _Job, slabs: Iterable[CTSlab]) -> CaseResult:
        """Write one result and then, when it is complete, its line in the journal."""
        result, meter = job.item.result, _Meter(iter(slabs))
        started = time.perf_counter()
        dicom = job.record.mask.dicom is not None
        # a writer that reads its files back, to digest them, may fail as well
        with writing(self._output / job.record.name), self._plan.private(dicom):
            files = self._format.write(self._output, job.record, meter)
        digests = {
            file.relative_to(self._output).as_posix(): digest for file, digest in files.items()
        }
        self._journal.add(
            Entry(
                job.record.name,
                job.item.key,
                digests,
                meter.slices,
                result.warnings,
                result.mask_sha256,
            )
        )
        seconds = {**job.seconds, "write": time.perf_counter() - started - meter.seconds}
        return replace(
            result, files=tuple(files), slices=meter.slices, seconds=seconds, sha256=digests
        )

    def _input(self, case: Case, *, image: bool = False) -> dict[str, str]:
        """Return the SHA-256 of each file that the case's mask, or its `image`, is read from.

        Files of a DICOM source are numbered, because their names may name a patient.
        """
        digests, files = {}, case.image if image else (*case.files, *case.grid)
        owner = f"image of {case.display_name.name}" if image else case.display_name.name
        for n, file in enumerate(files):
            name = owner if len(files) == 1 else f"{owner} {n + 1}"
            if not image and case.kind == "volume":
                name = file.name
            elif not image and case.kind == "classes":
                name = f"{owner} {file.name}"
            with reading(case.display_name, "a file that can be read"), opened(file) as handle:
                digests[name] = sha256_of(handle)
        return digests

    def _check_unchanged(
        self, case: Case, before: tuple[FileState, ...], inputs: Mapping[str, str]
    ) -> None:
        """Refuse a mask that changed between its digest and its reading.

        Its result would be recorded under the digest of another mask. The files are digested once
        more only if the state of one of them is another one, or so young that a further change
        would not show in it.
        """
        is_old = all(abs(time.time() - changed) > YOUNG for *_, changed in before)
        if _states(case) == before and is_old:
            return
        if {**self._input(case), **self._input(case, image=True)} != inputs:
            raise UnreadableVolume(
                f"{case.display_name.name} changed while it was read",
                expected="a mask that stays as it is until its CT is made",
                remedy="give it again when it is complete",
                file=case.display_name,
            )

    def _key(self, case: Case, variant: int | None, inputs: Mapping[str, str], image: str) -> str:
        """Return the digest of everything that a result's bytes depend on.

        It takes every field of the case and of its reading options but the paths, for which the
        digests of the files stand, and the part of the plan that `Plan.content_key` states.
        """
        source = self._source
        case_facts = {
            f.name: repr(getattr(case, f.name))
            for f in fields(case)
            if f.name not in ("path", "files", "grid", "image", "options")
        }
        # keywords, because a name that occurs twice is an error then, and hides no option
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

    def _refuse_to_replace(self, case: Case, mask_digest: str) -> None:
        """Refuse a case whose name a result of another mask has already."""
        for variant in self._plan.variant_ids:
            name = result_name(case.name, variant)
            if self._journal.belongs_to_other_mask(name, mask_digest):
                raise InputError(
                    f"the output folder holds {name}, made of another mask",
                    file=case.display_name,
                    expected="a name of its own for each case",
                    remedy="rename the mask, or remove that result",
                )

    def _check_names(self, case: Case) -> None:
        """Refuse a case whose name makes a file name that no file system takes."""
        files = self._plan.files(case.name, self._source.manifest.modality)
        if not all(map(filename_fits, files)):
            raise UnreadableVolume(
                f"the name of {case.display_name.name} is too long for the files that are written",
                expected="at most about 200 bytes",
                remedy="rename it",
                file=case.display_name,
            )


def _states(case: Case) -> tuple[FileState, ...]:
    """Return the state of each file that the case is read from.

    It holds device, inode, size in bytes, the times of the last change of content and of state in
    ns, and the latter in s.
    """
    states = []
    for file in (*case.files, *case.grid, *case.image):
        with reading(case.display_name, "a file that can be read"):
            stat = os.stat(outer(file))
        times = (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ctime)
        states.append((stat.st_dev, stat.st_ino, stat.st_size, *times))
    return tuple(states)


def _content(case: Case, inputs: Mapping[str, str]) -> list[Any]:
    """Return the digests of a case's files, in no order of names.

    Where each file is one class its name counts, for it says which.
    """
    return sorted(inputs.items() if case.kind == "classes" else inputs.values())


class _Meter:
    """Passes slabs on, and counts their slices and the seconds that it took to compute them."""

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
