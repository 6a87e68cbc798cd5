"""`mask2ct watch`: synthesize a CT for each mask that arrives in a folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..batch.audit_log import AUDIT, AuditTrail
from ..batch.runner import CaseResult
from ..core.console import epilog
from ..core.errors import UsageError, printable
from ..core.logfmt import log_line
from ..io.cases import Case
from ..service.watch_folder import FolderWatcher
from ..service.work_queue import WorkItem
from .failures import Warnings
from .masks import find
from .models import introduce, open_models, plans_by_model
from .options import (
    add_audit,
    add_engine,
    add_reading,
    add_results,
)


def add(commands: Any) -> None:
    """Add `watch` to the command line.

    Args:
        commands: What argparse's `add_subparsers` returned.
    """
    watch = commands.add_parser(
        "watch",
        epilog=epilog(
            "mask2ct watch INBOX --model MODEL --output OUT",
            "mask2ct watch INBOX --model MODEL --output OUT --format dicom --once",
        ),
    )
    watch.set_defaults(command=_watch)
    watch.add_argument(
        "inbox",
        type=Path,
        metavar="INBOX",
        help=(
            "the folder to watch for masks, zips and folders of masks; each is moved to its done/"
            " or failed/ afterwards"
        ),
    )
    add_engine(watch)
    add_results(watch)
    add_reading(watch)
    group = watch.add_argument_group("watching")
    group.add_argument(
        "--poll",
        type=_seconds,
        default=2.0,
        metavar="SECONDS",
        help="look into the folder this often (default: %(default)s)",
    )
    group.add_argument(
        "--stable",
        type=_seconds,
        default=5.0,
        metavar="SECONDS",
        help="take a mask when it has not changed for this long (default: %(default)s)",
    )
    group.add_argument(
        "--once", action="store_true", help="end when no complete mask is left in the folder"
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
        folder_watcher = FolderWatcher(
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
                folder_watcher.run(poll=options.poll, once=options.once)
            finally:
                log.say(f"{log.done} done, {log.failed} failed → {options.output}")
    if log.print_error is not None:
        raise log.print_error
    return 1 if log.failed else 0


def _audit_file(options: argparse.Namespace) -> Path:
    """Return the path of the audit file; raise `UsageError` for one in the watched folder."""
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
    """Prints a line for each item and each result, without a word about a patient."""

    def __init__(self, *, several: bool, quiet: bool):
        self._several, self._quiet = several, quiet
        self.done = self.failed = 0
        self.print_error: OSError | None = None
        self._waiting_printed = False
        self._warnings = Warnings()

    def say(self, text: str) -> None:
        """Print a line, unless the command is quiet."""
        if self._quiet:
            return
        try:
            print(printable(text), flush=True)
        except BrokenPipeError:  # nobody reads the output
            pass
        except OSError as exc:
            # The masks are more urgent than the log: the exit code reports this at the end.
            self.print_error = exc

    def chosen(self, case: Case, model: str, reason: str) -> None:
        """Print the model of a case, where there are several models."""
        if self._several:
            self.say(f"{case.display_name.name}: {model} ({reason})")

    def result_ready(self, result: CaseResult) -> None:
        """Print the warnings of a result."""
        for warning in result.warnings:
            self._warnings.add(warning)

    def settled(self, work_item: WorkItem, place: Path) -> None:
        """Print the errors of an item, and the folder that it was moved to."""
        self._waiting_printed = False
        self._warnings.close()
        for reason in work_item.reasons:
            print(f"error: {reason}", file=sys.stderr, flush=True)
        self.failed += bool(work_item.reasons)
        self.done += not work_item.reasons
        self.say(f"{work_item.display_name}: {place.parent.name}")

    def waiting(self) -> None:
        """Print once that another run holds the output folder."""
        if not self._waiting_printed:
            self.say("another run is writing into the output folder: waiting for it")
        self._waiting_printed = True


def _seconds(text: str) -> float:
    """Parse a number of seconds."""
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
