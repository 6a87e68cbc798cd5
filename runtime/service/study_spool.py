"""The node's folder.

Which study lies in which room is all its state, so that it survives whatever ends the process.

    incoming/STUDY/      objects that were acknowledged; more may follow
    studies/STUDY-N/     complete: objects/ and, while it is synthesized, results/ (N: how often the study has come)
    outbox/STUDY-N/      synthesized: results/ to be sent, and what each destination has acknowledged
    failed/STUDY-N/      objects/ of which some could not be synthesized, with reason.txt
    done/STUDY-N/        with --keep: what has been sent

A study goes from room to room by one rename. But what failed of a study is taken along when more of
it arrives, file by file before it is claimed: an RTSTRUCT whose images were not all there is tried
again when they are. Folders and files are called by digests of UIDs: no name here names a patient.
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
from ..core.atomic_files import remove_orphans, sync_folder, temporary_name, write_text
from ..core.errors import InputError, OutputError, UsageError, writing
from ..io.dicom.files import RTSTRUCT, SEGMENTATION, dataset, map_dicom_errors
from .attempts import attempts

STATES = ("incoming", "studies", "outbox", "failed", "done")
OBJECTS, RESULTS, REASON, ATTEMPTS = "objects", "results", "reason.txt", ".starts"
RESERVE = (
    64 << 20
    # bytes of the disk that objects from outside never take: what is synthesized and noted must
    # find
    # room
)
_GONE = ".gone-"
_HEADER = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID")


class NoMatch(InputError):
    """An object is not what its sender called it."""


@dataclass
class _Arriving:
    """A study that may not be complete.

    `senders`: the threads of the associations that brought something; `last`: when, monotonic s.
    """

    last: float
    mask: bool = False
    senders: set[threading.Thread] = field(default_factory=set)


class Spool:
    """The folder, locked for this process.

    Raises `UsageError` when another node has it, `OutputError` when it cannot be written.
    """

    def __init__(self, root: Path, *, keep: bool = False):
        self.root, self._keep = root, keep
        with writing(root):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)  # masks lie there
            self.narrowed = _narrow(root)
            for room in STATES:
                (root / room).mkdir(exist_ok=True)
        self._journal = Journal(root)
        self._lock = threading.Lock()
        for folder in (root / "incoming", *(root / "incoming").iterdir()):
            remove_orphans(folder, locked=True)
        for gone in root.glob(f"{_GONE}*"):
            shutil.rmtree(gone, ignore_errors=True)
        self._opened = now = time.monotonic()
        self._arriving = {
            name: _Arriving(now, any((root / "incoming" / name).glob("mask-*")))
            for name in self.names("incoming")
        }

    def close(self) -> None:
        """Let go of the folder."""
        self._journal.close()

    def full(self) -> str:
        """That the disk takes no more objects, or nothing."""
        return "the disk is full" if shutil.disk_usage(self.root).free < 2 * RESERVE else ""

    def names(self, room: str) -> list[str]:
        """The studies in a room, sorted."""
        return sorted(path.name for path in (self.root / room).iterdir() if path.is_dir())

    def receive(
        self,
        write: Callable[[BinaryIO], object],
        claimed: tuple[str, str],
        size: int,
        sender: threading.Thread,
    ) -> str:
        """Keep one object: on the disk, under its final name, when this returns.

        `write` is given the open file; `claimed`: SOP Class and SOP Instance UID as the sender
        stated them; `size` in bytes. Returns what to call its study.

        Raises `OutputError` when there is no room, `NoMatch` when the object is another than was
        claimed, `InputError` when it cannot be read.
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
                    arriving.senders.add(sender)  # from here on nobody claims the study
                folder = incoming / study
                if not folder.exists():
                    folder.mkdir(exist_ok=True)
                    sync_folder(incoming)
                os.replace(
                    part, folder / f"{'mask' if mask else 'image'}-{_digest(claimed[1], 32)}.dcm"
                )
                sync_folder(folder)
                with self._lock:
                    arriving.last = time.monotonic()
                    arriving.mask |= mask  # now there is one
            finally:
                part.unlink(missing_ok=True)
        return study

    def next(self, quiet: float) -> Path | None:
        """A study to synthesize: one that was begun before, else one with a mask to which nobody
        has brought anything for `quiet` seconds, and last what an earlier process ended in.

        Raises `OutputError`.
        """
        with self._lock, writing(self.root):
            begun = []
            for folder in (self.root / "studies" / name for name in self.names("studies")):
                if (folder / OBJECTS).is_dir():
                    begun.append(folder)
                else:
                    self._discard(folder)  # claimed when the power went
            begun.sort(key=lambda folder: attempts(folder / ATTEMPTS))
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
                    return self._claim(study)
            return (
                begun[0] if begun and now - self._opened >= quiet else None
            )  # what had arrived before has had its turn

    def move_to_send_queue(self, study: Path, reasons: list[str], *, poison: bool = False) -> None:
        """A study's results/ are all that it gives.

        `reasons`: of the masks that could not be synthesized; `poison`: it ended too many
        processes, and is not tried again when more of it arrives.
        """
        package = self.root / "outbox" / study.name
        with writing(study):
            if not poison:
                (study / ATTEMPTS).unlink(missing_ok=True)
            (study / REASON).unlink(missing_ok=True)  # of a time before the process was killed
            if reasons:
                write_text(study / REASON, "\n\n".join(reasons) + "\n")
            self._move(study, package)
            if not reasons and not self._keep:
                shutil.rmtree(package / OBJECTS, ignore_errors=True)

    def packages(self) -> Iterator[Path]:
        """What is to be sent."""
        return (self.root / "outbox" / name for name in self.names("outbox"))

    def finish(self, package: Path) -> None:
        """All of a study is where it belongs."""
        with self._lock, writing(package):
            if (package / REASON).exists():
                if not self._keep:
                    shutil.rmtree(package / RESULTS, ignore_errors=True)
                self._move(package, self.root / "failed" / package.name)
            elif self._keep:
                self._move(package, self.root / "done" / package.name)
            else:
                self._discard(package)

    def _failed(self, study: str) -> Iterator[Path]:
        """What failed of a study that is arriving, and may be tried again."""
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
        """Lay what failed of a study beside what has arrived of it.

        What arrived is newer, and stays.

        A process that dies in the midst leaves the rest in failed/, and the next claim takes it.
        """
        incoming = self.root / "incoming" / study
        for folder in [*self._failed(study)]:
            for path in sorted(
                (folder / OBJECTS).iterdir()
            ):  # images before masks: a mask alone says that it may be claimed
                if not (incoming / path.name).exists():
                    os.replace(path, incoming / path.name)
            sync_folder(incoming)
            self._discard(folder)

    def _claim(self, study: str) -> Path:
        self._take_along(study)
        taken = {name for room in STATES for name in self.names(room)}
        name = next(name for n in count(1) if (name := f"{study}-{n}") not in taken)
        folder = self.root / "studies" / name
        with writing(folder):
            folder.mkdir()
            self._move(self.root / "incoming" / study, folder / OBJECTS)
        del self._arriving[study]
        return folder

    def _discard(self, folder: Path) -> None:
        """Take a folder away so that no moment shows half of it."""
        gone = (
            self.root / f"{_GONE}{folder.name}-{os.urandom(3).hex()}"
        )  # a study may come again before the last one is all gone
        os.replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _move(self, old: Path, new: Path) -> None:
        os.replace(old, new)
        sync_folder(new.parent)
        sync_folder(old.parent)


def _identify(file: Path, claimed: tuple[str, str]) -> tuple[str, bool]:
    """What to call the study of an object, and whether it is a mask."""
    with map_dicom_errors("the object"):
        ds = dataset(file, tags=_HEADER)
        sop_class, instance, study = (str(ds.get(keyword) or "") for keyword in _HEADER)
    if not study or not instance:
        raise InputError(
            "the object has no Study or SOP Instance UID",
            expected="a DICOM composite object",
            remedy="export it again",
        )
    if (sop_class, instance) != claimed:
        raise NoMatch(
            "the object is not what it was called",
            expected="the UIDs of the request",
            remedy="export it again",
        )
    return f"study-{_digest(study, 16)}", sop_class in SEGMENTATION or sop_class == RTSTRUCT


def _digest(uid: str, digits: int) -> str:
    return hashlib.sha256(uid.encode()).hexdigest()[:digits]


def _narrow(root: Path) -> bool:
    """Take a spool that was there from everybody but its owner, and say whether that was needed.

    Raises `UsageError`, OSError.
    """
    if os.name != "posix" or not root.stat().st_mode & 0o077:
        return False
    others = [
        path.name
        for path in root.iterdir()
        if path.name not in STATES and not path.name.startswith(".")
    ]
    if others:
        raise UsageError(
            "the spool can be read by others and holds more than a spool",
            expected="a folder of mode 700 for the spool alone",
            remedy="choose another --spool, or make it private with chmod 700",
            file=root,
        )
    root.chmod(0o700)
    return True
