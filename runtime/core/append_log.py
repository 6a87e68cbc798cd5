"""An append log: a file to which lines are only added, each on the disk before it counts.

The last byte of the file is its state, and only an accident leaves it torn:

    no file --- open: it is created, and its folder is synced ---> whole

    whole <-----------------------------+    it is empty, or ends with a newline
      |                                 |
      |  append: the line, up to ...    |  ... its newline, then a sync; `append` returns
      v                                 |
    torn -------------------------------+
         killed, power cut, full disk: it stays torn until the next append, which begins with
         a newline. The torn line stays as it is, and readers leave it out.

Who keeps one, and what shows that a line is torn or altered:

    journal of an output folder   batch.completion_log   CRC-32; one owner holds the lock
    delivery log of a study       service.send_queue     CRC-32
    audit file                    batch.audit_log        chain of SHA-256; writers take turns
    metrics and results.jsonl     train                  JSON that does not parse
    history.jsonl                 benchmarks             JSON that does not parse

Files called jsonl are read by people's own tools: their lines are JSON and nothing else.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from .atomic_files import open_flags, open_input, permitted, sync_folder
from .errors import OutputError, writing

BLOCK = 1 << 16  # bytes of one read from the end of a file
# Bytes of a line: a series of 4,096 files takes half a million. A longer line is no line of ours:
# it is damage, such as the hole that a crash of the file system leaves.
MAX_LINE = 16 << 20
CHECKSUM = 8  # hexadecimal digits of a CRC-32


class AppendLog:
    """A log of JSON objects.

    Args:
        path: The file; it need not exist.
        what: The file in words, for errors.
        option: The option that chooses the path, for errors.
        checksums: Whether a CRC-32 precedes each line. Without it, a line is plain JSON.
        mode: Permissions of a new file, before the umask applies.
    """

    def __init__(
        self,
        path: Path,
        what: str = "the log",
        option: str = "path",
        *,
        checksums: bool = True,
        mode: int = 0o666,
    ):
        self.path, self._what, self._option = path, what, option
        self._checksums, self._mode = checksums, mode

    def read(self, handle: int | None = None) -> list[dict[str, Any]]:
        """Read all lines but those that are torn or altered.

        Args:
            handle: The open file, where this process has it locked.

        Returns:
            The objects in the order of the lines; none where there is no file.

        Raises:
            OSError: When the file cannot be read.
        """
        try:
            with (
                open_input(self.path)
                if handle is None
                else open(handle, "rb", closefd=False) as file
            ):
                return [*facts_in(file, checksums=self._checksums)]
        except FileNotFoundError:
            return []

    def add(self, *lines: Mapping[str, object]) -> None:
        """Append lines, and return when they are on the disk.

        Args:
            lines: Values that JSON can write.

        Raises:
            OutputError: When the file cannot be written, or is not a regular file.
        """
        content = b"".join(line_of(line, checksum=self._checksums) for line in lines)
        with writing(self.path):
            handle = self.open()
            try:
                append(handle, content)
            finally:
                os.close(handle)

    def open(self, lock: Callable[[int], object] = lambda handle: None) -> int:
        """Open the file that has the path, also while others lock, rename or remove it.

        Args:
            lock: Locks the open file, or raises an error.

        Returns:
            A descriptor for `append`.

        Raises:
            OutputError: When the path is a link, a pipe or the like.
            OSError: When the file cannot be opened.
        """
        while True:
            is_new = not os.path.lexists(self.path)
            handle = self._open()
            try:
                lock(handle)
                if os.path.samestat(os.fstat(handle), os.stat(self.path)):
                    if is_new:
                        sync_folder(self.path.parent)
                    return handle
            except FileNotFoundError:
                # its last owner removed or renamed it before it was locked here
                pass
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    def _open(self) -> int:
        """Open a regular file, without waiting for another process."""
        refusal = OutputError(
            f"{self._what} is a link, or not a regular file",
            expected="a file that mask2ct made, or none",
            remedy=f"remove it, or choose another {self._option}",
            file=self.path,
        )
        # by its name first: to open a device may have an effect
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(self.path).st_mode):
                raise refusal
        flags = open_flags(os.O_RDWR | os.O_CREAT | os.O_APPEND)
        safe = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        handle = os.open(self.path, flags | safe, permitted(self._mode))
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise refusal
        return handle


def append(handle: int, lines: bytes) -> None:
    """Append lines and wait until they are on the disk.

    Args:
        handle: Descriptor of a file that is open with O_RDWR and O_APPEND.
        lines: Complete lines, each with its newline.

    Raises:
        OSError: They cannot be written; a part of them may lie at the end of the file.
    """
    size = os.fstat(handle).st_size
    if size:
        os.lseek(handle, size - 1, os.SEEK_SET)
        if os.read(handle, 1) != b"\n":
            lines = b"\n" + lines
    while lines:  # a write may stop early, on a full disk for one
        lines = lines[os.write(handle, lines) :]
    os.fsync(handle)


def last_line(handle: int) -> tuple[bytes, bool]:
    """Read the last line of a file.

    Args:
        handle: Descriptor of a file that is open for reading.

    Returns:
        The line without its newline, empty for an empty file; and whether the line is torn, so that
        its newline is missing.
    """
    start = os.fstat(handle).st_size
    blocks: list[bytes] = []
    # The newline that ends the last line does not begin it.
    while start and len(blocks) * BLOCK < MAX_LINE and b"\n" not in b"".join(blocks[:1])[:-1]:
        length = min(BLOCK, start)
        start -= length
        os.lseek(handle, start, os.SEEK_SET)
        blocks.insert(0, os.read(handle, length))
    tail = b"".join(blocks)
    torn = bool(tail) and not tail.endswith(b"\n")
    return tail.removesuffix(b"\n").rpartition(b"\n")[2], torn


def line_of(facts: Mapping[str, object], *, checksum: bool = True) -> bytes:
    """Return a line for a log.

    Args:
        facts: Values that JSON can write.
        checksum: Whether the line begins with the CRC-32 of its JSON, 8 hexadecimal digits, and a
            blank.

    Raises:
        ValueError: A value is NaN or infinite, which JSON does not have.
    """
    body = json.dumps(facts, allow_nan=False).encode()
    return (b"%08x %s\n" % (zlib.crc32(body), body)) if checksum else body + b"\n"


def facts_in(file: BinaryIO, *, checksums: bool = True) -> Iterator[dict[str, Any]]:
    """Read the lines that `line_of` wrote, in their order.

    Args:
        file: The open file, at its begin.
        checksums: Whether each line begins with one.

    Yields:
        The facts of each line. A torn or altered line, and one longer than `MAX_LINE`, is left out.
    """
    while line := file.readline(MAX_LINE):
        checksum, _, body = line.partition(b" ") if checksums else (b"", b"", line)
        body = body.removesuffix(b"\n")
        try:
            if checksums and (len(checksum) != CHECKSUM or int(checksum, 16) != zlib.crc32(body)):
                continue
            if isinstance(facts := json.loads(body), dict):
                yield facts
        except (ValueError, RecursionError):
            pass
