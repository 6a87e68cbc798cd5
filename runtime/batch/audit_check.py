"""Check of audit files: follows the chain from line to line, and counts what the lines state."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.append_log import MAX_LINE
from ..core.atomic_files import open_input
from ..core.errors import InputError, UsageError, printable, quantity, reading
from ..core.logfmt import printable_line
from .audit_log import ACTIONS, NO_LINE, SCHEMA

LONGEST_LINE = MAX_LINE  # bytes


class BrokenChain(InputError):
    """A line of an audit file was altered, or a line before it is missing."""


@dataclass
class AuditSummary:
    """What one or several audit files state.

    Attributes:
        lines: number of complete lines.
        first_time: of the first line, UTC.
        last_time: of the last line, UTC.
        last: SHA-256 of the last complete line.
        continues: SHA-256 of the last line of the file before the first one; empty where the chain
            begins.
        torn: bytes after the last complete line, of a line that was cut short.
        torn_before: number of lines that were cut short and that other lines follow.
        processes: random names of the processes that wrote.
        actions: number of lines of each action.
        models: number of results of each model: its name, SHA-256 of its manifest and of its file.
    """

    lines: int = 0
    first_time: str = ""
    last_time: str = ""
    last: str = NO_LINE
    continues: str = ""
    torn: int = 0
    torn_before: int = 0
    processes: set[str] = field(default_factory=set)
    actions: Counter[str] = field(default_factory=Counter)
    models: Counter[tuple[str, ...]] = field(default_factory=Counter)

    def __str__(self) -> str:
        rows = [
            ("lines", f"{self.lines}, {self.first_time} … {self.last_time}"),
            ("starts", f"{len(self.processes)}"),
            *((action, f"{self.actions[action]}") for action in ACTIONS if self.actions[action]),
        ]
        for (name, manifest, file), count in self.models.items():
            rows.append(
                ("made by", f"{name}, manifest {manifest}, model file {file or 'none'}: {count}")
            )
        if self.continues:
            rows.append(("continues", f"a file whose last line has the SHA-256 {self.continues}"))
        if self.torn_before:
            torn_lines = quantity(self.torn_before, "line")
            cause = "that a crash or a full disk cut short, each stated by the next line"
            rows.append(("torn", f"{torn_lines} {cause}"))
        if self.torn:
            torn_bytes = quantity(self.torn, "byte")
            cause = "at the end: a crash or a full disk cut the last line short"
            rows.append(("torn", f"{torn_bytes} {cause}"))
        rows.append(("last line", f"SHA-256 {self.last}"))
        # anyone may have written into the file: its text must not control a terminal
        return "\n".join(f"{key:<15} {printable_line(text)}" for key, text in rows)


def check_audit(files: Sequence[Path], holds: str = "") -> AuditSummary:
    """Follow the chain through audit files.

    Args:
        files: one file, or a rotated one and those that followed it, the oldest first.
        holds: SHA-256, as 64 hexadecimal digits, of a line that was noted elsewhere and that must
            be in the files; empty for none.

    Returns:
        What the files state.

    Raises:
        BrokenChain: if the chain breaks, with the number of that line, and if no line has the
            SHA-256 that `holds` states.
        UsageError: if a file cannot be read.
    """
    chain = _Chain()
    for file in files:
        with reading(file, "an audit file of mask2ct", UsageError):
            chain.follow(file)
    if holds and holds.lower() not in chain.digests:
        raise BrokenChain(
            f"no line has the SHA-256 {printable(holds)[:64]}",
            expected="the line that was noted",
            remedy="lines were cut off or written anew: compare with a backup",
            file=files[-1],
        )
    return chain.finish()


@dataclass(frozen=True)
class _Unread:
    """A line that is not one of this format: torn, as the next line must state, or altered."""

    file: Path
    number: int
    # bytes, without the newline
    length: int
    # whether its newline is missing
    is_tail: bool


class _Chain:
    """The state of the check between two lines."""

    def __init__(self) -> None:
        self.digests: set[str] = set()
        self._summary = AuditSummary()
        # SHA-256 of the line before; empty before the first one
        self._previous = ""
        self._unread: _Unread | None = None

    def follow(self, file: Path) -> None:
        """Check the next file; raise `BrokenChain` at the line that breaks the chain."""
        with open_input(file) as handle:
            for number, line in enumerate(iter(lambda: handle.readline(LONGEST_LINE), b""), 1):
                content = line.removesuffix(b"\n")
                facts = _facts(content) if line.endswith(b"\n") else None
                digest = hashlib.sha256(content).hexdigest()
                if facts is not None:
                    self._link(file, number, facts)
                    self._count(facts, digest)
                elif self._unread is not None:
                    raise _altered(self._unread)
                else:
                    self._unread = _Unread(file, number, len(content), content is line)
                self._previous = digest
                self.digests.add(digest)

    def finish(self) -> AuditSummary:
        """Check that nothing but a torn line is at the end, and return the summary."""
        if self._unread is not None:
            if not self._unread.is_tail:
                raise _altered(self._unread)
            self._summary.torn = self._unread.length
        return self._summary

    def _link(self, file: Path, number: int, facts: Mapping[str, Any]) -> None:
        """Check a line against the line before it."""
        if self._unread is not None:
            if facts.get("torn") != self._unread.length:
                raise _altered(self._unread)
            self._unread = None
        self._summary.torn_before += "torn" in facts
        if not self._previous and "begins" not in facts:
            raise _broken(file, number, "lines before it are missing")
        if number > 1 and "begins" in facts:
            raise _broken(file, number, "it begins a file, but other lines precede it")
        if not self._previous:
            self._summary.continues = facts["previous"].strip("0") and facts["previous"]
        elif facts["previous"] != self._previous:
            raise _broken(
                file, number, "the line before it was altered, or lines before it are missing"
            )

    def _count(self, facts: Mapping[str, Any], digest: str) -> None:
        """Add a line to the summary."""
        summary, action = self._summary, str(facts["action"])
        summary.lines += 1
        summary.first_time = summary.first_time or str(facts["time"])
        summary.last_time, summary.last = str(facts["time"]), digest
        summary.processes.add(str(facts["process"]))
        summary.actions[action] += 1
        if action == "synthesized":
            model = tuple(
                str(facts.get(key, "")) for key in ("model_name", "manifest_sha256", "model_sha256")
            )
            summary.models[model] += 1


def _facts(line: bytes) -> dict[str, Any] | None:
    """Return the fields of a line, or None if it is not of this format."""
    try:
        facts = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        return None
    has_fields = facts.get("action") in ACTIONS and {"time", "process"} <= {*facts}
    return facts if has_fields and isinstance(facts.get("previous"), str) else None


def _altered(line: _Unread) -> BrokenChain:
    """Return the error for a line that was not written like this."""
    return _broken(
        line.file,
        line.number,
        "it is not a line of this format, and the next line does not state that it is torn",
    )


def _broken(file: Path, number: int, why: str) -> BrokenChain:
    """Return the error for a line that breaks the chain."""
    return BrokenChain(
        f"line {number} breaks the chain: {why}",
        expected="each line with the SHA-256 of the line before it",
        remedy="compare with a backup, and find out who wrote to the file",
        file=file,
    )
