"""A command that is told to end does so, also when a thread hangs in a library that hears of no
signal.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

GRACE = (
    8.0  # s that what is under way has to end by itself; systemd kills after 10 (deploy/systemd)
)


_is_command_line = False


@contextmanager
def command_line() -> Iterator[None]:
    """Within, the process is a command line of ours and ours to end; a program that calls the
    runtime is not.
    """
    global _is_command_line
    before, _is_command_line = _is_command_line, True
    try:
        yield
    finally:
        _is_command_line = before


@contextmanager
def ends_when_told(code: int) -> Iterator[None]:
    """For the work within: end the process with exit code `code` when it has not ended `GRACE`
    after SIGTERM or SIGINT.

    Does so within `command_line` alone: a program that embeds the runtime goes on, with its
    threads, whatever it was told.

    Python hears of a signal between two of the main thread's instructions, which do not come while
    it waits for a thread that hangs. So another thread is told of it, by the C-level handler.
    Nothing is lost by that: it is what a kill does. Whoever handles the signal otherwise within, as
    training does, which ends with a checkpoint, is left to do so. Does nothing outside the main
    thread, where the host program owns the signals.
    """
    if not _is_command_line:
        yield
        return
    heard, told = socket.socketpair()
    told.setblocking(False)
    try:
        before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    except ValueError:  # not the main thread
        heard.close()
        told.close()
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stopped, finished = threading.Event(), threading.Event()

    def listen() -> None:
        while number := heard.recv(1):
            if (
                number[0] in handlers
                and signal.getsignal(number[0]) is handlers[signal.Signals(number[0])]
            ):
                stopped.set()
                if not finished.wait(GRACE):
                    with suppress(Exception):  # nobody reads it
                        print(
                            "what is being read or generated does not end: it is left as it is",
                            file=sys.stderr,
                            flush=True,
                        )
                    os._exit(code)
                return

    def forget() -> None:
        """A forked process must not tell this one of its own signals."""
        if not finished.is_set():
            with suppress(ValueError):
                signal.set_wakeup_fd(-1)

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=forget)
    threads_before, process = {*threading.enumerate()}, os.getpid()
    listener = threading.Thread(target=listen, daemon=True, name="stopping")
    listener.start()
    try:
        yield
    finally:
        if os.getpid() == process:
            left = [
                thread
                for thread in threading.enumerate()
                if not thread.daemon and thread not in threads_before
            ]
            if not (
                stopped.is_set() and left
            ):  # else the interpreter would wait for them without end
                finished.set()
            signal.set_wakeup_fd(before)
            told.close()  # wakes the listener
            if finished.is_set():
                listener.join()
                heard.close()
