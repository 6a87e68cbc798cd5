"""The node's main loop: synthesize one study after the other, while others arrive and are sent."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..batch.audit_log import AuditTrail
from ..batch.runner import CaseResult
from ..core.errors import Mask2CTError, OutputError
from ..io.cases import Case
from ..io.dicom.files import scan, walk
from .attempts import MAX_ATTEMPTS, attempts, count_attempt, poison_message, reset_attempts
from .events import Events
from .send_queue import SendQueue
from .study_spool import OBJECTS, RESULTS, Spool
from .work_queue import ATTEMPTS

POLL = 0.25  # s between two looks for a complete study
FULL_DISK = 30.0  # s before another try at a study that could not be written
END = 3.0  # s that the senders have to end


class Node:
    """Synthesizes the studies of a spool in the caller's thread.

    Args:
        spool: Holds the studies.
        send_queue: Sends what is synthesized.
        events: Receives what happens.
        quiet: Seconds for which nothing of a study must arrive before it is complete.
        find: Finds the masks among a study's objects.
        synthesize: Writes results into a folder, and keeps those that are there already.
        audit: Receives what goes into the audit file; None for no file.
    """

    def __init__(
        self,
        spool: Spool,
        send_queue: SendQueue,
        events: Events,
        quiet: float,
        find: Callable[[Path], Sequence[Case]],
        synthesize: Callable[[Sequence[Case], Path], Iterable[CaseResult]],
        audit: AuditTrail | None = None,
    ):
        self._audit = audit or AuditTrail(None, "serve")
        self._spool, self._send_queue, self._events = spool, send_queue, events
        self._quiet, self._find, self._synthesize = quiet, find, synthesize
        self._ended = threading.Event()

    def run(self) -> None:
        """Work until KeyboardInterrupt, or until another thread calls `end`."""
        with _suppress_phi_in_output(self._events):
            self._send_queue.start()
            while not self._ended.is_set():
                try:
                    study = self._spool.next(self._quiet)
                    if study is None:
                        self._ended.wait(POLL)
                    else:
                        poison = attempts(study / ATTEMPTS) >= MAX_ATTEMPTS
                        with count_attempt(study / ATTEMPTS):
                            self._process(study, poison)
                except OutputError as exc:
                    # The study is unchanged, and the disk is to blame.
                    self._events("waiting", reason=exc.fact)
                    self._ended.wait(FULL_DISK)

    def end(self) -> None:
        """Let `run` return after the present study."""
        self._ended.set()

    def _process(self, study: Path, poison: bool) -> None:
        """Synthesize a study; with `poison`, too many attempts ended in it, and it only fails."""
        reasons: list[str] = []
        results = slices = warnings_count = 0
        arrival_times = [path.stat().st_mtime for path in (study / OBJECTS).iterdir()]
        self._events.metrics.claimed(study.name, min(arrival_times, default=time.time()))
        self._audit.add("received", study=study.name)
        try:
            if poison:
                raise poison_message("this study")
            cases = self._cases(study)
            for result in self._synthesize(cases, study / RESULTS) if cases else ():
                warnings_count += len(result.warnings)
                if result.error is None:
                    results, slices = results + 1, slices + result.slices
                    if not result.skipped:
                        reset_attempts(study / ATTEMPTS)
                        self._events.metrics.result(result.seconds)
                else:
                    # Its text may quote the file: the log has the type alone.
                    reasons.append(f"{result.case}: {result.error}")
                    self._events(
                        "failed",
                        study=study.name,
                        case=result.case,
                        error=type(result.error).__name__,
                    )
        except OutputError:
            raise
        except Exception as exc:  # an error of one study must not end the node
            fact = f"an error of mask2ct's own: {type(exc).__name__}"
            reasons.append(str(exc) if isinstance(exc, Mask2CTError) else fact)
            self._audit.add("failed", study=study.name, error=type(exc).__name__)
            self._events("failed", study=study.name, error=type(exc).__name__)
        self._spool.move_to_send_queue(study, reasons, poison=poison)
        self._events(
            "processed",
            study=study.name,
            results=results,
            slices=slices,
            warnings=warnings_count,
        )
        self._send_queue.wake()

    def _cases(self, study: Path) -> list[Case]:
        """Find the masks of a study; none where mask2ct wrote all of it."""
        # Some archives send on whatever they receive, also back to this node.
        if all(instance.written_by_mask2ct for instance in scan(walk(study / OBJECTS))):
            self._audit.add("skipped", study=study.name, reason="mask2ct wrote it")
            self._events("ignored", study=study.name, reason="mask2ct wrote it")
            return []
        return [case for case in self._find(study / OBJECTS) if case.kind in ("seg", "rtstruct")]


@contextmanager
def _suppress_phi_in_output(events: Events) -> Iterator[None]:
    """Print no library warning and no thread's traceback: they may quote what a file says."""

    def hook(failure: Any) -> None:
        if failure.exc_type is not SystemExit:
            events("broken", reason=f"a thread ended by {failure.exc_type.__name__}")

    before, threading.excepthook = threading.excepthook, hook
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        threading.excepthook = before
