"""A file that lines are only ever added to: the journal, the delivery logs and the audit file share
this.

A line is on the disk when `append` returns. A power cut may tear the last line: the next one begins
a line of its own, and what the torn one held is left as it is.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

BLOCK = 1 << 16  # bytes that are read at once from the end of a file


def append(handle: int, line: bytes) -> None:
    """Append one line and wait until it is on the disk.

    Args:
        handle: a file that is open with O_APPEND.
        line: the whole line, with its newline.

    Raises:
        OSError: for one that cannot be written; a part of the line may then lie at the file's end.
    """
    while line:  # a write may be cut short, by a full disk for one
        line = line[os.write(handle, line) :]
    os.fsync(handle)


def last_line(handle: int) -> tuple[bytes, bool]:
    """Read the last line of a file.

    Args:
        handle: a file that is open for reading.

    Returns:
        The line without its newline, empty where the file is; and whether the newline is missing, because the line is torn.
    """
    start = os.fstat(handle).st_size
    tail = b""
    while start and b"\n" not in tail[:-1]:
        length = min(BLOCK, start)
        start -= length
        os.lseek(handle, start, os.SEEK_SET)
        tail = os.read(handle, length) + tail
    torn = bool(tail) and not tail.endswith(b"\n")
    return tail.removesuffix(b"\n").rpartition(b"\n")[2], torn


def line_of(facts: Mapping[str, object]) -> bytes:
    """A line of a journal: the CRC-32 of its JSON, and that."""
    body = json.dumps(facts).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def facts_in(content: bytes) -> Iterator[dict[str, Any]]:
    """What a journal's lines hold, in their order; one that is torn or altered is passed over."""
    for line in content.split(b"\n"):
        checksum, _, body = line.partition(b" ")
        try:
            if int(checksum, 16) == zlib.crc32(body) and isinstance(
                facts := json.loads(body), dict
            ):
                yield facts
        except (ValueError, RecursionError):
            pass
