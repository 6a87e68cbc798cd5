"""Masks that are put into a folder become CTs: what `mask2ct watch` does. See docs/how-to/watching.md."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
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
from .work_queue import Inbox, WorkItem, display_name, groups_without_name_clash

# claimed together: one is read ahead while another is synthesized, and little is kept from other
# watchers
AT_ONCE = 4
SHORTEST = 0.01  # seconds between two looks
PER_LOOK = 64  # items between two looks at the whole folder


class Listener(Protocol):
    """Is told what happens, for a screen or a log."""

    def chosen(self, case: Case, model: str, reason: str) -> None: ...

    def made(self, result: CaseResult) -> None: ...

    def settled(self, claim: WorkItem, place: Path) -> None: ...

    def waiting(self) -> None: ...


class FolderWatcher:
    """Synthesizes what is put into `inbox`, each mask by the one of `models` that it is for.

    `recipes`: by model, what is made of a mask, all in one output folder; `find`: the cases at a
    path, and whether what is odd about it is to be said; `stable`: see `Inbox`. Results are those
    of `mask2ct synth` on the same masks, and never replace one of another mask. The output folder's
    journal is held while there is work: several watchers of one output folder take turns. What one
    claimed and did not finish, the next that looks goes on with, unless `MOST` of them ended in it.

    Raises `UsageError` and `OutputError` before any work.
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
            inbox, self._output, stable=stable, whole=self._whole, shared=self._shared
        )
        for name, plan in plans.items():
            plan.check(models[name].manifest, [])

    def run(self, *, poll: float, once: bool = False) -> None:
        """Look every `poll` seconds, until interrupted; `once`: until nothing is left that is
        complete, or that only has to prove it.

        Raises `OutputError` where results cannot be written, and what concerns all masks alike.
        """
        with (
            suppress(FolderBusy),
            closing(self._journal()),
        ):  # what a watcher that was killed did not come to
            for name, plan in self._plans.items():
                with plan.cleanup(self._models[name].manifest, []):
                    pass
        while True:
            if not self.step():
                if once and not self._inbox.settling and not self._waiting:
                    return
                time.sleep(max(poll, SHORTEST))

    def _journal(self) -> Journal:
        """For its owner alone: nobody knows yet what will come."""
        with private(not self._shared):
            return Journal(self._output)

    def step(self) -> bool:
        """One look, and the work it finds; whether any was done."""
        ready, left = self._inbox.look(), [*self._inbox.stale_items()]
        self._waiting = False
        if not ready and not left:
            return False
        claims: list[WorkItem] = []
        try:
            with closing(self._journal()) as journal:
                for n in range(0, min(len(ready), PER_LOOK), AT_ONCE):
                    taken = [
                        claim
                        for item in ready[n : n + AT_ONCE]
                        if (claim := self._inbox.claim(item))
                    ]
                    claims += taken
                    self._work(taken, journal)
                random.shuffle(
                    left
                    # and one by one, last: should a file end the process, it keeps no other waiting
                    # for
                    # ever
                )
                for claim in sorted(left, key=lambda claim: attempts(claim.attempts)):
                    if attempts(claim.attempts) >= MAX_ATTEMPTS:
                        self._fail(claim, poison_message(claim.display_name))
                        self._finish_item(claim)
                        continue
                    with count_attempt(claim.attempts):
                        self._work([claim], journal)
        except FolderBusy:
            self._waiting = True
            self._listener.waiting()
            return False
        finally:
            for claim in (*claims, *left):
                self._inbox.leave(claim)
        return bool(claims or left)

    def _work(self, claims: Sequence[WorkItem], journal: Journal) -> None:
        found: dict[str, list[tuple[Case, str]]] = {}
        good = []
        for claim in claims:
            self._audit.add("received", item=claim.display_name)
            try:
                found[claim.lease.name] = self._cases(claim.item)
                good.append(claim)
            except (InputError, UsageError) as exc:
                self._fail(claim, exc)
                self._finish_item(claim)
        for wave in groups_without_name_clash(
            good, {lease: [case.name for case, _ in cases] for lease, cases in found.items()}
        ):
            cases = {
                case.name: (claim, case, model)
                for claim in wave
                for case, model in found[claim.lease.name]
            }
            for name, (claim, _, _) in cases.items():
                claim.outstanding[name] = 1
            for model in self._models.names:
                self._synthesize(
                    model,
                    [name for name, (_, _, of) in cases.items() if of == model],
                    cases,
                    journal,
                )

    def _synthesize(
        self,
        model: str,
        names: Sequence[str],
        cases: Mapping[str, tuple[WorkItem, Case, str]],
        journal: Journal,
    ) -> None:
        """Synthesize those cases, settling each claim when its last result is there.

        What is wrong with one of them stops no other.
        """
        names = [name for name in names if cases[name][0].outstanding[name]]
        if not names:
            return
        for name in names:
            cases[name][0].outstanding[name] = len(self._plans[model].variant_ids)
        try:
            synth, plan, mine = (
                self._models[model],
                self._plans[model],
                [cases[name][1] for name in names],
            )
            plan.check(synth.manifest, mine)
            with (
                plan.cleanup(synth.manifest, mine),
                closing(BatchRunner(synth, plan, journal).results(mine)) as results,
            ):
                for result in results:
                    self._audit.result(
                        result, model, plan.seed, item=cases[result.case][0].display_name
                    )
                    self._listener.made(result)
                    self._count(cases[result.case][0], result)
        except (
            UsageError,
            MemoryCapExceeded,
        ) as exc:  # of one of them: which, shows when each is alone
            left = [name for name in names if cases[name][0].outstanding[name]]
            if not left:
                raise
            if len(names) == 1:
                self._fail(cases[left[0]][0], exc)
                self._finish(cases[left[0]][0], left[0])
            else:
                for name in left:
                    self._synthesize(model, [name], cases, journal)

    def _count(self, claim: WorkItem, result: CaseResult) -> None:
        if result.error is not None:
            claim.errors.append(result.error)
        elif not result.skipped:
            reset_attempts(claim.attempts)
        claim.outstanding[result.case] -= 1
        if not claim.outstanding[result.case] or (
            result.error is not None and result.variant is None
        ):
            self._finish(claim, result.case)

    def _finish(self, claim: WorkItem, name: str) -> None:
        claim.outstanding[name] = 0
        if not any(claim.outstanding.values()):
            self._finish_item(claim)

    def _fail(self, claim: WorkItem, exc: Mask2CTError) -> None:
        """An error that is none of a result's."""
        self._audit.add("failed", item=claim.display_name, error=type(exc).__name__)
        claim.errors.append(exc)

    def _finish_item(self, claim: WorkItem) -> None:
        place = self._inbox.finish(claim)
        self._listener.settled(claim, place)

    def _cases(self, item: Path) -> list[tuple[Case, str]]:
        """The cases of an item, each with the name of its model.

        Raises `InputError` and `UsageError`.
        """
        chosen = []
        if foreign := _belongs_to_other_mask(item):
            entries = quantity(len(foreign), "entry that is", "entries that are")
            fact = "is" if foreign == [item] else f"holds {entries}"
            raise UnreadableVolume(
                f"{display_name(item)} {fact} not opened: a link that is broken or leads outside, a"
                " pipe or a device",
                expected="files, in a folder of their own",
                remedy="put in the files themselves",
            )
        for case in self._find(item, True):
            if case.kind == "series" and not item.is_dir() and not is_zip(item):
                raise UnreadableVolume(
                    f"{case.display_name} is one image of a series",
                    expected="the whole series",
                    file=case.display_name,
                    remedy="put the series into a folder, and that into the watched one",
                )
            name, reason = self._models.decide(
                case, {name: plan.labels for name, plan in self._plans.items()}
            )
            self._listener.chosen(case, name, reason)
            chosen.append((case, name))
        return chosen

    def _whole(self, item: Path) -> bool:
        """Whether everything in it can be opened, by its headers, and no file of it seems to be
        missing.

        What never can be is not waited for.
        """
        if _belongs_to_other_mask(item):
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


def _belongs_to_other_mask(item: Path) -> list[Path]:
    """What of an item is not opened: links that lead outside of it, and all but files and
    folders.
    """
    if item.is_dir() and not item.is_symlink():
        unread: dict[str, list[Path]] = {}
        broken = [path for path in walk(item, unread) if is_broken_link(path)]
        return [*unread.get(LINKED, ()), *unread.get(OUTSIDE, ()), *broken]
    return [item] if item.is_symlink() or not item.is_file() else []
