"""Synthesize a CT for each mask that arrives in a folder: the loop behind `mask2ct watch`.

It consumes the work queue `runtime.service.work_queue.Inbox`, which shows the states of an item.
The journal of the output folder is held while there is work, so that several watchers of one output
folder take turns. See docs/how-to/watching.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ..batch.audit_log import AuditTrail
from ..batch.completion_log import Journal
from ..batch.model_router import Models
from ..batch.plan import Plan
from ..batch.runner import BatchRunner, CaseResult
from ..core.atomic_files import private
from ..core.errors import (
    FolderBusy,
    InputError,
    Mask2CTError,
    MemoryCapExceeded,
    UnreadableVolume,
    UsageError,
    quantity,
)
from ..io.archive import is_zip, on_disk
from ..io.cases import Case
from ..io.dicom.files import LINKED, OUTSIDE, is_broken_link, walk
from ..io.volume_files import check_header
from .attempts import MAX_ATTEMPTS, attempts, count_attempt, poison_message, reset_attempts
from .watched_items import display_name, reason
from .work_queue import Inbox, WorkItem

# Items that are claimed together: one is read ahead while another is synthesized, and few are
# withheld from other watchers.
AT_ONCE = 4
SHORTEST = 0.01  # s between two looks
PER_LOOK = 64  # items between two looks at the folder


class Listener(Protocol):
    """Receives what happens, for a screen or a log."""

    def chosen(self, case: Case, model: str, reason: str) -> None:
        """A model is chosen for a case, for this reason."""

    def result_ready(self, result: CaseResult) -> None:
        """A result is written, skipped or failed."""

    def settled(self, work_item: WorkItem, place: Path) -> None:
        """An item has been moved to its last place."""

    def waiting(self) -> None:
        """Another run holds the output folder."""


class FolderWatcher:
    """Synthesizes the masks that arrive in a folder.

    Results are those of `mask2ct synth` on the same masks, and never replace a result of another
    mask. The journal of the output folder is held while there is work: several watchers of one
    output folder take turns. An item that a watcher claimed and did not finish is taken over by the
    next one that looks, unless `MAX_ATTEMPTS` attempts ended in it.

    Args:
        inbox: The folder to watch.
        models: Open models; each mask is synthesized by the one that fits it.
        plans: By model name, what to write for a mask; all have the same output folder.
        find: Finds the cases at a path; the flag says whether to print what is unusual about it.
        stable: Seconds for which an item must not change.
        listener: Receives what happens.
        audit: Receives what goes into the audit file; None for no file.

    Raises:
        UsageError: Before any work, when folders, plans and models do not fit together.
        OutputError: Before any work, when nothing can be written.
    """

    def __init__(
        self,
        inbox: Path,
        models: Models,
        plans: Mapping[str, Plan],
        *,
        find: Callable[[Path, bool], list[Case]],
        stable: float,
        listener: Listener,
        audit: AuditTrail | None = None,
    ):
        self._models, self._find, self._listener, self._waiting = models, find, listener, False
        self._audit = audit or AuditTrail(None, "watch")
        self._plans = {
            name: replace(plan, resume=True, replace=False) for name, plan in plans.items()
        }
        self._shared = any(plan.shared for plan in plans.values())
        (self._output,) = {plan.output for plan in plans.values()}
        self._inbox = Inbox(
            inbox, self._output, stable=stable, is_complete=self._is_complete, shared=self._shared
        )
        for name, plan in plans.items():
            plan.check(models[name].manifest, [])

    def run(self, *, poll: float, once: bool = False) -> None:
        """Look and work until interrupted.

        Args:
            poll: Seconds between two looks that lead to no work.
            once: End when nothing is left that is complete, or may be at the next look.

        Raises:
            OutputError: When results cannot be written.
            Mask2CTError: For what concerns all masks alike.
        """
        # First what a watcher that was killed could not clean up.
        with suppress(FolderBusy), closing(self._journal()):
            for name, plan in self._plans.items():
                with plan.cleanup(self._models[name].manifest, []):
                    pass
        while True:
            if not self.step():
                if once and not self._inbox.settling and not self._waiting:
                    return
                time.sleep(max(poll, SHORTEST))

    def _journal(self) -> Journal:
        """Open the journal, for its owner alone: the next mask may be DICOM."""
        with private(not self._shared):
            return Journal(self._output)

    def step(self) -> bool:
        """Look once, and work on the items that are ready or stale.

        Returns:
            Whether there was work.

        Raises:
            OutputError: When results cannot be written.
        """
        ready, stale = self._inbox.look(), self._inbox.stale_items()
        self._waiting = False
        if not ready and not stale:
            return False
        claimed: list[WorkItem] = []
        try:
            with closing(self._journal()) as journal:
                for n in range(0, min(len(ready), PER_LOOK), AT_ONCE):
                    candidates = ready[n : n + AT_ONCE]
                    claims = [self._inbox.claim(item) for item in candidates]
                    group = [work_item for work_item in claims if work_item is not None]
                    claimed += group
                    self._work(group, journal)
                # One by one and last: an item that kills the process delays no other for ever.
                for work_item in stale:
                    self._retry(work_item, journal)
        except FolderBusy:
            self._waiting = True
            self._listener.waiting()
            return False
        finally:
            for work_item in (*claimed, *stale):
                self._inbox.leave(work_item)
        return bool(claimed or stale)

    def _retry(self, work_item: WorkItem, journal: Journal) -> None:
        """Work on a stale item, unless too many attempts ended in it."""
        if attempts(work_item.attempts) >= MAX_ATTEMPTS:
            self._fail(work_item, poison_message(work_item.display_name))
            self._finish_item(work_item)
            return
        with count_attempt(work_item.attempts):
            self._work([work_item], journal)

    def _work(self, work_items: Sequence[WorkItem], journal: Journal) -> None:
        """Synthesize the cases of items, group by group, so that no two have the same name."""
        readable = []
        for work_item in work_items:
            self._audit.add("received", item=work_item.display_name)
            try:
                work_item.cases = self._cases(work_item.item)
                readable.append(work_item)
            except (InputError, UsageError) as exc:
                self._fail(work_item, exc)
                self._finish_item(work_item)
        for group in _groups_without_name_clash(readable):
            cases = {
                case.name: (work_item, case, model)
                for work_item in group
                for case, model in work_item.cases
            }
            for name, (work_item, _, _) in cases.items():
                work_item.outstanding[name] = 1
            for model in self._models.names:
                model_names = [name for name, (_, _, of) in cases.items() if of == model]
                self._synthesize(model, model_names, cases, journal)

    def _synthesize(
        self,
        model: str,
        names: Sequence[str],
        cases: Mapping[str, tuple[WorkItem, Case, str]],
        journal: Journal,
    ) -> None:
        """Synthesize the named cases; an item is settled with its last result.

        An error of one case stops no other.
        """
        names = [name for name in names if cases[name][0].outstanding[name]]
        if not names:
            return
        for name in names:
            cases[name][0].outstanding[name] = len(self._plans[model].variant_ids)
        try:
            synth, plan = self._models[model], self._plans[model]
            batch = [cases[name][1] for name in names]
            plan.check(synth.manifest, batch)
            with (
                plan.cleanup(synth.manifest, batch),
                closing(BatchRunner(synth, plan, journal).results(batch)) as results,
            ):
                for result in results:
                    work_item = cases[result.case][0]
                    self._audit.result(result, model, plan.seed, item=work_item.display_name)
                    self._listener.result_ready(result)
                    self._count(work_item, result)
        except (UsageError, MemoryCapExceeded) as exc:
            # One of the cases caused it. Which one shows when each is synthesized alone.
            unfinished = [name for name in names if cases[name][0].outstanding[name]]
            if not unfinished:
                raise
            if len(names) == 1:
                self._fail(cases[unfinished[0]][0], exc)
                self._finish(cases[unfinished[0]][0], unfinished[0])
            else:
                for name in unfinished:
                    self._synthesize(model, [name], cases, journal)

    def _count(self, work_item: WorkItem, result: CaseResult) -> None:
        """Note a result of an item."""
        if result.error is not None:
            work_item.reasons.append(reason(work_item.item, result.error))
        elif not result.skipped:
            reset_attempts(work_item.attempts)
        work_item.outstanding[result.case] -= 1
        case_failed = result.error is not None and result.variant is None
        if case_failed or not work_item.outstanding[result.case]:
            self._finish(work_item, result.case)

    def _finish(self, work_item: WorkItem, name: str) -> None:
        """Note that a case is finished, and settle the item with its last one."""
        work_item.outstanding[name] = 0
        if not any(work_item.outstanding.values()):
            self._finish_item(work_item)

    def _fail(self, work_item: WorkItem, exc: Mask2CTError) -> None:
        """Note an error that no result has."""
        self._audit.add("failed", item=work_item.display_name, error=type(exc).__name__)
        work_item.reasons.append(reason(work_item.item, exc))

    def _finish_item(self, work_item: WorkItem) -> None:
        """Move an item to its last place."""
        place = self._inbox.finish(work_item)
        self._listener.settled(work_item, place)

    def _cases(self, item: Path) -> list[tuple[Case, str]]:
        """Return the cases of an item with their models; raise `InputError` and `UsageError`."""
        if unopened := _unopened_paths(item):
            entries = quantity(len(unopened), "entry that is", "entries that are")
            fact = "is" if unopened == [item] else f"holds {entries}"
            raise UnreadableVolume(
                f"{display_name(item)} {fact} not opened: a link that is broken or leads outside, a"
                " pipe or a device",
                expected="files, in a folder of their own",
                remedy="put in the files themselves",
            )
        cases_with_models = []
        label_maps = {name: plan.labels for name, plan in self._plans.items()}
        for case in self._find(item, True):
            if case.kind == "series" and not item.is_dir() and not is_zip(item):
                raise UnreadableVolume(
                    f"{case.display_name} is one image of a series",
                    expected="all images of the series",
                    file=case.display_name,
                    remedy="put the series into a folder, and that into the watched one",
                )
            model, reason = self._models.decide(case, label_maps)
            self._listener.chosen(case, model, reason)
            cases_with_models.append((case, model))
        return cases_with_models

    def _is_complete(self, item: Path) -> bool:
        """Whether each header in an item can be read, and no file seems to be missing.

        An item that never can be opened counts as complete: waiting would not help.
        """
        if _unopened_paths(item):
            return True
        try:
            for case in self._find(item, False):
                if not case.whole:
                    return False
                for file in case.files if case.kind in ("volume", "classes") else ():
                    with on_disk(file) as path:
                        check_header(path)
        except (InputError, UsageError):
            return False
        return True


def _unopened_paths(item: Path) -> list[Path]:
    """What of an item is never opened: links that lead outside, pipes, devices, broken links."""
    if item.is_dir() and not item.is_symlink():
        skipped: dict[str, list[Path]] = {}
        broken = [path for path in walk(item, skipped) if is_broken_link(path)]
        return [*skipped.get(LINKED, ()), *skipped.get(OUTSIDE, ()), *broken]
    return [item] if item.is_symlink() or not item.is_file() else []


def _groups_without_name_clash(work_items: Sequence[WorkItem]) -> Iterator[list[WorkItem]]:
    """Split items into groups in which no two cases have the same name."""
    remaining = [*work_items]
    while remaining:
        group_names: set[str] = set()
        group = []
        for work_item in remaining:
            names = {case.name for case, _ in work_item.cases}
            if group_names.isdisjoint(names):
                group.append(work_item)
                group_names |= names
        remaining = [work_item for work_item in remaining if work_item not in group]
        yield group
