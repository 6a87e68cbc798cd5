"""A log to which lines are only added: the journal, the delivery logs and the audit file use it.

A line is on the disk when `append` returns. A power cut may tear the last line. The next line then
starts on a new line of the file, and the torn line stays as it is.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

BLOCK = 1 << 16  # bytes of one read from the end of a file
# Bytes of a line: a series of 4,096 files takes half a million. A longer line is no line of ours:
# it is damage, such as the hole that a crash of the file system leaves.
MAX_LINE = 16 << 20
CHECKSUM = 8  # hexadecimal digits of a CRC-32


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


def is_torn(file: BinaryIO) -> bool:
    """Whether the last line of a file has no newline.

    Args:
        file: The open file; it is at its begin afterwards.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    last = file.read(1)
    file.seek(0)
    return last not in (b"", b"\n")


def line_of(facts: Mapping[str, object]) -> bytes:
    """A line with a checksum.

    Args:
        facts: Values that JSON can write.

    Returns:
        The CRC-32 of the JSON text in 8 hexadecimal digits, a blank, the JSON text and a newline.
    """
    body = json.dumps(facts).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def facts_in(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Read the lines that `line_of` wrote, in their order.

    Args:
        file: The open file, at its begin.

    Yields:
        The facts of each line. A torn or altered line, and one longer than `MAX_LINE`, is left out.
    """
    while line := file.readline(MAX_LINE):
        checksum, _, body = line.removesuffix(b"\n").partition(b" ")
        try:
            if (
                len(checksum) == CHECKSUM
                and int(checksum, 16) == zlib.crc32(body)
                and isinstance(facts := json.loads(body), dict)
            ):
                yield facts
        except (ValueError, RecursionError):
            pass
