"""A work queue of folders: who owns an item, how often it was tried, and where it ends.

The folder that an item lies in is its state, and each arrow is one rename:

    waiting      somebody puts it in, and may still write to it
      |   ^
      |   |  put back: it is incomplete, or has changed meanwhile
      v   |
    claimed <--- stale_items: its process ended (killed, power cut) and the next one takes it over,
      |          until MAX_ATTEMPTS attempts ended in it
      |
      +-- without reasons --> done
      +-- with reasons -----> failed, after a file with the reasons

`watch` and `serve` have such a queue each. What differs is how an item becomes complete:

              watch: `Inbox`, below               serve: `runtime.service.study_spool`
    waiting   INBOX/NAME                          SPOOL/incoming/STUDY
    claimed   INBOX/.work/LEASE/NAME              SPOOL/studies/STUDY-N/objects, with results/
    done      INBOX/done/NAME                     SPOOL/outbox/STUDY-N, where the sender takes it
    failed    INBOX/failed/NAME                   the same, and SPOOL/failed/STUDY-N afterwards
    reasons   INBOX/failed/NAME.reason.txt        reason.txt in it
    owner     LEASE/.lock: watchers share INBOX   the journal's lock: one node has SPOOL
    attempts  LEASE/.starts                       STUDY-N/.starts

A lease is the folder of one claimed item. Of two processes that rename an item into a lease, on one
machine or on two that share the folder, one succeeds. The kernel ends a lock together with its
process, so that a lease without a lock is free to be taken over.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..core.atomic_files import WINDOWS, lock, private, rename, sync_folder, write_text
from ..core.errors import OutputError, writing
from ..io.cases import Case
from .attempts import attempts, count_attempt
from .watched_items import (
    Observation,
    check_folders,
    display_name,
    fingerprint,
    free_name,
    may_be_dicom,
    reasons_file,
    unfinished,
)

WORK, DONE, FAILED = ".work", "done", "failed"
# In a lease's folder. No item has such a name: `look` ignores names that begin with a dot.
LOCK, ATTEMPTS = ".lock", ".starts"
# An item that looks incomplete waits this many times longer: somebody may still write it.
PATIENCE = 10


@dataclass
class WorkItem:
    """An item that this process alone works on.

    Attributes:
        lease: The folder of the item while it is worked on.
        item: The file or folder itself, within `lease`.
        handle: The open, locked file of the lease; -1 where one lock holds the whole queue.
        cases: Its cases, each with the name of its model.
        outstanding: By case name, how many results are still to come.
        reasons: Why it will fail, one text for each error.
        open: Whether `handle` is still open.
    """

    lease: Path
    item: Path
    handle: int = -1
    cases: list[tuple[Case, str]] = field(default_factory=list)
    outstanding: dict[str, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    open: bool = field(init=False)

    def __post_init__(self) -> None:
        self.open = self.handle >= 0

    @property
    def display_name(self) -> str:
        """The name for messages, which never is a patient's."""
        return display_name(self.item)

    @property
    def attempts(self) -> Path:
        """The file that counts attempts which ended with the process (`attempts`)."""
        return self.lease / ATTEMPTS


class WorkQueue:
    """The claimed items of a queue.

    Args:
        leases: The folder of the leases; the first claim creates it.
        prefix: Leases of this queue begin with it; others are left alone.
        item: What every item is called in its lease; empty for its own name.
        locked: Whether each lease has a lock, because several processes share the queue. Without,
            the caller has a lock on the whole of it.

    Raises:
        OutputError: When the folder that holds the leases' folder is missing.
    """

    def __init__(self, leases: Path, *, prefix: str = "", item: str = "", locked: bool = False):
        self._leases, self._prefix, self._item, self._locked = leases, prefix, item, locked
        with writing(leases.parent):
            # Whoever may see that folder may see the folders in it, and nobody else.
            self._mode = leases.parent.stat().st_mode & 0o777

    def stale_items(self) -> list[WorkItem]:
        """Take over the items of processes that ended before they finished.

        Call it while this process works on no item.

        Returns:
            Items which this process owns from then on, fewest attempts first, else in any order:
            one that ends the process each time delays no other for ever.

        Raises:
            OutputError: When the folder cannot be read.
        """
        stale = []
        with writing(self._leases.parent):
            for lease in sorted(self._leases.glob(f"{self._prefix}*")):
                handle = (_hold(lease) if self._locked else -1) if lease.is_dir() else None
                if handle is None:
                    continue
                item = next((path for path in lease.iterdir() if self._is_item(path.name)), None)
                work_item = WorkItem(lease, item or lease / LOCK, handle)
                if item is None:  # its process ended while it claimed
                    self._end(work_item)
                else:
                    stale.append(work_item)
        random.shuffle(stale)
        return sorted(stale, key=lambda work_item: attempts(work_item.attempts))

    def _is_item(self, name: str) -> bool:
        """Whether a name in a lease is the item's."""
        return name == self._item if self._item else name not in (LOCK, ATTEMPTS)

    def leave(self, work_item: WorkItem) -> None:
        """Give up an item where it is. It is stale then, and the next process takes it over.

        Args:
            work_item: An item of this process; nothing happens if it has ended.
        """
        if work_item.open:
            # The flag comes first: Ctrl-C may come in between, and the number of a closed file may
            # be another file's by then.
            work_item.open = False
            os.close(work_item.handle)

    def _claim(self, source: Path, name: str) -> WorkItem:
        """Move an item into a new lease of that name.

        Raises:
            FileNotFoundError: When another process was faster.
            BlockingIOError: When another process took the new lease for a dead one's.
            OSError: When it cannot be moved.
        """
        lease = self._leases / name
        lease.parent.mkdir(self._mode, exist_ok=True)
        lease.mkdir(self._mode)
        handle = _hold(lease, os.O_CREAT) if self._locked else -1
        if handle is None:
            raise BlockingIOError
        work_item = WorkItem(lease, lease / (self._item or source.name), handle)
        try:
            sync_folder(lease.parent)
            rename(source, work_item.item)
        except BaseException:
            self._put_back(work_item, source)
            raise
        return work_item

    def _put_back(self, work_item: WorkItem, place: Path) -> None:
        """Return a claimed item to its place."""
        if os.path.lexists(work_item.item):
            if os.path.lexists(place):  # another item of that name has arrived
                self.leave(work_item)
                return
            os.rename(work_item.item, place)
        self._end(work_item)

    def _end(self, work_item: WorkItem) -> None:
        """Remove the lease of an item that has left it."""
        if WINDOWS:  # it removes no open file; nobody else wants the lease: the item has left it
            self.leave(work_item)
        work_item.attempts.unlink(missing_ok=True)
        (work_item.lease / LOCK).unlink(missing_ok=True)
        with suppress(OSError):
            work_item.lease.rmdir()
        self.leave(work_item)


class Inbox(WorkQueue):
    """The watched folder of one output folder. Items claimed for other output folders are ignored.

    Args:
        folder: The folder to watch.
        output: The folder of the results; leases are named after it.
        stable: Seconds for which an item's fingerprint must not change.
        is_complete: Opens an item, and returns whether nothing of it is missing.
        shared: Whether others may read the reasons of what may be DICOM; else its owner alone.

    Attributes:
        settling: Whether the last look saw an item that will be ready if it does not change.

    Raises:
        UsageError: When there is no such folder, or its use would mix with the output.
        OutputError: When nothing can be moved in the folder.
    """

    def __init__(
        self,
        folder: Path,
        output: Path,
        *,
        stable: float,
        is_complete: Callable[[Path], bool],
        shared: bool = False,
    ):
        check_folders(folder, output, (WORK, DONE, FAILED))
        self._folder, self._stable, self._shared = folder, stable, shared
        self._is_complete = is_complete
        digest = hashlib.sha256(os.fsencode(output.absolute().resolve())).hexdigest()
        super().__init__(folder / WORK, prefix=f"{digest[:8]}-", locked=True)
        self._observed: dict[str, Observation] = {}
        self.settling = False

    def look(self) -> list[Path]:
        """Look into the folder once.

        Returns:
            The items that have not changed for long enough, the latest change last.

        Raises:
            OutputError: When the folder cannot be read.
        """
        now, ready = time.monotonic(), []
        observed: dict[str, Observation] = {}
        self.settling = False
        with writing(self._folder):
            items = [
                path
                for path in self._folder.iterdir()
                if path.name not in (DONE, FAILED) and not unfinished(path.name)
            ]
        for item in items:
            current = fingerprint(item)
            if not current:
                continue
            before = self._observed.get(item.name)
            if before is not None and before.fingerprint == current:
                observation = before
            else:
                observation = Observation(current, now)
            observed[item.name] = observation
            observation.age = now - observation.since
            patience = PATIENCE if observation.complete is False else 1
            if observation.age >= self._stable * patience:
                ready.append(item)
            elif before is None or before is observation:
                self.settling = True
        self._observed = observed

        def last_change(item: Path) -> tuple[int, str]:
            return max(time_ns for *_, time_ns in observed[item.name].fingerprint), item.name

        return sorted(ready, key=last_change)

    def claim(self, item: Path) -> WorkItem | None:
        """Claim an item of the last look.

        It is opened only after the claim, while the attempt is counted: a file that kills each
        process which opens it does not come before others again, nor for ever.

        Args:
            item: A path that `look` returned.

        Returns:
            The claimed item; None when it is incomplete, has changed, or another was faster.

        Raises:
            OutputError: When it cannot be moved.
        """
        observation = self._observed[item.name]
        if observation.complete is False and observation.age < PATIENCE * self._stable:
            self.settling = True
            return None
        with writing(self._folder):
            try:
                work_item = self._claim(item, f"{self._prefix}{os.urandom(6).hex()}")
            except FileNotFoundError:  # another watcher was faster
                return None
            except BlockingIOError:
                self.settling = True
                return None
            try:
                if self._is_ready(work_item, observation) or os.path.lexists(item):
                    return work_item
            except BaseException:
                self._put_back(work_item, item)
                raise
            # Somebody still writes it.
            self._put_back(work_item, item)
            return None

    def _is_ready(self, work_item: WorkItem, observation: Observation) -> bool:
        """Whether the claimed item is unchanged, and complete or out of patience."""
        if fingerprint(work_item.item) != observation.fingerprint:
            return False
        if observation.complete is None:
            with ExitStack() as counting:
                # A full disk cannot count: then the claim itself stands for the first attempt.
                with suppress(OutputError):
                    counting.enter_context(count_attempt(work_item.attempts))
                observation.complete = self._is_complete(work_item.item)
        if observation.complete or observation.age >= PATIENCE * self._stable:
            return True
        self.settling = True
        return False

    def finish(self, work_item: WorkItem) -> Path:
        """Move an item to done/, or to failed/ beside a file with the reason.

        Where its name is taken, it receives a number.

        Args:
            work_item: An item that this process owns; its `reasons` decide on the folder.

        Returns:
            The item's new path.

        Raises:
            OutputError: When it cannot be moved, or the reason cannot be written.
        """
        folder = self._folder / (FAILED if work_item.reasons else DONE)
        with writing(folder):
            folder.mkdir(self._mode, exist_ok=True)
            with self._exclusive():
                place = free_name(folder / work_item.item.name)
                with private(not self._shared and may_be_dicom(work_item.item)):
                    move_with_reasons(work_item.item, place, reasons_file(place), work_item.reasons)
            self._end(work_item)
        return place

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keep other processes from choosing a free name at the same time."""
        handle = os.open(self._folder / WORK / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            while not lock(handle):
                time.sleep(0.01)
            yield
        finally:
            os.close(handle)


def move_with_reasons(old: Path, new: Path, reasons_file: Path, reasons: Sequence[str]) -> None:
    """Move what was worked on to its last folder, after the reasons why it failed.

    Args:
        old: Its path.
        new: Its path in the last folder.
        reasons_file: Receives the reasons, before the move: nothing lies in failed/ without.
        reasons: Why it failed; none when it did not.

    Raises:
        OutputError: When the reasons cannot be written.
        OSError: When it cannot be moved.
    """
    if reasons:
        write_text(reasons_file, "\n\n".join(reasons) + "\n")
    rename(old, new)


def _hold(lease: Path, flags: int = 0) -> int | None:
    """Lock a lease; None when another process has it, or it is gone."""
    path = lease / LOCK
    try:
        handle = os.open(path, os.O_RDWR | flags, 0o666)
    except FileNotFoundError:  # not there yet, or no more
        with suppress(OSError):
            lease.rmdir()
        return None
    with suppress(FileNotFoundError):
        # The file that is locked must still be the one in the lease.
        if lock(handle) and os.path.samestat(os.fstat(handle), os.stat(path)):
            return handle
    os.close(handle)
    return None
