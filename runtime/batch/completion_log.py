"""The journal of an output folder: which results are complete.

`--resume` proves by it what need not be made again. It is an append log (`runtime.core.append_log`)
with one line per result, appended after the result's files: the key of all that determined the
bytes, and the SHA-256 of the files.

The journal is locked while a run writes, so that no other run writes into the folder. The kernel
releases the lock when the process ends, however it ends. Why this is not SQLite:
docs/decisions/0019.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..core.append_log import AppendLog, append, line_of
from ..core.atomic_files import digest_of, lock
from ..core.errors import FolderBusy, OutputError, writing

JOURNAL = ".mask2ct.journal"


@dataclass(frozen=True)
class Entry:
    """One completed result.

    Attributes:
        result: its name.
        key: SHA-256 of all that its bytes depend on.
        files: SHA-256 of each file or folder, by its path within the output folder.
        slices: number of axial slices.
        warnings: what a person should be told.
        mask: SHA-256 of the mask's files alone; empty where an older mask2ct wrote the entry.
    """

    result: str
    key: str
    files: Mapping[str, str]
    slices: int
    warnings: tuple[str, ...] = ()
    mask: str = ""


class CompletionIndex:
    """What is complete in an output folder, in memory.

    A process that does not hold the folder's lock, such as a worker, uses one.

    Attributes:
        entries: by name of the result.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Entry] | None = None):
        self._folder, self.entries = folder, dict(entries or {})

    def find_complete(self, result: str, key: str) -> Entry | None:
        """Return the entry of a result, if it is still complete.

        Args:
            result: its name.
            key: SHA-256 of all that its bytes depend on now.

        Returns:
            The entry if it was made from that key and its files still have the SHA-256 that they
            were written with, else None.
        """
        entry = self.entries.get(result)
        if entry is None or entry.key != key:
            return None
        try:
            is_complete = all(
                digest_of(self._folder / name) == digest for name, digest in entry.files.items()
            )
        except OSError:
            return None
        return entry if is_complete else None

    def belongs_to_other_mask(self, result: str, mask: str) -> bool:
        """Whether the folder holds files of a result that were made of another mask.

        Args:
            result: its name.
            mask: SHA-256 of the mask's files.

        Returns:
            True if one of its files exists and its entry has another digest.
        """
        entry = self.entries.get(result)
        return (
            entry is not None
            and entry.mask != mask
            and any((self._folder / name).exists() for name in entry.files)
        )

    def add(self, entry: Entry) -> None:
        """Note a completed result.

        Args:
            entry: of the result; it replaces an earlier one.
        """
        self.entries[entry.result] = entry


class Journal(CompletionIndex):
    """The journal of one output folder, open and locked by this process.

    Raises:
        FolderBusy: if another run writes into the folder.
        OutputError: if the file cannot be written or locked.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        log = _log(folder)
        self._path = log.path
        with writing(self._path):
            self._handle = log.open(lambda handle: _lock(handle, self._path))
            self.entries = {entry.result: entry for entry in _entries(log, self._handle)}

    def add(self, entry: Entry) -> None:
        """Append an entry, and return when it is on the disk.

        Args:
            entry: of a result whose files are on the disk.

        Raises:
            OutputError: if the journal cannot be written.
        """
        with writing(self._path):
            append(self._handle, line_of(asdict(entry)))
        super().add(entry)

    def close(self) -> None:
        """Release the lock, and remove a journal without entries."""
        if self._handle < 0:
            return
        if not self.entries:
            self._path.unlink(missing_ok=True)
        # before the descriptor is closed: after Ctrl-C in between it must not be closed again
        handle, self._handle = self._handle, -1
        os.close(handle)


def names_in(folder: Path) -> frozenset[str]:
    """Return the paths that a folder's journal states, whoever wrote them.

    Args:
        folder: an output folder.

    Returns:
        Paths below the folder; none if the journal cannot be read.
    """
    try:
        return frozenset(name for entry in _entries(_log(folder)) for name in entry.files)
    except OSError:
        return frozenset()


def _log(folder: Path) -> AppendLog:
    return AppendLog(folder / JOURNAL, "the journal of the output folder", "--output")


def _entries(log: AppendLog, handle: int | None = None) -> list[Entry]:
    return [entry for facts in log.read(handle) if (entry := _entry(facts)) is not None]


def _entry(facts: Mapping[str, Any]) -> Entry | None:
    """Return the entry that a line states, or None for a line that we do not write.

    A checksum only shows that the line is intact, and not who wrote it.
    """
    try:
        entry = Entry(
            facts["result"],
            facts["key"],
            facts["files"],
            facts["slices"],
            tuple(facts["warnings"]),
            facts.get("mask", ""),
        )
    except (KeyError, TypeError):
        return None
    texts = [entry.result, entry.key, entry.mask, *entry.warnings]
    if not isinstance(entry.files, dict) or type(entry.slices) is not int or entry.slices < 0:
        return None
    texts += [*entry.files, *entry.files.values()]
    if not entry.files or not all(isinstance(text, str) for text in texts):
        return None
    return entry if all(map(_is_below_folder, entry.files)) else None


def _is_below_folder(name: str) -> bool:
    """Whether a path stays below the output folder."""
    path = PurePosixPath(name)
    leads_outside = path.is_absolute() or ".." in path.parts
    return bool(path.parts) and not leads_outside and "\0" not in name


def _lock(handle: int, path: Path) -> None:
    """Lock the file for this process.

    Raises:
        FolderBusy: if another process has the lock.
        OutputError: if the file system has no locks.
    """
    try:
        locked = lock(handle)
    except OSError as exc:
        raise OutputError(
            "the output folder's file system has no locks",
            expected="a file system on which a file can be locked",
            remedy="write to another disk",
            file=path,
        ) from exc
    if not locked:
        raise FolderBusy(
            "another run is writing into this folder",
            expected="one run per output folder",
            remedy="wait for it, or choose another --output",
            file=path.parent,
        )
