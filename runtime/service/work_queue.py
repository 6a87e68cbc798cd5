"""A folder that others put masks into: which are complete, whose each one is, and where it goes
when it is done.

A mask is claimed by moving it into INBOX/.work/TICKET/, beside a file that its owner keeps locked:
one of two watchers succeeds, on one machine or on two that share the folder. The kernel ends the
lock with the process, so that another may take up what a dead one left.
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
LOCK, ATTEMPTS = ".lock", ".starts"  # nothing that is taken begins with a dot
IGNORED = (".ds_store", "._")  # what macOS leaves in folders begins with
# times as long as for others, what does not look whole is left to whoever may still be writing it
PATIENCE = 10

Fingerprint = tuple[tuple[str, int, int], ...]


@dataclass
class WorkItem:
    """What this process alone works on: `item`, the file or folder, in its `ticket`.

    `called`: what messages call it.
    """

    lease: Path
    item: Path
    handle: int
    open: bool = True
    outstanding: dict[str, int] = field(default_factory=dict)  # case → results to come
    errors: list[Mask2CTError] = field(default_factory=list)

    @property
    def display_name(self) -> str:
        return display_name(self.item)

    @property
    def attempts(self) -> Path:
        """Where it is counted how often a process ended while it worked on this alone
        (`runtime.service.attempts`).
        """
        return self.lease / ATTEMPTS


@dataclass
class _Seen:
    """An item as it was at the last look: since when it has not changed, on the clock of this
    machine alone.
    """

    found: Fingerprint
    since: float
    age: float = 0.0  # seconds
    whole: bool | None = None  # None: nobody has looked


class Inbox:
    """`folder`, watched for one output folder: what others claimed for another output is theirs.

    `stable`: seconds that nothing of a mask may have changed for, by its size, its time of change
    and, of a folder, its list of files. `whole(path)`: whether it can be opened. The reason of what
    may be DICOM is for the owner alone, unless `shared`.

    Raises `UsageError` when there is no such folder and `OutputError` where nothing can be moved.
    """

    def __init__(
        self,
        folder: Path,
        output: Path,
        *,
        stable: float,
        whole: Callable[[Path], bool],
        shared: bool = False,
    ):
        if not folder.is_dir():
            raise UsageError(
                f"there is no folder {folder} to watch",
                expected="a folder that masks are put into",
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
        self._folder, self._stable, self._whole, self._shared = folder, stable, whole, shared
        with writing(folder):
            self._mode = (
                folder.stat().st_mode & 0o777
            )  # who may see the folder may see what is made in it, and nobody else
        self._for = hashlib.sha256(os.fsencode(output.absolute().resolve())).hexdigest()[:8]
        self._seen: dict[str, _Seen] = {}
        self.settling = (
            False  # whether the last look saw something that would be ready if it stayed as it is
        )

    def look(self) -> list[Path]:
        """What has not changed for long enough, the one that changed last at the end."""
        now, seen, ready = time.monotonic(), {}, []
        self.settling = False
        with writing(self._folder):
            items = [
                p
                for p in self._folder.iterdir()
                if p.name not in (DONE, FAILED) and not _unfinished(p.name)
            ]
        for item in items:
            if not (found := fingerprint(item)):
                continue
            before = self._seen.get(item.name)
            one = seen[item.name] = (
                before if before is not None and before.found == found else _Seen(found, now)
            )
            one.age = now - one.since
            if one.age >= self._stable * (PATIENCE if one.whole is False else 1):
                ready.append(item)
            else:
                self.settling |= before is None or one is before
        self._seen = seen
        return sorted(
            ready,
            key=lambda item: (max(changed for *_, changed in seen[item.name].found), item.name),
        )

    def claim(self, item: Path) -> WorkItem | None:
        """Take what `look` gave.

        None when it is not whole, when another was faster and when it has changed since.

        It is opened only when it is this process' own and the start is counted: a file that ends
        whoever opens it is not opened before others once more, and not for ever.
        """
        seen = self._seen[item.name]
        if seen.whole is False and seen.age < PATIENCE * self._stable:
            self.settling = True
            return None
        with writing(self._folder):
            lease = self._folder / WORK / f"{self._for}-{os.urandom(6).hex()}"
            lease.parent.mkdir(self._mode, exist_ok=True)
            lease.mkdir(self._mode)
            handle = _hold(lease, os.O_CREAT)
            if handle is None:  # another took the new ticket for a dead watcher's
                self.settling = True
                return None
            claim = WorkItem(lease, lease / item.name, handle)
            try:
                os.rename(item, claim.item)
                if self._is_complete(claim, seen) or os.path.lexists(item):
                    return claim
            except FileNotFoundError:  # another was faster
                pass
            except BaseException:
                self._put_back(claim, item)
                raise
            self._put_back(claim, item)  # somebody still writes it
            return None

    def _is_complete(self, claim: WorkItem, seen: _Seen) -> bool:
        """Whether it is what was seen, and whole, or waited for long enough."""
        if fingerprint(claim.item) != seen.found:
            return False
        if seen.whole is None:
            with ExitStack() as counting:
                with suppress(
                    OutputError
                ):  # on a full disk that it was claimed tells of the first start
                    counting.enter_context(count_attempt(claim.attempts))
                seen.whole = self._whole(claim.item)
        if seen.whole or seen.age >= PATIENCE * self._stable:
            return True
        self.settling = True
        return False

    def _put_back(self, claim: WorkItem, item: Path) -> None:
        if os.path.lexists(claim.item):
            if os.path.lexists(item):  # one of that name has come meanwhile
                self._close(claim)
                return
            os.rename(claim.item, item)
        self._end(claim)

    def stale_items(self) -> Iterator[WorkItem]:
        """What watchers for the same output left when they ended, while this process has no
        claim of its own; each is its now.
        """
        with writing(self._folder):
            leases = sorted((self._folder / WORK).glob(f"{self._for}-*"))
        for lease in leases:
            with writing(self._folder):
                handle = _hold(lease)
                if handle is None:
                    continue
                items = [path for path in lease.iterdir() if path.name not in (LOCK, ATTEMPTS)]
                claim = WorkItem(lease, items[0] if items else lease / LOCK, handle)
                if not items:
                    self._end(claim)
                    continue
            yield claim

    def finish(self, claim: WorkItem) -> Path:
        """Move it to done/, or to failed/ with NAME.reason.txt; under a numbered name where its
        own is taken. Returns the place.
        """
        folder = self._folder / (FAILED if claim.errors else DONE)
        with writing(folder):
            folder.mkdir(self._mode, exist_ok=True)
            with self._alone():
                place = _free(folder / claim.item.name)
                if claim.errors:  # first, so that nothing lies there without its reason
                    beside = place.with_name(f"{place.name}.reason.txt")
                    beside = (
                        beside
                        if filename_fits(beside)
                        else place.with_name(f"{pseudonym('item', place.name)}.reason.txt")
                    )
                    with private(not self._shared and may_be_dicom(claim.item)):
                        write_text(
                            beside, "\n\n".join(reason(claim, exc) for exc in claim.errors) + "\n"
                        )
                os.rename(claim.item, place)
            self._end(claim)
        return place

    def leave(self, claim: WorkItem) -> None:
        """Let go of it where it is: it is taken up as `abandoned`, by whoever comes first."""
        if claim.open:
            self._close(claim)

    def _end(self, claim: WorkItem) -> None:
        claim.attempts.unlink(missing_ok=True)
        (claim.lease / LOCK).unlink(missing_ok=True)
        with suppress(OSError):
            claim.lease.rmdir()
        self._close(claim)

    def _close(self, claim: WorkItem) -> None:
        # first: Ctrl-C may come in between, and a number that is closed may be another file's by
        # then
        claim.open = False
        os.close(claim.handle)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else chooses a free name meanwhile."""
        handle = os.open(self._folder / WORK / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            while not lock(handle):
                time.sleep(0.01)
            yield
        finally:
            os.close(handle)


def fingerprint(path: Path) -> Fingerprint:
    """Name, size in bytes and time of change of every file; empty where there is none, or one that
    is being copied.

    Of a link its own, not those of what it leads to.
    """
    try:
        if path.is_symlink() or not path.is_dir():
            return (("", path.lstat().st_size, path.lstat().st_mtime_ns),)
        files = [
            file
            for where, folders, names in os.walk(path)
            for file in (
                Path(where) / name
                for name in (*names, *folders)
                if not name.lower().startswith(IGNORED)
            )
            if file.name in names
            or file.is_symlink()  # a linked folder is not entered, but is there
        ]
        if any(_unfinished(file.name) for file in files):
            return ()
        states = ((file.relative_to(path).as_posix(), file.lstat()) for file in files)
        return tuple(sorted((name, state.st_size, state.st_mtime_ns) for name, state in states))
    except OSError:  # it went away, or cannot be read yet
        return ()


def may_be_dicom(item: Path) -> bool:
    """Whether it may hold a patient's data besides a mask: what is no volume by its name."""
    return not item.name.lower().endswith(SUFFIXES)


def display_name(item: Path) -> str:
    """What messages may call it: a volume by its file name, all else, which may be DICOM's and
    named after a patient, by a digest.
    """
    return (
        printable(item.name)
        if not may_be_dicom(item)
        else pseudonym("zip" if is_zip(item) else "item", item.name)
    )


def reason(claim: WorkItem, exc: Mask2CTError) -> str:
    """The error for a person, without the place where it was worked on, and without a name that
    may be a patient's.
    """
    text, name = (
        str(exc).replace(printable(claim.item), claim.display_name),
        printable(claim.item.name),
    )
    return text.replace(name, claim.display_name) if len(name) > 3 else text


def groups_without_name_clash(
    claims: Sequence[WorkItem], names: Mapping[str, Sequence[str]]
) -> Iterator[list[WorkItem]]:
    """The claims in groups without two cases of one name. `names`: ticket name → its case names."""
    left = [*claims]
    while left:
        taken: set[str] = set()
        wave = []
        for claim in left:
            if taken.isdisjoint(names[claim.lease.name]):
                wave.append(claim)
                taken.update(names[claim.lease.name])
        left = [claim for claim in left if claim not in wave]
        yield wave


def _hold(lease: Path, flags: int = 0) -> int | None:
    """The ticket's lock, when it can be had and is still the ticket's."""
    path = lease / LOCK
    try:
        handle = os.open(path, os.O_RDWR | flags, 0o666)
    except FileNotFoundError:  # not there yet, or no more
        with suppress(OSError):
            lease.rmdir()
        return None
    with suppress(FileNotFoundError):
        if lock(handle) and os.path.samestat(os.fstat(handle), os.stat(path)):
            return handle
    os.close(handle)
    return None


def _free(path: Path) -> Path:
    """`path`, or with -2, -3 … before its suffixes the first that is free."""
    ending = next(
        (s for s in SUFFIXES if path.name.lower().endswith(s)),
        path.suffix if not path.is_dir() else "",
    )
    base, ending = (
        path.name[: len(path.name) - len(ending)],
        path.name[len(path.name) - len(ending) :],
    )
    number, place = 1, path
    while os.path.lexists(place):
        number += 1
        place = path.with_name(f"{base}-{number}{ending}")
    return place


def _unfinished(name: str) -> bool:
    return name.startswith(".") or name.lower().endswith(UNFINISHED)
