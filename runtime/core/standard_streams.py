"""The three standard streams of a command: closed, full, without a reader, in another encoding."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


def open_standard_streams() -> None:
    """Open the null device for each standard stream that the process started without.

    Otherwise the next open file, a result for one, would get the descriptor of standard error, and
    a library's messages would go into it.
    """
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # It stays open as long as the process.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


@contextmanager
def droppable_messages() -> Iterator[None]:
    r"""Within the block, drop messages that cannot be written to standard error.

    A full or closed log must not end the work. A character that the encoding lacks must not either:
    cp1252 prints → as \u2192.
    """
    before = sys.stderr
    if not isinstance(before, io.TextIOWrapper):  # a stream of the host program
        yield
        return
    before.reconfigure(errors="backslashreplace")
    if os.name != "posix" or not _is_descriptor_2(before):
        yield
        return
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(_Droppable()),
        encoding=before.encoding,
        errors="backslashreplace",
        line_buffering=True,
    )
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = before


def _is_descriptor_2(stream: io.TextIOWrapper) -> bool:
    """Whether a stream writes to the descriptor of standard error."""
    try:
        return stream.fileno() == 2
    except OSError:  # a stream in memory has no descriptor
        return False


class _Droppable(io.RawIOBase):
    """Standard error that ignores failing writes and leaves the descriptor open."""

    def fileno(self) -> int:
        """The descriptor of standard error."""
        return 2

    def isatty(self) -> bool:
        """Whether standard error is a terminal."""
        return os.isatty(2)

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, data: Any) -> int:
        """Write `data`, and return the bytes that were written, or all where that fails."""
        with suppress(OSError):
            return os.write(2, data)
        return len(data)
