"""Common parts of the command lines: exit codes, one-screen errors, a progress line with an ETA."""

from __future__ import annotations

import argparse
import json
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

EXIT_CODES = (
    "exit codes: 0 done · 1 at least one case failed · 2 the command, config or model is wrong ·\n"
    "3 a required component is missing · 4 the output cannot be written · 130 interrupted"
)


def epilog(*examples: str, notes: str = "") -> str:
    """The end of a command's help: examples, notes and the exit codes.

    Args:
        examples: Command lines as a person types them.
        notes: Sentences for this command alone.
    """
    lines = "".join(f"  {example}\n" for example in examples)
    parts = [f"examples:\n{lines}" if examples else "", EXIT_CODES, notes]
    return "\n".join(part for part in parts if part)


class Parser(argparse.ArgumentParser):
    """A parser that keeps the lines of its epilog, and prints unknown words with `printable`.

    These may be file names that a pattern of the shell matched.
    """

    def __init__(self, *args: Any, **options: Any):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **options)

    def error(self, message: str) -> NoReturn:
        """Print the usage and `message`, and exit with code 2."""
        super().error(printable(message))

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print, and raise where that fails: `ArgumentParser` would ignore the failure."""
        print(message, end="", file=file or sys.stderr, flush=True)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`, for every command whose result a program may read.

    Args:
        parser: Receives the option.
    """
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the result as JSON (docs/reference/json.md); warnings stay on standard error",
    )


def print_json(value: object) -> None:
    """Print a result as JSON on standard output.

    Args:
        value: A value that JSON can write.

    Raises:
        ValueError: It holds NaN or infinity, which are not JSON.
    """
    print(json.dumps(value, indent=1, allow_nan=False))


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Call `main(argv)` and print a `Mask2CTError` on one screen.

    Standard output is a part of a command's result: where it cannot be written, the exit code is 4.
    Standard error is not: where it cannot be written, the work goes on (`droppable_messages`).

    Args:
        main: The command; it returns its exit code.
        argv: Words of the command line. None takes the words that this process was started with:
            the process is this command then, and ends on a signal even where a thread hangs
            (`stopping.command_line`). A program that passes words of its own goes on.

    Returns:
        The exit code: the command's or the error's, 130 after Ctrl-C.
    """
    open_standard_streams()
    if isinstance(sys.stdout, TextIOWrapper):
        # A character that the encoding lacks must not end the work: cp1252 prints → as \u2192.
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
    except BrokenPipeError:  # the reader of the output ended (`| head`)
        return 0
    except MemoryError as exc:
        fact = f"the memory does not suffice: {exc or 'none is left'}"
        return _report(
            OutputError(
                fact,
                expected="a machine with more",
                remedy="give smaller masks, or end other programs",
            )
        )
    except OSError as exc:  # the file system failed in an unexpected place
        return _report(
            OutputError(
                f"the system refused: {exc.strerror or exc}",
                expected="files and streams that work",
                remedy="check the disk and where the output goes, then run again",
                file=exc.filename,
            )
        )


def _flushed(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Call `main(argv)` and flush its output, so that Python does not report a failure at its end.

    Where the reader of the output has ended, the command's exit code counts.
    """
    code = None
    try:
        try:
            code = main(argv)
        except SystemExit:  # --help and --version print as well
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except OSError as exc:
        with suppress(OSError, ValueError):
            # Python writes the rest of the buffer at its end; let that go nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if code is None or not isinstance(exc, BrokenPipeError):
            raise
    return code


def _report(error: Mask2CTError) -> int:
    _print_error(f"error: {error}")
    return error.exit_code


def _print_error(text: str) -> None:
    with suppress(OSError):  # the exit code tells the caller as well
        print(text, file=sys.stderr)


@contextmanager
def _terminated() -> Iterator[None]:
    """Handle SIGTERM as Ctrl-C: half-written files are removed, the exit code is 130.

    Where a library or a file system does not return, the process ends all the same
    (`stopping.ends_when_told`), as after `kill -9`: the next start removes half-written files.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        # A command leaves SIGINT at its default while it imports its modules.
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
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
    """A duration for a person: `8.2 s`, `3 min 05 s`, `2 h 07 min`.

    Args:
        seconds: The duration in seconds.
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return (
        f"{minutes} min {int(seconds % 60):02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


class Progress:
    """A progress line on standard error: count/total, rate, ETA and a note.

    On a terminal it rewrites one line, else it prints a line every 10 s.

    Args:
        what: The start of the line.
        total: The count at the end.
        unit: The unit of the rate, per second.
        quiet: Print nothing.
        stream: Where to print; default: standard error.
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
        self._count = self._first_count = 0
        self._start_time = self._first_time = self._print_time = time.monotonic()

    def update(self, count: int, note: str = "") -> None:
        """State that `count` of the total are complete.

        The rate leaves out the work before the first call (warm-up, resume).

        Args:
            count: How many are complete.
            note: Printed after the rate.
        """
        now = time.monotonic()
        if self._count == 0:
            self._first_time, self._first_count = now, count
        self._count = count
        if self._quiet or (now - self._print_time < self._every and count < self._total):
            return
        self._print_time = now
        rate = (
            (count - self._first_count) / (now - self._first_time)
            if now > self._first_time and count > self._first_count
            else 0.0
        )
        remaining = self._total - count
        eta = f", {duration(remaining / rate)} left" if rate and remaining > 0 else ""
        speed = f", {rate:.3g} {self._unit}/s".replace(" /", "/") if rate else ""
        self._write(f"{self._what} {count}/{self._total}{speed}{eta}{'  ' + note if note else ''}")

    def close(self) -> None:
        """End the line and print how long it took."""
        if not self._quiet:
            took = duration(time.monotonic() - self._start_time)
            self._write(f"{self._what} {self._count}/{self._total} in {took}", last=True)

    def _write(self, text: str, last: bool = False) -> None:
        text = printable(text)
        if self._terminal:
            self._stream.write(f"\r\x1b[2K{text}" + ("\n" if last else ""))
        else:
            self._stream.write(text + "\n")
        self._stream.flush()
