"""Send each study to every destination, until each has acknowledged every file, and then no more.

Each destination has a thread and, in each study's folder, a delivery log: a line for each file that
it acknowledged, synced before the next file is sent. Where the line is missing, the file is sent
again.
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
from ..core.append_log import AppendLog
from .events import Events
from .study_spool import RESULTS, Spool

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0  # s before another try; doubled after each failure


class Unreachable(Exception):
    """A destination does not answer now. The text says why, without quoting the destination."""


@dataclass(frozen=True)
class DeliveryResult:
    """A destination's answer for one file.

    Attributes:
        file: The file that was sent.
        refused: Why it is not stored; empty when it is.
    """

    file: Path
    refused: str


class Destination(Protocol):
    """An archive that receives studies.

    Attributes:
        name: Its name in logs and delivery logs.
    """

    name: str

    def send(self, files: Sequence[Path]) -> Iterator[DeliveryResult]:
        """Send files, and yield a result as each is answered; raise `Unreachable`."""

    def stop(self) -> None:
        """End `send`, from another thread."""


class DeliveryLog:
    """The files of a study that one destination has acknowledged.

    Args:
        package: The study's folder in the outbox.
        destination: The destination's name.

    Attributes:
        files: The acknowledged files, by path within the study's results.
    """

    def __init__(self, package: Path, destination: str):
        digest = hashlib.sha256(destination.encode()).hexdigest()[:16]
        self._log = AppendLog(package / f".sent-{digest}.journal")
        self.files = {str(facts["sent"]) for facts in self._log.read() if "sent" in facts}

    def add(self, file: str) -> None:
        """Append a file, and return when the line is on the disk.

        Args:
            file: Its path within the study's results.

        Raises:
            OutputError: When the log cannot be written.
        """
        self._log.add({"sent": file})
        self.files.add(file)


class SendQueue:
    """The threads that send, one for each destination.

    Args:
        spool: Holds the studies to be sent.
        destinations: Every study goes to each of them.
        events: Receives what happens.
        audit: Receives what goes into the audit file; None for no file.
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
        """Start the threads."""
        for sender in self._senders:
            sender.start()
        self.wake()

    def wake(self) -> None:
        """Look for studies to send now."""
        for sender in self._senders:
            sender.wake.set()
        # Without destinations, results stay in the spool.
        if not self._senders:
            for package in self._spool.packages():
                self.finish(package)

    def finish(self, package: Path) -> None:
        """Take a study out of the outbox if every destination has acknowledged all of it.

        Another sender may have done so already, and the study may even have come again.

        Args:
            package: The study's folder in the outbox.

        Raises:
            OutputError: When it cannot be moved.
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
        """Whether every thread runs."""
        return all(sender.is_alive() for sender in self._senders)

    def close(self, seconds: float) -> None:
        """End the threads.

        Args:
            seconds: How long to wait for them; a thread that hangs is left behind.
        """
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
        self._destination, self._send_queue = destination, send_queue
        self._spool, self._events, self._ended = spool, events, ended
        self.wake = threading.Event()
        # Studies that the audit file has as delivered to this destination.
        self._delivered: set[str] = set()
        # By study, or "" for the destination: seconds of the pause, and when it ends.
        self._pauses: dict[str, tuple[float, float]] = {}
        # By study: how often the destination failed while it was sent. Such studies come last,
        # because they may be the cause.
        self._failures: dict[str, int] = {}

    def run(self) -> None:
        while not self._ended.is_set():
            self.wake.clear()
            try:
                self._round()
            except Exception as exc:  # no error may end the thread
                if not self._ended.is_set():
                    reason = str(exc) if isinstance(exc, Unreachable) else type(exc).__name__
                    self._events(
                        "unreachable",
                        peer=self._destination.name,
                        reason=reason,
                        again_in=f"{self._pause(''):g}s",
                    )
            due = min((end for _, end in self._pauses.values()), default=None)
            if self._paused(""):
                due = self._pauses[""][1]
            self.wake.wait(None if due is None else max(0.05, due - time.monotonic()))

    def end(self) -> None:
        """Let the thread end: stop what is being sent, and wake it."""
        self._destination.stop()
        self.wake.set()

    def _round(self) -> None:
        """Send every study that is not paused."""
        if self._paused(""):
            return
        packages = sorted(
            self._spool.packages(), key=lambda package: self._failures.get(package.name, 0)
        )
        for package in packages:
            if self._ended.is_set():
                return
            if self._paused(package.name):
                continue
            try:
                self._send(package)
                self._failures.pop(package.name, None)
            except Unreachable:
                self._failures[package.name] = self._failures.get(package.name, 0) + 1
                raise
            except Exception as exc:  # an error of one study must not hold up the others
                self._events(
                    "not-taken",
                    peer=self._destination.name,
                    study=package.name,
                    error=type(exc).__name__,
                    again_in=f"{self._pause(package.name):g}s",
                )

    def _send(self, package: Path) -> None:
        """Send the files of a study that the destination has not acknowledged."""
        log = DeliveryLog(package, self._destination.name)
        waiting = [package / RESULTS / file for file in sendable(package) if file not in log.files]
        sent = 0
        refused: list[DeliveryResult] = []
        if waiting:
            started = time.monotonic()
            for result in self._destination.send(waiting):
                if result.refused:
                    refused.append(result)
                else:
                    log.add(result.file.relative_to(package / RESULTS).as_posix())
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
            # A restart writes the line again, because the process may have ended before it.
            if sent or package.name not in self._delivered:
                self._send_queue.audit.add(
                    "delivered",
                    study=package.name,
                    destination=self._destination.name,
                    objects=len(log.files),
                )
                self._delivered.add(package.name)
            self._send_queue.finish(package)

    def _pause(self, key: str) -> float:
        """Begin a pause of a study, or of the destination (""); return its seconds."""
        seconds = FIRST_PAUSE
        if key in self._pauses:
            seconds = min(2 * self._pauses[key][0], LONGEST_PAUSE)
        self._pauses[key] = seconds, time.monotonic() + seconds
        return seconds

    def _paused(self, key: str) -> bool:
        return key in self._pauses and time.monotonic() < self._pauses[key][1]


def sendable(package: Path) -> list[str]:
    """List the DICOM files of a study's results.

    Args:
        package: The study's folder in the outbox.

    Returns:
        Paths within the results, series by series.
    """
    results = package / RESULTS
    return sorted(
        path.relative_to(results).as_posix()
        for path in results.rglob("*.dcm")
        if not any(p.startswith(".") for p in path.parts[-2:])
    )
