"""`mask2ct watch`: a CT for each mask that is put into a folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..batch.audit_log import AUDIT, AuditTrail
from ..batch.runner import CaseResult
from ..core.console import EXIT_CODES
from ..core.errors import UsageError, printable
from ..core.logfmt import log_line
from ..io.cases import Case
from ..service.watch_folder import FolderWatcher
from ..service.work_queue import WorkItem, reason
from .options import (
    add_audit,
    add_engine,
    add_reading,
    add_results,
    find,
    introduce,
    open_models,
    plans_by_model,
)


def add(commands: Any) -> None:
    watch = commands.add_parser(
        "watch", help="synthesize a CT for each mask that is put into a folder", epilog=EXIT_CODES
    )
    watch.set_defaults(command=_watch)
    watch.add_argument(
        "inbox",
        type=Path,
        metavar="INBOX",
        help="the folder: masks, zips and folders of masks in it end in done/ or failed/ there",
    )
    add_engine(watch)
    add_results(watch)
    add_reading(watch)
    when = watch.add_argument_group("watching")
    when.add_argument(
        "--poll",
        type=_seconds,
        default=2.0,
        metavar="SECONDS",
        help="how often to look (default: %(default)s)",
    )
    when.add_argument(
        "--stable",
        type=_seconds,
        default=5.0,
        metavar="SECONDS",
        help="take what has not changed for so long (default: %(default)s)",
    )
    when.add_argument(
        "--once", action="store_true", help="end when nothing is left that is complete"
    )
    add_audit(watch, f"{AUDIT} in the output folder")
    watch.add_argument("--quiet", action="store_true", help="print errors and warnings only")


def _watch(options: argparse.Namespace) -> int:
    audit_file = _audit_file(options)
    with open_models(options) as models:
        plans = plans_by_model(options, models, options.output, resume=True)
        log = _Log(several=len(models) > 1, quiet=options.quiet)
        audit = AuditTrail(
            audit_file, "watch", lambda action, facts: log.say(log_line(action, facts))
        )
        watcher = FolderWatcher(
            options.inbox,
            models,
            plans,
            find=lambda path, say: find(options, [path], say=say),
            stable=options.stable,
            listener=log,
            audit=audit,
        )
        if not options.quiet:
            introduce(models)
        with audit:
            audit.load(models)
            try:
                watcher.run(poll=options.poll, once=options.once)
            finally:
                log.say(f"{log.done} done, {log.failed} failed → {options.output}")
    if log.unsaid is not None:
        raise log.unsaid
    return 1 if log.failed else 0


def _audit_file(options: argparse.Namespace) -> Path:
    """Where the audit file lies. Raises `UsageError` for a place in the watched folder."""
    file = options.audit or options.output / AUDIT
    if file.absolute().resolve().is_relative_to(options.inbox.resolve()):
        raise UsageError(
            "the audit file lies in the watched folder",
            expected="a file beside it, not in it",
            remedy="choose another --audit",
            file=file,
        )
    return Path(file)


class _Log:
    """One line for what became of each item and of each result; nothing of a patient is in it."""

    def __init__(self, *, several: bool, quiet: bool):
        self._several, self._quiet = several, quiet
        self.done = self.failed = 0
        self.unsaid: OSError | None = None
        self._told = False

    def say(self, text: str) -> None:
        if not self._quiet:
            try:
                print(printable(text), flush=True)
            except BrokenPipeError:  # nobody reads it
                pass
            except (
                OSError
            ) as exc:  # the masks that wait are no less urgent; the exit code will say it
                self.unsaid = exc

    def chosen(self, case: Case, model: str, reason: str) -> None:
        if self._several:
            self.say(f"{case.display_name.name}: {model} ({reason})")

    def made(self, result: CaseResult) -> None:
        for warning in result.warnings:
            print(f"warning: {printable(warning)}", file=sys.stderr, flush=True)

    def settled(self, claim: WorkItem, place: Path) -> None:
        self._told = False
        for error in claim.errors:
            print(f"error: {reason(claim, error)}", file=sys.stderr, flush=True)
        self.failed += bool(claim.errors)
        self.done += not claim.errors
        self.say(f"{claim.display_name}: {place.parent.name}")

    def waiting(self) -> None:
        if not self._told:
            self.say("another run is writing into the output folder: waiting for it")
        self._told = True


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise UsageError(
            f"{text!r} is not a number of seconds",
            expected="0 or more",
            remedy="leave it out for the default",
        )
    return seconds
