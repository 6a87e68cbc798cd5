"""What is to be sent, to whom, and what has been acknowledged: sent until it is, and never again
after it was.

Each destination has a thread and, in each study's folder, a journal: a line for each file that it
acknowledged, synced before the next is sent. This is what commits us to an object: where the line
is missing, the object is sent again.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..batch.audit_log import AuditTrail
from ..core.append_log import append, facts_in, line_of
from ..core.atomic_files import sync_folder
from ..core.errors import writing
from .events import Events
from .study_spool import RESULTS, Spool

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0  # s before what failed is tried again; doubled each time


class Unreachable(Exception):
    """A destination answers nobody now. Says why, without quoting it."""


@dataclass(frozen=True)
class DeliveryResult:
    """What a destination says of a file: `refused` is empty when it has stored it."""

    file: Path
    refused: str


class Destination(Protocol):
    """Who is sent to. `name`: for logs.

    `send` yields an `Outcome` as each file is answered for, and raises `Unreachable`; `stop` ends
    it.
    """

    name: str

    def send(self, files: Sequence[Path]) -> Iterator[DeliveryResult]: ...

    def stop(self) -> None: ...


class DeliveryLog:
    """The files of a study that one destination has acknowledged, by path within the study's
    results.
    """

    def __init__(self, package: Path, destination: str):
        self._path = (
            package / f".sent-{hashlib.sha256(destination.encode()).hexdigest()[:16]}.journal"
        )
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            content = b""
        self._torn = bool(content) and not content.endswith(b"\n")
        self.files = {str(facts["sent"]) for facts in facts_in(content) if "sent" in facts}

    def add(self, file: str) -> None:
        """Append, and return when it is on the disk. Raises `OutputError`."""
        with writing(self._path):
            made = not self._path.exists()
            with open(self._path, "ab", buffering=0) as handle:
                append(handle.fileno(), (b"\n" if self._torn else b"") + line_of({"sent": file}))
            if made:
                sync_folder(self._path.parent)
        self._torn = False
        self.files.add(file)


class SendQueue:
    """The threads that send.

    `start` them, `wake` them when there is something new, `close` ends them within seconds.
    """

    def __init__(
        self,
        spool: Spool,
        destinations: Sequence[Destination],
        events: Events,
        audit: AuditTrail | None = None,
    ):
        self._spool, self._events = spool, events
        self.audit = audit or AuditTrail(None, "serve")
        self._ended, self._settling = threading.Event(), threading.Lock()
        self._senders = [
            _Sender(destination, self, spool, events, self._ended) for destination in destinations
        ]
        self._names = [destination.name for destination in destinations]

    def start(self) -> None:
        for sender in self._senders:
            sender.start()
        self.wake()

    def wake(self) -> None:
        for sender in self._senders:
            sender.wake.set()
        if not self._senders:  # nobody to send to: what is synthesized stays here
            for package in self._spool.packages():
                self.finish(package)

    def finish(self, package: Path) -> None:
        """Take a study that every destination has acknowledged out of the outbox.

        Another sender may have done so, and the study be back.
        """
        with self._settling:
            if not package.is_dir():
                return
            files = set(sendable(package))
            if all(files <= DeliveryLog(package, name).files for name in self._names):
                self._spool.finish(package)
                self._events.metrics.settled(package.name)
                self._events("settled", study=package.name, objects=len(files))

    @property
    def alive(self) -> bool:
        return all(sender.is_alive() for sender in self._senders)

    def close(self, seconds: float) -> None:
        """End within `seconds`."""
        self._ended.set()
        for sender in self._senders:
            sender.end()
        until = time.monotonic() + seconds
        for sender in self._senders:
            if sender.is_alive():
                sender.join(max(0.0, until - time.monotonic()))


class _Sender(threading.Thread):
    """Sends to one destination what it has not acknowledged, study by study."""

    def __init__(
        self,
        destination: Destination,
        send_queue: SendQueue,
        spool: Spool,
        events: Events,
        ended: threading.Event,
    ):
        super().__init__(name=f"sender {destination.name}", daemon=True)
        self._destination, self._send_queue, self._spool, self._events, self._ended = (
            destination,
            send_queue,
            spool,
            events,
            ended,
        )
        self.wake = threading.Event()
        self._delivered: set[str] = set()  # studies that the audit file has as delivered here
        self._pauses: dict[
            str, tuple[float, float]
        ] = {}  # study, or "" for the destination → how long the pause is and when it ends
        self._broken: dict[
            str,
            int,
            # study → how often the destination broke down on it: those come last, in case it is
            # their
            # doing
        ] = {}

    def run(self) -> None:
        while not self._ended.is_set():
            self.wake.clear()
            try:
                self._round()
            except Exception as exc:  # whatever it was, it must not end the sending
                if not self._ended.is_set():
                    reason = str(exc) if isinstance(exc, Unreachable) else type(exc).__name__
                    self._events(
                        "unreachable",
                        peer=self._destination.name,
                        reason=reason,
                        again_in=f"{self._pause(''):g}s",
                    )
            due = (
                self._pauses[""][1]
                if self._paused("")
                else min((end for _, end in self._pauses.values()), default=None)
            )
            self.wake.wait(None if due is None else max(0.05, due - time.monotonic()))

    def end(self) -> None:
        self._destination.stop()
        self.wake.set()

    def _round(self) -> None:
        if self._paused(""):
            return
        for package in sorted(
            self._spool.packages(), key=lambda package: self._broken.get(package.name, 0)
        ):
            if self._ended.is_set():
                return
            if self._paused(package.name):
                continue
            try:
                self._send(package)
                self._broken.pop(package.name, None)
            except Unreachable:
                self._broken[package.name] = self._broken.get(package.name, 0) + 1
                raise
            except Exception as exc:  # one study's fault must not keep the others here
                self._events(
                    "not-taken",
                    peer=self._destination.name,
                    study=package.name,
                    error=type(exc).__name__,
                    again_in=f"{self._pause(package.name):g}s",
                )

    def _send(self, package: Path) -> None:
        done = DeliveryLog(package, self._destination.name)
        waiting = [package / RESULTS / file for file in sendable(package) if file not in done.files]
        sent = 0
        refused: list[DeliveryResult] = []
        if waiting:
            started = time.monotonic()
            for outcome in self._destination.send(waiting):
                if outcome.refused:
                    refused.append(outcome)
                else:
                    done.add(outcome.file.relative_to(package / RESULTS).as_posix())
                    sent += 1
                if self._ended.is_set():
                    return
            self._pauses.pop("", None)
            self._events.metrics.stage("send", time.monotonic() - started)
            self._events("sent", peer=self._destination.name, study=package.name, objects=sent)
        if refused:
            pause = self._pause(package.name)
            self._events(
                "not-taken",
                peer=self._destination.name,
                study=package.name,
                objects=len(refused),
                reason=refused[0].refused,
                again_in=f"{pause:g}s",
            )
        else:
            self._pauses.pop(package.name, None)
            if (
                sent or package.name not in self._delivered
            ):  # again after a restart, lest it be missing
                self._send_queue.audit.add(
                    "delivered",
                    study=package.name,
                    destination=self._destination.name,
                    objects=len(done.files),
                )
                self._delivered.add(package.name)
            self._send_queue.finish(package)

    def _pause(self, what: str) -> float:
        length = (
            min(2 * self._pauses[what][0], LONGEST_PAUSE) if what in self._pauses else FIRST_PAUSE
        )
        self._pauses[what] = length, time.monotonic() + length
        return length

    def _paused(self, what: str) -> bool:
        return what in self._pauses and time.monotonic() < self._pauses[what][1]


def sendable(package: Path) -> list[str]:
    """The DICOM files of a study's results, by path within them, series by series."""
    results = package / RESULTS
    return sorted(
        path.relative_to(results).as_posix()
        for path in results.rglob("*.dcm")
        if not any(p.startswith(".") for p in path.parts[-2:])
    )
