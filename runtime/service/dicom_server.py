"""The listening side of pynetdicom, within bounds.

Only an allowed peer that has sent its whole request gets an association. The request
(A-ASSOCIATE-RQ, PS3.8 section 9.3.2) is read here, under the bounds of `connections`; it is
aborted, rejected, or handed on as if pynetdicom had read it. For a stranger, pynetdicom decodes one
PDU and does nothing else.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .connections import BoundedServer, PendingConnections, descriptors
from .events import Events, plain

# Bytes of an association request, which a stranger may send.
LONGEST_REQUEST = 1 << 17
# s before an association is one too many: a peer may see the end of its last one before we do.
WAIT_FOR_PLACE = 0.5
# s before a refusal is sent: a peer on pynetdicom takes an earlier one for a broken connection.
BEFORE_REFUSAL = 0.02
ENDING = 2.0  # s that an association whose thread failed has to send its abort

# Reasons of an A-ABORT by the service provider (PS3.8 table 9-26).
ABORT_UNEXPECTED_PDU, ABORT_INVALID_PARAMETER = 2, 6
# Result, source and reason of an A-ASSOCIATE-RJ (PS3.8 table 9-21).
CALLED_UNKNOWN, CALLING_UNKNOWN = (1, 1, 7), (1, 1, 3)
VERSION_UNKNOWN, TOO_MANY = (1, 2, 2), (2, 3, 2)


@dataclass(frozen=True)
class Limits:
    """What a node gives to all its peers together, and to each.

    Attributes:
        associations: How many there may be at once.
        pdu: Bytes of the largest PDU that is received.
        size: Bytes of the largest object.
        pending: How many connections may wait without an association.
        request_seconds: For the TLS handshake and the whole request, together.
        pdu_seconds: For one PDU of an association, from its first byte to its last.
        idle_seconds: An association ends after so long without a PDU. An object may take this
            long beyond its size divided by `slowest`.
        slowest: Bytes/s at which an object must arrive on average.
    """

    associations: int = 10
    pdu: int = 1 << 17
    size: int = 256 << 20
    pending: int = 100
    request_seconds: float = 10.0
    pdu_seconds: float = 30.0
    idle_seconds: float = 60.0
    slowest: int = 10_000


class _Refused(Exception):
    """A peer gets no association; `answer` is the PDU that tells it."""

    def __init__(self, answer: bytes, reason: str, calling: str = ""):
        super().__init__(reason)
        self.answer, self.reason, self.calling = answer, reason, calling

    @classmethod
    def abort(cls, code: int, reason: str) -> _Refused:
        """Answer with an A-ABORT (PS3.8 section 9.3.8)."""
        return cls(bytes([7, 0, 0, 0, 0, 4, 0, 0, 2, code]), reason)

    @classmethod
    def reject(cls, code: tuple[int, int, int], reason: str, calling: str) -> _Refused:
        """Answer with an A-ASSOCIATE-RJ (PS3.8 section 9.3.4)."""
        return cls(bytes([3, 0, 0, 0, 0, 4, 0, *code]), reason, calling)


def abort_connections(associations: Sequence[Any], *, abort: bool = False) -> None:
    """End the connections of associations, established or not, whatever their peers do.

    Args:
        associations: Associations of pynetdicom.
        abort: Whether to send an A-ABORT first.
    """
    if abort:
        for association in associations:
            association.abort(block=False)
        # The aborts need a moment on their way.
        threading.Event().wait(0.1)
    for association in associations:
        with suppress(OSError, AttributeError):  # it is closed already
            association.dul.socket.socket.shutdown(socket.SHUT_RDWR)


def read(connection: socket.socket, count: int) -> bytearray:
    """Read from a connection.

    Args:
        connection: An open socket.
        count: How many bytes to read.

    Returns:
        The bytes; fewer than `count` when the connection ended.

    Raises:
        OSError: When the connection fails, or its time is up.
    """
    data = bytearray(count)
    view, filled = memoryview(data), 0
    while filled < count:
        received = connection.recv_into(view[filled:])
        if not received:
            break
        filled += received
    view.release()
    del data[filled:]
    return data


def read_request(connection: socket.socket, called: str, allow: tuple[str, ...]) -> Any:
    """Read and decode the A-ASSOCIATE-RQ of a peer that may have an association.

    Args:
        connection: An open socket.
        called: This node's AE title.
        allow: Calling AE titles; empty means any.

    Returns:
        pynetdicom's `A_ASSOCIATE_RQ`.

    Raises:
        _Refused: For a peer or a request that gets no association.
        OSError: When the connection ended before, or its time was up.
    """
    head = read(connection, 6)
    if len(head) < 6:
        raise ConnectionError("no request came")
    if head[0] != 1:
        raise _Refused.abort(ABORT_UNEXPECTED_PDU, "the first PDU is not an association request")
    length = int.from_bytes(head[2:], "big")
    if length > LONGEST_REQUEST:
        raise _Refused.abort(ABORT_INVALID_PARAMETER, "the association request is too long")
    body = read(connection, length)
    if len(body) < length:
        raise ConnectionError("half a request came")
    pdu = _decode(bytes(head + body))
    request = pdu.to_primitive()
    calling = str(request.calling_ae_title).strip()
    if pdu.protocol_version != 1:
        raise _Refused.reject(VERSION_UNKNOWN, "the protocol version is not 1", calling)
    if allow and calling not in allow:
        wrong_called = str(request.called_ae_title).strip() != called
        code = CALLED_UNKNOWN if wrong_called else CALLING_UNKNOWN
        raise _Refused.reject(code, "calling AE title is not allowed", calling)
    if str(request.called_ae_title).strip() != called:
        raise _Refused.reject(CALLED_UNKNOWN, "called AE title is another", calling)
    return pdu


def _decode(data: bytes) -> Any:
    """Decode a request; raise `_Refused` for one that pynetdicom could not negotiate."""
    from pynetdicom.pdu import A_ASSOCIATE_RQ

    try:
        pdu = A_ASSOCIATE_RQ()
        pdu.decode(data)
        contexts = pdu.to_primitive().presentation_context_definition_list
        complete = all(context.abstract_syntax and context.transfer_syntax for context in contexts)
    except Exception as exc:  # a stranger's bytes may raise anything
        raise _Refused.abort(ABORT_INVALID_PARAMETER, "the association request is damaged") from exc
    if not contexts or not complete:
        raise _Refused.abort(
            ABORT_INVALID_PARAMETER, "a presentation context has no transfer syntax"
        )
    return pdu


def server_class(
    events: Events, aet: str, allow: tuple[str, ...], limits: Limits, tls: ssl.SSLContext | None
) -> Any:
    """Return the class of a bounded pynetdicom server.

    Args:
        events: Receives what happens.
        aet: This node's AE title.
        allow: Calling AE titles; empty means any.
        limits: What the node gives to its peers.
        tls: The context for TLS; None without TLS.

    Returns:
        A `ThreadedAssociationServer`.
    """
    from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

    most_pending = max(8, min(limits.pending, descriptors() // 4))

    class Handler(RequestHandler):  # type: ignore[misc]
        """Runs one association from its request on; no thread and no descriptor is left over."""

        def __init__(self, pdu: Any, connection: Any, client_address: Any, server: Any):
            self._pdu = pdu
            super().__init__(connection, client_address, server)

        def handle(self) -> None:
            """Run the association until it ends."""
            association = self._create_association()
            association.dul.socket.recv = self._bounded_recv(association)
            # As if pynetdicom had read the request, after the event of the connection itself.
            association.dul._recv_pdu.put(self._pdu)
            association.dul.event_queue.put("Evt6")
            association.start()
            association.join()
            # The association failed, and the thread of its connection does not know.
            if association.dul.is_alive():
                abort_connections([association], abort=True)
                association.dul.join(ENDING)
                association.dul.kill_dul()

        def _bounded_recv(self, association: Any) -> Any:
            """Return a replacement of pynetdicom's `recv` that bounds length and time of a PDU.

            A PDU that is not complete within these bounds ends the connection.
            """
            connection, largest = self.request, max(limits.pdu, 6)

            def receive(count: int) -> bytearray:
                if count > largest:
                    abort_connections([association])
                    raise OSError("the PDU is longer than was agreed")
                with self.server.receiving.hold(connection):
                    data = read(connection, count)
                if len(data) < count:
                    # pynetdicom would keep our half open until it is garbage-collected.
                    abort_connections([association])
                return data

            return receive

    class Server(BoundedServer, ThreadedAssociationServer):  # type: ignore[misc]
        """Accepts connections, reads their requests, and counts associations."""

        def __init__(self, *arguments: Any, **options: Any):
            self.receiving = PendingConnections(limits.associations + 1, limits.pdu_seconds)
            self._place_free, self.places_taken = threading.Condition(), 0
            pending = PendingConnections(most_pending, limits.request_seconds)
            super().__init__(*arguments, pending=pending, served=limits.associations, **options)

        def service_actions(self) -> None:
            """End overdue connections; the server's loop calls it."""
            super().service_actions()
            self.receiving.end_overdue()

        def finish_request(self, request: Any, client_address: Any) -> None:
            """Serve one connection in its thread: handshake, request, association."""
            connection = request
            try:
                if tls is not None:
                    connection = tls.wrap_socket(
                        request, server_side=True, do_handshake_on_connect=False
                    )
                connection.settimeout(limits.idle_seconds)
                with self.pending.hold(connection):
                    if tls is not None:
                        connection.do_handshake()
                    pdu = read_request(connection, aet, allow)
                    self._take_place(str(pdu.calling_ae_title).strip())
                try:
                    Handler(pdu, connection, client_address, self)
                finally:
                    self._give_place_back()
            except _Refused as refused:
                if refused.calling:
                    events("rejected", calling=plain(refused.calling), reason=refused.reason)
                else:
                    events("broken", reason=refused.reason)
                threading.Event().wait(BEFORE_REFUSAL)
                with suppress(OSError):
                    connection.sendall(refused.answer)
            except ssl.SSLError as exc:
                events("rejected", reason="TLS", detail=exc.reason or type(exc).__name__)
            except OSError as exc:
                events("broken", reason="no association request", detail=type(exc).__name__)
            finally:
                self.shutdown_request(connection)

        def _take_place(self, calling: str) -> None:
            """Take one of the places for associations; raise `_Refused` when all are taken."""
            with self._place_free:
                if not self._place_free.wait_for(self._is_place_free, WAIT_FOR_PLACE):
                    raise _Refused.reject(TOO_MANY, "too many associations", calling)
                self.places_taken += 1

        def _is_place_free(self) -> bool:
            return self.places_taken < limits.associations

        def _give_place_back(self) -> None:
            with self._place_free:
                self.places_taken -= 1
                self._place_free.notify()

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Report an error of a connection's thread, without a traceback."""
            events("broken", reason="a connection failed before it was an association")

    return Server
