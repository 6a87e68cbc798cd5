"""Whether an audit file is whole: its chain is followed from line to line, and what it tells is
counted.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.atomic_files import open_input
from ..core.errors import InputError, UsageError, printable, quantity, reading
from ..core.logfmt import printable_line
from .audit_log import ACTIONS, NO_LINE, SCHEMA

LONGEST_LINE = 64 << 20  # bytes: a series of 5,000 slices needs 0.7 MB


class BrokenChain(InputError):
    """A line of an audit file is not the one that was written there, or one is missing before
    it.
    """


@dataclass
class AuditSummary:
    """What one or several audit files tell.

    `last`: SHA-256 of the last whole line; `torn`: bytes of what follows it.
    """

    lines: int = 0
    first_time: str = ""  # UTC
    last_time: str = ""
    last: str = NO_LINE
    continues: str = ""  # SHA-256 of the last line of a file that was not given
    torn: int = 0
    torn_before: int = 0  # torn lines that others follow
    processes: set[str] = field(default_factory=set)
    actions: Counter[str] = field(default_factory=Counter)
    models: Counter[tuple[str, ...]] = field(
        default_factory=Counter
    )  # name, SHA-256 of manifest and file

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
            rows.append(
                (
                    "torn",
                    (
                        f"{quantity(self.torn_before, 'line')} that a crash or a full disk cut"
                        " short, each told by the next"
                    ),
                )
            )
        if self.torn:
            rows.append(
                (
                    "torn",
                    (
                        f"{quantity(self.torn, 'byte')} at the end: a crash or a full disk cut the"
                        " last line short"
                    ),
                )
            )
        rows.append(("last line", f"SHA-256 {self.last}"))
        # what the file holds may be anyone's: nothing of it may steer a terminal
        return "\n".join(f"{key:<15} {printable_line(text)}" for key, text in rows)


def check_audit(files: Sequence[Path], holds: str = "") -> AuditSummary:
    """Follow the chain through audit files.

    Args:
        files: one file, or a rotated one and those that followed it, the oldest first.
        holds: SHA-256, as 64 hexadecimal digits, of a line that was noted elsewhere and must be there; empty for none.

    Raises:
        BrokenChain: names the line at which the chain breaks, and for `holds` that no such line is there.
        UsageError: for a file that cannot be read.
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
    """A line that is no JSON object: torn, as the next line must say, or altered."""

    file: Path
    number: int
    length: int  # bytes, without the newline
    is_tail: bool  # whether its newline is missing


class _Chain:
    def __init__(self) -> None:
        self.digests: set[str] = set()
        self._summary = AuditSummary()
        self._previous = ""  # SHA-256 of the line before; empty before the first one
        self._unread: _Unread | None = None

    def follow(self, file: Path) -> None:
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
        if self._unread is not None:
            if not self._unread.is_tail:
                raise _altered(self._unread)
            self._summary.torn = self._unread.length
        return self._summary

    def _link(self, file: Path, number: int, facts: Mapping[str, Any]) -> None:
        """Hold a line against the one before it."""
        if self._unread is not None:
            if facts.get("torn") != self._unread.length:
                raise _altered(self._unread)
            self._unread = None
        self._summary.torn_before += "torn" in facts
        if not self._previous and "begins" not in facts:
            raise _broken(file, number, "lines before it are missing")
        if number > 1 and "begins" in facts:
            raise _broken(file, number, "it begins a file, but lines stand before it")
        if not self._previous:
            self._summary.continues = facts["previous"].strip("0") and facts["previous"]
        elif facts["previous"] != self._previous:
            raise _broken(
                file, number, "the line before it was altered, or lines before it are missing"
            )

    def _count(self, facts: Mapping[str, Any], digest: str) -> None:
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
    """What a line holds, or None for one that is none of this format."""
    try:
        facts = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_whole = (
        isinstance(facts, dict) and facts.get("schema") == SCHEMA and facts.get("action") in ACTIONS
    )
    return (
        facts
        if is_whole and isinstance(facts.get("previous"), str) and {"time", "process"} <= {*facts}
        else None
    )


def _altered(line: _Unread) -> BrokenChain:
    return _broken(
        line.file,
        line.number,
        "it is no line of this format, and the next does not say that it is torn",
    )


def _broken(file: Path, number: int, why: str) -> BrokenChain:
    return BrokenChain(
        f"line {number} breaks the chain: {why}",
        expected="each line with the SHA-256 of the line before it",
        remedy="compare with a backup, and find out who wrote to the file",
        file=file,
    )
