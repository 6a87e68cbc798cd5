"""The DICOM node's folder: a work queue (`runtime.service.work_queue`) of studies.

An arrow is one rename, so that a study is always in exactly one state, whatever ends the process:

    incoming/STUDY         acknowledged objects; more may follow
        |    ^
        |    |  next, file by file, before it claims: what failed of a study joins what arrives
        |    +------------------------------------------------------------+
        |  next: no object for `quiet` seconds, and at least one mask      |
        v                                                                 |
    studies/STUDY-N        complete: objects/, and while it is            |
        |                  synthesized results/ (N counts its arrivals)   |
        |  move_to_send_queue                                             |
        v                                                                 |
    outbox/STUDY-N         results/ to be sent, and a log of what each    |
        |                  destination has acknowledged                   |
        |  finish: every destination has everything                       |
        +--- a mask failed ---> failed/STUDY-N: objects/, reason.txt -----+
        +--- with --keep -----> done/STUDY-N
        +--- else ------------> removed

An RTSTRUCT that failed because not all of its images had arrived is tried again in this way when
they have. A study that ended too many processes (`attempts`) stays in failed/. Names of folders and
files are digests of UIDs: none names a patient.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import BinaryIO

from ..batch.completion_log import Journal
from ..core.atomic_files import remove_orphans, rename, sync_folder, temporary_name
from ..core.errors import InputError, OutputError, UsageError, writing
from ..io.dicom.files import RTSTRUCT, SEGMENTATION, map_dicom_errors, read_dataset
from .attempts import attempts
from .work_queue import ATTEMPTS, WorkQueue, move_with_reasons

STATES = ("incoming", "studies", "outbox", "failed", "done")
OBJECTS, RESULTS, REASON = "objects", "results", "reason.txt"
# Bytes of the disk that received objects never take: results and logs need them.
RESERVE = 64 << 20
_GONE = ".gone-"
_HEADER = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID")


class NoMatch(InputError):
    """An object has other UIDs than its sender stated."""


@dataclass
class _Arriving:
    """A study that may not be complete."""

    last: float  # s of the monotonic clock, when its last object arrived
    mask: bool = False  # whether a mask has arrived
    # The threads of the associations that brought objects.
    senders: set[threading.Thread] = field(default_factory=set)


class Spool(WorkQueue):
    """The node's folder, locked for this process.

    Args:
        root: The folder; it is made when it is missing.
        keep: Keep objects and results of sent studies in done/.

    Attributes:
        root: The folder.
        narrowed: Whether others could read the folder until this process opened it.

    Raises:
        UsageError: When another node has it, or others can read it and it holds other files.
        OutputError: When it cannot be written.
    """

    def __init__(self, root: Path, *, keep: bool = False):
        self.root, self._keep = root, keep
        with writing(root):
            # Masks lie here: for the owner alone.
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.narrowed = _narrow(root)
            for state in STATES:
                (root / state).mkdir(exist_ok=True)
        super().__init__(root / "studies", item=OBJECTS)
        self._journal = Journal(root)
        self._lock = threading.Lock()
        for folder in (root / "incoming", *(root / "incoming").iterdir()):
            remove_orphans(folder, locked=True)
        for discarded in root.glob(f"{_GONE}*"):
            shutil.rmtree(discarded, ignore_errors=True)
        self._opened = now = time.monotonic()
        self._arriving = {
            name: _Arriving(now, any((root / "incoming" / name).glob("mask-*")))
            for name in self.names("incoming")
        }

    def close(self) -> None:
        """Unlock the folder."""
        self._journal.close()

    def full(self) -> str:
        """Return a sentence if the disk takes no more objects, else an empty text."""
        return "the disk is full" if shutil.disk_usage(self.root).free < 2 * RESERVE else ""

    def names(self, state: str) -> list[str]:
        """List the studies in a state.

        Args:
            state: One of `STATES`.

        Returns:
            Their folders' names, sorted.
        """
        return sorted(path.name for path in (self.root / state).iterdir() if path.is_dir())

    def receive(
        self,
        write: Callable[[BinaryIO], object],
        claimed: tuple[str, str],
        size: int,
        sender: threading.Thread,
    ) -> str:
        """Store one object: it is on the disk, under its final name, when this returns.

        Args:
            write: Writes the object into the open file.
            claimed: SOP Class and SOP Instance UID as the sender stated them.
            size: Bytes of the object.
            sender: The thread of the association. While it lives, the study is not complete.

        Returns:
            The pseudonym of the object's study.

        Raises:
            OutputError: When the disk has no room.
            NoMatch: When the object has other UIDs than `claimed`.
            InputError: When it cannot be read.
        """
        incoming = self.root / "incoming"
        part = temporary_name(incoming / "object.dcm")
        with writing(part):
            if shutil.disk_usage(incoming).free < size + RESERVE:
                raise OutputError(
                    "the spool has no room",
                    expected=f"{size + RESERVE} bytes",
                    remedy="free some space",
                    file=self.root,
                )
            try:
                with open(part, "wb") as handle:
                    write(handle)
                    handle.flush()
                    os.fsync(handle.fileno())
                study, mask = _identify(part, claimed)
                with self._lock:
                    arriving = self._arriving.setdefault(study, _Arriving(0))
                    # From here on `next` does not claim the study.
                    arriving.senders.add(sender)
                folder = incoming / study
                if not folder.exists():
                    folder.mkdir(exist_ok=True)
                    sync_folder(incoming)
                name = f"{'mask' if mask else 'image'}-{_digest(claimed[1], 32)}.dcm"
                os.replace(part, folder / name)
                sync_folder(folder)
                with self._lock:
                    arriving.last = time.monotonic()
                    # Only now, with the file in its place: a mask lets the study be claimed.
                    arriving.mask |= mask
            finally:
                part.unlink(missing_ok=True)
        return study

    def next(self, quiet: float) -> Path | None:
        """Return a study to synthesize.

        First come studies that were begun without a failed attempt, then complete ones that have
        arrived, and last those in which an earlier process ended.

        Args:
            quiet: Seconds for which nothing of a study must have arrived.

        Returns:
            The study's folder in studies/; None when there is nothing to do.

        Raises:
            OutputError: When it cannot be moved.
        """
        with self._lock, writing(self.root):
            begun = [work_item.lease for work_item in self.stale_items()]
            if begun and not attempts(begun[0] / ATTEMPTS):
                return begun[0]
            now = time.monotonic()
            for study, arriving in self._arriving.items():
                arriving.senders = {thread for thread in arriving.senders if thread.is_alive()}
                if arriving.senders:
                    arriving.last = now
                elif (
                    now - arriving.last >= quiet
                    and (self.root / "incoming" / study).is_dir()
                    and (arriving.mask or self._has_failed_mask(study))
                ):
                    return self._claim_study(study)
            # After `quiet` seconds, all that had arrived before the start has had its turn.
            return begun[0] if begun and now - self._opened >= quiet else None

    def move_to_send_queue(self, study: Path, reasons: list[str], *, poison: bool = False) -> None:
        """Move a synthesized study into the outbox.

        Args:
            study: Its folder in studies/, whose results/ are complete.
            reasons: Why masks of it could not be synthesized.
            poison: Whether it ended too many processes: then it is not tried again when more of
                it arrives.

        Raises:
            OutputError: When it cannot be moved.
        """
        package = self.root / "outbox" / study.name
        with writing(study):
            if not poison:
                (study / ATTEMPTS).unlink(missing_ok=True)
            # A process that was killed may have left one.
            (study / REASON).unlink(missing_ok=True)
            move_with_reasons(study, package, study / REASON, reasons)
            if not reasons and not self._keep:
                shutil.rmtree(package / OBJECTS, ignore_errors=True)

    def packages(self) -> Iterator[Path]:
        """Return the folders in the outbox."""
        return (self.root / "outbox" / name for name in self.names("outbox"))

    def finish(self, package: Path) -> None:
        """Take a study out of the outbox, after every destination has all of it.

        Args:
            package: Its folder in the outbox.

        Raises:
            OutputError: When it cannot be moved.
        """
        with self._lock, writing(package):
            if (package / REASON).exists():
                if not self._keep:
                    shutil.rmtree(package / RESULTS, ignore_errors=True)
                rename(package, self.root / "failed" / package.name)
            elif self._keep:
                rename(package, self.root / "done" / package.name)
            else:
                self._discard(package)

    def _failed(self, study: str) -> Iterator[Path]:
        """The folders in failed/ of an arriving study that may be tried again."""
        folders = (self.root / "failed").glob(f"{study}-*")
        return (
            folder
            for folder in folders
            if (folder / OBJECTS).is_dir() and not (folder / ATTEMPTS).exists()
        )

    def _has_failed_mask(self, study: str) -> bool:
        return any(
            path for folder in self._failed(study) for path in (folder / OBJECTS).glob("mask-*")
        )

    def _take_along(self, study: str) -> None:
        """Move what failed of a study to what has arrived of it, which is newer and stays.

        A process that ends in the middle leaves the rest in failed/, for the next claim.
        """
        incoming = self.root / "incoming" / study
        for folder in [*self._failed(study)]:
            # Images (image-*) come before masks (mask-*): a mask lets the study be claimed.
            for path in sorted((folder / OBJECTS).iterdir()):
                if not (incoming / path.name).exists():
                    os.replace(path, incoming / path.name)
            sync_folder(incoming)
            self._discard(folder)

    def _claim_study(self, study: str) -> Path:
        """Move a complete study from incoming/ to studies/."""
        self._take_along(study)
        used_names = {name for state in STATES for name in self.names(state)}
        name = next(name for n in count(1) if (name := f"{study}-{n}") not in used_names)
        work_item = self._claim(self.root / "incoming" / study, name)
        del self._arriving[study]
        return work_item.lease

    def _discard(self, folder: Path) -> None:
        """Remove a folder so that no moment shows half of it."""
        # The random part: a study may come again before its last folder is removed.
        discarded = self.root / f"{_GONE}{folder.name}-{os.urandom(3).hex()}"
        os.replace(folder, discarded)
        shutil.rmtree(discarded, ignore_errors=True)


def _identify(file: Path, claimed: tuple[str, str]) -> tuple[str, bool]:
    """Return the pseudonym of an object's study, and whether the object is a mask."""
    with map_dicom_errors("the object"):
        ds = read_dataset(file, tags=_HEADER)
        sop_class, instance, study = (str(ds.get(keyword) or "") for keyword in _HEADER)
    if not study or not instance:
        raise InputError(
            "the object has no Study or SOP Instance UID",
            expected="a DICOM composite object",
            remedy="export it again",
        )
    if (sop_class, instance) != claimed:
        raise NoMatch(
            "the object has other UIDs than the request",
            expected="the UIDs of the request",
            remedy="export it again",
        )
    return f"study-{_digest(study, 16)}", sop_class in SEGMENTATION or sop_class == RTSTRUCT


def _digest(uid: str, digits: int) -> str:
    """Return the first hexadecimal digits of a UID's SHA-256."""
    return hashlib.sha256(uid.encode()).hexdigest()[:digits]


def _narrow(root: Path) -> bool:
    """Make the folder private, and return whether others could read it.

    Raises:
        UsageError: When others can read it and it holds more than a spool.
        OSError: When its mode cannot be changed.
    """
    if os.name != "posix" or not root.stat().st_mode & 0o077:
        return False
    foreign = [
        path.name
        for path in root.iterdir()
        if path.name not in STATES and not path.name.startswith(".")
    ]
    if foreign:
        raise UsageError(
            "the spool can be read by others and holds more than a spool",
            expected="a folder of mode 700 for the spool alone",
            remedy="choose another --spool, or make it private with chmod 700",
            file=root,
        )
    root.chmod(0o700)
    return True
