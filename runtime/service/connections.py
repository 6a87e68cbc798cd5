"""How many connections a server holds, and for how long: a stranger costs a thread and a place, and
both end.

A server here has one thread for each connection. Whoever connects has `seconds` in all to say what
he wants, however he spreads his bytes. When all places are taken, the connection that has waited
longest is ended: a peer that asks at once gets in, whatever waits beside it.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from socketserver import ThreadingMixIn
from typing import Any

SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # what accept(2) lacks
PAUSE = 0.05  # s before accept is tried again: what was ended gives back its descriptor meanwhile
WAIT_FOR_THREAD = 1.0  # s that a new connection waits for a thread of one that is being ended


def descriptors() -> int:
    """How many files this process may have open."""
    try:
        import resource
    except ImportError:  # not POSIX
        return 1024
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if most == resource.RLIM_INFINITY else most


class PendingConnections:
    """The connections from which something is awaited. Safe to use from several threads.

    Args:
        most: how many at once; one more ends the oldest.
        seconds: how long each may take. The server's `end_overdue` ends what takes longer.
    """

    def __init__(self, most: int, seconds: float):
        self.most, self.seconds = most, seconds
        self._lock = threading.Lock()
        self._since: dict[socket.socket, float] = {}  # oldest first

    @contextmanager
    def hold(self, connection: socket.socket) -> Iterator[None]:
        """Bound the work within: when its time is up, the connection is shut down, which wakes
        who reads from it.
        """
        with self._lock:
            if len(self._since) >= self.most:
                self._end(next(iter(self._since)))
            self._since[connection] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:  # from here on its owner may close it
                self._since.pop(connection, None)

    def end_overdue(self) -> None:
        """End what took too long."""
        with self._lock:
            for connection, since in [*self._since.items()]:
                if time.monotonic() - since < self.seconds:
                    return
                self._end(connection)

    def end_oldest(self) -> None:
        """Give back the descriptor of the connection that has waited longest."""
        with self._lock:
            if self._since:
                self._end(next(iter(self._since)))

    def end_all(self) -> None:
        with self._lock:
            for connection in [*self._since]:
                self._end(connection)

    def _end(self, connection: socket.socket) -> None:
        del self._since[connection]
        with suppress(OSError):  # the peer has gone
            socket.socket.shutdown(
                connection, socket.SHUT_RDWR
            )  # a TLS socket's own would touch what its thread uses


class BoundedServer(ThreadingMixIn):
    """For a socketserver: bounds its threads and their time, and goes on where descriptors are
    short.

    Args:
        pending: who has connected and is not yet served.
        served: how many threads there may be besides those of `pending`.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, *arguments: Any, pending: PendingConnections, served: int = 0, **options: Any
    ):
        self.pending = pending
        self.shortage = ""  # why the last connection could not be taken
        self._threads_left = threading.Semaphore(pending.most + served + 8)
        super().__init__(*arguments, **options)
        self.socket.settimeout(1.0)  # type: ignore[attr-defined]  # of accept, should a peer vanish before it

    def get_request(self) -> Any:
        try:
            connection = super().get_request()  # type: ignore[misc]
        except OSError as exc:
            if exc.errno in SHORTAGE:
                self.shortage = exc.strerror or type(exc).__name__
                self.pending.end_oldest()
                threading.Event().wait(
                    PAUSE
                )  # else the loop would spin: the connection still waits
            raise
        self.shortage = ""
        return connection

    def service_actions(self) -> None:
        super().service_actions()  # type: ignore[misc]
        self.pending.end_overdue()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Take a thread for it. One that has just been ended gives its own back."""
        return self._threads_left.acquire(timeout=WAIT_FOR_THREAD)

    def process_request(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._threads_left.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._threads_left.release()
