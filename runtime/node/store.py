"""The C-STORE and C-ECHO service class provider (PS3.4 B, A), on pynetdicom: whom it talks to, what it takes, how much of it."""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InputError, OutputError, UsageError, importing
from ..io.dicom_files import RTSTRUCT, SEGMENTATION
from .events import Events, plain
from .spool import NoMatch, Spool

if TYPE_CHECKING:
    import socket

SUCCESS, OUT_OF_RESOURCES, NO_MATCH, CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xA900, 0xC000  # PS3.4 table B.2-1
IMAGES = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.128")  # CT, MR, PET: what contours lie on
LONGEST_REQUEST = 1 << 17  # bytes of a PDU that asks for an association, which comes before anyone is known
STRANGERS = 100  # connections that have not asked for an association: each may take HANDSHAKE to do so
LONGEST_COMMAND = 1 << 16  # bytes of a DIMSE command set
HANDSHAKE = 10.0  # s that a peer has for TLS, and for asking for an association
IDLE = 60.0  # s without a word after which an association is ended


@dataclass(frozen=True)
class Limits:
    """`associations` at once; `pdu`: bytes of a PDU that is received; `size`: bytes of an object."""

    associations: int = 10
    pdu: int = 1 << 17
    size: int = 256 << 20


def pynetdicom() -> Any:
    """The pynetdicom module, silent. Raises `MissingComponent` when it is not installed."""
    with importing("pynetdicom", "pynetdicom, which speaks DICOM over a network", 'pip install "mask2ct[node]"'):
        import pynetdicom
        import pynetdicom._config
    pynetdicom._config.LOG_HANDLER_LEVEL = "none"  # what it logs quotes data sets
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)
    return pynetdicom


def hang_up(associations: Sequence[Any], *, abort: bool = False) -> None:
    """End the connections of associations, also of those that are not established, whatever the peer does; with an A-ABORT before."""
    import socket

    if abort:
        for association in associations:
            association.abort(block=False)
        threading.Event().wait(0.1)  # what is on its way
    for association in associations:
        with suppress(OSError, AttributeError):  # it is closed already
            association.dul.socket.socket.shutdown(socket.SHUT_RDWR)


class Acceptor:
    """Listens until it is closed. `allow`: calling AE titles; empty means any. Raises `UsageError` when the port cannot be had."""

    def __init__(
        self, spool: Spool, events: Events, aet: str, address: tuple[str, int], allow: tuple[str, ...], limits: Limits, tls: ssl.SSLContext | None
    ):  # fmt: skip
        self._spool, self._events, self._allow, self._aet, self._limits = spool, events, allow, aet, limits
        self._cut: set[Any] = set()  # associations whose present object is larger than it may be
        evt, ae = pynetdicom().evt, _entity(aet)
        ae.maximum_associations, ae.maximum_pdu_size = limits.associations, limits.pdu
        ae.require_called_aet, ae.require_calling_aet = True, [*allow]
        ae.acse_timeout, ae.dimse_timeout, ae.network_timeout = HANDSHAKE, IDLE, IDLE
        _support(ae)
        handlers = [(evt.EVT_C_STORE, self._store), (evt.EVT_C_ECHO, self._echo), (evt.EVT_PDU_RECV, self._measure), (evt.EVT_ACCEPTED, self._accepted),
                    (evt.EVT_REJECTED, self._rejected), (evt.EVT_CONN_CLOSE, self._closed)]  # fmt: skip
        try:
            self._server = ae.make_server(address, evt_handlers=handlers, server_class=_server(events, limits, tls))
        except OSError as exc:
            raise UsageError(f"{address[0]} port {address[1]} cannot be had: {exc.strerror}", expected="an address of this machine and a free port",
                             remedy="choose another --port") from exc  # fmt: skip
        ae._servers.append(self._server)  # as `start_server` does: its shutdown takes itself out
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), daemon=True, name="acceptor")
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def listening(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Listen no more and end every association: what was not acknowledged its sender still has."""
        self._server.shutdown()
        hang_up(self._server.active_associations, abort=True)

    def _store(self, event: Any) -> int:
        request, association = event.request, event.assoc
        who = self._peer(association)
        if association in self._cut:
            self._cut.discard(association)
            return self._refuse(OUT_OF_RESOURCES, who, f"the object is larger than {self._limits.size} bytes")
        data = request.DataSet
        size = data.getbuffer().nbytes
        meta = event.file_meta

        def write(handle: Any) -> None:
            from pydicom.filewriter import write_file_meta_info

            handle.write(bytes(128) + b"DICM")
            write_file_meta_info(handle, meta)
            handle.write(data.getbuffer())

        try:
            claimed = (str(request.AffectedSOPClassUID), str(request.AffectedSOPInstanceUID))
            study = self._spool.receive(write, claimed, size, threading.current_thread())
        except NoMatch as exc:
            return self._refuse(NO_MATCH, who, exc.fact)
        except InputError as exc:
            return self._refuse(CANNOT_UNDERSTAND, who, exc.fact)
        except (OutputError, MemoryError) as exc:
            return self._refuse(OUT_OF_RESOURCES, who, getattr(exc, "fact", "out of memory"))
        except Exception as exc:  # a peer's data must not end the association without an answer
            return self._refuse(CANNOT_UNDERSTAND, who, type(exc).__name__)
        self._events("stored", peer=who, study=study, bytes=size)
        return SUCCESS

    def _refuse(self, status: int, who: str, reason: str) -> int:
        self._events("refused", peer=who, status=f"0x{status:04X}", reason=reason)
        return status

    def _echo(self, event: Any) -> int:
        self._events("echo", peer=self._peer(event.assoc))
        return SUCCESS

    def _measure(self, event: Any) -> None:
        """Before each PDU is taken in: an object beyond the limit is received to its end, since only then it can be answered, but not kept."""
        message, association = event.assoc.dimse.message, event.assoc
        if message is None:
            return
        if message.encoded_command_set.tell() > LONGEST_COMMAND:
            association.abort(block=False)
        elif message.data_set is not None and message.data_set.tell() > self._limits.size:
            self._cut.add(association)
        if association in self._cut and message.data_set is not None:
            message.data_set.seek(0)
            message.data_set.truncate()

    def _accepted(self, event: Any) -> None:
        """One line for the SOP classes that were offered in vain. A UID that is none of the standard's might be anything: it is not quoted."""
        from pydicom.uid import UID

        offered = {UID(context.abstract_syntax) for context in event.assoc.rejected_contexts}
        if offered:
            names = sorted(uid.name if uid.name != str(uid) else "unknown" for uid in offered)
            self._events("not-supported", peer=self._peer(event.assoc), classes=len(offered), such_as=names[0])

    def _rejected(self, event: Any) -> None:
        asked = event.assoc.requestor.primitive
        calling, called = str(asked.calling_ae_title).strip(), str(asked.called_ae_title).strip()
        known = not self._allow or calling in self._allow
        reason = (
            "calling AE title is not allowed"
            if not known
            else "too many associations"
            if called == self._aet
            else "called AE title is another"
        )
        self._events("rejected", calling=plain(calling), reason=reason)

    def _closed(self, event: Any) -> None:
        self._cut.discard(event.assoc)
        if not (event.assoc.is_released or event.assoc.is_rejected):
            self._events("broken", reason="the association ended without a release")

    def _peer(self, association: Any) -> str:
        """The calling AE title, where it is one of those allowed: a label of a counter must not be a stranger's choice."""
        title = str(association.requestor.ae_title).strip()
        return title if title in self._allow else "any"


def _support(ae: Any) -> None:
    from pydicom import uid

    plain_syntaxes = [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian]
    ae.add_supported_context("1.2.840.10008.1.1")  # Verification
    for sop_class in (*SEGMENTATION, RTSTRUCT):
        ae.add_supported_context(sop_class, [*plain_syntaxes, uid.RLELossless])
    compressed = [uid.RLELossless, uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless,
                  uid.JPEGLSNearLossless, uid.JPEG2000Lossless, uid.JPEG2000]  # fmt: skip
    for sop_class in IMAGES:  # only where their slices lie is read
        ae.add_supported_context(sop_class, [*plain_syntaxes, *compressed])


def _entity(aet: str) -> Any:
    """pynetdicom's application entity, whose limit here is of associations that were asked for: who only connects takes nobody's place."""

    class Entity(pynetdicom().AE):  # type: ignore[misc]
        @property
        def active_associations(self) -> list[Any]:
            ended = ("is_released", "is_aborted", "is_rejected")
            return [
                a for a in super().active_associations if a.requestor.primitive is not None and not any(getattr(a, how) for how in ended)
            ]

    return Entity(ae_title=aet)


def _server(events: Events, limits: Limits, tls: ssl.SSLContext | None) -> Any:
    """pynetdicom's server, which here does the TLS handshake in the connection's own thread, and bounds what a stranger may send."""
    from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

    class Handler(RequestHandler):  # type: ignore[misc]
        def _create_association(self) -> Any:
            association = super()._create_association()
            connection, largest = association.dul.socket, max(limits.pdu, LONGEST_REQUEST)
            receive = connection.recv

            def bounded(count: int) -> Any:
                if count > largest:
                    hang_up([association])
                    raise OSError("the PDU is longer than was agreed")
                found = receive(count)
                if len(found) < count:  # the peer has ended: pynetdicom would keep our half open until it is collected
                    hang_up([association])
                return found

            connection.recv = bounded
            return association

    class Server(ThreadedAssociationServer):  # type: ignore[misc]
        daemon_threads = True
        request_queue_size = 64

        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **{**options, "request_handler": Handler})

        def verify_request(self, request: socket.socket, client_address: Any) -> bool:
            return len(self.active_associations) < STRANGERS + limits.associations  # beyond, not even an answer

        def finish_request(self, request: Any, client_address: Any) -> None:
            request.settimeout(IDLE)
            if tls is not None:
                try:
                    request.settimeout(HANDSHAKE)
                    request = tls.wrap_socket(request, server_side=True)
                    request.settimeout(IDLE)
                except OSError as exc:  # ssl.SSLError, too
                    events("rejected", reason="TLS", detail=getattr(exc, "reason", None) or type(exc).__name__)
                    request.close()
                    return
            super().finish_request(request, client_address)

        def handle_error(self, request: Any, client_address: Any) -> None:
            events("broken", reason="a connection failed before it was an association")

    return Server
