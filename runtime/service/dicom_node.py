"""The node at work: one study after the other is synthesized in the caller's thread, while
others arrive and are sent.
"""

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
from .study_spool import ATTEMPTS, OBJECTS, RESULTS, Spool

POLL = 0.25  # s between two looks whether a study is complete
FULL_DISK = 30.0  # s before a study that could not be written is tried again
END = 3.0  # s that senders have to end


class Node:
    """`find` gives the masks among a study's objects; `synthesize` makes of them results in a
    folder, keeping what is there already.
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
        self._spool, self._send_queue, self._events, self._quiet, self._find, self._synthesize = (
            spool,
            send_queue,
            events,
            quiet,
            find,
            synthesize,
        )
        self._ended = threading.Event()

    def run(self) -> None:
        """Work until KeyboardInterrupt, or `end` is called from another thread."""
        with _suppress_phi_in_output(self._events):
            self._send_queue.start()
            while not self._ended.is_set():
                try:
                    study = self._spool.next(self._quiet)
                    if study is None:
                        self._ended.wait(POLL)
                    else:
                        spent = attempts(study / ATTEMPTS) >= MAX_ATTEMPTS
                        with count_attempt(study / ATTEMPTS):
                            self._make(study, spent)
                except OutputError as exc:  # a study is as it was, and the fault is not its own
                    self._events("waiting", reason=exc.fact)
                    self._ended.wait(FULL_DISK)

    def end(self) -> None:
        self._ended.set()

    def _make(self, study: Path, spent: bool) -> None:
        """`spent`: it has ended so many processes that it is not begun again."""
        reasons, made, slices, warned = [], 0, 0, 0
        arrived = min(
            (path.stat().st_mtime for path in (study / OBJECTS).iterdir()), default=time.time()
        )
        self._events.metrics.claimed(study.name, arrived)
        self._audit.add("received", study=study.name)
        try:
            if spent:
                raise poison_message("this study")
            if all(
                instance.ours for instance in scan(walk(study / OBJECTS))
            ):  # an archive that sends on whatever it gets
                cases = []
                self._audit.add("skipped", study=study.name, reason="mask2ct wrote it")
                self._events("ignored", study=study.name, reason="mask2ct wrote it")
            else:
                cases = [
                    case for case in self._find(study / OBJECTS) if case.kind in ("seg", "rtstruct")
                ]
            for result in self._synthesize(cases, study / RESULTS) if cases else ():
                warned += len(result.warnings)
                if result.error is None:
                    made, slices = made + 1, slices + result.slices
                    if not result.skipped:
                        reset_attempts(study / ATTEMPTS)
                        self._events.metrics.result(result.seconds)
                else:  # what it says may quote the file: its words stay beside the mask
                    reasons.append(f"{result.case}: {result.error}")
                    self._events(
                        "failed",
                        study=study.name,
                        case=result.case,
                        error=type(result.error).__name__,
                    )
        except OutputError:
            raise
        except (
            Exception
        ) as exc:  # a study must not end the node: it is put aside with what is known
            reasons.append(
                str(exc)
                if isinstance(exc, Mask2CTError)
                else f"an error of mask2ct's own: {type(exc).__name__}"
            )
            self._audit.add("failed", study=study.name, error=type(exc).__name__)
            self._events("failed", study=study.name, error=type(exc).__name__)
        self._spool.move_to_send_queue(study, reasons, poison=spent)
        self._events("synthesized", study=study.name, results=made, slices=slices, warnings=warned)
        self._send_queue.wake()


@contextmanager
def _suppress_phi_in_output(events: Events) -> Iterator[None]:
    """Neither a warning of a library nor a thread's traceback may quote what a file says."""

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
