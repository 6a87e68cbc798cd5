"""A watched folder as a work queue: which items are complete, who owns each, and where it ends.

An item is one mask: a file, a zip or a folder directly in INBOX. The folder that it lies in is its
state, and each arrow is one rename:

    INBOX/NAME <---------------------+     somebody puts it in, and may still write to it
        |                            |
        | claim: unchanged           | claim: incomplete, or
        | for `stable` seconds       | changed meanwhile
        v                            |
    INBOX/.work/LEASE/NAME ----------+     one process owns it; when that process ended (killed,
        |                                  power cut), `stale_items` of the next one takes over
        |
        +-- finish, no errors ---> INBOX/done/NAME
        +-- finish, errors ------> INBOX/failed/NAME, with NAME.reason.txt beside it

The rename into .work/ is the claim: of two watchers, on one machine or on two that share the
folder, one succeeds. LEASE/.lock is the lease: its owner keeps that file locked, and the kernel
ends the lock together with the process, so that a lease without a lock is free to be taken over.
LEASE/.starts counts the attempts (`runtime.service.attempts`).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..core.atomic_files import filename_fits, lock, private, write_text
from ..core.errors import Mask2CTError, OutputError, UsageError, printable, writing
from ..io.archive import is_zip
from ..io.dicom.files import UNFINISHED, pseudonym
from ..io.volume_files import SUFFIXES
from .attempts import count_attempt

WORK, DONE, FAILED = ".work", "done", "failed"
# In a lease's folder. No item has such a name: `look` ignores names that begin with a dot.
LOCK, ATTEMPTS = ".lock", ".starts"
# What macOS leaves in folders begins with one of these.
IGNORED = (".ds_store", "._")
# An item that looks incomplete waits this many times longer: somebody may still write it.
PATIENCE = 10

# Name, size in bytes and time of change in ns of every file of an item.
Fingerprint = tuple[tuple[str, int, int], ...]


@dataclass
class WorkItem:
    """An item that this process alone works on.

    Attributes:
        lease: The folder of the item while it is worked on.
        item: The file or folder itself, within `lease`.
        handle: The open, locked file of the lease.
        open: Whether `handle` is still open.
        outstanding: By case name, how many results are still to come.
        errors: What went wrong so far.
    """

    lease: Path
    item: Path
    handle: int
    open: bool = True
    outstanding: dict[str, int] = field(default_factory=dict)
    errors: list[Mask2CTError] = field(default_factory=list)

    @property
    def display_name(self) -> str:
        """The name for messages, which never is a patient's."""
        return display_name(self.item)

    @property
    def attempts(self) -> Path:
        """The file that counts attempts which ended with the process (`attempts`)."""
        return self.lease / ATTEMPTS


@dataclass
class _Observation:
    """An item at the last look. Its times are of this machine's clock alone, never of files."""

    fingerprint: Fingerprint
    since: float  # s, when this fingerprint was first seen
    age: float = 0.0  # s, for how long it has not changed
    complete: bool | None = None  # None: it has not been opened yet


class Inbox:
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
        _check_folders(folder, output)
        self._folder, self._stable, self._shared = folder, stable, shared
        self._is_complete = is_complete
        with writing(folder):
            # Whoever may see the folder may see the folders in it, and nobody else.
            self._mode = folder.stat().st_mode & 0o777
        output_path = os.fsencode(output.absolute().resolve())
        self._prefix = hashlib.sha256(output_path).hexdigest()[:8]
        self._observed: dict[str, _Observation] = {}
        self.settling = False

    def look(self) -> list[Path]:
        """Look into the folder once.

        Returns:
            The items that have not changed for long enough, the latest change last.

        Raises:
            OutputError: When the folder cannot be read.
        """
        now, ready = time.monotonic(), []
        observed: dict[str, _Observation] = {}
        self.settling = False
        with writing(self._folder):
            items = [
                path
                for path in self._folder.iterdir()
                if path.name not in (DONE, FAILED) and not _unfinished(path.name)
            ]
        for item in items:
            current = fingerprint(item)
            if not current:
                continue
            before = self._observed.get(item.name)
            if before is not None and before.fingerprint == current:
                observation = before
            else:
                observation = _Observation(current, now)
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
            lease = self._folder / WORK / f"{self._prefix}-{os.urandom(6).hex()}"
            lease.parent.mkdir(self._mode, exist_ok=True)
            lease.mkdir(self._mode)
            handle = _hold(lease, os.O_CREAT)
            if handle is None:  # another watcher took the new lease for a dead one's
                self.settling = True
                return None
            work_item = WorkItem(lease, lease / item.name, handle)
            try:
                os.rename(item, work_item.item)
                if self._is_ready(work_item, observation) or os.path.lexists(item):
                    return work_item
            except FileNotFoundError:  # another watcher was faster
                pass
            except BaseException:
                self._put_back(work_item, item)
                raise
            # Somebody still writes it.
            self._put_back(work_item, item)
            return None

    def _is_ready(self, work_item: WorkItem, observation: _Observation) -> bool:
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

    def _put_back(self, work_item: WorkItem, item: Path) -> None:
        """Return a claimed item to its place."""
        if os.path.lexists(work_item.item):
            if os.path.lexists(item):  # another item of that name has arrived
                self._close(work_item)
                return
            os.rename(work_item.item, item)
        self._end(work_item)

    def stale_items(self) -> Iterator[WorkItem]:
        """Take over the items of watchers for the same output that ended before they finished.

        Call it while this process owns no item.

        Yields:
            Items, each of which this process owns from then on.

        Raises:
            OutputError: When the folder cannot be read.
        """
        with writing(self._folder):
            leases = sorted((self._folder / WORK).glob(f"{self._prefix}-*"))
        for lease in leases:
            with writing(self._folder):
                handle = _hold(lease)
                if handle is None:
                    continue
                items = [path for path in lease.iterdir() if path.name not in (LOCK, ATTEMPTS)]
                work_item = WorkItem(lease, items[0] if items else lease / LOCK, handle)
                if not items:
                    self._end(work_item)
                    continue
            yield work_item

    def finish(self, work_item: WorkItem) -> Path:
        """Move an item to done/, or to failed/ beside a file with the reason.

        Where its name is taken there, it receives a number.

        Args:
            work_item: An item that this process owns; its `errors` decide on the folder.

        Returns:
            The item's new path.

        Raises:
            OutputError: When it cannot be moved, or the reason cannot be written.
        """
        folder = self._folder / (FAILED if work_item.errors else DONE)
        with writing(folder):
            folder.mkdir(self._mode, exist_ok=True)
            with self._exclusive():
                place = _free(folder / work_item.item.name)
                if work_item.errors:
                    # Before the rename, so that no item is in failed/ without its reason.
                    self._write_reason(work_item, place)
                os.rename(work_item.item, place)
            self._end(work_item)
        return place

    def _write_reason(self, work_item: WorkItem, place: Path) -> None:
        """Write why an item failed into a file beside its future place."""
        file = place.with_name(f"{place.name}.reason.txt")
        if not filename_fits(file):
            file = place.with_name(f"{pseudonym('item', place.name)}.reason.txt")
        reasons = [reason(work_item, error) for error in work_item.errors]
        with private(not self._shared and may_be_dicom(work_item.item)):
            write_text(file, "\n\n".join(reasons) + "\n")

    def leave(self, work_item: WorkItem) -> None:
        """Give up an item where it is. It is stale then, and the next process takes it over.

        Args:
            work_item: An item of this process; nothing happens if it has ended.
        """
        if work_item.open:
            self._close(work_item)

    def _end(self, work_item: WorkItem) -> None:
        """Remove the lease of an item that has left it."""
        work_item.attempts.unlink(missing_ok=True)
        (work_item.lease / LOCK).unlink(missing_ok=True)
        with suppress(OSError):
            work_item.lease.rmdir()
        self._close(work_item)

    def _close(self, work_item: WorkItem) -> None:
        """End the lock of a lease."""
        # The flag comes first: Ctrl-C may come in between, and the number of a closed file may
        # be another file's by then.
        work_item.open = False
        os.close(work_item.handle)

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


def _check_folders(folder: Path, output: Path) -> None:
    """Raise `UsageError` for folders that cannot be a watched folder and its output."""
    if not folder.is_dir():
        raise UsageError(
            f"there is no folder {folder} to watch",
            expected="a folder that receives masks",
            remedy="make it, or check the path",
            file=folder,
        )
    if output.absolute().resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            "the output folder lies in the watched one",
            expected="results beside it, not in it",
            remedy="choose another --output",
            file=output,
        )
    for name in (WORK, DONE, FAILED):
        if (folder / name).is_symlink():
            raise UsageError(
                f"{name} in the watched folder is a link",
                expected="a folder of its own, or none",
                remedy="remove the link; masks are moved there, not copied",
                file=folder / name,
            )


def fingerprint(path: Path) -> Fingerprint:
    """Take the fingerprint of an item, which changes whenever a file of it does.

    A link counts itself, and not what it leads to.

    Args:
        path: A file or a folder.

    Returns:
        Relative path, size in bytes and time of change in ns of every file; empty where there is
        none, or one that is still being copied.
    """
    try:
        if path.is_symlink() or not path.is_dir():
            state = path.lstat()
            return (("", state.st_size, state.st_mtime_ns),)
        files = [*_files_in(path)]
        if any(_unfinished(file.name) for file in files):
            return ()
        states = ((file.relative_to(path).as_posix(), file.lstat()) for file in files)
        return tuple(sorted((name, state.st_size, state.st_mtime_ns) for name, state in states))
    except OSError:  # it went away, or cannot be read yet
        return ()


def _files_in(folder: Path) -> Iterator[Path]:
    """Every file and link in a folder, at any depth, but what macOS leaves there."""
    for parent, folders, files in os.walk(folder):
        # A linked folder is not entered, but counts as a link.
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in (*files, *links):
            if not name.lower().startswith(IGNORED):
                yield Path(parent) / name


def may_be_dicom(item: Path) -> bool:
    """Whether an item may hold a patient's data besides a mask.

    Args:
        item: A file or folder; only its name counts.

    Returns:
        False for the name of a volume file, else True.
    """
    return not item.name.lower().endswith(SUFFIXES)


def display_name(item: Path) -> str:
    """Return the name of an item for messages.

    Args:
        item: A file or folder.

    Returns:
        The name of a volume file. Anything else may be DICOM and named after a patient: then a
        pseudonym, made of a digest.
    """
    if not may_be_dicom(item):
        return printable(item.name)
    return pseudonym("zip" if is_zip(item) else "item", item.name)


def reason(work_item: WorkItem, exc: Mask2CTError) -> str:
    """Return an error as text, without its working folder and names that may be a patient's.

    Args:
        work_item: The item that the error is about.
        exc: The error.

    Returns:
        The text, with the display name in place of the item's path and name.
    """
    text = str(exc).replace(printable(work_item.item), work_item.display_name)
    name = printable(work_item.item.name)
    # A name of a few letters may be a part of any word.
    return text.replace(name, work_item.display_name) if len(name) > 3 else text


def groups_without_name_clash(
    work_items: Sequence[WorkItem], names: Mapping[str, Sequence[str]]
) -> Iterator[list[WorkItem]]:
    """Split items into groups in which no two cases have the same name.

    Args:
        work_items: The items.
        names: By the name of an item's lease, the names of its cases.

    Yields:
        The groups, which together hold each item once.
    """
    remaining = [*work_items]
    while remaining:
        group_names: set[str] = set()
        group = []
        for work_item in remaining:
            case_names = names[work_item.lease.name]
            if group_names.isdisjoint(case_names):
                group.append(work_item)
                group_names.update(case_names)
        remaining = [work_item for work_item in remaining if work_item not in group]
        yield group


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


def _free(path: Path) -> Path:
    """Return `path`, or the first free one with -2, -3 … before its suffixes."""
    name, ending = path.name, "" if path.is_dir() else path.suffix
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            ending = suffix
            break
    base, ending = name[: len(name) - len(ending)], name[len(name) - len(ending) :]
    number, place = 1, path
    while os.path.lexists(place):
        number += 1
        place = path.with_name(f"{base}-{number}{ending}")
    return place


def _unfinished(name: str) -> bool:
    """Whether a name is one of a copy that is not finished."""
    return name.startswith(".") or name.lower().endswith(UNFINISHED)
