"""What every command line shares: exit codes, one-screen errors, a progress line with an ETA."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any, TextIO

from .errors import Mask2CTError

PATIENCE = 8.0  # s that what is under way has to end by itself; systemd kills after 10 (deploy/systemd)
EXIT_CODES = """exit codes: 0 done · 1 at least one case failed · 2 the command, config or model is wrong ·
3 a required component is missing · 4 the output cannot be written · 130 interrupted"""


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Call `main(argv)`; print a `Mask2CTError` on one screen and return its exit code; 130 on Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # an arrow in cp1252 is written as \u2192, and ends nothing
            stream.reconfigure(errors="backslashreplace")
    try:
        with _terminated():
            return main(sys.argv[1:] if argv is None else argv)
    except Mask2CTError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away (`| head`)
        sys.stderr.close()
        return 0


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM is taken as Ctrl-C is: what is half-written goes, the exit code is 130.

    Where a library or a file system does not come back for `PATIENCE` seconds, the process ends all the same, as it does by
    `kill -9`: the next start removes what is half-written.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as a command has it while it is imported
            signal.signal(signal.SIGINT, signal.default_int_handler)
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: the host program owns the signals
        yield
        return
    try:
        with _ended_at_the_latest(interrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _ended_at_the_latest(handler: Any) -> Iterator[None]:
    """End the process `PATIENCE` seconds after a SIGTERM that `handler` is for, if it has not ended by then.

    Python calls handlers between two steps of the main thread, which may wait within a library. So a thread is told of the signal by the
    pipe that Python's own, lower handler writes to (`signal.set_wakeup_fd`).
    """
    if os.name != "posix":
        yield
        return
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    ended, process = threading.Event(), os.getpid()

    def wait() -> None:
        while (number := os.read(source, 1)) != b"\0":
            ours = number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is handler
            if ours and not ended.wait(PATIENCE):
                os.write(2, b"interrupted: what was being read or written did not end by itself\n")
                os._exit(130)

    def forget() -> None:
        with suppress(ValueError):
            signal.set_wakeup_fd(-1)  # a forked process must not tell this one of its own signals

    thread = threading.Thread(target=wait, name="mask2ct-end", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: None if ended.is_set() else forget())
    try:
        yield
    finally:
        ended.set()
        if os.getpid() == process:
            signal.set_wakeup_fd(before)
            os.write(sink, b"\0")
            thread.join()
        os.close(sink)
        os.close(source)


def duration(seconds: float) -> str:
    """Seconds for a person: `8.2 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min {int(seconds % 60):02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """A line on standard error: done/total, rate, ETA and a note. One line rewritten on a terminal, else a line every 10 s."""

    def __init__(self, what: str, total: int, *, unit: str = "", quiet: bool = False, stream: TextIO | None = None):
        self._what, self._total, self._unit, self._quiet = what, total, unit, quiet
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._every = 0.1 if self._terminal else 10.0
        self._done = 0
        self._first = self._started = self._shown = time.monotonic()
        self._from = 0

    def update(self, done: int, note: str = "") -> None:
        """State that `done` of the total are done. The first call's work (warm-up, resume) is left out of the rate."""
        now = time.monotonic()
        if self._done == 0:
            self._first, self._from = now, done
        self._done = done
        if self._quiet or (now - self._shown < self._every and done < self._total):
            return
        self._shown = now
        rate = (done - self._from) / (now - self._first) if now > self._first and done > self._from else 0.0
        eta = f", {duration((self._total - done) / rate)} left" if rate and done < self._total else ""
        speed = f", {rate:.3g} {self._unit}/s".replace(" /", "/") if rate else ""
        self._write(f"{self._what} {done}/{self._total}{speed}{eta}{'  ' + note if note else ''}")

    def close(self) -> None:
        """End the line and say how long it took."""
        if not self._quiet:
            self._write(f"{self._what} {self._done}/{self._total} in {duration(time.monotonic() - self._started)}", last=True)

    def _write(self, text: str, last: bool = False) -> None:
        if self._terminal:
            self._stream.write(f"\r\x1b[2K{text}" + ("\n" if last else ""))
        else:
            self._stream.write(text + "\n")
        self._stream.flush()
