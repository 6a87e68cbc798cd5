"""The audit file: which model made what of which mask, one JSON object a line, each chained to the
line before it.

    {"schema": 1, "time": "…Z", "process": "…", "action": "synthesized", …, "previous": "<SHA-256 of the line before>"}

Lines are appended and never rewritten. `docs/reference/audit.md` states the fields; `mask2ct audit FILE`
verifies the chain. No word of a DICOM source is in it: cases and studies are called by digests.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.append_log import append, last_line
from ..core.atomic_files import key_of, lock, sync_folder
from ..core.errors import OutputError, writing
from ..io.dicom.files import pseudonym
from ..io.volume_files import SUFFIXES

if TYPE_CHECKING:
    from .runner import CaseResult
    from .summary import Maker

AUDIT = ".mask2ct.audit.jsonl"
SCHEMA = 1
NO_LINE = "0" * 64  # `previous` of the first line of a chain
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
COMPRESSED = (
    ".gz",
    ".bz2",
    ".xz",
    ".zst",
)  # what log rotation makes of a file that is no longer read

Facts = dict[str, Any]


class AuditFile:
    """Appends lines to an audit file; safe to use from several threads and several processes.

    The file is opened for each line. So an operator rotates it by renaming it within its folder:
    the next line begins a new file, and names the SHA-256 of the last line of the file that was
    renamed.
    """

    def __init__(self, path: Path):
        self.path = path
        self.process = os.urandom(8).hex()
        self._last = (
            NO_LINE  # SHA-256 of the last line of this process, should the renamed file be gone
        )
        self._thread = threading.Lock()

    def add(self, action: str, **facts: object) -> None:
        """Append one line, and return when it is on the disk.

        Args:
            action: one of `ACTIONS`.
            facts: further fields, as JSON takes them.

        Raises:
            OutputError: for a file that cannot be written, or is a link or a device.
        """
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        with self._thread, writing(self.path), self._opened() as handle:
            before, is_torn = last_line(handle)
            line: Facts = {
                "schema": SCHEMA,
                "time": now,
                "process": self.process,
                "action": action,
                **facts,
            }
            end = b"\n" if is_torn else b""
            if not before:
                before, is_torn = self._rotated()
                line["begins"] = "after rotation" if before or self._last != NO_LINE else "a chain"
            if is_torn:
                line["torn"] = len(
                    before
                )  # bytes of the line before, which a crash or a full disk cut short
            line["previous"] = _sha256(before) if before else self._last
            content = json.dumps(line).encode()
            append(handle, end + content + b"\n")
            self._last = _sha256(content)

    def models(self) -> dict[str, Facts]:
        """The last "model loaded" or "model switched" line of each model, by the model's name."""
        models: dict[str, Facts] = {}
        for path in [*reversed(_renamed(self.path)), self.path]:
            with suppress(OSError), open(path, "rb") as file:
                for line in file:
                    if b'"model loaded"' in line or b'"model switched"' in line:
                        with suppress(ValueError, KeyError, TypeError, RecursionError):
                            facts = json.loads(line)
                            models[str(facts["model"])] = facts
        return models

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """The file that has the path now, locked."""
        while True:
            known = os.path.lexists(self.path)
            if known and not stat.S_ISREG(os.lstat(self.path).st_mode):
                raise OutputError(
                    "the audit file is a link or no regular file",
                    expected="a regular file, or none",
                    remedy="choose another --audit, or take that away",
                    file=self.path,
                )
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
            handle = os.open(self.path, flags, 0o600)
            try:
                _wait_for_lock(handle)
                if self._is_current(handle):
                    if not known:
                        sync_folder(self.path.parent)
                    yield handle
                    return
            finally:
                os.close(handle)

    def _is_current(self, handle: int) -> bool:
        """Whether the file was not renamed between being opened and being locked."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(handle), os.stat(self.path))
        return False

    def _rotated(self) -> tuple[bytes, bool]:
        """`last_line` of the file that was renamed last; empty without one."""
        for path in _renamed(self.path)[:1]:
            with suppress(OSError):
                handle = os.open(path, os.O_RDWR)
                try:
                    _wait_for_lock(
                        handle
                    )  # who opened it before it was renamed may still add a line
                    return last_line(handle)
                finally:
                    os.close(handle)
        return b"", False


class AuditTrail:
    """What one run of a command tells of itself: each result to its log, all actions to the audit
    file where there is one.

    Use as a context manager: it writes `started` and `stopped`.
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
        with suppress(OutputError):  # the error that ended the command is the one to be told
            self.add(
                "stopped", command=self._command, reason="done" if kind is None else kind.__name__
            )

    def add(self, action: str, **facts: object) -> None:
        """Append a line to the audit file, if there is one. Raises `OutputError`."""
        if self._file is not None:
            self._file.add(action, **facts)

    def load(self, models: Mapping[str, Maker]) -> None:
        """Note which models are open: as switched where the file's last line about one of that
        name had other digests.
        """
        known = {} if self._file is None else self._file.models()
        for name, synth in models.items():
            facts = self._models[name] = model_facts(name, synth)
            if synth.manifest.derived:  # a method, and no model
                continue
            before = known.get(name)
            if before is None or all(
                before.get(key) == facts[key] for key in ("manifest_sha256", "model_sha256")
            ):
                self.add("model loaded", **facts)
            else:
                old = {
                    f"before_{key}": before.get(key) for key in ("manifest_sha256", "model_sha256")
                }
                self.add("model switched", **facts, **old)

    def result(self, result: CaseResult, model: str, seed: int, **facts: object) -> None:
        """Note what became of one mask in one variant, first in the audit file, then in the log.

        Args:
            result: what the run says of it.
            model: name of the model as `load` was given it; empty where none fits the mask.
            seed: of all randomness.
            facts: further fields, such as the study.

        Raises:
            OutputError: where the audit file cannot be written.
        """
        action = (
            "failed" if result.error is not None else "skipped" if result.skipped else "synthesized"
        )
        line = {**facts, **result_facts(result, seed), **self._models.get(model, {"model": model})}
        self.add(action, **line)
        if self._log is not None:
            del line["files"]  # of a series one for each slice
            seconds = {f"{stage}_s": value for stage, value in line.pop("seconds").items()}
            known = {key: value for key, value in line.items() if value not in (None, "")}
            self._log(action, {**known, **seconds})


def model_facts(name: str, synth: Maker) -> Facts:
    """What identifies an open model: its names, the SHA-256 of its manifest and of the file that
    runs, engine and precision.
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
    """What there is to say of a result but its model.

    `files`: path in the output folder → SHA-256. `file_list_sha256`: of that list, not of a file;
    one value for a series of a thousand slices. Lines written before it had this name call it
    `output_sha256`.
    """
    return {
        "case": _case_name(result),
        "mask_sha256": result.mask_sha256,
        **({"image_sha256": result.image_sha256} if result.image_sha256 else {}),
        "seed": seed,
        "variant": result.variant,
        "slices": result.slices,
        "warnings": len(result.warnings),
        "error": (
            "" if result.error is None else type(result.error).__name__
        ),  # its words may quote the mask
        "seconds": {stage: round(value, 3) for stage, value in result.seconds.items()},
        "files": dict(result.sha256),
        "file_list_sha256": key_of(result.sha256) if result.sha256 else "",
    }


def _case_name(result: CaseResult) -> str:
    """The case's name; of a file that is no volume, and no DICOM source either, a digest: its
    name may be a patient's.
    """
    known = (
        result.mask == Path(result.case)
        or result.mask.name.lower().endswith(SUFFIXES)
        or result.error is None
    )
    return result.case if known else pseudonym("item", result.mask.name)


def _renamed(path: Path) -> list[Path]:
    """Files beside `path` that log rotation made of it (NAME.1, NAME-20261130), the one that was
    written last first.
    """
    folder = path.parent
    beside = [file for mark in (".", "-") for file in folder.glob(f"{_escape(path.name)}{mark}*")]
    files = [
        file
        for file in beside
        if file.is_file() and not file.is_symlink() and file.suffix not in COMPRESSED
    ]
    return sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name), reverse=True)


def _escape(name: str) -> str:
    from glob import escape

    return escape(name)


def _wait_for_lock(handle: int) -> None:
    while not lock(handle):
        time.sleep(0.01)


def _sha256(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
