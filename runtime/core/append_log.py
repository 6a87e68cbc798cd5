"""A log to which lines are only added: the journal, the delivery logs and the audit file use it.

A line is on the disk when `append` returns. A power cut may tear the last line. The next line then
starts on a new line of the file, and the torn line stays as it is.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

BLOCK = 1 << 16  # bytes of one read from the end of a file


def append(handle: int, line: bytes) -> None:
    """Append one line and wait until it is on the disk.

    Args:
        handle: Descriptor of a file that is open with O_APPEND.
        line: The complete line, with its newline.

    Raises:
        OSError: The line cannot be written; a part of it may lie at the end of the file.
    """
    while line:  # a write may stop early, on a full disk for one
        line = line[os.write(handle, line) :]
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
    tail = b""
    while start and b"\n" not in tail[:-1]:
        length = min(BLOCK, start)
        start -= length
        os.lseek(handle, start, os.SEEK_SET)
        tail = os.read(handle, length) + tail
    torn = bool(tail) and not tail.endswith(b"\n")
    return tail.removesuffix(b"\n").rpartition(b"\n")[2], torn


def line_of(facts: Mapping[str, object]) -> bytes:
    """A line with a checksum.

    Args:
        facts: Values that JSON can write.

    Returns:
        The CRC-32 of the JSON text in 8 hexadecimal digits, a blank, the JSON text and a newline.
    """
    body = json.dumps(facts).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def facts_in(content: bytes) -> Iterator[dict[str, Any]]:
    """Read the lines that `line_of` wrote, in their order.

    Args:
        content: The bytes of the file.

    Yields:
        The facts of each line. A torn or altered line is left out.
    """
    for line in content.split(b"\n"):
        checksum, _, body = line.partition(b" ")
        try:
            if int(checksum, 16) == zlib.crc32(body) and isinstance(
                facts := json.loads(body), dict
            ):
                yield facts
        except (ValueError, RecursionError):
            pass
