"""Bound how many connections a server holds, and for how long.

A server here has one thread for each connection. A peer has `seconds` in all for its request,
however it spreads the bytes. When all places are taken, the connection that has waited longest is
ended: so a peer that asks at once gets in, whatever else is connected.
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

# Errors of accept(2) for want of descriptors or memory.
SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# s before accept is tried again: a connection that was ended returns its descriptor meanwhile.
PAUSE = 0.05
WAIT_FOR_THREAD = 1.0  # s that a new connection waits for the thread of one that is being ended


def descriptors() -> int:
    """Return how many files this process may have open."""
    try:
        import resource
    except ImportError:  # not POSIX
        return 1024
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit


class PendingConnections:
    """The connections whose peers still have to send something. Safe to use from several threads.

    Args:
        most: How many there may be at once; one more ends the oldest.
        seconds: How long each may take. The server calls `end_overdue`, which ends the others.
    """

    def __init__(self, most: int, seconds: float):
        self.most, self.seconds = most, seconds
        self._lock = threading.Lock()
        # When each began, in s of the monotonic clock; oldest first.
        self._since: dict[socket.socket, float] = {}

    @contextmanager
    def hold(self, connection: socket.socket) -> Iterator[None]:
        """Bound the time of the work within.

        When it is up, the connection is shut down, which wakes whoever reads from it.

        Args:
            connection: The connection that the work uses.
        """
        with self._lock:
            if len(self._since) >= self.most:
                self._end(next(iter(self._since)))
            self._since[connection] = time.monotonic()
        try:
            yield
        finally:
            # From here on its owner may close it.
            with self._lock:
                self._since.pop(connection, None)

    def end_overdue(self) -> None:
        """End the connections that took too long."""
        with self._lock:
            for connection, since in [*self._since.items()]:
                if time.monotonic() - since < self.seconds:
                    return
                self._end(connection)

    def end_oldest(self) -> None:
        """End the connection that has waited longest, to free its descriptor."""
        with self._lock:
            if self._since:
                self._end(next(iter(self._since)))

    def end_all(self) -> None:
        """End every connection."""
        with self._lock:
            for connection in [*self._since]:
                self._end(connection)

    def _end(self, connection: socket.socket) -> None:
        """Shut a connection down; call it with the lock."""
        del self._since[connection]
        with suppress(OSError):  # the peer has gone
            # Not `connection.shutdown`: that of a TLS socket would change what its thread uses.
            socket.socket.shutdown(connection, socket.SHUT_RDWR)


class BoundedServer(ThreadingMixIn):
    """Bounds a socketserver's threads and their time, and goes on when descriptors run short.

    Args:
        pending: The connections that are not yet served.
        served: How many threads there may be besides those of `pending`.

    Attributes:
        pending: As above.
        shortage: Why the last connection could not be accepted; empty when it was.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, *arguments: Any, pending: PendingConnections, served: int = 0, **options: Any
    ):
        self.pending = pending
        self.shortage = ""
        self._free_threads = threading.Semaphore(pending.most + served + 8)
        super().__init__(*arguments, **options)
        # A peer may vanish before accept, which then must not block.
        self.socket.settimeout(1.0)  # type: ignore[attr-defined]

    def get_request(self) -> Any:
        """Accept a connection; when descriptors are short, end the oldest pending one."""
        try:
            connection = super().get_request()  # type: ignore[misc]
        except OSError as exc:
            if exc.errno in SHORTAGE:
                self.shortage = exc.strerror or type(exc).__name__
                self.pending.end_oldest()
                # Without a pause the loop would spin: the connection still waits.
                threading.Event().wait(PAUSE)
            raise
        self.shortage = ""
        return connection

    def service_actions(self) -> None:
        """End overdue connections; the server's loop calls it."""
        super().service_actions()  # type: ignore[misc]
        self.pending.end_overdue()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Reserve a thread for a connection; one that has just been ended frees its own soon."""
        return self._free_threads.acquire(timeout=WAIT_FOR_THREAD)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the thread of a connection."""
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._free_threads.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection in its thread, and free the thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free_threads.release()
