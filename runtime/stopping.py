"""A service that is told to end does so, also when a thread hangs in a library that hears of no signal."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

GRACE = 4.5  # s after SIGTERM or SIGINT before the process ends whatever it is at: a kill loses nothing here


@contextmanager
def ends_when_told(code: int) -> Iterator[None]:
    """For the work within: end the process with exit code `code` when it has not ended `GRACE` after SIGTERM or SIGINT.

    Python hears of a signal between two of the main thread's instructions, which do not come while it waits for
    a thread that hangs. So another thread is told of it, by the C-level handler. Does nothing outside the main thread.
    """
    heard, told = socket.socketpair()
    told.setblocking(False)
    try:
        before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    except ValueError:  # not the main thread: the host program owns the signals
        heard.close()
        told.close()
        yield
        return
    stopped, finished = threading.Event(), threading.Event()

    def listen() -> None:
        while number := heard.recv(1):
            if number[0] in (signal.SIGTERM, signal.SIGINT):
                stopped.set()
                if not finished.wait(GRACE):
                    with suppress(Exception):  # nobody reads it
                        print("what is being read or generated does not end: it is left as it is", file=sys.stderr, flush=True)
                    os._exit(code)
                return

    threads_before = {*threading.enumerate()}
    listener = threading.Thread(target=listen, daemon=True, name="stopping")
    listener.start()
    try:
        yield
    finally:
        left = [thread for thread in threading.enumerate() if not thread.daemon and thread not in threads_before]
        if not (stopped.is_set() and left):  # else the interpreter would wait for them without end
            finished.set()
        signal.set_wakeup_fd(before)
        told.close()  # wakes the listener
        if finished.is_set():
            listener.join()
            heard.close()
