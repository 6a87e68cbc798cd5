"""A command ends on SIGTERM and SIGINT, even where a thread hangs in a library."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Seconds that the work has to end by itself; systemd kills after 10 (deploy/systemd).
GRACE = 8.0

_is_command_line = False


@contextmanager
def command_line() -> Iterator[None]:
    """Within the block, the process is a command of mask2ct, which `ends_when_told` may end.

    A program that embeds the runtime is not.
    """
    global _is_command_line
    before, _is_command_line = _is_command_line, True
    try:
        yield
    finally:
        _is_command_line = before


def is_command_line() -> bool:
    """Whether the process is a command of mask2ct, and no program that embeds the runtime."""
    return _is_command_line


@contextmanager
def ends_when_told(code: int) -> Iterator[None]:
    """End the process where the block has not ended `GRACE` seconds after SIGTERM or SIGINT.

    It does so only within `command_line`: a program that embeds the runtime goes on, with its
    threads. It does nothing outside the main thread, where the host program owns the signals. A
    block that installs its own handler keeps it, as training does, which ends with a checkpoint.

    Python runs a handler between two instructions of the main thread, and there are none while the
    main thread waits for a thread that hangs. So the C-level handler wakes another thread. That
    loses no more than a kill does.

    Args:
        code: The exit code of the process.
    """
    if not _is_command_line:
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    try:
        before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    except ValueError:  # not the main thread
        receiver.close()
        sender.close()
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stopped, finished = threading.Event(), threading.Event()

    def listen() -> None:
        while number := receiver.recv(1):
            if (
                number[0] in handlers
                and signal.getsignal(number[0]) is handlers[signal.Signals(number[0])]
            ):
                stopped.set()
                if not finished.wait(GRACE):
                    with suppress(Exception):  # standard error may have no reader
                        print(
                            "the work does not end: the process ends without it",
                            file=sys.stderr,
                            flush=True,
                        )
                    os._exit(code)
                return

    def forget() -> None:
        """Keep a forked process from reporting its signals to this one."""
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
            running = [
                thread
                for thread in threading.enumerate()
                if not thread.daemon and thread not in threads_before
            ]
            # The interpreter waits for running threads at its end. After a signal, the listener
            # must end the process where they hang.
            if not (stopped.is_set() and running):
                finished.set()
            signal.set_wakeup_fd(before)
            sender.close()  # wakes the listener
            if finished.is_set():
                listener.join()
                receiver.close()
