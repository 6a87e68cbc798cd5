"""The listening side of pynetdicom, within bounds: an association exists when an allowed peer has
asked for it whole.

Nothing of pynetdicom runs for a stranger but the decoding of one PDU. The request (A-ASSOCIATE-RQ,
PS3.8 9.3.2) is read here, under the bounds of `connections`; it is aborted, rejected, or handed on
as if pynetdicom had read it.
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

LONGEST_REQUEST = (
    1 << 17
)  # bytes of a PDU that asks for an association, which comes before anyone is known
WAIT_FOR_PLACE = (
    0.5  # s before an association is one too many: another's end may be seen by its peer before us
)
# s: pynetdicom takes a refusal that comes before it looks at its connection for a broken one
BEFORE_REFUSAL = 0.02
ENDING = 2.0  # s that an association whose thread failed has to send its abort

ABORT_UNEXPECTED_PDU, ABORT_INVALID_PARAMETER = 2, 6  # PS3.8 table 9-26, of the service provider
CALLED_UNKNOWN, CALLING_UNKNOWN = (1, 1, 7), (1, 1, 3)  # PS3.8 table 9-21: result, source, reason
VERSION_UNKNOWN, TOO_MANY = (1, 2, 2), (2, 3, 2)


@dataclass(frozen=True)
class Limits:
    """What one node gives to all its peers together, and to each.

    Attributes:
        associations: at once.
        pdu: bytes of a PDU that is received.
        size: bytes of an object.
        pending: connections that have not asked for an association yet.
        request_seconds: for TLS and the whole request, together.
        pdu_seconds: for one PDU of an association, from its first byte to its last.
        idle_seconds: without a word, after which an association is ended; also what an object may take beyond
            its size by `slowest`.
        slowest: bytes/s, on average, in which an object must come.
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
    """A peer gets no association: `answer` is the PDU that says so."""

    def __init__(self, answer: bytes, reason: str, calling: str = ""):
        super().__init__(reason)
        self.answer, self.reason, self.calling = answer, reason, calling

    @classmethod
    def abort(cls, why: int, reason: str) -> _Refused:
        return cls(bytes([7, 0, 0, 0, 0, 4, 0, 0, 2, why]), reason)

    @classmethod
    def reject(cls, why: tuple[int, int, int], reason: str, calling: str) -> _Refused:
        return cls(bytes([3, 0, 0, 0, 0, 4, 0, *why]), reason, calling)


def abort_connections(associations: Sequence[Any], *, abort: bool = False) -> None:
    """End the connections of associations, also of those that are not established, whatever the
    peer does; with an A-ABORT before.
    """
    if abort:
        for association in associations:
            association.abort(block=False)
        threading.Event().wait(0.1)  # what is on its way
    for association in associations:
        with suppress(OSError, AttributeError):  # it is closed already
            association.dul.socket.socket.shutdown(socket.SHUT_RDWR)


def read(connection: socket.socket, count: int) -> bytearray:
    """`count` bytes, or fewer where the connection ended. Raises `OSError`."""
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
    """The A-ASSOCIATE-RQ of a peer that may have an association, decoded.

    Args:
        called: this node's AE title.
        allow: calling AE titles; empty means any.

    Raises:
        _Refused: for anything else.
        OSError: the connection ended before, or its time was up.
    """
    head = read(connection, 6)
    if len(head) < 6:
        raise ConnectionError("no request came")
    if head[0] != 1:
        raise _Refused.abort(ABORT_UNEXPECTED_PDU, "what came is no association request")
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
        why = CALLED_UNKNOWN if wrong_called else CALLING_UNKNOWN
        raise _Refused.reject(why, "calling AE title is not allowed", calling)
    if str(request.called_ae_title).strip() != called:
        raise _Refused.reject(CALLED_UNKNOWN, "called AE title is another", calling)
    return pdu


def _decode(data: bytes) -> Any:
    """Raise `_Refused` for a request that pynetdicom could not negotiate."""
    from pynetdicom.pdu import A_ASSOCIATE_RQ

    try:
        pdu = A_ASSOCIATE_RQ()
        pdu.decode(data)
        contexts = pdu.to_primitive().presentation_context_definition_list
        whole = all(context.abstract_syntax and context.transfer_syntax for context in contexts)
    except Exception as exc:  # whatever a stranger's bytes lead to
        raise _Refused.abort(ABORT_INVALID_PARAMETER, "the association request is damaged") from exc
    if not contexts or not whole:
        raise _Refused.abort(
            ABORT_INVALID_PARAMETER, "a presentation context has no transfer syntax"
        )
    return pdu


def server_class(
    events: Events, aet: str, allow: tuple[str, ...], limits: Limits, tls: ssl.SSLContext | None
) -> Any:
    """pynetdicom's server, bounded."""
    from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

    most_pending = max(8, min(limits.pending, descriptors() // 4))

    class Handler(RequestHandler):  # type: ignore[misc]
        """Runs one association, from its request on, and leaves no thread and no descriptor
        behind.
        """

        def __init__(self, pdu: Any, connection: Any, client_address: Any, server: Any):
            self._pdu = pdu
            super().__init__(connection, client_address, server)

        def handle(self) -> None:
            association = self._create_association()
            association.dul.socket.recv = self._bounded(association)
            association.dul._recv_pdu.put(self._pdu)  # as if it had been read there,
            association.dul.event_queue.put("Evt6")  # after the connection's own event
            association.start()
            association.join()
            if (
                association.dul.is_alive()
            ):  # the association failed, and its connection's thread does not know
                abort_connections([association], abort=True)
                association.dul.join(ENDING)
                association.dul.kill_dul()

        def _bounded(self, association: Any) -> Any:
            """What replaces pynetdicom's `recv`: a PDU comes whole, within its time and length,
            or the connection ends.
            """
            connection, largest = self.request, max(limits.pdu, 6)

            def receive(count: int) -> bytearray:
                if count > largest:
                    abort_connections([association])
                    raise OSError("the PDU is longer than was agreed")
                with self.server.receiving.hold(connection):
                    data = read(connection, count)
                if len(data) < count:  # pynetdicom would keep our half open until it is collected
                    abort_connections([association])
                return data

            return receive

    class Server(BoundedServer, ThreadedAssociationServer):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any):
            self.receiving = PendingConnections(limits.associations + 1, limits.pdu_seconds)
            self._place_free, self.places_taken = threading.Condition(), 0
            pending = PendingConnections(most_pending, limits.request_seconds)
            super().__init__(*arguments, pending=pending, served=limits.associations, **options)

        def service_actions(self) -> None:
            super().service_actions()
            self.receiving.end_overdue()

        def finish_request(self, request: Any, client_address: Any) -> None:
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
            """One of the places for associations. Raises `_Refused` when all are taken."""
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
            events("broken", reason="a connection failed before it was an association")

    return Server
