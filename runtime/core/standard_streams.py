"""The three streams a command is given, whatever state they are in: closed, full, in another
encoding, read by nobody.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


def open_standard_streams() -> None:
    """Give a process that was started without some of them streams that lead nowhere.

    Else the next file that is opened, a result for one, would take the number of standard error,
    and whatever a library says there would be written into it.
    """
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process


@contextmanager
def droppable_messages() -> Iterator[None]:
    """What cannot be written to standard error is dropped: a log without room or reader ends no
    work.

    Also no character ends it: an arrow in cp1252 is written as \\u2192.
    """
    before = sys.stderr
    if not isinstance(before, io.TextIOWrapper):  # the host program's
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
    try:
        return stream.fileno() == 2
    except OSError:  # a text in memory has none
        return False


class _Droppable(io.RawIOBase):
    """Standard error whose failing writes count as done. The descriptor stays open."""

    def fileno(self) -> int:
        return 2

    def isatty(self) -> bool:
        return os.isatty(2)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        with suppress(OSError):
            return os.write(2, data)
        return len(data)
