"""The audit file: which model made which result from which mask.

It has one JSON object a line, and each line states the SHA-256 of the line before:

    {"schema": 1, "time": "…Z", "process": "…", "action": "synthesized", …, "previous": "<SHA-256>"}

Lines are appended and never rewritten. `docs/reference/audit.md` states the fields;
`mask2ct audit FILE` verifies the chain. The file holds no text of a DICOM source: it calls cases
and studies by digests.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.append_log import MAX_LINE, AppendLog, append, last_line, line_of
from ..core.atomic_files import key_of, lock, open_flags
from ..core.errors import OutputError, writing
from ..io.dicom.files import pseudonym
from ..io.volume_files import SUFFIXES

if TYPE_CHECKING:
    from .runner import CaseResult
    from .summary import Maker

AUDIT = ".mask2ct.audit.jsonl"
SCHEMA = 1
# `previous` of the first line of a chain
NO_LINE = "0" * 64
ACTIONS = (
    "started",
    "stopped",
    "model loaded",
    "model switched",
    "received",
    "synthesized",
    "skipped",
    "failed",
    "delivered",
)
# log rotation compresses a file to one of these; such a file is not read
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

Facts = dict[str, Any]


class AuditFile:
    """Appends lines to an audit file; safe to use from several threads and several processes.

    It opens the file for each line. So an operator rotates it by renaming it within its folder: the
    next line begins a new file, and states the SHA-256 of the last line of the renamed file.

    Attributes:
        path: of the file.
        process: a random name of this process.
    """

    def __init__(self, path: Path):
        self.path = path
        self.process = os.urandom(8).hex()
        # SHA-256 of the last line of this process, in case that the renamed file is gone
        self._last = NO_LINE
        self._thread = threading.Lock()

    def add(self, action: str, **facts: object) -> None:
        """Append one line, and return when it is on the disk.

        Args:
            action: one of `ACTIONS`.
            facts: further fields, as JSON takes them.

        Raises:
            OutputError: if the file cannot be written, or is a link or a device.
        """
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: Facts = {"schema": SCHEMA, "time": now, "process": self.process, "action": action}
        with self._thread, writing(self.path):
            log = AppendLog(self.path, "the audit file", "--audit", mode=0o600)
            handle = log.open(_wait_for_lock)
            try:
                self._append(handle, {**line, **facts})
            finally:
                os.close(handle)

    def _append(self, handle: int, line: Facts) -> None:
        """Append a line that states the SHA-256 of the line before."""
        before, is_torn = last_line(handle)
        if not before:
            before, is_torn = self._rotated()
            line["begins"] = "after rotation" if before or self._last != NO_LINE else "a chain"
        if is_torn:
            # a crash or a full disk cut the line before short: its bytes
            line["torn"] = len(before)
        line["previous"] = _sha256(before) if before else self._last
        content = line_of(line, checksum=False)
        append(handle, content)
        self._last = _sha256(content.removesuffix(b"\n"))

    def models(self) -> dict[str, Facts]:
        """Return the last "model loaded" or "model switched" line of each model, by its name."""
        models: dict[str, Facts] = {}
        for path in [*reversed(_renamed(self.path)), self.path]:
            with suppress(OSError), open(path, "rb") as file:
                for line in iter(lambda: file.readline(MAX_LINE), b""):
                    if b'"model loaded"' in line or b'"model switched"' in line:
                        with suppress(ValueError, KeyError, TypeError, RecursionError):
                            facts = json.loads(line)
                            models[str(facts["model"])] = facts
        return models

    def _rotated(self) -> tuple[bytes, bool]:
        """Return `last_line` of the file that was renamed last; empty without one."""
        for path in _renamed(self.path)[:1]:
            with suppress(OSError):
                handle = os.open(path, open_flags(os.O_RDWR))
                try:
                    # a process that opened it before it was renamed may still add a line
                    _wait_for_lock(handle)
                    return last_line(handle)
                finally:
                    os.close(handle)
        return b"", False


class AuditTrail:
    """Reports one run of a command: each result to a log, all actions to the audit file.

    Use it as a context manager: it writes `started` and `stopped`.

    Args:
        path: of the audit file; None for none.
        command: the name of the command.
        log: is called with the action and the facts of each result.
    """

    def __init__(
        self, path: Path | None, command: str, log: Callable[[str, Facts], None] | None = None
    ):
        self._file = None if path is None else AuditFile(path)
        self._command, self._log = command, log
        self._models: dict[str, Facts] = {}

    def __enter__(self) -> AuditTrail:
        from ..core.version import VERSION

        self.add("started", command=self._command, version=VERSION)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        reason = "done" if kind is None else kind.__name__
        # the error that ended the command must reach the user, and not this one
        with suppress(OutputError):
            self.add("stopped", command=self._command, reason=reason)

    def add(self, action: str, **facts: object) -> None:
        """Append a line to the audit file, if there is one.

        Args:
            action: one of `ACTIONS`.
            facts: further fields, as JSON takes them.

        Raises:
            OutputError: as `AuditFile.add` does.
        """
        if self._file is not None:
            self._file.add(action, **facts)

    def load(self, models: Mapping[str, Maker]) -> None:
        """Note which models are open.

        A model is noted as switched if the file's last line about that name has other digests.

        Args:
            models: what makes the CTs, by name.

        Raises:
            OutputError: if the audit file cannot be written.
        """
        digests = ("manifest_sha256", "model_sha256")
        last_lines = {} if self._file is None else self._file.models()
        for name, synth in models.items():
            facts = self._models[name] = model_facts(name, synth)
            if synth.manifest.derived:
                # a method, and not a model
                continue
            before = last_lines.get(name)
            if before is None or all(before.get(key) == facts[key] for key in digests):
                self.add("model loaded", **facts)
            else:
                old = {f"before_{key}": before.get(key) for key in digests}
                self.add("model switched", **facts, **old)

    def result(self, result: CaseResult, model: str, seed: int, **facts: object) -> None:
        """Note one result, first in the audit file, then in the log.

        Args:
            result: of one mask in one variant.
            model: the model's name, as `load` got it; empty where no model fits the mask.
            seed: of all randomness.
            facts: further fields, such as the study.

        Raises:
            OutputError: if the audit file cannot be written.
        """
        action = (
            "failed" if result.error is not None else "skipped" if result.skipped else "synthesized"
        )
        line = {**facts, **result_facts(result, seed), **self._models.get(model, {"model": model})}
        self.add(action, **line)
        if self._log is not None:
            # a series has one for each slice
            del line["files"]
            seconds = {f"{stage}_s": value for stage, value in line.pop("seconds").items()}
            stated = {key: value for key, value in line.items() if value not in (None, "")}
            self._log(action, {**stated, **seconds})


def model_facts(name: str, synth: Maker) -> Facts:
    """Return what identifies an open model.

    Args:
        name: what the run calls it.
        synth: the open model.

    Returns:
        Its names, the SHA-256 of its manifest and of the file that runs, engine and precision.
    """
    file = synth.manifest.files.get(synth.file)
    return {
        "model": name,
        "model_name": synth.manifest.name,
        "manifest_sha256": synth.manifest_sha256,
        "model_file": synth.file,
        "model_sha256": "" if file is None else file.sha256,
        "engine": synth.engine,
        "precision": "" if file is None else file.precision,
    }


def result_facts(result: CaseResult, seed: int) -> Facts:
    """Return all that a line states of a result but its model.

    Args:
        result: of one mask in one variant.
        seed: of all randomness.

    Returns:
        Fields of a line (docs/reference/audit.md). `files` has the SHA-256 of each file by its
        path in the output folder. `file_list_sha256` is the digest of that list, and not of a
        file: one value for a series of a thousand slices. Older lines call it `output_sha256`.
    """
    return {
        "case": _case_name(result),
        "mask_sha256": result.mask_sha256,
        **({"image_sha256": result.image_sha256} if result.image_sha256 else {}),
        "seed": seed,
        "variant": result.variant,
        "slices": result.slices,
        "warnings": len(result.warnings),
        # without the message, which may quote the mask
        "error": "" if result.error is None else type(result.error).__name__,
        "seconds": {stage: round(value, 3) for stage, value in result.seconds.items()},
        "files": dict(result.sha256),
        "file_list_sha256": key_of(result.sha256) if result.sha256 else "",
    }


def _case_name(result: CaseResult) -> str:
    """Return the case's name, or a digest of it if the name may be a patient's.

    It may be for a file that is neither a volume nor a DICOM source.
    """
    is_dicom = result.mask == Path(result.case)
    is_volume = result.mask.name.lower().endswith(SUFFIXES)
    if is_dicom or is_volume or result.error is None:
        return result.case
    return pseudonym("item", result.mask.name)


def _renamed(path: Path) -> list[Path]:
    """Return the rotated files of a path (NAME.1, NAME-20261130), the newest first."""
    name = _escape(path.name)
    candidates = [file for mark in (".", "-") for file in path.parent.glob(f"{name}{mark}*")]
    files = [
        file
        for file in candidates
        if file.is_file() and not file.is_symlink() and file.suffix not in COMPRESSED
    ]
    return sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name), reverse=True)


def _escape(name: str) -> str:
    """Return a glob pattern that matches this name alone."""
    from glob import escape

    return escape(name)


def _wait_for_lock(handle: int) -> None:
    """Lock a file that another process may hold, for the moment in which it appends a line."""
    while not lock(handle):
        time.sleep(0.01)


def _sha256(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
