"""What a run has completed, kept in the output folder, so that `--resume` can prove it and another
process is kept out.

One line per result, appended and synced after its files are: a CRC-32, then JSON with the key of
what determined its bytes and the SHA-256 of its files. A line that a power cut tore is passed over.
The file is locked while a run writes; the kernel lets go of the lock when the process ends, however
it ends. Why not SQLite: docs/decisions/0019.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..core.append_log import append, facts_in, line_of
from ..core.atomic_files import digest_of, lock, permitted, sync_folder
from ..core.errors import FolderBusy, OutputError, writing

JOURNAL = ".mask2ct.journal"


@dataclass(frozen=True)
class Entry:
    """One completed result.

    `key`: SHA-256 of all that its bytes depend on, `mask`: of the mask's files alone, empty where
    an older mask2ct wrote it; `files`: path within the folder → SHA-256.
    """

    result: str
    key: str
    files: Mapping[str, str]
    slices: int
    warnings: tuple[str, ...] = ()
    mask: str = ""


class CompletionIndex:
    """What is complete in an output folder, kept in memory: `entries` by result.

    Who holds none of its locks works with one.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Entry] | None = None):
        self._folder, self.entries = folder, dict(entries or {})

    def find_complete(self, result: str, key: str) -> Entry | None:
        """The entry of `result`, if it was made from `key` and its files still have the SHA-256
        they were written with.
        """
        entry = self.entries.get(result)
        if entry is None or entry.key != key:
            return None
        try:
            return (
                entry
                if all(
                    digest_of(self._folder / name) == digest for name, digest in entry.files.items()
                )
                else None
            )
        except OSError:
            return None

    def belongs_to_other_mask(self, result: str, mask: str) -> bool:
        """Whether files of `result` are there that were made of another mask."""
        entry = self.entries.get(result)
        return (
            entry is not None
            and entry.mask != mask
            and any((self._folder / name).exists() for name in entry.files)
        )

    def add(self, entry: Entry) -> None:
        self.entries[entry.result] = entry


class Journal(CompletionIndex):
    """The journal of one output folder, open and locked by this process.

    Raises `FolderBusy` when another run writes into the folder, `OutputError` when the file cannot
    be written or locked.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._path = folder / JOURNAL
        self._handle = self._open()
        with writing(self._path):
            content = b"".join(iter(lambda: os.read(self._handle, 1 << 20), b""))
            self.entries = {
                entry.result: entry
                for facts in facts_in(content)
                if (entry := _entry(facts)) is not None
            }
            if content and not content.endswith(
                b"\n"
            ):  # torn by a power cut: the next line begins a line
                os.write(self._handle, b"\n")

    def add(self, entry: Entry) -> None:
        """Append, and return when it is on the disk. Raises `OutputError`."""
        line = line_of(asdict(entry))
        with writing(self._path):
            append(self._handle, line)
        super().add(entry)

    def close(self) -> None:
        """Let go of the lock; a journal without any entry goes."""
        if self._handle < 0:
            return
        if not self.entries:
            self._path.unlink(missing_ok=True)
        handle, self._handle = self._handle, -1  # first: Ctrl-C may come in between
        os.close(handle)

    def _open(self) -> int:
        with writing(self._path):
            while True:
                made = not self._path.exists()
                handle = _open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
                try:
                    _lock(handle, self._path)
                    if os.path.samestat(os.fstat(handle), os.stat(self._path)):
                        if made:
                            sync_folder(self._folder)
                        return handle
                except FileNotFoundError:  # its last owner took it away before we had the lock
                    pass
                except BaseException:
                    os.close(handle)
                    raise
                os.close(handle)


def names_in(folder: Path) -> frozenset[str]:
    """What the folder's journal says was written there by anybody, as paths below it; nothing
    where it cannot be read.
    """
    try:
        with open(_open(folder / JOURNAL, os.O_RDONLY), "rb") as handle:
            entries = [_entry(facts) for facts in facts_in(handle.read())]
    except (OSError, OutputError):
        return frozenset()
    return frozenset(name for entry in entries if entry is not None for name in entry.files)


def _open(path: Path, flags: int) -> int:
    """A descriptor of the journal, which is a file of the folder itself: no link leads to another
    one.

    Raises:
        OSError: it cannot be opened.
        OutputError: it is a link, a pipe or the like.
    """
    safe = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    refusal = OutputError(
        "the journal of the output folder is a link or no file",
        expected="a file that mask2ct made, or none",
        remedy="remove it, or choose another --output",
        file=path,
    )
    if path.is_symlink():
        raise refusal
    handle = os.open(path, flags | safe, permitted(0o666))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise refusal
    return handle


def _entry(facts: Mapping[str, Any]) -> Entry | None:
    """The entry that a line states; None where it is none of ours, whatever its checksum says."""
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
    if (
        not entry.files
        or not all(isinstance(text, str) for text in texts)
        or not all(map(_within, entry.files))
    ):
        return None
    return entry


def _within(name: str) -> bool:
    """Whether a path is one below the output folder."""
    path = PurePosixPath(name)
    return (
        bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    )


def _lock(handle: int, path: Path) -> None:
    """Lock the file for this process, or say who cannot."""
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
