"""What every command line shares: exit codes, one-screen errors, a progress line with an ETA."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any, NoReturn, TextIO

from .errors import Mask2CTError, OutputError, printable
from .standard_streams import droppable_messages, open_standard_streams
from .stopping import command_line, ends_when_told

EXIT_CODES = """exit codes: 0 done · 1 at least one case failed · 2 the command, config or model is wrong ·
3 a required component is missing · 4 the output cannot be written · 130 interrupted"""


class Parser(argparse.ArgumentParser):
    """One that quotes the words it does not take as `printable` does: a pattern of the shell may
    have found them.
    """

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse would pass over what cannot be written."""
        print(message, end="", file=file or sys.stderr, flush=True)


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Call `main(argv)`; print a `Mask2CTError` on one screen and return its exit code; 130 on
    Ctrl-C.

    Args:
        main: What the command does; returns its exit code.
        argv: Words of the command line. None: those that this process was started with, so that the process is this command
            and ends when told, whatever hangs in it (`stopping.command_line`). A program that gives words of its own goes on.

    What a command prints is a part of its output: where it cannot be written, the exit code is 4.
    Messages, on standard error, are none: where they cannot be written the work goes on without
    (`droppable_messages`).
    """
    open_standard_streams()
    if isinstance(
        sys.stdout, TextIOWrapper
    ):  # an arrow in cp1252 is written as \u2192, and ends nothing
        sys.stdout.reconfigure(errors="backslashreplace")
    with droppable_messages():
        if argv is not None:
            return _exit_code(main, argv)
        with command_line():
            return _exit_code(main, sys.argv[1:])


def _exit_code(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    try:
        with _terminated():
            return _flushed(main, argv)
    except Mask2CTError as exc:
        return _report(exc)
    except KeyboardInterrupt:
        _print_error("interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output went away (`| head`)
        return 0
    except MemoryError as exc:
        fact = f"the memory does not suffice: {exc or 'none is left'}"
        return _report(
            OutputError(
                fact,
                expected="a machine with more",
                remedy="give smaller masks, or end what else runs",
            )
        )
    except OSError as exc:  # the file system failed where nobody expects it to
        return _report(
            OutputError(
                f"the system refused: {exc.strerror or exc}",
                expected="files and streams that work",
                remedy="check the disk and where the output goes, then run again",
                file=exc.filename,
            )
        )


def _flushed(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """`main(argv)`, and what it printed is written: else Python would say so when it ends, in words
    of its own.

    Where its reader left, the command's own exit code counts.
    """
    code = None
    try:
        try:
            code = main(argv)
        except SystemExit:  # --help and --version print, too
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except OSError as exc:
        with suppress(OSError, ValueError):  # what is left in the buffer goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if code is None or not isinstance(exc, BrokenPipeError):
            raise
    return code


def _report(error: Mask2CTError) -> int:
    _print_error(f"error: {error}")
    return error.exit_code


def _print_error(text: str) -> None:
    with suppress(OSError):  # the exit code says it, too
        print(text, file=sys.stderr)


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM is taken as Ctrl-C is: what is half-written goes, the exit code is 130.

    Where a library or a file system does not come back, the process ends all the same
    (`stopping.ends_when_told`), as it does by `kill -9`: the next start removes what is
    half-written.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        if (
            signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        ):  # as a command has it while it is imported
            signal.signal(signal.SIGINT, signal.default_int_handler)
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: the host program owns the signals
        yield
        return
    try:
        with ends_when_told(130):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


def duration(seconds: float) -> str:
    """Seconds for a person: `8.2 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return (
        f"{minutes} min {int(seconds % 60):02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


class Progress:
    """A line on standard error: done/total, rate, ETA and a note.

    One line rewritten on a terminal, else a line every 10 s.
    """

    def __init__(
        self,
        what: str,
        total: int,
        *,
        unit: str = "",
        quiet: bool = False,
        stream: TextIO | None = None,
    ):
        self._what, self._total, self._unit, self._quiet = what, total, unit, quiet
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._every = 0.1 if self._terminal else 10.0
        self._done = 0
        self._first = self._started = self._shown = time.monotonic()
        self._from = 0

    def update(self, done: int, note: str = "") -> None:
        """State that `done` of the total are done.

        The first call's work (warm-up, resume) is left out of the rate.
        """
        now = time.monotonic()
        if self._done == 0:
            self._first, self._from = now, done
        self._done = done
        if self._quiet or (now - self._shown < self._every and done < self._total):
            return
        self._shown = now
        rate = (
            (done - self._from) / (now - self._first)
            if now > self._first and done > self._from
            else 0.0
        )
        eta = (
            f", {duration((self._total - done) / rate)} left" if rate and done < self._total else ""
        )
        speed = f", {rate:.3g} {self._unit}/s".replace(" /", "/") if rate else ""
        self._write(f"{self._what} {done}/{self._total}{speed}{eta}{'  ' + note if note else ''}")

    def close(self) -> None:
        """End the line and say how long it took."""
        if not self._quiet:
            self._write(
                f"{self._what} {self._done}/{self._total} in"
                f" {duration(time.monotonic() - self._started)}",
                last=True,
            )

    def _write(self, text: str, last: bool = False) -> None:
        text = printable(text)
        if self._terminal:
            self._stream.write(f"\r\x1b[2K{text}" + ("\n" if last else ""))
        else:
            self._stream.write(text + "\n")
        self._stream.flush()
